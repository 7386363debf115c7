"""A debugger is told which device stored to what it watches."""

from __future__ import annotations

from gdbstub.target import CONTINUE, BreakpointKind, Stop, ThreadId
from tests.platform.pci.programs import PciRig
from vmdbg.debugger import Debugger
from vmdbg.watchpoints import Space

POLLED = """config_write 0x18, 4, 7
    edu_dma 0x300000, 0x40000, 8, 1; edu_wait
    edu_dma 0x40000, 0x300100, 8, 3; edu_wait
    poke bar+0x88, 0xd0000000; poke bar+0x98, 3; edu_wait
    1: jmp 1b"""
THREAD = ThreadId(1, 1)


def stops(debugger: Debugger, count: int) -> list[str]:
    """What the next stops say, resumed after each."""
    found: list[str] = []
    for _ in range(count):
        debugger.resume({THREAD: CONTINUE})
        for _ in range(200):
            event = debugger.run_slice()
            if isinstance(event, Stop):
                found.append(event.text)
                break
    return found


def test_dma_to_a_watched_address_names_the_device() -> None:
    rig = PciRig(POLLED, "edu,slot=03.0")
    debugger = Debugger(rig.machine)
    point = debugger.watchpoints.add(BreakpointKind.WRITE, Space.SPA, 0x300104, 2, 1, debugger.context(THREAD))
    rig.ram.write(0x300100, b"\xff" * 8)
    assert stops(debugger, 1)[0].startswith(f"[{point} was written by edu 00:03.0")
    rig.machine.close()


def test_catch_dma() -> None:
    rig = PciRig(POLLED, "edu,slot=03.0,dma-mask=32")
    debugger = Debugger(rig.machine)
    for line in ("catch dma 00:03.0", "catch dma w if iova == 0x300100 && requester == 0x18", "catch dma 05:00.0 w"):
        debugger.monitor(line, str, THREAD)
    found = stops(debugger, 3)
    assert found[0] == "catchpoint 1: read of 0x8 bytes at 0x300000 by edu 00:03.0"
    assert found[1] == "catchpoint 1, catchpoint 2: write of 0x8 bytes at 0x300100 by edu 00:03.0"
    assert found[2] == "catchpoint 1: write of 0x8 bytes at 0xd0000000 by edu 00:03.0, refused: no memory at 0xd0000000"
    said: list[str] = []
    debugger.monitor("catch delete all", said.append, THREAD)
    assert not rig.machine.chipset.dma.listeners
    assert "dma 00:03.0" not in "".join(said)
    rig.machine.close()


def test_a_machine_that_sleeps_stops_where_the_transfer_was() -> None:
    """No CPU executes when it happens: the stop comes then all the same, at its guest time."""
    times = []
    for line in ("catch dma", ""):
        rig = PciRig("config_write 0x18, 4, 7; edu_dma 0x40000, 0x300100, 8, 3; cli; hlt", "edu,slot=03.0")
        debugger = Debugger(rig.machine)
        if line:
            debugger.monitor(line, str, THREAD)
        else:
            debugger.watchpoints.add(BreakpointKind.WRITE, Space.SPA, 0x300100, 8, 1, debugger.context(THREAD))
            rig.ram.write(0x300100, b"\xff" * 8)
        assert len(stops(debugger, 1)) == 1
        times.append(rig.now)
        rig.machine.close()
    assert times[0] == times[1] < 1_000_000
