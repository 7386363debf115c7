"""A debugger is told which device stored to what it watches."""

from __future__ import annotations

from gdbstub.target import CONTINUE, BreakpointKind, Output, Stop, ThreadId
from tests.platform.pci.programs import PciRig
from vmdbg.debugger import Debugger
from vmdbg.watchpoints import Space


def test_dma_to_a_watched_address_names_the_device() -> None:
    rig = PciRig(
        "config_write 0x18, 4, 7; edu_dma 0x40000, 0x300100, 8, 3; edu_wait; 1: jmp 1b", "edu,slot=03.0"
    )
    debugger = Debugger(rig.machine)
    thread = ThreadId(1, 1)
    point = debugger.watchpoints.add(BreakpointKind.WRITE, Space.SPA, 0x300104, 2, 1, debugger.context(thread))
    rig.ram.write(0x300100, b"\xff" * 8)
    debugger.resume({thread: CONTINUE})
    events: list[Stop | Output] = []
    for _ in range(100):
        event = debugger.run_slice()
        if isinstance(event, Stop | Output):
            events.append(event)
            break
    assert isinstance(events[-1], Stop)
    assert events[-1].text.startswith(f"[{point} was written by edu 00:03.0")
    rig.machine.close()
