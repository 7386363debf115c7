"""Breakpoints of the engine leave no trace in the guest, neither while they are there nor when they go."""

from __future__ import annotations

import pytest

from tests.engine.rig import CODE, A, Rig
from vmdbg.engine.engine import MOST_IDLE
from vmdbg.machine import Event


@pytest.mark.parametrize("how", ["breakpoint", "range"])
def test_what_is_taken_out_is_not_accessed(how: str, python: bool) -> None:
    """The engine translates a hook's address when it takes it out: not by the tables of whoever has executed last."""
    rig = Rig("movl $0x9000, %ebx; jmp *%ebx", "legacy", python=python)
    rig.ram.write(0x9000, b"\xeb\xfe")
    engine = rig.machine.engine
    if how == "range":
        engine.arm_ranges({(CODE, CODE + 1)})
    else:
        engine.arm({CODE})
    assert rig.machine.run(breakpoints=True) == Event.BREAKPOINT
    rig.step(2)
    assert rig.ram.read_u32(rig.entry(CODE)) & A
    rig.change(CODE, drop=A)  # as in another guest's tables, which maps the page and never executes it
    rig.machine.run(100)
    engine.arm(set())
    engine.arm_ranges(set())
    engine.rt.idle = MOST_IDLE
    rig.machine.run(100)
    assert not rig.ram.read_u32(rig.entry(CODE)) & A


@pytest.mark.parametrize("how", ["breakpoint", "range"])
def test_what_is_taken_out_stops_no_more(how: str, python: bool) -> None:
    rig = Rig("again: inc %ebx; jmp again", "long", python=python)
    engine = rig.machine.engine
    for _ in range(3):
        if how == "range":
            engine.arm_ranges({(CODE, CODE + 1)})
        else:
            engine.arm({CODE})
        assert rig.machine.run(breakpoints=True) == Event.BREAKPOINT
        engine.arm(set())
        engine.arm_ranges(set())
        engine.rt.idle = MOST_IDLE
        assert rig.machine.run(100, breakpoints=True) == Event.SLICE
