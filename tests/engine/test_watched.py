"""Watched pages: the engine stops before the access, at any address, physical address 0 included."""

from __future__ import annotations

import pytest

from tests.engine.rig import STACK, Rig
from vmdbg.engine.physical import WATCH_READ, WATCH_WRITE
from vmdbg.machine import Event


@pytest.mark.parametrize("address", [0, 4, 0x7000])
@pytest.mark.parametrize(("text", "flag"), [("movl %eax, {at}", WATCH_WRITE), ("movl {at}, %eax", WATCH_READ)])
def test_stops_before_the_access(address: int, text: str, flag: int, python: bool) -> None:
    rig = Rig("nop\naccess: " + text.format(at=f"{address:#x}") + "; hlt", "protected32", python=python)
    physical = rig.machine.engine.physical
    before = rig.ram.read_u32(address)
    rig.state.set_reg(0, before ^ 0xFFFF)
    physical.watch(address >> 12, flag, True)
    assert rig.machine.run() == Event.WATCHED
    assert rig.rip == rig.labels["access"]
    assert rig.ram.read_u32(address) == before
    assert rig.cpu.watched is not None
    assert rig.cpu.watched.watched == address
    physical.watch(address >> 12, flag, False)
    rig.run()
    assert rig.cpu.halted


@pytest.mark.parametrize("flag", [WATCH_WRITE, WATCH_READ])
def test_the_processors_own_stores_are_told(flag: int, python: bool) -> None:
    """The frame of an interrupt goes to a page of plain data that is watched."""
    rig = Rig("int $0x21", python=python)
    physical = rig.machine.engine.physical
    told: list[bool] = []
    physical.on_watched = lambda: told.append(True)
    rig.step()
    assert told == []
    rig.state.rip = rig.program.origin
    physical.watch((STACK - 8) >> 12, flag, True)
    rig.step()
    assert rig.handled == 0x21
    assert told
