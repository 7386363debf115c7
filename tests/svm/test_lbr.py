"""LBR virtualization: DebugCtl and the branch records of host and guest (APM2 15.23)."""

from __future__ import annotations

import pytest

from introspect.registers import DBGCTL, RFLAGS
from introspect.vmcb import MISC_CTL2
from tests.engine.rig import HANDLERS
from tests.svm.covers import covers
from tests.svm.hypervisor import HLT, HSAVE, VMMCALL, Hypervisor
from vmdbg.platform.msrs import (
    DEBUGCTL,
    LAST_BRANCH_FROM,
    LAST_BRANCH_TO,
    LAST_EXCEPTION_FROM,
    LAST_EXCEPTION_TO,
)

RECORDS = (LAST_BRANCH_FROM, LAST_BRANCH_TO, LAST_EXCEPTION_FROM, LAST_EXCEPTION_TO)
FIELDS = ("br_from", "br_to", "last_excp_from", "last_excp_to")
JUMPS = "nop\nat: jmp to\nnop\nto: vmmcall"


def guest(source: str, python: bool, *, virtual: bool = True, dbgctl: int = DBGCTL.LBR, host: str = "vmrun; hlt") -> Hypervisor:
    h = Hypervisor(source, python=python, host=host)
    h.set(misc_ctl2=MISC_CTL2.lbr_virt if virtual else 0, dbgctl=dbgctl)
    return h


def set_host(h: Hypervisor, dbgctl: int = 0) -> None:
    h.cpu.msrs.values |= {DEBUGCTL: dbgctl, **{number: 0x1110 + n for n, number in enumerate(RECORDS)}}


def hosts(h: Hypervisor) -> list[int]:
    return [h.cpu.msrs.values[number] for number in (DEBUGCTL, *RECORDS)]


@covers("LBRV")
def test_the_guests_branches_are_in_the_vmcb(python: bool) -> None:
    """And the host's records are as they were, its recording off or on."""
    h = guest(JUMPS, python)
    set_host(h)
    before = hosts(h)
    assert h.enter() == VMMCALL
    assert (h["br_from"], h["br_to"]) == (h.labels["at"], h.labels["to"])
    assert h["dbgctl"] == DBGCTL.LBR
    assert hosts(h) == before


def test_the_guest_reads_its_own(python: bool) -> None:
    for number, name in zip(RECORDS, FIELDS, strict=True):
        h = guest(f"movl ${number:#x}, %ecx; rdmsr; vmmcall", python, dbgctl=0)
        h.set(**{name: 0x2225})
        set_host(h, DBGCTL.LBR)
        assert h.enter() == VMMCALL
        assert h["rax"] == 0x2225
        assert hosts(h)[0] == DBGCTL.LBR


def test_a_guest_turns_it_on_for_itself(python: bool) -> None:
    h = guest("movl $0x1d9, %ecx; movl $1, %eax; xorl %edx, %edx; wrmsr; " + JUMPS, python, dbgctl=0)
    assert h.enter() == VMMCALL
    assert (h["dbgctl"], h["br_from"], h["br_to"]) == (1, h.labels["at"], h.labels["to"])
    assert hosts(h) == [0] * 5


def test_without_it_there_is_one_set(python: bool) -> None:
    """The VMCB's fields are neither read nor written; the host's recording goes on in the guest."""
    h = guest(JUMPS, python, virtual=False, dbgctl=0)
    h.set(br_from=0x77)
    set_host(h, DBGCTL.LBR)
    assert h.enter() == VMMCALL
    assert h["br_from"] == 0x77
    assert hosts(h)[:3] == [DBGCTL.LBR, h.labels["at"], h.labels["to"]]


def test_world_switches_are_no_branches(python: bool) -> None:
    h = guest("nop; vmmcall", python, host="at: jmp to\nnop\nto: vmrun; hlt")
    h.cpu.msrs.values[DEBUGCTL] = DBGCTL.LBR
    assert h.enter() == VMMCALL
    assert (h["br_from"], h["br_to"]) == (0, 0)
    assert hosts(h)[1:3] == [h.labels["host_at"], h.labels["host_to"]]


def test_exceptions_of_the_guest(python: bool) -> None:
    """One that the hypervisor intercepts is no transfer; one that the guest handles is."""
    h = guest("at: jmp to\nnop\nto: ud2", python)
    h.intercept(0x46)
    assert h.enter() == 0x46
    assert (h["br_to"], h["last_excp_to"]) == (h.labels["to"], 0)
    h.intercept(0x46, on=False)
    assert h.again() == HLT
    assert (h["last_excp_from"], h["last_excp_to"]) == (h.labels["at"], h.labels["to"])
    assert (h["br_from"], h["br_to"]) == (h.labels["to"], HANDLERS + 16 * 6)


def test_injected_events_are_recorded(python: bool) -> None:
    h = guest("nop", python)
    h.set(eventinj=1 << 31 | 0x40, br_from=0x1234, br_to=0x5678)
    assert h.enter() == HLT
    assert (h["last_excp_from"], h["last_excp_to"], h["br_to"]) == (0x1234, 0x5678, HANDLERS + 16 * 0x40)


def test_the_guest_steps_on_branches(python: bool) -> None:
    h = guest(f"nop; nop\n{JUMPS}", python, dbgctl=DBGCTL.BTF)
    h.intercept(0x41)
    h.set(rflags=2 | RFLAGS.TF)
    assert h.enter() == 0x41
    assert h["rip"] == h.labels["to"]


@pytest.mark.parametrize("virtual", [True, False])
def test_the_hosts_records_wait_in_its_save_area(virtual: bool, python: bool) -> None:
    h = guest("1: jmp 1b", python, virtual=virtual, dbgctl=0)
    set_host(h)
    h.machine.run(200)
    assert h.cpu.guest is not None
    assert h.ram.read_u64(HSAVE + 0x678) == (0x1110 if virtual else 0)


def test_reserved_bits_of_dbgctl_are_dropped(python: bool) -> None:
    h = guest("movl $0x1d9, %ecx; rdmsr; vmmcall", python, dbgctl=1 << 40 | 0x3C)
    assert h.enter() == VMMCALL
    assert (h["rax"], h["dbgctl"]) == (0x3C, 0x3C)
