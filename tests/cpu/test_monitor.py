"""MONITOR and MWAIT: what they refuse, what they wait for."""

from __future__ import annotations

import pytest

from tests.engine.rig import CODE, DATA, Mode, Rig
from tests.engine.test_smp import AP, BOOT, finish, machine
from vmdbg.engine.state import DS, RAX, RCX
from vmdbg.machine import QUANTUM, Event
from vmdbg.platform.msrs import HWCR

UD, GP, PF = 6, 13, 14
WAIT = f"movl ${DATA}, %eax; monitor; mwait\nbehind: nop"


def at(rig: Rig) -> int:
    return rig.labels["behind"]


@pytest.mark.parametrize("mode", ["real", "protected32", "long"])
def test_waits_for_an_interrupt(mode: Mode, python: bool) -> None:
    text = WAIT.replace(f"{DATA}", "0x3000") if mode == "real" else WAIT
    rig = Rig(text, mode, python=python)
    rig.state.rflags |= 0x200
    rig.step(3)
    assert (rig.cpu.halted, rig.rip) == (True, at(rig))
    assert rig.machine.run(1000) == Event.IDLE
    rig.cpu.nmi()
    rig.step()
    assert (rig.cpu.halted, rig.handled) == (False, 2)


@pytest.mark.parametrize("offset", [0, 63])
def test_a_store_ends_it(offset: int, python: bool) -> None:
    """To any byte of the line, here by a device or a debugger; no interrupt has to be enabled."""
    rig = Rig(WAIT, python=python)
    rig.step(3)
    assert not rig.cpu.runnable
    rig.ram.write(DATA + 64, b"\1")
    assert not rig.cpu.runnable
    rig.ram.write(DATA + offset, b"\1")
    assert rig.cpu.runnable
    rig.step()
    assert (rig.cpu.halted, rig.rip) == (False, at(rig) + 1)


@pytest.mark.parametrize("text", ["mwait", f"movl ${DATA}, %eax; monitor; incl (%rax); mwait",
                                  f"movl ${DATA}, %eax; monitor; int $0x80; mwait", "movl $0xfee00000, %eax; monitor; mwait"])  # fmt: skip
def test_does_not_wait(text: str, python: bool) -> None:
    """Where nothing is armed, where the store has been made, behind a far transfer, and on what is not memory."""
    rig = Rig(f"{text}\nbehind: cli; hlt", python=python)
    rig.handler(0x80, "iretq")
    rig.run()
    assert rig.rip == at(rig) + 2


def test_hlt_does_not_wait_for_the_line(python: bool) -> None:
    rig = Rig(f"movl ${DATA}, %eax; monitor; hlt", python=python)
    rig.step(3)
    rig.ram.write(DATA, b"\1")
    assert not rig.cpu.runnable


@pytest.mark.parametrize("text", ["monitor", "mwait"])
def test_refused(text: str, python: bool) -> None:
    """Extensions, of which CPUID claims none; users, unless HWCR lets them; anybody where HWCR takes them away."""
    for user, hwcr, ecx, vector in (
        (False, 0, 1, GP), (False, 1 << 9, 0, UD), (True, 0, 0, UD), (True, 1 << 10, 0, None), (True, 1 << 10, 1, GP),
        (True, 3 << 9, 0, UD),
    ):  # fmt: skip
        rig = Rig(f"{text}; nop", user=user, python=python)
        rig.cpu.msrs.values[HWCR] |= hwcr
        rig.state.set_reg(RAX, DATA)
        rig.state.set_reg(RCX, ecx)
        rig.step()
        assert rig.handled == vector
        assert vector or rig.rip == CODE + 3


def test_the_address(python: bool) -> None:
    """MONITOR reads: segment, limit, canonical form, page; the address size counts."""
    rig = Rig("movabsq $0x800000000000, %rax; monitor", python=python)
    rig.step(2)
    assert rig.handled == GP
    rig = Rig("monitor", "protected32", python=python)
    rig.state.set_segment(DS, 0x10, 0, 0xFFF, 0x493)
    rig.state.set_reg(RAX, 0x1000)
    rig.step()
    assert rig.handled == GP
    rig = Rig("movl $0x300000, %eax; monitor", python=python)
    rig.change(0x300000, drop=1)
    rig.step(2)
    assert (rig.handled, rig.state.cr(2)) == (PF, 0x300000)
    rig = Rig(f"movabsq $0x1{DATA:08x}, %rax; addr32 monitor; mwait", python=python)
    rig.step(3)
    assert rig.cpu.halted
    rig.ram.write(DATA, b"\1")
    assert rig.cpu.runnable


def test_an_smi_ends_it(python: bool) -> None:
    """RSM restarts HLT only (APM2 10.3.5)."""
    rig = Rig(WAIT, python=python)
    rig.step(3)
    rig.cpu.smi()
    rig.step(2)
    assert (rig.cpu.smm, rig.cpu.halted, rig.rip) == (None, False, at(rig))


PING_PONG = f"""{BOOT}
    movl $0x600000, %eax; xorl %edi, %edi
    1: incl %edi; movl %edi, (%rax)                                     # a number to the other one, and wait for it to come back
    2: xorl %ecx, %ecx; leaq 64(%rax), %rax; monitor; cmpl %edi, (%rax); je 3f; mwait; leaq -64(%rax), %rax; jmp 2b
    3: leaq -64(%rax), %rax; cmpl $100, %edi; jb 1b
    movl %edi, %eax; outl %eax, $0xf4; hlt
{AP}
    movl $0x600000, %eax; xorl %edi, %edi; cli
    1: xorl %ecx, %ecx; monitor; cmpl %edi, (%rax); jne 2f; mwait; jmp 1b
    2: movl (%rax), %edi; movl %edi, 64(%rax); jmp 1b"""


def test_two_processors_wait_for_each_other(python: bool) -> None:
    """Neither takes time while it waits: a hundred rounds are over long before the first turn would be."""
    m = machine(PING_PONG, 2, python)
    assert finish(m) == 100
    assert m.clock.now < QUANTUM
    again = machine(PING_PONG, 2, not python)
    assert finish(again) == 100
    assert again.clock.now == m.clock.now
