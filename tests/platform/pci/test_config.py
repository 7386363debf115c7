"""Configuration space: access rules, both ways to it, BARs, decoding."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from introspect.pci import COMMAND, HEADER0, STATUS, RequesterId, bars, capabilities
from tests.platform.pci.board import Board
from vmdbg.platform.clock import Clock
from vmdbg.platform.pci.config import SIZE, ConfigSpace, Rule
from vmdbg.platform.pci.function import Bar, Function
from vmdbg.platform.pci.root import ECAM

EDU = "00:03.0"


class Sample(Function):
    """BARs of all kinds, whose reads say which BAR and offset it was."""

    kind = title = "sample"
    vendor_id, device_id, class_code, revision = 0x1234, 0x5678, 0x088000, 3
    bars = (
        Bar(0, 0x1000), Bar(1, 0x20, io=True), Bar(2, 1 << 20, wide=True, prefetchable=True, width=8), Bar(4, 1 << 34, wide=True),
    )  # fmt: skip
    interrupt_pin = 1

    def __init__(self, clock: Clock) -> None:
        super().__init__(clock)
        self.written: list[tuple[int, int, int, int]] = []

    def read_bar(self, bar: int, offset: int, size: int) -> int:
        return bar << 28 | offset

    def write_bar(self, bar: int, offset: int, size: int, value: int) -> None:
        self.written.append((bar, offset, size, value))


def sampled() -> tuple[Board, Sample]:
    board = Board()
    sample = Sample(board.clock)
    board.place(sample)
    return board, sample


def test_rules_say_which_bits_software_writes_and_clears() -> None:
    config = ConfigSpace()
    config.define(HEADER0, {"command": Rule(0x4, 0x407), "status": Rule(0x10, 0, 0xF900), "vendor_id": Rule(0x1234)})
    config.reset()
    config.write(4, 4, 0xFFFFFFFF)
    assert config.get(4, 4) == 0x0010_0407
    config.put(6, 2, 0xF910)
    config.write(6, 2, 0x2010)
    assert config.get(6, 2) == 0xD910, "RW1C: ones clear, and read-only bits stay"
    config.write(0, 4, 0)
    assert config.get(0, 4) == 0x1234
    config.reset()
    assert config.get(4, 4) == 0x0010_0004


def test_both_mechanisms_reach_the_same_registers() -> None:
    board = Board("edu,slot=03.0")
    for offset in range(0, 0x100, 4):
        assert board.read(EDU, offset) == board.bus.read_mmio(ECAM + (3 << 15) + offset, 4)
    assert board.read(EDU, 0) == 0x11E81234
    assert board.read(EDU, 2, 2) == board.bus.read_mmio(ECAM + (3 << 15) + 2, 2) == 0x11E8
    board.bus.write_mmio(ECAM + (3 << 15) + 0x3C, 1, 0x5A)
    assert board.read(EDU, 0x3C, 1) == 0x5A


def test_nobody_there_reads_as_ones() -> None:
    board = Board("edu,slot=03.0")
    assert board.read("00:04.0", 0) == board.read("00:03.1", 0) == board.read(RequesterId(0x0500), 0) == 0xFFFFFFFF
    assert board.bus.read_mmio(ECAM + (0xFF << 20), 4) == 0xFFFFFFFF
    assert board.bus.read_mmio(ECAM + (3 << 15) + 0xFFE, 4) >> 16 == 0xFFFF


def test_the_address_port_takes_dwords_and_reset_is_between() -> None:
    board = Board("edu,slot=03.0")
    board.bus.write_port(0xCF8, 4, 0xFFFFFFFF)
    assert board.bus.read_port(0xCF8, 4) == 0x80FFFFFC
    board.bus.write_port(0xCF8, 1, 0)
    assert board.bus.read_port(0xCF8, 4) == 0x80FFFFFC, "a byte is no address"
    board.bus.write_port(0xCF8, 4, 3 << 11)
    assert board.bus.read_port(0xCFC, 4) == 0xFFFFFFFF, "enable is clear"
    for value in (2, 6):
        board.bus.write_port(0xCF9, 1, value)
    assert len(board.resets) == 1
    assert board.bus.read_port(0xCF9, 1) == 6


def test_extended_space_needs_pci_express() -> None:
    board = Board("edu,slot=03.0,express=off", "edu,slot=04.0")
    for device, expected in ((3, 0), (4, 0)):
        assert board.bus.read_mmio(ECAM + (device << 15) + 0x100, 4) == expected
    assert not board.function("edu", 0).extended
    assert board.function("edu", 1).extended


@pytest.mark.parametrize(
    ("register", "value"),
    [(0x10, 0xFFFFF000), (0x14, 0xFFFFFFE1), (0x18, 0xFFF0000C), (0x1C, 0xFFFFFFFF), (0x20, 4), (0x24, 0xFFFFFFFC)],
)
def test_sizing(register: int, value: int) -> None:
    """All ones written, the size is in the zeros (PCI 3.0, 6.2.5.1)."""
    board, _ = sampled()
    before = board.read(EDU, register)
    board.write(EDU, register, 0xFFFFFFFF)
    assert board.read(EDU, register) == value
    board.write(EDU, register, before)
    assert board.read(EDU, register) == before


def test_decoding_follows_registers_and_enables() -> None:
    board, sample = sampled()
    board.write(EDU, 0x10, 0xD0000000)
    board.write(EDU, 0x14, 0xC100)
    board.write(EDU, 0x18, 0xD1000000)
    board.write(EDU, 0x20, 0)
    board.write(EDU, 0x24, 0x10)
    assert board.bus.read_mmio(0xD0000010, 4) == 0xFFFFFFFF, "memory is not enabled"
    board.write(EDU, 4, COMMAND.MEMORY, 2)
    assert board.bus.read_mmio(0xD0000010, 4) == 0x10
    assert board.bus.read_mmio(0xD10FFFFC, 4) == 0x2000_0000 | 0xFFFFC
    assert board.bus.read_mmio(0x10_0000_0000 + 0x3_FFFF_FFF8, 4) == 0x4000_0000 | 0x3_FFFF_FFF8 & 0xFFFFFFFF
    assert board.bus.read_port(0xC104, 4) == 0xFFFFFFFF, "ports are not enabled"
    board.write(EDU, 4, COMMAND.IO, 2)
    assert board.bus.read_port(0xC104, 4) == 0x1000_0004
    assert board.bus.read_mmio(0xD0000010, 4) == 0xFFFFFFFF
    board.write(EDU, 4, COMMAND.MEMORY, 2)
    board.write(EDU, 0x10, 0xD2000000)
    assert board.bus.read_mmio(0xD0000010, 4) == 0xFFFFFFFF
    board.bus.write_mmio(0xD2000020, 8, 0x1122334455667788)
    board.bus.write_mmio(0xD1000020, 8, 0x1122334455667788)
    assert sample.written == [(0, 0x20, 4, 0x55667788), (0, 0x24, 4, 0x11223344), (2, 0x20, 8, 0x1122334455667788)]


def test_fixed_devices_and_earlier_functions_win() -> None:
    board, sample = sampled()
    board.write(EDU, 0x10, 0xFEC00000)
    board.write(EDU, 0x14, 0x3E0)
    board.write(EDU, 4, COMMAND.MEMORY | COMMAND.IO, 2)
    board.bus.write_mmio(0xFEC00000, 4, 1)
    assert board.bus.read_mmio(0xFEC00010, 4) == 0x170020, "the I/O APIC's version"
    other = Sample(board.clock)
    board.place(other, 4 << 3)
    board.write("00:04.0", 0x10, 0xD0000000)
    board.write("00:04.0", 4, COMMAND.MEMORY, 2)
    board.write(EDU, 0x10, 0xD0000000)
    board.bus.write_mmio(0xD0000000, 4, 1)
    assert sample.written
    assert not other.written


def test_firmware_leaves_bars_that_do_not_overlap() -> None:
    board = Board(*["edu"] * 20)
    found = sorted((region.first, region.last) for region in board.root.regions())
    assert len(found) == 20
    assert all(last < first for (_, last), (first, _) in pairwise(found))
    assert all(bar.address % (1 << 20) == 0 for function in board.root.functions for bar in bars(function.config.bytes))


def test_a_reset_brings_back_what_firmware_left() -> None:
    board = Board("edu,slot=03.0", "bridge,id=b", "edu,bus=b")
    before = [bytes(function.config.bytes) for function in board.root.functions]
    for function in board.root.functions:
        board.write(function.address, 0x10, 0)
        board.write(function.address, 0x18, 0)
    assert [bytes(function.config.bytes) for function in board.root.functions] != before
    board.chipset.reset()
    assert [bytes(function.config.bytes) for function in board.root.functions] == before


def test_status_errors_are_cleared_by_writing_ones() -> None:
    board, sample = sampled()
    sample.put_header("status", STATUS.CAPABILITIES | STATUS.RECEIVED_MASTER_ABORT | STATUS.SIGNALLED_ERROR)
    board.write(EDU, 6, STATUS.RECEIVED_MASTER_ABORT, 2)
    assert board.read(EDU, 6, 2) == STATUS.CAPABILITIES | STATUS.SIGNALLED_ERROR


def test_functions_of_one_device() -> None:
    board = Board("edu,slot=05.0", "edu,slot=05.3", "edu,slot=06.0")
    assert board.read("00:05.0", 0x0E, 1) == 0x80
    assert board.read("00:05.3", 0x0E, 1) == board.read("00:06.0", 0x0E, 1) == 0
    assert board.read("00:05.3", 0) == 0x11E81234


def test_the_chain_of_capabilities_ends() -> None:
    config = bytearray(256)
    config[6], config[0x34], config[0x40], config[0x41], config[0x50], config[0x51] = 0x10, 0x40, 5, 0x50, 9, 0x40
    assert list(capabilities(config)) == [(0x40, 5), (0x50, 9)]


WRITES = st.lists(
    st.tuples(st.integers(0, 0x3FF), st.integers(0, SIZE - 1), st.sampled_from([1, 2, 4, 8]), st.integers(0, (1 << 64) - 1)),
    max_size=60,
)


@settings(max_examples=60, deadline=None)
@given(WRITES, st.lists(st.integers(0, (1 << 40) - 1), max_size=20))
def test_any_writes_are_survived(writes: list[tuple[int, int, int, int]], addresses: list[int]) -> None:
    """Whatever software writes wherever, reads answer, and a reset brings everything back."""
    board = Board("edu,slot=03.0", "bridge,id=b,slot=04.0", "edu,bus=b", "pci-bridge,id=c,slot=05.0", "edu,bus=c,slot=03.0")
    before = [bytes(function.config.bytes) for function in board.root.functions]
    for requester, offset, size, value in writes:
        board.bus.write_mmio(ECAM + (requester << 12) + offset, size, value & (1 << 8 * size) - 1)
        board.bus.read_mmio(ECAM + (requester << 12) + offset, size)
        board.pass_time(1000)
    for address in addresses:
        board.bus.write_mmio(address, 4, address & 0xFFFFFFFF)
        assert 0 <= board.bus.read_mmio(address, 8) < 1 << 64
        assert 0 <= board.bus.read_port(address & 0xFFFF, 4) < 1 << 32
    board.pass_time(1 << 32)
    board.chipset.reset()
    assert [bytes(function.config.bytes) for function in board.root.functions] == before
