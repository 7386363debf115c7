"""Bridges: bus numbers, windows, interrupt pins, requester IDs, reset of a bus."""

from __future__ import annotations

import pytest

from introspect.pci import BRIDGE_CONTROL, COMMAND, windows
from tests.platform.pci.board import Board
from vmdbg.platform.pci.bus import Bridge
from vmdbg.platform.pci.catalogue import DeviceError

TREE = (
    "bridge,slot=02.0,id=a", "edu,bus=a", "edu,bus=a", "pci-bridge,slot=03.0,id=b", "edu,bus=b,slot=05.0",
    "pci-bridge,bus=b,slot=06.0,id=c", "edu,bus=c,slot=01.0",
)  # fmt: skip


def test_firmware_numbers_buses_depth_first() -> None:
    board = Board(*TREE)
    found = [f"{function.kind} {function.address}" for function in board.root.functions]
    assert found == [
        "host-bridge 00:00.0", "bridge 00:02.0", "edu 01:00.0", "edu 01:00.1", "pci-bridge 00:03.0", "edu 02:05.0",
        "pci-bridge 02:06.0", "edu 03:01.0",
    ]  # fmt: skip
    assert board.read("00:03.0", 0x18) & 0xFFFFFF == 0x030200
    for function in board.root.functions:
        assert board.root.find(function.address) is function
        if function.kind == "edu":
            assert board.bus.read_mmio(function.header_field("bar0"), 4) == 0x010000ED, "through every window"


def test_software_gives_other_bus_numbers() -> None:
    board = Board(*TREE)
    board.write("00:03.0", 0x18, 0x402000)
    board.write("20:06.0", 0x18, 0x343020)
    assert board.read("30:01.0", 0) == 0x11E81234
    assert str(board.function("edu", 3).address) == "30:01.0"
    assert board.read("03:01.0", 0) == 0xFFFFFFFF
    assert board.read("21:05.0", 0) == 0xFFFFFFFF, "a number within the bridge's that none below it has"
    board.write("00:03.0", 0x18, 0)
    assert board.read("30:01.0", 0) == 0xFFFFFFFF, "without numbers nothing is reached"


def test_windows_clip() -> None:
    board = Board("bridge,slot=02.0,id=a", "edu,bus=a")
    bar = board.function("edu").header_field("bar0")
    assert windows(board.function("bridge").config.bytes)["memory"] == (bar, bar + 0xFFFFF)
    board.write("00:02.0", 0x20, 0x0000FFF0)
    assert board.bus.read_mmio(bar, 4) == 0xFFFFFFFF, "closed"
    board.write("00:02.0", 0x24, bar >> 16 | (bar & 0xFFF00000))
    assert board.bus.read_mmio(bar, 4) == 0x010000ED, "the other window will do"
    board.command("00:02.0", 0, drop=COMMAND.MEMORY)
    assert board.bus.read_mmio(bar, 4) == 0xFFFFFFFF


def test_who_sends_behind_conventional_pci() -> None:
    """A root port passes IDs on; a bridge to conventional PCI sends under its own."""
    board = Board(*TREE)
    assert [str(function.requester) for function in board.root.functions if function.kind == "edu"] == [
        "01:00.0", "01:00.1", "00:03.0", "00:03.0",
    ]  # fmt: skip


def test_pins_are_swizzled() -> None:
    board = Board(*TREE)
    lines = []
    for function in (board.function("edu", n) for n in range(4)):
        function.set_intx(True)
        lines.append(board.chipset.ioapic.pins >> 16)
        function.set_intx(False)
    assert lines == [1 << 2, 1 << 2, 1 << (5 + 3) % 4, 1 << (1 + 6 + 3) % 4]


def test_a_reset_of_the_bus_resets_what_is_behind_it() -> None:
    board = Board(*TREE)
    board.command("03:01.0")
    board.write("00:03.0", 0x3E, BRIDGE_CONTROL.BUS_RESET, 2)
    board.write("00:03.0", 0x3E, 0, 2)
    assert board.read("02:05.0", 4, 2) == 0
    assert board.function("edu", 3).header_field("bar0") == 0
    assert board.function("edu", 0).header_field("bar0") != 0
    bridge = board.function("pci-bridge", 1)
    assert isinstance(bridge, Bridge)
    assert bridge.secondary.number == 0


@pytest.mark.parametrize(
    ("devices", "error"),
    [
        (["edu,slot=00.0"], "host-bridge is at 00.0 already"), (["edu,slot=03.0", "edu,slot=03.0"], "edu is at 03.0 already"),
        (["edu,bus=x"], "put --device bridge,id=x before it"), (["bridge,id=x", "bridge,id=x"], "choose another"),
        (["bridge,id=x", "edu,bus=x,slot=01.0"], "below the root port"), (["edu"] * 40, "no free slot"),
        (["bridge,id=x", "bridge,bus=x"], "on the root bus"), (["edu"] * 201, "too many"), (["frob"], "choose from edu"),
        (["edu,slot=xx"], "not DEVICE.FUNCTION"), (["edu,slot=00:03.0"], "not DEVICE.FUNCTION"), (["edu,slot"], "KEY=VALUE"),
        (["edu,x=1"], "no option 'x'"), (["edu,dma-mask=3"], "from 12 to 64"), (["edu,dma-mask=y"], "from 12 to 64"),
        (["edu,express=perhaps"], "neither on nor off"), (["edu,slot=03.0,slot=03.0"], "each key once"),
    ],
)  # fmt: skip
def test_what_cannot_be_built_says_why(devices: list[str], error: str) -> None:
    with pytest.raises(DeviceError, match=error):
        Board(*devices)


def test_a_full_machine() -> None:
    """All slots, and eight functions behind a root port."""
    board = Board("bridge,slot=01.0,id=a", *["edu,bus=a"] * 8, *["edu"] * 27)
    assert len(board.root.functions) == 1 + 1 + 8 + 27
    assert board.read("01:00.7", 0) == 0x11E81234
    assert board.read("00:14.0", 0) == board.read("00:18.0", 0) == 0xFFFFFFFF, "kept for others"
