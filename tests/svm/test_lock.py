"""How firmware and a hypervisor find, take and lock SVM: CPUID, EFER.SVME, VM_CR, SVM_KEY, VM_HSAVE_PA (APM2 15.4, 15.30, 15.31)."""

from __future__ import annotations

import pytest

from introspect.rules import SVM_FEATURES
from tests.engine.rig import Rig
from tests.svm.covers import covers
from vmdbg.platform.msrs import EFER, HWCR, SMM_CTL, SMM_KEY, SVM_KEY, VM_CR, VM_HSAVE_PA
from vmdbg.svm import world

SVME = 1 << 12
DPD, R_INIT, DIS_A20M, LOCK, SVMDIS = (1 << bit for bit in range(5))
GP = 13


def wrmsr(number: int, value: int) -> str:
    return f"movl ${number:#x}, %ecx; movl ${value & 0xFFFFFFFF:#x}, %eax; movl ${value >> 32:#x}, %edx; wrmsr"


def rdmsr(number: int) -> str:
    return f"movl ${number:#x}, %ecx; rdmsr"


def outcome(python: bool, *steps: str) -> int | None:
    """EAX at the end; None if something raised #GP."""
    rig = Rig("; ".join((*steps, "hlt")), python=python)
    rig.run()
    if rig.handled == GP:
        return None
    assert rig.handled is None
    return rig.reg(0)


def test_what_cpuid_claims(python: bool) -> None:
    rig = Rig("movl $0x8000000a, %eax; cpuid; hlt", python=python)
    rig.run()
    assert (rig.reg(0), rig.reg(3), rig.reg(2)) == (1, world.ASIDS, world.FEATURES)
    for absent in ("SSSCheck", "x2AVIC", "IbsVirt", "ROGPT"):
        assert not rig.reg(2) & SVM_FEATURES.fields[absent]
    rig = Rig("movl $0x8000001f, %eax; cpuid; hlt", python=python)
    rig.run()
    assert rig.reg(0) & 0x3F == 0  # no SEV


def test_svmdis_keeps_svme_from_being_set(python: bool) -> None:
    assert outcome(python, wrmsr(VM_CR, SVMDIS), rdmsr(EFER), f"orl ${SVME}, %eax; wrmsr") is None
    assert outcome(python, rdmsr(EFER), f"orl ${SVME}, %eax; wrmsr", rdmsr(EFER)) == 0xD00 | SVME


def test_svmdis_cannot_be_set_under_a_running_hypervisor(python: bool) -> None:
    enable = (rdmsr(EFER), f"orl ${SVME}, %eax; wrmsr")
    assert outcome(python, *enable, wrmsr(VM_CR, SVMDIS)) is None
    assert outcome(python, *enable, wrmsr(VM_CR, R_INIT), rdmsr(VM_CR)) == R_INIT


    locked = wrmsr(VM_CR, LOCK)
    assert outcome(python, locked, *enable, wrmsr(VM_CR, SVMDIS)) is None, "though the bit would not change (15.30.1)"


@pytest.mark.parametrize("lock", [0, LOCK])
def test_init_gives_svm_back_unless_it_is_locked(lock: int, python: bool) -> None:
    """INIT clears SVMDIS while LOCK is clear, and leaves the others (15.30.1)."""
    rig = Rig("; ".join((wrmsr(VM_CR, lock | SVMDIS | DIS_A20M), "jmp .")), python=python)
    rig.machine.run(100)
    rig.cpu.init()
    rig.machine.run(step=True)
    assert rig.cpu.msrs.values[VM_CR] == DIS_A20M | (lock | SVMDIS if lock else 0)


SMMLOCK = 1


def test_the_smm_key_unlocks(python: bool) -> None:
    """Writes to SMMLOCK are ignored once it is set; SMM_KEY, set before, clears it (15.32)."""
    key, lock = wrmsr(SMM_KEY, 0x123456789), wrmsr(HWCR, SMMLOCK)
    assert outcome(python, lock, wrmsr(HWCR, 1 << 10), rdmsr(HWCR), f"andl ${SMMLOCK | 1 << 10}, %eax") == SMMLOCK | 1 << 10
    assert outcome(python, key, lock, wrmsr(SMM_CTL, 1)) is None
    assert outcome(python, key, lock, key, wrmsr(SMM_CTL, 1), rdmsr(HWCR), f"andl ${SMMLOCK}, %eax") == 0
    assert outcome(python, key, lock, wrmsr(SMM_KEY, 1), rdmsr(HWCR), f"andl ${SMMLOCK}, %eax") == SMMLOCK
    assert outcome(python, lock, key, key, rdmsr(HWCR), f"andl ${SMMLOCK}, %eax") == SMMLOCK  # too late
    assert outcome(python, key, rdmsr(SMM_KEY)) == 0


def test_lock_freezes_lock_and_svmdis(python: bool) -> None:
    """The other bits stay writable; what may not change is ignored, not refused."""
    lock = wrmsr(VM_CR, LOCK | SVMDIS)
    assert outcome(python, lock, wrmsr(VM_CR, 0), rdmsr(VM_CR)) == LOCK | SVMDIS
    assert outcome(python, lock, wrmsr(VM_CR, DPD | R_INIT | DIS_A20M), rdmsr(VM_CR)) == 0x1F
    assert outcome(python, wrmsr(VM_CR, LOCK), wrmsr(VM_CR, SVMDIS), rdmsr(VM_CR)) == LOCK


@pytest.mark.parametrize("value", [1 << 5, 1 << 31, 1 << 32])
def test_reserved_bits_of_vm_cr(value: int, python: bool) -> None:
    assert outcome(python, wrmsr(VM_CR, value)) is None


@covers("SVML")
def test_the_key_unlocks(python: bool) -> None:
    """Set before the lock, written again after it (APM2 15.31)."""
    key, lock = wrmsr(SVM_KEY, 0x123456789), wrmsr(VM_CR, LOCK | SVMDIS)
    assert outcome(python, key, lock, key, rdmsr(VM_CR)) == SVMDIS
    assert outcome(python, key, lock, key, wrmsr(VM_CR, 0), rdmsr(VM_CR)) == 0
    assert outcome(python, key, lock, wrmsr(SVM_KEY, 0x123456788), rdmsr(VM_CR)) == LOCK | SVMDIS
    assert outcome(python, lock, key, key, rdmsr(VM_CR)) == LOCK | SVMDIS  # too late
    assert outcome(python, wrmsr(SVM_KEY, 0), lock, wrmsr(SVM_KEY, 0), rdmsr(VM_CR)) == LOCK | SVMDIS  # zero is no key
    assert outcome(python, key, rdmsr(SVM_KEY)) == 0


@pytest.mark.parametrize(("value", "fine"), [
    (0, True), (0x91000, True), (0xFFFFFFF000, True), (0x91001, False), (0x91800, False), (1 << 40, False), (1 << 63, False),
])  # fmt: skip
def test_the_host_save_area(value: int, fine: bool, python: bool) -> None:
    """A page below MAXPHYADDR (APM2 15.30.4)."""
    assert outcome(python, wrmsr(VM_HSAVE_PA, value), rdmsr(VM_HSAVE_PA)) == (value & 0xFFFFFFFF if fine else None)


@pytest.mark.parametrize("number", [VM_CR, VM_HSAVE_PA, SVM_KEY])
def test_privileged(number: int, python: bool) -> None:
    rig = Rig(rdmsr(number), python=python, user=True)
    rig.run()
    assert rig.handled == GP
