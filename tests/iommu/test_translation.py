"""DMA through an IOMMU: where it leads, what is refused and how the log says so."""

from __future__ import annotations

import pytest

from introspect.iommu.records import EventCode
from introspect.iommu.registers import CONTROL, EXCLUSION_BASE, STATUS
from introspect.iommu.structures import PTE
from introspect.pci import RequesterId
from tests.iommu.rig import DATA, DEVICE, DEVICE_TABLE, EVENTS_AT, OTHER, RW, Bench
from vmdbg.platform.pci.dma import DmaError


def test_off_is_as_if_there_were_none() -> None:
    bench = Bench(control=0)
    bench.dma.write(DEVICE, DATA, b"x")
    assert bench.ram.read(DATA, 1) == b"x"
    bench.dma.write(DEVICE, 0xFEE00000, b"\x41\0\0\0")
    assert bench.vectors == [0x41]


def test_pages_lead_where_tables_say() -> None:
    bench = Bench()
    bench.give({0x10000: DATA, 0x11000: DATA + 0x5000})
    bench.dma.write(DEVICE, 0x10FFE, b"abcd")
    assert bench.ram.read(DATA + 0xFFE, 2) + bench.ram.read(DATA + 0x5000, 2) == b"abcd"
    assert bench.dma.read(DEVICE, 0x10FFE, 4) == b"abcd"
    assert bench.events() == []


def test_an_entry_without_v_lets_all_pass() -> None:
    bench = Bench()
    bench.dma.write(OTHER, DATA, b"x")
    assert bench.ram.read(DATA, 1) == b"x"


def test_identity_with_mode_0() -> None:
    bench = Bench()
    bench.entry(V=1, TV=1, IR=1, DomainID=3)
    bench.ram.write(DATA, b"x")
    assert bench.dma.read(DEVICE, DATA, 1) == b"x"
    with pytest.raises(DmaError, match="IO_PAGE_FAULT"):
        bench.dma.write(DEVICE, DATA, b"y")
    event = bench.event()
    assert (event.code, event.device, event.address, event.domain) == (EventCode.IO_PAGE_FAULT, DEVICE, DATA, 3)
    assert event.flags == {"PR", "RW", "PE"}


@pytest.mark.parametrize("strict", [False, True])
def test_reads_of_no_bytes_need_either_right(strict: bool) -> None:
    bench = Bench(strict=strict)
    for rights, refused in ((PTE.IR, False), (PTE.IW, False), (0, True)):
        bench.give({0x1000: DATA}, rights=rights)
        bench.unit.caches.forget_all()
        if refused:
            with pytest.raises(DmaError, match="IR or IW is missing"):
                bench.dma.read(DEVICE, 0x1000, 0)
            assert bench.event().flags == {"PR", "PE"}
        else:
            assert bench.dma.read(DEVICE, 0x1000, 0) == b""
            assert bench.events() == []
    with pytest.raises(DmaError, match="PR is 0"):
        bench.dma.read(DEVICE, 0x2000, 0)


def test_a_fault_bit_by_bit() -> None:
    """Not present, write, domain 7, device 00:03.0."""
    bench = Bench()
    bench.give({0x10000: DATA})
    with pytest.raises(DmaError, match="PR is 0"):
        bench.dma.write(DEVICE, 0x12345678, b"x")
    assert int.from_bytes(bench.ram.read(EVENTS_AT, 16), "little") == 0x12345678 << 64 | 0x2020_0007_0000_0018
    assert bench.get("event_tail") == 16
    assert bench.get("status") & STATUS.EventLogInt


@pytest.mark.parametrize("levels", [1, 2, 3, 4, 5, 6])
def test_every_number_of_levels(levels: int) -> None:
    bench = Bench()
    iova = min(1 << 12 + 9 * levels, 1 << 64) - 0x1000
    bench.give({iova: DATA}, levels=levels)
    bench.dma.write(DEVICE, iova, b"top")
    assert bench.ram.read(DATA, 3) == b"top"


def test_large_pages_and_skipped_levels() -> None:
    bench = Bench()
    root, table = bench.table(), bench.table()
    bench.entry(V=1, TV=1, Mode=4, PageTableRoot=root >> 12, IR=1, IW=1)
    bench.ram.write_u64(root, table | PTE.make(PR=1, NextLevel=2) | RW)  # from level 4 to 2
    bench.ram.write_u64(table + 8, DATA | PTE.make(PR=1, NextLevel=0) | RW)  # 2 MiB
    for slot in range(16, 24):
        bench.ram.write_u64(table + 8 * slot, 0xC00000 >> 24 << 24 | 0x7FF000 | PTE.make(PR=1, NextLevel=7) | RW)
    bench.dma.write(DEVICE, 0x200000 + 0x12345, b"large")
    assert bench.ram.read(DATA + 0x12345, 5) == b"large"
    bench.dma.write(DEVICE, 16 * 0x200000 + 0x654321, b"16 MiB")
    assert bench.ram.read(0x654321, 6) == b"16 MiB"
    with pytest.raises(DmaError, match="skips"):
        bench.dma.write(DEVICE, 1 << 30 | 0x200000, b"x")


def test_requesters_beyond_the_device_table() -> None:
    bench = Bench()
    bench.put("device_table_base", DEVICE_TABLE)  # 4 KiB: 128 entries
    far = RequesterId.make(9, 0, 0)
    with pytest.raises(DmaError, match="ends before"):
        bench.dma.read(far, DATA, 4)
    assert bench.event().device == far


def test_segments() -> None:
    """With DevTblSegEn 1 the upper half of the DeviceIDs has a table of its own."""
    bench = Bench()
    high, segment = RequesterId.make(0x80, 1, 0), 0xA00000
    bench.put("device_table_base1", segment)
    bench.control(CONTROL.make(DevTblSegEn=1))
    root = bench.host({0: DATA})
    bench.give({0: DATA + 0x1000})
    bench.ram.write(segment + (high & 0x7FFF) * 32, bench.ram.read(DEVICE_TABLE + DEVICE * 32, 32))
    bench.ram.write_u64(segment + (high & 0x7FFF) * 32, bench.ram.read_u64(DEVICE_TABLE + DEVICE * 32) & 0xFFF | root | 3 << 61)
    bench.dma.write(high, 0, b"high")
    bench.dma.write(DEVICE, 0, b"low")
    assert bench.ram.read(DATA, 4) == b"high"
    assert bench.ram.read(DATA + 0x1000, 3) == b"low"


def test_special_addresses_within_a_large_page() -> None:
    """2.1.4.6: what a page spans beside them leads where it says, also when it is cached, and in one transaction."""
    bench = Bench()
    root, table, directory = bench.table(), bench.table(), bench.table()
    bench.entry(V=1, TV=1, Mode=4, PageTableRoot=root >> 12, IR=1, IW=1, DomainID=7)
    page = 0xFD_F900_0000
    bench.ram.write_u64(root + 8 * (page >> 39 & 511), table | PTE.make(PR=1, NextLevel=3) | RW)
    bench.ram.write_u64(table + 8 * (page >> 30 & 511), directory | PTE.make(PR=1, NextLevel=2) | RW)
    bench.ram.write_u64(directory + 8 * (page >> 21 & 511), DATA | PTE.PR | RW)  # 2 MiB, of which one is special
    bench.dma.write(DEVICE, page, b"x")
    assert bench.ram.read(DATA, 1) == b"x"
    for address, length, kind in ((0xFD_F910_0000, 1, 4), (0xFD_F90F_FFF0, 0x20, 4), (0xFD_F7FF_FFFF, 1, 0)):
        with pytest.raises(DmaError):
            bench.dma.read(DEVICE, address, length)
        event = bench.event()
        assert (event.code, event.type) == (EventCode.INVALID_DEVICE_REQUEST, kind)
        assert event.address == (0xFD_F910_0000 if length > 1 else address)


def test_the_exclusion_range() -> None:
    bench = Bench()
    bench.give({0: DATA})
    bench.give({0: DATA}, device=OTHER, EX=1)
    bench.put("exclusion_limit", 0x900000)
    assert bench.get("exclusion_limit") == 0x900000, "its low bits count as ones, and are reserved"
    bench.put("exclusion_base", 0x900000 | EXCLUSION_BASE.ExEn)
    bench.dma.write(OTHER, 0x900010, b"ex")
    assert bench.ram.read(0x900010, 2) == b"ex"
    with pytest.raises(DmaError):
        bench.dma.write(DEVICE, 0x900010, b"no")
    bench.put("exclusion_base", 0x900000 | EXCLUSION_BASE.ExEn | EXCLUSION_BASE.Allow)
    bench.dma.write(DEVICE, 0x900010, b"al")
    assert bench.ram.read(0x900010, 2) == b"al"


def test_an_exclusion_range_within_a_large_page() -> None:
    """A transaction that runs into it is judged piece by piece."""
    bench = Bench()
    root, table = bench.table(), bench.table()
    bench.entry(V=1, TV=1, Mode=4, PageTableRoot=root >> 12, IR=1, IW=1, EX=1)
    bench.ram.write_u64(root, table | PTE.make(PR=1, NextLevel=2) | RW)
    bench.ram.write_u64(table + 8 * 4, DATA + 0x200000 | PTE.PR | RW)  # 2 MiB from 0x800000
    bench.put("exclusion_limit", 0x901000)
    bench.put("exclusion_base", 0x900000 | EXCLUSION_BASE.ExEn)
    spans = bench.dma.locate(DEVICE, 0x8FF000, 0x4000, False)
    assert [(span.spa, span.length) for span in spans] == [(0xAFF000, 0x1000), (0x900000, 0x2000), (0xB02000, 0x1000)]


def test_accessed_and_dirty() -> None:
    bench = Bench()
    root = bench.give({0: DATA}, HAD=3)
    leaf = bench.leaf_of(root, 0)
    bench.dma.locate(DEVICE, 0, 4, True)
    assert not bench.ram.read_u64(root) & PTE.A, "to ask leaves no mark"
    bench.dma.read(DEVICE, 0, 4)
    assert bench.ram.read_u64(root) & PTE.A
    assert bench.ram.read_u64(leaf) & (PTE.A | PTE.D) == PTE.A
    bench.dma.write(DEVICE, 0, b"x")
    assert bench.ram.read_u64(leaf) & (PTE.A | PTE.D) == PTE.A | PTE.D
    bench.ram.write_u64(leaf, bench.ram.read_u64(leaf) & ~PTE.D)
    bench.dma.write(DEVICE, 0, b"x")
    assert bench.ram.read_u64(leaf) & PTE.D, "coherent: cleared bits are seen at once"


def test_suppression() -> None:
    """SA: none is logged.  SE: the first one is, until the entry is read anew."""
    bench = Bench()
    bench.give({0: DATA}, SA=1)
    for _ in range(2):
        with pytest.raises(DmaError, match="because of SA"):
            bench.dma.read(DEVICE, 0x5000, 4)
    assert bench.events() == []
    bench.give({0: DATA}, SE=1)
    for _ in range(3):
        with pytest.raises(DmaError):
            bench.dma.read(DEVICE, 0x5000, 4)
    assert len(bench.events()) == 1


def test_a_read_in_the_interrupt_range() -> None:
    bench = Bench()
    bench.give({0: DATA})
    with pytest.raises(DmaError):
        bench.dma.read(DEVICE, 0xFEE00000, 4)
    assert bench.event().code == EventCode.INVALID_DEVICE_REQUEST


def test_an_unreadable_table_is_a_hardware_error() -> None:
    bench = Bench()
    bench.entry(V=1, TV=1, Mode=4, PageTableRoot=0xD0000000 >> 12, IR=1, IW=1)
    with pytest.raises(DmaError):
        bench.dma.read(DEVICE, 0x1000, 4)
    event = bench.event()
    assert (event.code, event.address, event.type) == (EventCode.PAGE_TAB_HARDWARE_ERROR, 0xD0000000, 1)
    assert bench.get("hardware_event_status") == 1
    assert bench.get("hardware_event_high") == event.encode() & (1 << 64) - 1, "with the event code (3.4.2)"
    assert bench.get("hardware_event_low") == 0xD0000000
    with pytest.raises(DmaError):
        bench.dma.read(DEVICE, 0x1000, 4)
    assert bench.get("hardware_event_status") == 3
    bench.put("hardware_event_status", 3)
    assert bench.get("hardware_event_status") == 0


def test_to_ask_logs_nothing() -> None:
    bench = Bench()
    bench.give({0: DATA})
    with pytest.raises(DmaError):
        bench.dma.locate(DEVICE, 0x5000, 4, True)
    assert bench.events() == []
