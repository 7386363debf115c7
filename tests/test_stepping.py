"""What VMRUN means to a step of the vCPU it enters."""

from __future__ import annotations

from gdbstub.target import Action, ThreadId
from vmdbg.cpu.faults import Kind
from vmdbg.stepping import Place, Stepping

THERE, NEXT, HANDLER = Place(0x1000, 0x8000), Place(0x1002, 0x8000), Place(0x5000, 0x7FD8)


def stepping(start: int = 0, end: int = 0) -> Stepping:
    return Stepping(ThreadId(2, 1), Action(step=True, start=start, end=end), THERE)


def test_an_instruction_that_faulted_in_the_nested_table_is_still_to_come() -> None:
    step = stepping()
    step.entered(THERE, None)
    assert (step.executed, step.back) == (False, None)
    assert not step.ends_at(THERE.pc)


def test_an_instruction_that_the_hypervisor_carried_out_is_done() -> None:
    step = stepping()
    step.entered(NEXT, None)
    assert step.ends_at(NEXT.pc)


def test_an_injected_interrupt_is_passed_over() -> None:
    for kind in (Kind.INTR, Kind.NMI):
        step = stepping()
        step.entered(THERE, kind)
        assert (step.executed, step.back) == (False, THERE)
        step.entered(HANDLER, Kind.INTR)  # a #VMEXIT in the handler
        assert (step.executed, step.back) == (False, THERE)
        step = stepping()
        step.entered(NEXT, kind)
        assert (step.executed, step.back) == (True, NEXT)


def test_an_injected_interrupt_is_stepped_into_if_the_user_wants_that() -> None:
    for kind in (Kind.INTR, Kind.NMI):
        step = stepping()
        step.entered(THERE, kind, into_handlers=True)
        assert (step.executed, step.back) == (True, None)


def test_an_injected_exception_is_what_became_of_the_instruction() -> None:
    step = stepping()
    step.entered(THERE, Kind.EXCEPTION)
    assert (step.executed, step.back) == (True, None)


def test_a_range_ends_outside() -> None:
    step = stepping(0x1000, 0x1010)
    step.executed = True
    assert not step.ends_at(0x1000)
    assert not step.ends_at(0x100F)
    assert step.ends_at(0x1010)
