"""A guest that a debugger holds: nothing of it is executed, and only what leaves it is taken."""

from __future__ import annotations

import pytest

from introspect.vmcb import V_INTR
from tests.engine.interrupts import IF, interrupt
from tests.svm.hypervisor import HLT, Hypervisor
from vmdbg.cpu.core import Hold
from vmdbg.machine import Event

INTR, NMI_EXIT, SMI_EXIT, INIT_EXIT, VINTR = range(0x60, 0x65)
LOOP = "sti; again: incl %eax; jmp again"


def held(python: bool, *intercepts: int, hold: Hold = Hold.WAITS, **fields: int) -> Hypervisor:
    """A guest that has executed a little, and is held."""
    h = Hypervisor(LOOP, python=python)
    h.state.rflags |= IF
    h.intercept(*intercepts)
    h.set(rflags=IF | 2, **fields)
    h.machine.run(1000)
    assert h.cpu.guest is not None
    h.cpu.hold = hold
    return h


def stands(h: Hypervisor) -> bool:
    """Whether no time executes any of the guest."""
    before = h.state.rip, h.state.reg(0), h.state.rflags
    event = h.machine.run(1_000_000)
    assert event in (Event.IDLE, Event.SLICE)
    return h.cpu.guest is not None and (h.state.rip, h.state.reg(0), h.state.rflags) == before


def test_nothing_is_executed_until_it_is_let_go(python: bool) -> None:
    h = held(python)
    assert stands(h)
    count = h.state.reg(0)
    h.cpu.hold = Hold.NO
    h.machine.run(1000)
    assert h.state.reg(0) > count


@pytest.mark.parametrize("masking", [False, True])
def test_an_intercepted_interrupt_gives_the_hypervisor_its_cpu(masking: bool, python: bool) -> None:
    h = held(python, INTR, v_intr=V_INTR.v_intr_masking if masking else 0)
    rip = h.state.rip
    interrupt(h, 0x40)
    h.cpu.hold = Hold.STANDS  # with its hypervisor
    assert stands(h)
    h.cpu.hold = Hold.WAITS
    h.machine.run(1_000_000)
    assert h.cpu.guest is None
    assert (h["exitcode"], h["rip"]) == (INTR, rip)


@pytest.mark.parametrize("event", [NMI_EXIT, SMI_EXIT, INIT_EXIT])
def test_other_intercepted_events_too(event: int, python: bool) -> None:
    h = held(python, event)
    {NMI_EXIT: h.cpu.nmi, SMI_EXIT: h.cpu.smi, INIT_EXIT: h.cpu.init}[event]()
    h.machine.run(1_000_000)
    assert (h.cpu.guest, h["exitcode"]) == (None, event)


def test_what_the_guest_would_handle_waits_for_it(python: bool) -> None:
    """And holds nothing back that leaves it, though it is more urgent."""
    h = held(python, INTR)
    h.guest_handler(2, "hlt")
    h.cpu.nmi()  # not intercepted
    assert stands(h)
    interrupt(h, 0x40)
    h.machine.run(1_000_000)
    assert h["exitcode"] == INTR
    h = held(python)
    interrupt(h, 0x40)
    assert stands(h)
    h.cpu.hold = Hold.NO
    h.machine.run(100_000)
    assert (h["exitcode"], h.guest_vector) == (HLT, 0x40)


@pytest.mark.parametrize("intercepted", [False, True])
def test_virtual_interrupts(intercepted: bool, python: bool) -> None:
    """Requested while it is held, as by a debugger that writes the field."""
    h = held(python, *([VINTR] if intercepted else []))
    assert h.cpu.guest is not None
    h.cpu.guest.v_intr |= V_INTR.v_irq | V_INTR.v_ign_tpr | 0x55 << 32
    if intercepted:
        h.machine.run(1_000_000)
        assert h["exitcode"] == VINTR
    else:
        assert stands(h)
