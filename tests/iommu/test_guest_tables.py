"""Guest tables: PASIDs, GCR3 tables of every depth, translation in two dimensions, accessed and dirty bits."""

from __future__ import annotations

import pytest

from introspect.iommu.records import CommandCode, EventCode
from introspect.iommu.registers import CONTROL
from introspect.iommu.structures import PTE, gcr3_root_bits
from introspect.paging import ENTRY
from tests.iommu.rig import DATA, DEVICE, DEVICE_TABLE, ON, Bench
from vmdbg.platform.pci.dma import Attributes, DmaError

PASID = 0x1234
GVA = 0x7F12_3456_7000
LEVELS = {0: 4, 1: 5}
P_RW_US = ENTRY.P | ENTRY.W | ENTRY.U


class Guest:
    """Tables of a process, at guest-physical addresses that the host maps `shift` further on; 0 for none. The first GCR3 table
    is named by its system-physical address (2.2.6.3)."""

    def __init__(self, bench: Bench, *, nested: bool, glx: int = 1, paging: int = 0, **fields: int) -> None:
        self.bench, self.nested = bench, nested
        first, self.shift = 0x100000, 0x500000 if nested else 0
        self.next = first if nested else 0x600000
        root = bench.host({first + n * 0x1000: first + self.shift + n * 0x1000 for n in range(32)}) if nested else 0
        self.host_root = root
        gcr3 = table = self.take()
        for level in range(glx, 0, -1):
            table = self.put(table, PASID >> 9 * level & 511, self.take() | 1) & ~0xFFF
        self.cr3 = self.take()
        self.put(table, PASID & 511, self.cr3 | 1)
        self.slots: list[tuple[int, int]] = []
        table = self.cr3
        for level in range(LEVELS[paging], 1, -1):
            self.slots.append((table, GVA >> 12 + 9 * (level - 1) & 511))
            table = self.put(table, GVA >> 12 + 9 * (level - 1) & 511, self.take() | P_RW_US) & ~0xFFF
        self.page = self.take()
        self.leaf = table, GVA >> 12 & 511
        self.slots.append(self.leaf)
        self.put(*self.leaf, self.page | P_RW_US)
        bench.entry(**{
            "V": 1, "TV": 1, "IR": 1, "IW": 1, "DomainID": 7, "GV": 1, "GLX": glx, "GuestPagingMode": paging,
            "Mode": 4 if nested else 0, "PageTableRoot": root >> 12, **fields,
        })  # fmt: skip
        at = DEVICE_TABLE + DEVICE * 32
        entry = int.from_bytes(bench.ram.read(at, 32), "little") | gcr3_root_bits(gcr3 + self.shift)
        bench.ram.write(at, entry.to_bytes(32, "little"))

    def take(self) -> int:
        self.next += 0x1000
        return self.next - 0x1000

    def put(self, table: int, slot: int, entry: int) -> int:
        self.bench.ram.write_u64(table + self.shift + 8 * slot, entry)
        return entry

    def get(self, table: int, slot: int) -> int:
        return self.bench.ram.read_u64(table + self.shift + 8 * slot)


@pytest.mark.parametrize("paging", [0, 1], ids=["4-level", "5-level"])
@pytest.mark.parametrize("glx", [0, 1, 2])
@pytest.mark.parametrize("nested", [False, True])
def test_a_process_gets_its_pages(nested: bool, glx: int, paging: int) -> None:
    bench = Bench(control=ON | CONTROL.GTEn)
    guest = Guest(bench, nested=nested, glx=glx, paging=paging)
    pasid = PASID & (1 << 9 * (glx + 1)) - 1
    bench.dma.write(DEVICE, GVA + 8, b"process", Attributes(pasid))
    assert bench.ram.read(guest.page + guest.shift + 8, 7) == b"process"
    assert bench.dma.read(DEVICE, GVA + 8, 7, Attributes(pasid)) == b"process"
    assert all(guest.get(*slot) & ENTRY.A for slot in guest.slots)
    assert guest.get(*guest.leaf) & ENTRY.D
    assert bench.events() == []


def test_without_a_pasid_it_is_0_with_giov() -> None:
    bench = Bench(control=ON | CONTROL.GTEn)
    guest = Guest(bench, nested=True, GIoV=1)
    with pytest.raises(DmaError):
        bench.dma.write(DEVICE, GVA, b"x")
    event = bench.event()
    assert (event.code, event.pasid) == (EventCode.IO_PAGE_FAULT, 0)
    assert guest.cr3


def test_refusals_name_the_pasid() -> None:
    bench = Bench(control=ON | CONTROL.GTEn)
    guest = Guest(bench, nested=True)
    guest.put(*guest.leaf, guest.page | ENTRY.P | ENTRY.U)
    with pytest.raises(DmaError):
        bench.dma.write(DEVICE, GVA, b"x", Attributes(PASID))
    event = bench.event()
    assert (event.pasid, event.address) == (PASID, GVA)
    assert event.flags == {"US", "PR", "RW", "PE"}
    with pytest.raises(DmaError):
        bench.dma.read(DEVICE, GVA, 4, Attributes(0x10000))
    assert bench.event().pasid == 0x10000, "more than 16 bits"
    bench.control(drop=CONTROL.GTEn)
    with pytest.raises(DmaError):
        bench.dma.read(DEVICE, GVA, 4, Attributes(PASID))
    event = bench.event()
    assert (event.code, event.type, event.pasid) == (EventCode.INVALID_DEVICE_REQUEST, 4, PASID)


def test_privileged_pages_are_closed_to_all() -> None:
    """PrivAbrtEn is there, with USSup (2.2.6.2); devices of the machine ask as users in any case."""
    bench = Bench(control=ON | CONTROL.GTEn)
    bench.control(CONTROL.make(PrivAbrtEn=1))
    assert bench.get("control") & CONTROL.PrivAbrtEn
    guest = Guest(bench, nested=False)
    bench.dma.write(DEVICE, GVA, b"x", Attributes(PASID))
    guest.put(*guest.leaf, guest.page | ENTRY.P | ENTRY.W)
    with pytest.raises(DmaError):
        bench.dma.write(DEVICE, GVA, b"x", Attributes(PASID))
    assert bench.event().flags == {"US", "PR", "RW", "PE"}


def test_strict_guest_pages_go_by_pasid() -> None:
    bench = Bench(control=ON | CONTROL.GTEn, strict=True)
    guest = Guest(bench, nested=True)
    bench.dma.write(DEVICE, GVA, b"x", Attributes(PASID))
    guest.put(*guest.leaf, 0)
    for fields, kept in (
        ({"GN": 1, "PASID": PASID + 1}, True), ({"GN": 1, "PASID": PASID, "Address": GVA + 0x1000 >> 12}, True),
        ({"GN": 1, "PASID": PASID, "Address": GVA >> 12}, False),
    ):  # fmt: skip
        bench.issue(CommandCode.INVALIDATE_IOMMU_PAGES, DomainID=7, **fields)
        bench.commands_done()
        if kept:
            assert bench.dma.read(DEVICE, GVA, 1, Attributes(PASID))
        else:
            with pytest.raises(DmaError):
                bench.dma.read(DEVICE, GVA, 1, Attributes(PASID))


def test_strict_rights_of_a_guest_are_looked_up_anew() -> None:
    """2.2.7.3: software need not tell of a right that it grants, nor of a page that it makes present."""
    bench = Bench(control=ON | CONTROL.GTEn, strict=True)
    guest = Guest(bench, nested=True)
    guest.put(*guest.leaf, guest.page | ENTRY.P | ENTRY.U)
    bench.dma.read(DEVICE, GVA, 1, Attributes(PASID))
    guest.put(*guest.leaf, guest.page | P_RW_US)
    bench.dma.write(DEVICE, GVA, b"x", Attributes(PASID))
    assert bench.events() == []


def test_host_invalidations_take_nested_ones_along() -> None:
    bench = Bench(control=ON | CONTROL.GTEn, strict=True)
    guest = Guest(bench, nested=True)
    bench.ram.write(DATA, b"other")
    bench.dma.write(DEVICE, GVA, b"first", Attributes(PASID))
    leaf = bench.leaf_of(guest.host_root, guest.page)
    bench.ram.write_u64(leaf, bench.ram.read_u64(leaf) & ~PTE.Address | DATA)
    assert bench.dma.read(DEVICE, GVA, 5, Attributes(PASID)) == b"first"
    bench.issue(CommandCode.INVALIDATE_IOMMU_PAGES, DomainID=7, S=1, Address=0x7FFFFFFFFFFFF)
    bench.commands_done()
    assert bench.dma.read(DEVICE, GVA, 5, Attributes(PASID)) == b"other"


@pytest.mark.parametrize("pde", [0, 1])
def test_strict_guest_directories_go_by_pasid(pde: int) -> None:
    bench = Bench(control=ON | CONTROL.GTEn, strict=True)
    told: list[str] = []
    bench.unit.stale_listeners.append(told.append)
    guest = Guest(bench, nested=True)
    table, slot = guest.leaf
    before, after, fresh = guest.take(), guest.take(), guest.take()
    guest.put(table, slot + 1, before | P_RW_US)
    guest.put(fresh, slot + 1, after | P_RW_US)
    bench.dma.read(DEVICE, GVA, 1, Attributes(PASID))
    guest.put(*guest.slots[-2], fresh | P_RW_US)
    for fields in ({"PASID": PASID + 1, "PDE": 1}, {"PASID": PASID, "PDE": pde}):
        bench.issue(CommandCode.INVALIDATE_IOMMU_PAGES, DomainID=7, GN=1, Address=0x7FFFFFFFFFFFF, S=1, **fields)
    bench.commands_done()
    bench.dma.read(DEVICE, GVA + 0x1000, 1, Attributes(PASID))
    found = bench.dma.locate(DEVICE, GVA + 0x1000, 1, False, attributes=Attributes(PASID))[0].spa
    assert found == guest.shift + (after if pde else before)
    assert [one.rpartition("; ")[2] for one in told] == ([] if pde else ["INVALIDATE_IOMMU_PAGES with PDE was forgotten"])
