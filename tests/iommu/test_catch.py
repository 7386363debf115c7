"""`catch dma`, `catch iommu-fault` and watchpoints: what a device does, seen behind the translation, by name."""

from __future__ import annotations

import pytest

from gdbstub.target import CONTINUE, BreakpointKind, Exited, Stop, TargetError, ThreadId
from introspect.iommu.registers import CONTROL, REGISTERS, RING_BASE
from introspect.iommu.structures import DTE, PTE, encode_dte
from introspect.pci import ATS_CONTROL, RequesterId
from tests.engine.rig import Rig
from tests.iommu.rig import DEVICE_TABLE, EVENTS_AT, ON, TABLES
from tests.platform.pci.programs import MACROS
from vmdbg.debugger import Debugger
from vmdbg.iommu.config import IommuConfig
from vmdbg.iommu.translator import BASE
from vmdbg.watchpoints import Space

HOST = ThreadId(1, 1)
TARGET = 0x300000
PROGRAM = (
    MACROS + "config_write 0x18, 4, 7; edu_dma 0x40000, 0x10100, 8, 3; edu_wait; edu_dma 0x40000, 0x11000, 8, 3; edu_wait; "
    "edu_dma 0x10000, 0x40000, 4, 1; edu_wait; 1: hlt; jmp 1b"
)


def debugger() -> Debugger:
    """A machine whose edu writes where it is mapped, where it is not, and reads."""
    return prepared(Rig(PROGRAM, devices=("edu,slot=03.0",), iommu=IommuConfig()))


def prepared(rig: Rig) -> Debugger:
    """Tables in memory, and the IOMMU on."""
    ram, bus = rig.ram, rig.machine.bus
    root = TABLES
    ram.write_u64(root + 0x10 * 8, TARGET | PTE.make(PR=1) | PTE.IR | PTE.IW)
    entry = DTE.make(V=1, TV=1, Mode=1, PageTableRoot=root >> 12, IR=1, IW=1, DomainID=9)
    ram.write(DEVICE_TABLE + RequesterId.make(0, 3, 0) * 32, encode_dte(entry))
    for name, value in (
        ("device_table_base", DEVICE_TABLE | 0x1FF), ("event_base", EVENTS_AT | RING_BASE.make(Length=8)),
        ("control", ON & ~CONTROL.CmdBufEn),
    ):  # fmt: skip
        bus.write_mmio(BASE + REGISTERS[name].offset, 8, value)
    return Debugger(rig.machine)


def stops(made: Debugger, *lines: str) -> list[str]:
    """What it stops for until the program waits for ever."""
    for line in lines:
        made.monitor(line, str, HOST)
    found = []
    made.resume({HOST: CONTINUE})
    for _ in range(60):
        event = made.run_slice()
        if isinstance(event, Stop):
            found.append(event.text.strip("[]"))
            made.resume({HOST: CONTINUE})
        elif isinstance(event, Exited):
            break
    made.machine.close()
    return found


def test_catch_dma() -> None:
    assert stops(debugger(), "catch dma") == [
        "catchpoint 1: write of 0x8 bytes at 0x10100 by edu 00:03.0",
        "catchpoint 1: write of 0x8 bytes at 0x11000 by edu 00:03.0, refused: IO_PAGE_FAULT: PR is 0",
        "catchpoint 1: read of 0x4 bytes at 0x10000 by edu 00:03.0",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("line", "count"),
    [
        ("catch dma 00:03.0", 3), ("catch dma 00:04.0", 0), ("catch dma r", 1), ("catch dma 00:03.0 w", 2), ("tcatch dma", 1),
        ("catch dma if refused", 1), ("catch dma if iova >= 0x10100 && iova < 0x10108 && length == 8", 1),
        ("catch dma 00:02.0-00:03.7 if requester == 0x18", 3), ("catch iommu-fault", 1), ("catch iommu-fault r", 0),
        ("catch iommu-fault if domain == 9 && event == 2 && !interrupt", 1), ("catch dma guest 2", 0),
    ],
)  # fmt: skip
def test_which(line: str, count: int) -> None:
    assert len(stops(debugger(), line)) == count


def test_catch_iommu_fault() -> None:
    (text,) = stops(debugger(), "catch iommu-fault 00:03.0")
    assert text == "catchpoint 1: IO_PAGE_FAULT of edu 00:03.0 at 0x11000: PR is 0"


def test_the_list_names_devices() -> None:
    made = debugger()
    said: list[str] = []
    made.monitor("catch dma 00:03.0 w", said.append, HOST)
    assert "dma 00:03.0 w" in "".join(said)
    with pytest.raises(TargetError, match=r"00:03\.0"):
        made.monitor("catch dma nobody", str, HOST)
    made.machine.close()


def test_stop_on_stale() -> None:
    """A translation that the program uses once more after the tables have changed."""
    rig = Rig(PROGRAM, devices=("edu,slot=03.0",), iommu=IommuConfig(strict=True))
    made = prepared(rig)
    made.monitor("catch once dma r", str, HOST)
    made.resume({HOST: CONTINUE})
    while not isinstance(made.run_slice(), Stop):
        pass
    rig.ram.write_u64(TABLES + 0x10 * 8, 0)
    rig.machine.chipset.dma.write(RequesterId.make(0, 3, 0), 0x10000, b"x")
    assert "INVALIDATE_IOMMU_PAGES was forgotten" in rig.machine.history.notices[-1]
    rig.machine.close()


def test_a_watchpoint_behind_the_translation() -> None:
    made = debugger()
    point = made.watchpoints.add(BreakpointKind.WRITE, Space.SPA, TARGET + 0x104, 2, 1, made.context(HOST))
    made.machine.ram.write(TARGET + 0x100, b"\xff" * 8)
    assert stops(made)[0].startswith(f"{point} was written by edu 00:03.0")


def test_a_watchpoint_on_the_log_names_the_iommu() -> None:
    made = debugger()
    point = made.watchpoints.add(BreakpointKind.WRITE, Space.SPA, EVENTS_AT, 4, 1, made.context(HOST))
    assert stops(made)[0].startswith(f"{point} was written by iommu 00:00.2")


def test_what_a_device_says_of_its_addresses() -> None:
    """A device with ATS: its own address is what is told, and that it has translated it."""
    rig = Rig(PROGRAM, devices=("edu,slot=03.0,ats=on",), iommu=IommuConfig())
    made = prepared(rig)
    at, device = DEVICE_TABLE + RequesterId.make(0, 3, 0) * 32, RequesterId.make(0, 3, 0)
    entry = int.from_bytes(rig.ram.read(at, 32), "little") | DTE.I
    rig.ram.write(at, encode_dte(entry))
    rig.machine.chipset.root.write_config(device, 0x106, 2, ATS_CONTROL.ENABLE)
    assert stops(made, "catch dma if translated && iova < 0x10800 && pasid == 0") == []
    made = prepared(rig2 := Rig(PROGRAM, devices=("edu,slot=03.0,ats=on",), iommu=IommuConfig()))
    rig2.ram.write(at, encode_dte(entry))
    rig2.machine.chipset.root.write_config(device, 0x106, 2, ATS_CONTROL.ENABLE)
    assert stops(made, "catch dma 00:03.0 w if translated") == [
        "catchpoint 1: write of 0x8 bytes at 0x10100 by edu 00:03.0, which has translated it"
    ]
