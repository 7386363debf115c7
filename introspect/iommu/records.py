"""What goes through the rings of an AMD IOMMU: commands, events, page requests, guest virtual APIC log (AMD 48882, 2.4-2.7).

Each record is one number, of 128 bits or (GA log) 64; `Bits` decodes, encodes and describes it. Bits 63:60 say what it is.
"""

from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

from introspect.layout import Bits, bit, bits

__all__ = [
    "COMMANDS", "EVENTS", "GA_RECORD", "GUEST_INTERRUPT", "INVALIDATE_EVERYTHING", "INVALID_PPR_REQUEST", "PAGE_REQUEST",
    "PPR_RECORD", "CommandCode", "Event", "EventCode", "RecordType", "command_of", "event_of", "invalidated_range",
]  # fmt: skip

_CODE = bits(63, 60)
_ADDRESS_HIGH = bits(127, 76)
"""Address bits 63:12 of an invalidation."""


class CommandCode(IntEnum):
    COMPLETION_WAIT = 1
    INVALIDATE_DEVTAB_ENTRY = 2
    INVALIDATE_IOMMU_PAGES = 3
    INVALIDATE_IOTLB_PAGES = 4
    INVALIDATE_INTERRUPT_TABLE = 5
    PREFETCH_IOMMU_PAGES = 6
    COMPLETE_PPR_REQUEST = 7
    INVALIDATE_IOMMU_ALL = 8


class COMPLETION_WAIT(Bits):
    Store = bit(0)
    Interrupt = bit(1)
    Flush = bit(2)
    StoreAddress = bits(51, 3)
    """Address bits 51:3."""
    code = _CODE
    StoreData = bits(127, 64)


class INVALIDATE_DEVTAB_ENTRY(Bits):
    DeviceID = bits(15, 0)
    code = _CODE


class INVALIDATE_IOMMU_PAGES(Bits):
    PASID = bits(19, 0)
    DomainID = bits(47, 32)
    code = _CODE
    S = bit(64)
    PDE = bit(65)
    GN = bit(66)
    Address = _ADDRESS_HIGH


class INVALIDATE_IOTLB_PAGES(Bits):
    DeviceID = bits(15, 0)
    PASID_15_8 = bits(23, 16)
    MaxPend = bits(31, 24)
    QueueID = bits(47, 32)
    PASID_7_0 = bits(55, 48)
    PASID_19_16 = bits(59, 56)
    code = _CODE
    S = bit(64)
    GN = bit(66)
    Type = bits(69, 68)
    """With InvIotlbTypeSup; else it must be 0."""
    Address = _ADDRESS_HIGH


class INVALIDATE_INTERRUPT_TABLE(Bits):
    DeviceID = bits(15, 0)
    code = _CODE


class PREFETCH_IOMMU_PAGES(Bits):
    """PASID is of no use: GN is ignored, and guests' translations are not prefetched."""

    DeviceID = bits(15, 0)
    PFCount = bits(31, 24)
    """Translations, each of the size that S says; 0 is 1."""
    PASID = bits(51, 32)
    code = _CODE
    S = bit(64)
    GN = bit(66)
    Inval = bit(68)
    Address = _ADDRESS_HIGH


class COMPLETE_PPR_REQUEST(Bits):
    DeviceID = bits(15, 0)
    PASID = bits(51, 32)
    code = _CODE
    GN = bit(66)
    CompletionTag = bits(111, 96)
    """The page request group of the request in 8:0, the response in 15:12: 0 success, 1 invalid, 15 failure. Not checked."""


class INVALIDATE_IOMMU_ALL(Bits):
    code = _CODE


class RecordType(NamedTuple):
    """One kind of record: its name, and its fields; every other bit is reserved."""

    code: int
    bits: type[Bits]
    known_as: str = ""

    @property
    def name(self) -> str:
        return self.known_as or self.bits.__name__


COMMANDS: dict[int, RecordType] = {
    code: RecordType(code, table)
    for code, table in (
        (CommandCode.COMPLETION_WAIT, COMPLETION_WAIT),
        (CommandCode.INVALIDATE_DEVTAB_ENTRY, INVALIDATE_DEVTAB_ENTRY),
        (CommandCode.INVALIDATE_IOMMU_PAGES, INVALIDATE_IOMMU_PAGES),
        (CommandCode.INVALIDATE_IOTLB_PAGES, INVALIDATE_IOTLB_PAGES),
        (CommandCode.INVALIDATE_INTERRUPT_TABLE, INVALIDATE_INTERRUPT_TABLE),
        (CommandCode.PREFETCH_IOMMU_PAGES, PREFETCH_IOMMU_PAGES),
        (CommandCode.COMPLETE_PPR_REQUEST, COMPLETE_PPR_REQUEST),
        (CommandCode.INVALIDATE_IOMMU_ALL, INVALIDATE_IOMMU_ALL),
    )
}


def command_of(record: int) -> RecordType | None:
    """What kind of command a 128-bit record is; None for an unknown opcode."""
    return COMMANDS.get(record >> 60 & 15)


INVALIDATE_EVERYTHING = 0x7FFF_FFFF_FFFF_F000
"""With S, this address means all pages."""


def invalidated_range(address: int, size: bool) -> tuple[int, int]:
    """(first, end) that the address (bits 63:12 in place) and the S bit of an invalidation cover (2.4).

    With S, the first zero bit from bit 12 up gives the size, as in a leaf with NextLevel 7.
    """
    page = address & ~0xFFF
    if not size:
        return page, page + 0x1000
    if page == INVALIDATE_EVERYTHING:
        return 0, 1 << 64
    above = page >> 12
    ones = (~above & above + 1).bit_length() - 1
    length = 1 << 13 + ones
    if length >= 1 << 64:
        return 0, 1 << 64
    start = page & -length
    return start, start + length


class EventCode(IntEnum):
    ILLEGAL_DEV_TABLE_ENTRY = 1
    IO_PAGE_FAULT = 2
    DEV_TAB_HARDWARE_ERROR = 3
    PAGE_TAB_HARDWARE_ERROR = 4
    ILLEGAL_COMMAND_ERROR = 5
    COMMAND_HARDWARE_ERROR = 6
    IOTLB_INV_TIMEOUT = 7
    INVALID_DEVICE_REQUEST = 8
    INVALID_PPR_REQUEST = 9
    EVENT_COUNTER_ZERO = 10
    GUEST_EVENT_FAULT = 11
    VIOMMU_HARDWARE_ERROR = 12
    RMP_PAGE_FAULT = 13
    RMP_HARDWARE_ERROR = 14


class _DeviceEvent(Bits):
    """What most events begin with."""

    DeviceID = bits(15, 0)
    code = _CODE
    Address = bits(127, 64)


class _DomainEvent(_DeviceEvent):
    """With the domain of the request, or in its place PASID 15:0."""

    DomainID = bits(47, 32)
    """PASID 15:0 with GN."""
    GN = bit(48)

    @classmethod
    def names(cls, value: int) -> list[str]:
        words = super().names(value)
        if not value & cls.GN:
            return words
        return [f"PASID_15_0={word.removeprefix('DomainID=')}" if word.startswith("DomainID=") else word for word in words]


class ILLEGAL_DEV_TABLE_ENTRY(_DeviceEvent):
    PASID_19_16 = bits(19, 16)
    PASID_15_0 = bits(47, 32)
    GN = bit(48)
    I = bit(51)  # noqa: E741
    RW = bit(53)
    RZ = bit(55)
    TR = bit(56)


class IO_PAGE_FAULT(_DomainEvent):
    PASID_19_16 = bits(19, 16)
    NX = bit(49)
    US = bit(50)
    I = bit(51)  # noqa: E741
    PR = bit(52)
    RW = bit(53)
    PE = bit(54)
    RZ = bit(55)
    TR = bit(56)


class DEV_TAB_HARDWARE_ERROR(_DeviceEvent):
    I = bit(51)  # noqa: E741
    RW = bit(53)
    TR = bit(56)
    Type = bits(58, 57)

    meanings = {"Type": {1: "master-abort", 2: "target-abort", 3: "data-error"}}  # noqa: RUF012


class PAGE_TAB_HARDWARE_ERROR(_DomainEvent):
    """There is no room for more of a PASID (2.5.5, table 60)."""

    I = bit(51)  # noqa: E741
    RW = bit(53)
    TR = bit(56)
    Type = bits(58, 57)

    meanings = DEV_TAB_HARDWARE_ERROR.meanings


class ILLEGAL_COMMAND_ERROR(Bits):
    code = _CODE
    Address = bits(127, 64)


class COMMAND_HARDWARE_ERROR(Bits):
    Type = bits(58, 57)
    code = _CODE
    Address = bits(127, 64)

    meanings = DEV_TAB_HARDWARE_ERROR.meanings


class IOTLB_INV_TIMEOUT(_DeviceEvent):
    pass


class INVALID_DEVICE_REQUEST(_DeviceEvent):
    PASID_19_16 = bits(19, 16)
    PASID_15_0 = bits(47, 32)
    GN = bit(48)
    US = bit(49)
    TR = bit(56)
    Type = bits(59, 57)

    meanings = {  # noqa: RUF012 - table 64; of a translation request (TR) they are others
        "Type": {
            0: "not-a-posted-write-in-interrupt-range", 1: "pretranslated-with-I-or-V-clear", 2: "port-io-with-IoCtl-abort",
            3: "posted-write-in-sysmgt-range", 4: "read-in-sysmgt-range-or-PASID-without-guest-tables",
            5: "interrupt-with-IntCtl-abort", 6: "posted-write-in-reserved-interrupt-range", 7: "special-range-with-TV-clear",
        },
    }  # fmt: skip
    _translation_requests = {0: "I-or-V-or-TV-clear", 1: "special-range", 2: "PASID-without-guest-tables"}  # noqa: RUF012

    @classmethod
    def names(cls, value: int) -> list[str]:
        words = super().names(value)
        if not value & cls.TR:
            return words
        kind = cls.get(value, "Type")
        named = cls._translation_requests.get(kind, f"{kind:#x}")
        return [f"Type={named}" if word.startswith("Type=") else word for word in words]


class INVALID_PPR_REQUEST(_DeviceEvent):
    """PASID and tag are where the page request has them. RX: it was a COMPLETE_PPR_REQUEST, at the address."""

    PASID_15_0 = bits(31, 16)
    PPRTag = bits(41, 32)
    PASID_19_16 = bits(45, 42)
    RX = bit(48)
    NX = bit(49)
    RP = bit(50)
    WP = bit(53)
    US = bit(54)
    GN = bit(57)


class EVENT_COUNTER_ZERO(Bits):
    code = _CODE
    CounterNote_51_32 = bits(83, 64)
    CounterNote_31_0 = bits(127, 96)


class GUEST_EVENT_FAULT(Bits):
    """The guest's event is the next record."""

    GuestID = bits(47, 32)
    RZ = bit(48)
    code = _CODE


class VIOMMU_HARDWARE_ERROR(Bits):
    GuestID = bits(15, 0)
    Src = bits(17, 16)
    VNR = bit(27)
    VEvent = bit(29)
    VPpr = bit(30)
    VCmd = bit(31)
    I = bit(51)  # noqa: E741
    Rst = bit(52)
    RW = bit(53)
    Type = bits(58, 57)
    code = _CODE
    Vld = bit(64)
    Address_63_2 = bits(127, 66)

    meanings = DEV_TAB_HARDWARE_ERROR.meanings | {
        "Src": {0: "MMIO", 1: "DeviceID-table", 2: "DomainID-table", 3: "private-memory"},
    }


class _RmpEvent(_DeviceEvent):
    VNR = bit(27)
    VEvent = bit(29)
    VPpr = bit(30)
    VCmd = bit(31)


class RMP_PAGE_FAULT(_RmpEvent):
    ASID_MISMATCH = bit(17)
    PAGE_SIZE_MISMATCH = bit(18)
    PAGE_LOCKED = bit(19)
    PAGE_IMMUTABLE = bit(21)
    NX = bit(49)
    US = bit(50)
    INT = bit(51)
    C = bit(52)
    RW = bit(53)
    SPA = bit(54)
    AT = bits(56, 55)
    MMIO = bit(57)
    CP = bit(58)
    T = bit(59)

    meanings = {"AT": {0: "untranslated", 1: "translation", 2: "pretranslated"}}  # noqa: RUF012


class RMP_HARDWARE_ERROR(_RmpEvent):
    INT = bit(51)
    MMIO = bit(52)
    RW = bit(53)
    AT = bits(56, 55)
    Type = bits(58, 57)
    T = bit(59)

    meanings = DEV_TAB_HARDWARE_ERROR.meanings | RMP_PAGE_FAULT.meanings


EVENTS: dict[int, RecordType] = {
    code: RecordType(code, table)
    for code, table in (
        (EventCode.ILLEGAL_DEV_TABLE_ENTRY, ILLEGAL_DEV_TABLE_ENTRY),
        (EventCode.IO_PAGE_FAULT, IO_PAGE_FAULT),
        (EventCode.DEV_TAB_HARDWARE_ERROR, DEV_TAB_HARDWARE_ERROR),
        (EventCode.PAGE_TAB_HARDWARE_ERROR, PAGE_TAB_HARDWARE_ERROR),
        (EventCode.ILLEGAL_COMMAND_ERROR, ILLEGAL_COMMAND_ERROR),
        (EventCode.COMMAND_HARDWARE_ERROR, COMMAND_HARDWARE_ERROR),
        (EventCode.IOTLB_INV_TIMEOUT, IOTLB_INV_TIMEOUT),
        (EventCode.INVALID_DEVICE_REQUEST, INVALID_DEVICE_REQUEST),
        (EventCode.INVALID_PPR_REQUEST, INVALID_PPR_REQUEST),
        (EventCode.EVENT_COUNTER_ZERO, EVENT_COUNTER_ZERO),
        (EventCode.GUEST_EVENT_FAULT, GUEST_EVENT_FAULT),
        (EventCode.VIOMMU_HARDWARE_ERROR, VIOMMU_HARDWARE_ERROR),
        (EventCode.RMP_PAGE_FAULT, RMP_PAGE_FAULT),
        (EventCode.RMP_HARDWARE_ERROR, RMP_HARDWARE_ERROR),
    )
}


def event_of(record: int) -> RecordType | None:
    """What kind of event a 128-bit record is; None for an unknown code."""
    return EVENTS.get(record >> 60 & 15)


_FLAGS = ("NX", "US", "I", "PR", "RW", "PE", "RZ", "TR")
_RESERVED_ADDRESS = {
    EventCode.ILLEGAL_DEV_TABLE_ENTRY: 3, EventCode.PAGE_TAB_HARDWARE_ERROR: 7, EventCode.DEV_TAB_HARDWARE_ERROR: 15,
}  # fmt: skip
"""Address bits that an event does not have (2.5.2-2.5.5, figures 55, 57 and 58)."""
_PRETRANSLATED, _INTERRUPT_DENIED, _POSTED_WRITES = 1, 5, (3, 5, 6)
"""Types of INVALID_DEVICE_REQUEST, which has neither I nor RW (2.5.9, table 64)."""


def _low(kind: RecordType) -> str:
    """The field that has PASID 15:0 with GN."""
    return "PASID_15_0" if "PASID_15_0" in kind.bits.fields else "DomainID"


@dataclass(frozen=True, slots=True)
class Event:
    """An event as the hardware logs it. `flags`: names of `_FLAGS`; GN is set for a `pasid`, which then is where `domain` was.

    Other fields that some kinds have are lost.
    """

    code: EventCode
    device: int
    address: int
    flags: frozenset[str] = frozenset()
    domain: int = 0
    pasid: int | None = None
    type: int = 0

    def encode(self) -> int:
        """The 128-bit record."""
        kind = EVENTS[self.code]
        value = self.code << 60 | (self.address & (1 << 64) - 1 & ~_RESERVED_ADDRESS.get(self.code, 0)) << 64
        if "DeviceID" in kind.bits.fields:
            value |= self.device
        if self.pasid is not None and "GN" in kind.bits.fields:
            parts = {"GN": 1, "PASID_19_16": self.pasid >> 16, _low(kind): self.pasid & 0xFFFF}
            value |= kind.bits.make(**{name: part for name, part in parts.items() if name in kind.bits.fields})
        elif "DomainID" in kind.bits.fields:
            value |= self.domain << 32
        for name in self.flags:
            value |= kind.bits.fields.get(name, 0)
        if "Type" in kind.bits.fields:
            value |= self.type << 57
        return value

    @property
    def interrupt(self) -> bool:
        """Whether it was an interrupt request."""
        return "I" in self.flags or (self._invalid_request and self.type == _INTERRUPT_DENIED)

    @property
    def write(self) -> bool:
        """Whether it was a write, as far as the event tells."""
        return "RW" in self.flags or (self._invalid_request and self.type in _POSTED_WRITES)

    @property
    def pretranslated(self) -> bool:
        """Whether the request had a translated address, as far as the event tells."""
        return self._invalid_request and self.type == _PRETRANSLATED

    @property
    def _invalid_request(self) -> bool:
        return self.code == EventCode.INVALID_DEVICE_REQUEST and "TR" not in self.flags

    @classmethod
    def decode(cls, record: int) -> "Event | None":
        """Of a record; None for an unknown code."""
        kind = event_of(record)
        if kind is None:
            return None
        fields = {name: kind.bits.get(record, name) for name in kind.bits.fields}
        guest = bool(fields.get("GN"))
        low = fields.get(_low(kind), 0)
        return cls(
            EventCode(kind.code), fields.get("DeviceID", 0), record >> 64, frozenset(name for name in _FLAGS if fields.get(name)),
            0 if guest else fields.get("DomainID", 0), fields.get("PASID_19_16", 0) << 16 | low if guest else None,
            fields.get("Type", 0),
        )  # fmt: skip

    def describe(self) -> str:
        return EVENTS[self.code].bits.describe(self.encode() & ~_CODE)


class PPR_RECORD(Bits):
    """Peripheral page request log entry (2.6.3): code 1 is PAGE_SERVICE_REQUEST."""

    DeviceID = bits(15, 0)
    PASID_15_0 = bits(31, 16)
    PPRTag = bits(41, 32)
    """The last one of its group in bit 9, the group in 8:0."""
    PASID_19_16 = bits(45, 42)
    NX = bit(49)
    RP = bit(50)
    WP = bit(53)
    US = bit(54)
    RZ = bit(55)
    GN = bit(56)
    code = _CODE
    Address = bits(127, 64)


class GA_RECORD(Bits):
    """Guest virtual APIC log entry, 64 bits (2.7.3): code 1 is GA_GUEST_NR."""

    GATag = bits(31, 0)
    DeviceID = bits(47, 32)
    code = _CODE


PAGE_REQUEST = RecordType(1, PPR_RECORD, "PAGE_SERVICE_REQUEST")
"""The only kind in its log (2.6.3)."""
GUEST_INTERRUPT = RecordType(1, GA_RECORD, "GA_GUEST_NR")
"""Likewise (2.7.3)."""
