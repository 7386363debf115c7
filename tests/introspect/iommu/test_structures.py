"""Every table decodes what it encodes, and no two fields share a bit."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from introspect.iommu import records, registers, structures
from introspect.iommu.records import COMMANDS, EVENTS, INVALIDATE_EVERYTHING, Event, EventCode, invalidated_range
from introspect.iommu.registers import FEATURES, REGISTERS, RING_BASE, WINDOW_SIZE, register_at, ring_bytes
from introspect.iommu.state import EVERY_FEATURE, Iommu
from introspect.iommu.structures import DTE, PTE, decode_dte, encode_dte, gcr3_root, gcr3_root_bits, page_size_of
from introspect.layout import Bits

TABLES = [
    one for module in (structures, records, registers) for one in vars(module).values()
    if isinstance(one, type) and issubclass(one, Bits) and one is not Bits and not one.__name__.startswith("_")
]  # fmt: skip
WIDTHS = {"DTE": 256, "IRTE": 32}


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.__name__)
def test_fields_do_not_overlap(table: type[Bits]) -> None:
    assert sum(table.fields.values()) == table.defined
    for mask in table.fields.values():
        assert mask // (mask & -mask) + 1 & mask // (mask & -mask) == 0, "bits of a field are neighbours"


@given(st.data())
def test_what_is_encoded_is_decoded(data: st.DataObject) -> None:
    table = data.draw(st.sampled_from(TABLES))
    value = data.draw(st.integers(0, (1 << WIDTHS.get(table.__name__, 128)) - 1)) & table.defined
    fields = {name: table.get(value, name) for name in table.fields}
    assert table.make(**fields) == value


@given(st.integers(0, (1 << 256) - 1))
def test_an_entry_is_32_bytes(value: int) -> None:
    assert decode_dte(encode_dte(value)) == value
    assert encode_dte(value)[:8] == (value & (1 << 64) - 1).to_bytes(8, "little")


@given(st.integers(0, (1 << 40) - 1).map(lambda page: page << 12))
def test_the_gcr3_root_is_in_three_parts(address: int) -> None:
    dte = gcr3_root_bits(address)
    assert gcr3_root(dte) == address
    assert not dte & ~(DTE.GCR3Root_14_12 | DTE.GCR3Root_30_15 | DTE.GCR3Root_51_31)


def test_bit_positions_of_the_device_table_entry() -> None:
    """Where Linux's driver writes them: in which word of 64 bits, and where in it."""
    words = {"IV": (2, 0), "IntTabLen": (2, 1), "IntCtl": (2, 60), "EX": (1, 39), "I": (1, 32), "GV": (0, 55), "GLX": (0, 56),
             "GuestPagingMode": (2, 54), "NMIPass": (2, 58), "HAD": (0, 7), "SysMgt": (1, 40)}  # fmt: skip
    for name, (word, at) in words.items():
        mask = DTE.fields[name]
        assert (mask & -mask).bit_length() - 1 == 64 * word + at, name


@pytest.mark.parametrize(("entry", "level", "size"), [
    (0, 1, 1 << 12), (0, 2, 1 << 21), (0, 3, 1 << 30), (0, 4, 1 << 39), (0, 5, 1 << 48),
    (7 << 9, 1, 1 << 13), (7 << 9 | 0x1000, 1, 1 << 14), (7 << 9 | 0xFF000, 2, 1 << 21), (7 << 9 | 0x7F000, 1, 1 << 20),
    (7 << 9 | 0x7FFFF000, 3, 1 << 32),
])  # fmt: skip
def test_sizes_of_pages(entry: int, level: int, size: int) -> None:
    assert page_size_of(entry, level) == size


def test_entries_are_described_without_bits_that_are_ignored() -> None:
    assert PTE.describe(PTE.PR | PTE.IR | 1 << 63 | 0x1E) == "PR IR NextLevel=0"
    assert PTE.describe(PTE.PR | PTE.U | PTE.make(NextLevel=2)) == f"PR NextLevel=2 reserved={PTE.U:#x}"
    assert "U FC" in PTE.describe(PTE.PR | PTE.U | PTE.FC)


def test_every_command_and_event_has_its_code() -> None:
    assert sorted(COMMANDS) == list(range(1, 9))
    assert sorted(EVENTS) == sorted(EventCode)
    assert all(kind.name == records.CommandCode(code).name for code, kind in COMMANDS.items())
    assert all(kind.name == EventCode(code).name for code, kind in EVENTS.items())


EVENT = st.builds(
    Event, st.sampled_from(EventCode), st.integers(0, 0xFFFF), st.integers(0, (1 << 64) - 1),
    st.frozensets(st.sampled_from(("NX", "US", "I", "PR", "RW", "PE", "RZ", "TR"))), st.integers(0, 0xFFFF),
    st.none() | st.integers(0, 0xFFFFF), st.integers(0, 3),
)  # fmt: skip


@given(EVENT)
def test_events_come_back(event: Event) -> None:
    record = event.encode()
    again = Event.decode(record)
    assert again is not None
    assert again.encode() == record
    assert again.code == event.code
    grain = {EventCode.ILLEGAL_DEV_TABLE_ENTRY: 4, EventCode.PAGE_TAB_HARDWARE_ERROR: 8, EventCode.DEV_TAB_HARDWARE_ERROR: 16}
    assert again.address == event.address // grain.get(event.code, 1) * grain.get(event.code, 1)


@given(st.integers(0, (1 << 128) - 1))
def test_any_record_is_decoded(record: int) -> None:
    event = Event.decode(record)
    assert (event is None) == (record >> 60 & 15 not in EVENTS)
    assert event is None or event.describe() is not None


def test_an_event_bit_by_bit() -> None:
    """A write of 00:03.0 to a page that is not there, as Linux shows it: flags=0x0020."""
    event = Event(EventCode.IO_PAGE_FAULT, 0x18, 0x1234000, frozenset(("RW",)), 7)
    assert event.encode() == 0x1234000 << 64 | 2 << 60 | 0x20 << 48 | 7 << 32 | 0x18
    guest = Event(EventCode.IO_PAGE_FAULT, 0x18, 0, frozenset(("PR", "PE")), 7, 0xABCDE)
    assert guest.encode() == 2 << 60 | 0x51 << 48 | 0xBCDE << 32 | 0xA << 16 | 0x18
    table = Event(EventCode.PAGE_TAB_HARDWARE_ERROR, 0x18, 0x5008, frozenset(("RW", "US")), 7, 0xABCDE, 1)
    assert table.encode() == 0x5008 << 64 | 4 << 60 | 1 << 57 | 0x21 << 48 | 0xBCDE << 32 | 0x18, "16 bits of the PASID (table 60)"
    denied = Event(EventCode.INVALID_DEVICE_REQUEST, 0x18, 0x5001, frozenset(("RW", "US", "NX")), 7, 0xABCDE, 4)
    assert denied.encode() == 0x5001 << 64 | 8 << 60 | 4 << 57 | 3 << 48 | 0xBCDE << 32 | 0xA << 16 | 0x18, "no RW (table 65)"
    entry = Event(EventCode.ILLEGAL_DEV_TABLE_ENTRY, 0x18, 0x5003, frozenset(("RW", "RZ")))
    assert entry.encode() == 0x5000 << 64 | 1 << 60 | 0xA0 << 48 | 0x18, "address bits 63:2 (table 56)"


@pytest.mark.parametrize(("address", "size", "expected"), [
    (0x5000, False, (0x5000, 0x6000)), (0x5000, True, (0x4000, 0x8000)), (0x4000, True, (0x4000, 0x6000)),
    (0x1FF000, True, (0, 0x400000)), (INVALIDATE_EVERYTHING, True, (0, 1 << 64)), (0xFFFF_FFFF_FFFF_F000, True, (0, 1 << 64)),
])  # fmt: skip
def test_what_an_invalidation_covers(address: int, size: bool, expected: tuple[int, int]) -> None:
    assert invalidated_range(address, size) == expected


def test_registers_lie_side_by_side() -> None:
    seen: set[int] = set()
    for one in REGISTERS.values():
        covered = set(range(one.offset, one.offset + one.size))
        assert not covered & seen, one.name
        assert one.offset % one.size == 0, one.name
        assert one.offset + one.size <= WINDOW_SIZE, one.name
        seen |= covered
        assert not one.writable & one.clears
        assert not (one.writable | one.clears) >> 8 * one.size
        assert all(name in REGISTERS for name in one.resets)
        assert register_at(one.offset) is register_at(one.offset + one.size - 1) is one
    assert register_at(0x1FF0) is None


def test_where_registers_are() -> None:
    """As the names of 3.4's sections have their offsets; the length of a ring is in bytes (3.4.1, 3.4.4)."""
    offsets = {
        "device_table_base": 0x0000, "hardware_event_high": 0x0040, "smi_filter15": 0x00D8, "ga_tail_address": 0x00E8,
        "event_b_base": 0x00F8, "device_table_base7": 0x0130, "device_specific_status": 0x0148, "msi_capability": 0x0158,
        "msi_mapping": 0x0168, "performance_optimisation": 0x016C, "x2apic_ga": 0x0180, "viommu_status": 0x0190,
        "extended_features2": 0x01A0, "marc3_length": 0x0258, "reserved": 0x1FF8, "status": 0x2020, "event_b_tail": 0x2078,
        "ppr_b_overflow_early": 0x2090,
    }  # fmt: skip
    assert {name: REGISTERS[name].offset for name in offsets} == offsets
    assert [ring_bytes(RING_BASE.make(Length=n)) for n in (7, 8, 15)] == [0, 0x1000, 0x80000]
    assert [Iommu({"ga_base": RING_BASE.make(Length=n)}).ring("ga").entries for n in (8, 12, 13)] == [512, 8192, 0]


def test_invalid_requests_are_named() -> None:
    """Table 64: a type of a translation request is another one."""
    kind = records.INVALID_DEVICE_REQUEST
    assert kind.describe(kind.make(Type=5)) == "Type=interrupt-with-IntCtl-abort"
    assert kind.describe(kind.make(Type=2, TR=1)) == "TR Type=PASID-without-guest-tables"


def test_what_a_write_does_to_a_register() -> None:
    status = REGISTERS["status"]
    assert status.written(0x1F, 0x3) == 0x1C, "1 clears"
    assert status.written(0x18, 0x18) == 0x18, "those that say what runs are not software's"
    table = REGISTERS["device_table_base"]
    assert table.written(0, (1 << 64) - 1) == 0x000F_FFFF_FFFF_F1FF
    assert table.written(0x5000_0000_1001, 0x2003, 0xFFFF_FFFF) == 0x5000_0000_2003, "half a register"
    assert REGISTERS["extended_features"].written(5, 0) == 5


def test_the_state_of_an_iommu() -> None:
    iommu = Iommu({"device_table_base": 0x8000_0001, "command_base": 0x9000 | 9 << 56, "command_tail": 0x40,
                   "command_head": 0x1FF0, "event_base": 7 << 56, "extended_features": EVERY_FEATURE})  # fmt: skip
    assert iommu.entry_address(0) == 0x8000_0000
    assert iommu.entry_address(255) == 0x8000_0000 + 255 * 32
    assert iommu.entry_address(256) is None
    ring = iommu.ring("command")
    assert (ring.entries, ring.size, ring.pending) == (512, 0x2000, 5)
    assert iommu.ring("event").entries == iommu.ring("event").pending == 0, "so short a ring is reserved"
    segmented = Iommu({"control": 1 << 34, "extended_features": FEATURES.make(DevTblSegSup=1), "device_table_base1": 0x5000})
    assert segmented.entry_address(0x8001) == 0x5020
    assert segmented.entry_address(0x8080) is None


@pytest.mark.parametrize("code", [EventCode.IO_PAGE_FAULT, EventCode.PAGE_TAB_HARDWARE_ERROR])
def test_a_pasid_in_the_place_of_the_domain_is_called_so(code: EventCode) -> None:
    assert "DomainID=0x7" in Event(code, 0x18, 0x1000, domain=7).describe()
    words = Event(code, 0x18, 0x1000, pasid=0x12345).describe()
    assert "PASID_15_0=0x2345" in words
    assert "DomainID" not in words
