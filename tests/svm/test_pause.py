"""PAUSE: the intercept, its filter, and the filter's threshold (APM2 15.14.4)."""

from __future__ import annotations

import pytest

from introspect.exits import ExitCode
from tests.svm.covers import covers
from tests.svm.hypervisor import VMMCALL, Hypervisor

SPIN = "movl $100, %ecx\n1: incl %esi; pause; loop 1b; vmmcall"
"""ESI counts the PAUSEs."""


def spinning(python: bool, count: int, threshold: int = 0, source: str = SPIN) -> Hypervisor:
    h = Hypervisor(source, python=python)
    h.intercept(ExitCode.PAUSE)
    h.set(pause_filter_count=count, pause_filter_threshold=threshold)
    return h


def test_without_the_intercept_nothing_is_counted(python: bool) -> None:
    h = spinning(python, 5)
    h.intercept(ExitCode.PAUSE, on=False)
    assert h.enter() == VMMCALL


@covers("PauseFilter")
@pytest.mark.parametrize(("count", "spins"), [(0, 1), (1, 1), (2, 2), (30, 30), (100, 100)])
def test_the_last_of_so_many_exits(count: int, spins: int, python: bool) -> None:
    """A count of 0 is no filter: each PAUSE exits."""
    h = spinning(python, count)
    assert h.enter() == ExitCode.PAUSE
    assert h.reg(6) == spins
    assert h["nrip"] == h["rip"] + 2


def test_more_than_there_are(python: bool) -> None:
    assert spinning(python, 101).enter() == VMMCALL


def test_each_vmrun_loads_the_counter(python: bool) -> None:
    """The VMCB's field is not written: it is where the count begins again."""
    h = spinning(python, 10)
    for spins in (10, 20, 30):
        assert (h.enter() if spins == 10 else h.skip(2)) == ExitCode.PAUSE
        assert h.reg(6) == spins
        assert h["pause_filter_count"] == 10


def test_each_vmrun_in_c_does_too(python: bool) -> None:
    h = Hypervisor("1: incl %esi; pause; incl %edi; cpuid; jmp 1b", python=python, host="""
        movl $0x90000, %ebp
    1:  movq %rbp, %rax; clgi; vmrun; stgi; incl %r12d; cmpl $0x77, 0x70(%rbp); je 2f
        movq 0xc8(%rbp), %rcx; movq %rcx, 0x578(%rbp); decl %ebx; jnz 1b
    2:  hlt""")  # fmt: skip
    h.intercept(0x72, ExitCode.PAUSE)
    h.state.set_reg(3, 20)
    h.set(pause_filter_count=2)
    h.run()
    assert h["exitcode"] == 0x72  # one PAUSE in each round
    assert h.reg(12) == 20


@covers("PauseFilterThreshold")
@pytest.mark.parametrize(("threshold", "exits"), [(5, False), (6, True), (1000, True)])
def test_the_threshold_tells_loops_apart(threshold: int, exits: bool, python: bool) -> None:
    """PAUSEs that are further apart begin the count anew; those of this loop are 6 ticks apart."""
    h = spinning(python, 20, threshold)
    assert h.enter() == (ExitCode.PAUSE if exits else VMMCALL)


def test_the_first_of_a_loop_is_not_counted(python: bool) -> None:
    h = spinning(python, 20, 1000)
    assert h.enter() == ExitCode.PAUSE
    assert h.reg(6) == 22  # one that begins the loop, 20 down to zero, and the one below


def test_a_long_wait_between_loops(python: bool) -> None:
    h = spinning(python, 8, 100, """
        movl $3, %edx
    2:  movl $6, %ecx; 1: incl %esi; pause; loop 1b
        movl $200, %ecx; 3: loop 3b
        decl %edx; jnz 2b; vmmcall""")  # fmt: skip
    assert h.enter() == VMMCALL
    assert h.reg(6) == 18
