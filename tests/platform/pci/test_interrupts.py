"""MSI, MSI-X and interrupt pins of functions."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from introspect.pci import COMMAND, MSIX_CONTROL, STATUS, CapabilityId
from tests.platform.pci.board import MSI_ADDRESS, Board
from vmdbg.platform.apicbus import DeliveryMode
from vmdbg.platform.pci.capability import Capability, Msi, MsiX
from vmdbg.platform.pci.dma import Message
from vmdbg.platform.pci.function import Bar, Function
from vmdbg.platform.pic import ELCR_PORT

DEVICE = "00:03.0"
FIXED = DeliveryMode.FIXED


class Several(Function):
    """Eight vectors, of MSI and MSI-X."""

    kind = title = "several"
    vendor_id, device_id, class_code = 0x1234, 1, 0x088000
    bars = (Bar(0, 0x1000), Bar(1, 0x1000, width=8))
    interrupt_pin = 2

    def make_capabilities(self) -> Iterable[Capability]:
        return Msi(8), MsiX(8, bar=1, table=0x100, pending=0x800)

    def write_bar(self, bar: int, offset: int, size: int, value: int) -> None:
        """Any write asks for a vector's interrupt."""
        self.signal(value)


def several() -> tuple[Board, Several]:
    board = Board()
    function = Several(board.clock)
    board.place(function)
    board.write(DEVICE, 0x10, 0xD0000000)
    board.write(DEVICE, 0x14, 0xD0001000)
    board.write(DEVICE, 4, COMMAND.MEMORY | COMMAND.BUS_MASTER, 2)
    return board, function


def test_msi_with_all_vectors() -> None:
    board, function = several()
    function.signal(3)
    assert not board.apic.taken, "MSI is off"
    at = board.messages(DEVICE, 0x45, multiple=3)
    for vector in (0, 3, 7):
        function.signal(vector)
    assert board.apic.taken == [(0x40, FIXED, False), (0x43, FIXED, False), (0x47, FIXED, False)]
    board.write(DEVICE, at + 2, 1 | 1 << 4, 2)
    function.signal(7)
    assert board.apic.taken[3:] == [(0x45, FIXED, False)], "software gave two vectors: their numbers wrap"


def test_a_masked_msi_is_pending_until_it_is_unmasked() -> None:
    board, function = several()
    at = board.messages(DEVICE, 0x40, multiple=3)
    board.write(DEVICE, at + 16, 0xFFFFFFFF)
    assert board.read(DEVICE, at + 16) == 0xFF
    function.signal(5)
    function.signal(5)
    assert (board.apic.taken, board.read(DEVICE, at + 20)) == ([], 1 << 5)
    board.write(DEVICE, at + 16, 0xDF)
    assert (board.apic.taken, board.read(DEVICE, at + 20)) == ([(0x45, FIXED, False)], 0)


def test_msi_needs_bus_mastering() -> None:
    board, function = several()
    board.messages(DEVICE, 0x40)
    board.command(DEVICE, 0, drop=COMMAND.BUS_MASTER)
    function.signal()
    assert not board.apic.taken


def test_msi_that_is_no_message_is_a_store() -> None:
    board, function = several()
    at = board.messages(DEVICE, 0x40)
    board.write(DEVICE, at + 4, 0x5000)
    function.signal()
    assert not board.apic.taken
    assert board.ram.read(0x5000, 4) == b"\x40\0\0\0"


def test_msix_table_masks_and_pending_bits() -> None:
    board, function = several()
    at, table = board.capability(DEVICE, CapabilityId.MSIX), 0xD0001100
    assert board.read(DEVICE, at + 2, 2) == 7
    assert (board.read(DEVICE, at + 4), board.read(DEVICE, at + 8)) == (0x101, 0x801)
    for vector in range(8):
        assert board.bus.read_mmio(table + 16 * vector + 12, 4) == 1, "masked at reset"
        board.bus.write_mmio(table + 16 * vector, 8, MSI_ADDRESS | 0x5000)
        board.bus.write_mmio(table + 16 * vector + 8, 4, 0x60 + vector)
    board.write(DEVICE, at + 2, MSIX_CONTROL.ENABLE, 2)
    function.signal(2)
    assert (board.apic.taken, board.bus.read_mmio(0xD0001800, 4)) == ([], 4)
    board.bus.write_mmio(table + 16 * 2 + 12, 4, 0)
    assert (board.apic.taken, board.bus.read_mmio(0xD0001800, 8)) == ([(0x62, FIXED, False)], 0)
    board.write(DEVICE, at + 2, MSIX_CONTROL.ENABLE | MSIX_CONTROL.MASK, 2)
    function.signal(2)
    assert len(board.apic.taken) == 1
    board.write(DEVICE, at + 2, MSIX_CONTROL.ENABLE, 2)
    assert len(board.apic.taken) == 2
    assert board.bus.read_mmio(table + 16 * 2 + 8, 2) == 0x62, "parts of a word read as they lie"
    board.bus.write_mmio(0xD0001800, 4, 0xFF)
    assert board.bus.read_mmio(0xD0001800, 4) == 0, "pending bits are read-only"
    function.reset()
    assert function.capabilities[1].entries[2] == [0, 0, 0, 1]  # type: ignore[attr-defined]


def test_msix_comes_before_msi() -> None:
    board, function = several()
    board.messages(DEVICE, 0x40)
    board.write(DEVICE, board.capability(DEVICE, CapabilityId.MSIX) + 2, MSIX_CONTROL.ENABLE, 2)
    function.signal(1)
    assert not board.apic.taken
    assert board.bus.read_mmio(0xD0001800, 4) == 2


def test_pin_to_the_8259_and_the_io_apic() -> None:
    """INTB of device 3 is line 0 of the root bus: pin 16, and IRQ 10."""
    board, function = several()
    function.set_intx(True)
    assert board.chipset.ioapic.pins >> 16 == 1
    assert board.chipset.pic.slave.lines == 1 << 2
    assert board.read(DEVICE, 6, 2) & STATUS.INTERRUPT
    board.command(DEVICE, COMMAND.INTX_DISABLE)
    assert (board.chipset.ioapic.pins, board.chipset.pic.slave.lines) == (0, 0)
    assert board.read(DEVICE, 6, 2) & STATUS.INTERRUPT, "the status bit says what the device wants"
    board.command(DEVICE, 0, drop=COMMAND.INTX_DISABLE)
    assert board.chipset.ioapic.pins >> 16 == 1
    board.messages(DEVICE, 0x40)
    assert board.chipset.ioapic.pins == 0, "with MSI on, pins are silent"
    function.reset()
    assert not board.read(DEVICE, 6, 2) & STATUS.INTERRUPT


def test_lines_are_shared() -> None:
    board = Board("edu,slot=03.0", "edu,slot=07.0", "edu,slot=05.0")
    first, second, other = board.root.functions[1], board.root.functions[3], board.root.functions[2]
    first.set_intx(True)
    second.set_intx(True)
    other.set_intx(True)
    assert board.chipset.ioapic.pins >> 16 == 1 << 3 | 1 << 1
    assert board.chipset.pic.slave.lines == 1 << 3, "lines 1 and 3 are IRQ 11"
    first.set_intx(False)
    assert board.chipset.ioapic.pins >> 16 == 1 << 3 | 1 << 1
    second.set_intx(False)
    assert board.chipset.ioapic.pins >> 16 == 1 << 1
    other.set_intx(False)
    assert board.chipset.pic.slave.lines == 0


def test_firmware_tells_the_line_and_makes_it_level_triggered() -> None:
    board = Board("edu,slot=03.0", "edu,slot=04.0", "bridge,slot=05.0,id=b", "edu,bus=b")
    assert [board.read(where, 0x3C, 1) for where in (DEVICE, "00:04.0", "01:00.0")] == [11, 10, 11]
    assert board.bus.read_port(ELCR_PORT + 1, 1) == 1 << 2 | 1 << 3
    assert Board().bus.read_port(ELCR_PORT + 1, 1) == 0, "without devices nothing changes"


@pytest.mark.parametrize(
    ("address", "data", "message"),
    [
        (0xFEE00000, 0x41, Message(0x41, FIXED, 0, False, False)),
        (0xFEE05004, 0xC141, Message(0x41, DeliveryMode.LOWEST, 5, True, True)),
        (0xFEEFF000, 0x0400, Message(0, DeliveryMode.NMI, 0xFF, False, False)),
    ],
)  # fmt: skip
def test_messages(address: int, data: int, message: Message) -> None:
    """APM2 16.11.1."""
    assert Message.decode(address, data) == message
