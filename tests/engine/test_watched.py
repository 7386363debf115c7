"""Watched pages: the engine stops before the access, at any address, physical address 0 included."""

from __future__ import annotations

import pytest

from tests.engine.ports import PORT, Ports
from tests.engine.rig import DATA, HANDLERS, STACK, Rig
from tests.svm.hypervisor import GUEST, IOPM, Hypervisor
from vmdbg.engine.physical import WATCH_READ, WATCH_WRITE
from vmdbg.engine.state import RCX, RDI, RDX, RSI, RSP
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
    told: list[tuple[int, int, bool]] = []
    physical.on_watched = lambda spa, size, write: told.append((spa, size, write))
    rig.step()
    assert told == []
    rig.state.rip = rig.program.origin
    rig.state.set_reg(RSP, STACK)
    physical.watch((STACK - 8) >> 12, flag, True)
    rig.step()
    assert rig.handled == 0x21
    assert all(write and spa >= STACK - 40 and spa + size <= STACK for spa, size, write in told)
    assert sum(size for _, size, _ in told) == 40


@pytest.mark.parametrize(("text", "flag"), [("insb", WATCH_WRITE), ("rep insb", WATCH_WRITE), ("insw", WATCH_READ),
                                            ("outsb", WATCH_READ), ("rep outsl", WATCH_READ)])  # fmt: skip
def test_stops_before_string_input_and_output(text: str, flag: int, python: bool) -> None:
    """And not for a page that is watched for stores only while it is read; the port has not been asked then."""
    rig = Rig(f"nop\naccess: {text}\nnop", python=python)
    ports = Ports(rig.machine.bus)
    physical = rig.machine.engine.physical
    before = rig.ram.read(DATA, 16)
    for register, value in ((RDX, PORT), (RCX, 1), (RSI, DATA), (RDI, DATA)):
        rig.state.set_reg(register, value)
    physical.watch(DATA >> 12, flag, True)
    assert rig.machine.run() == Event.WATCHED
    assert (rig.rip, rig.now) == (rig.labels["access"], 1)
    assert rig.cpu.watched is not None
    assert (rig.cpu.watched.watched, rig.cpu.watched.write) == (DATA, "ins" in text)
    assert (rig.ram.read(DATA, 16), ports.log) == (before, [])
    physical.watch(DATA >> 12, flag, False)
    if "out" in text:
        physical.watch(DATA >> 12, WATCH_WRITE, True)
    assert rig.machine.run(step=True) != Event.WATCHED
    assert len(ports.log) == 1


def test_an_intercepted_input_accesses_nothing(python: bool) -> None:
    h = Hypervisor("insb", python=python)
    h.intercept(0x7B)
    h.ram.write(IOPM, b"\xff" * 0x3000)
    h.state.set_reg(RDI, DATA)
    h.machine.engine.physical.watch(GUEST + DATA >> 12, WATCH_READ, True)
    assert h.enter() == 0x7B


def test_stops_before_an_iret_that_an_nmi_waits_for(python: bool) -> None:
    """The engine executes it after it has stopped for it once: that it then stops again for the page is told."""
    rig = Rig("nop; nop", python=python)
    rig.handler(2, "nop; iretq")
    rig.cpu.nmi()
    rig.step(2)
    rig.cpu.nmi()
    rig.machine.engine.physical.watch((STACK - 8) >> 12, WATCH_READ, True)
    assert rig.machine.run(1000) == Event.WATCHED
    assert (rig.rip, rig.state.nmi_blocked) == (HANDLERS + 0x21, True)
    assert rig.machine.run(step=True) == Event.WATCHED
    rig.machine.engine.physical.watch((STACK - 8) >> 12, WATCH_READ, False)
    rig.handler(2, "hlt")
    rig.run(1000)
    assert rig.handled == 2
