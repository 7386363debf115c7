"""When a guest is gone: what the looks at its VMCB find."""

from __future__ import annotations

from introspect.exits import ExitCode
from tests.svm.hypervisor import VMMCALL, Hypervisor

VMRUN = int(ExitCode.VMRUN)


def _alive(h: Hypervisor) -> list[int]:
    return [number for number, guest in h.machine.history.guests.items() if not guest.gone]


def _look(h: Hypervisor, *, svm: bool = True) -> list[int]:
    h.machine.history.look(h.ram, svm)
    return _alive(h)


def _clear(h: Hypervisor) -> None:
    h.set(guest_asid=0)
    h.intercept(VMRUN, on=False)


def test_a_vmcb_that_could_run_is_kept(python: bool) -> None:
    h = Hypervisor("again: vmmcall; jmp again", python=python)
    assert h.enter() == VMMCALL
    assert _look(h) == _look(h) == [2]
    h.set(guest_asid=0)  # the intercept of VMRUN is set
    assert _look(h) == _look(h) == [2]
    _clear(h)
    h.set(guest_asid=1)
    assert _look(h) == _look(h) == [2]


def test_two_looks_without_a_run_between(python: bool) -> None:
    h = Hypervisor("again: vmmcall; jmp again", python=python)
    h.enter()
    _clear(h)
    assert _look(h) == [2]
    h.intercept(VMRUN)
    assert h.again(guest_asid=1) == VMMCALL
    _clear(h)
    assert _look(h) == [2]
    version = h.machine.history.version
    assert _look(h) == []
    assert h.machine.history.version > version
    h.intercept(VMRUN)
    assert h.again(guest_asid=1) == VMMCALL
    assert _look(h) == _look(h) == [3]


def test_without_svm_all_are_gone(python: bool) -> None:
    h = Hypervisor("vmmcall", python=python)
    h.enter()
    assert _look(h, svm=False) == [2]
    assert _look(h) == [2]
    assert _look(h, svm=False) == [2]
    assert _look(h, svm=False) == []


def test_one_vmcb_of_several_keeps_the_guest(python: bool) -> None:
    h = Hypervisor("again: vmmcall; jmp again", python=python)
    h.enter()
    history = h.machine.history
    other = h.ram.view[0xA0000:0xA1000]
    other[:] = h.view
    h.state.set_reg(0, 0xA0000)
    h.state.rip = h.program.origin
    h.cpu.halted = False
    h.run(100_000)
    assert list(history.guests[2].vcpus) == [0x90000, 0xA0000]
    _clear(h)
    assert _look(h) == _look(h) == [2]
    other[:] = bytes(0x1000)
    assert _look(h) == [2]
    assert _look(h) == []
