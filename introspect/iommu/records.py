"""What goes through the rings of an AMD IOMMU: commands, events, page requests, guest virtual APIC log (AMD 48882, 2.4-2.8).

Each record is one number, of 128 bits or (GA log) 64; `Bits` decodes, encodes and describes it. Bits 63:60 say what it is.
"""

from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

from introspect.layout import Bits, bit, bits

__all__ = [
    "COMMANDS", "EVENTS", "GA_RECORD", "INVALIDATE_EVERYTHING", "PPR_RECORD", "CommandCode", "Event", "EventCode", "RecordType",
    "command_of", "event_of", "invalidated_range",
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
    PASID_7_0 = bits(23, 16)
    MaxPend = bits(31, 24)
    QueueID = bits(47, 32)
    PASID_19_8 = bits(59, 48)
    code = _CODE
    S = bit(64)
    GN = bit(66)
    Type = bits(69, 68)
    Address = _ADDRESS_HIGH


class INVALIDATE_INTERRUPT_TABLE(Bits):
    DeviceID = bits(15, 0)
    code = _CODE


class PREFETCH_IOMMU_PAGES(Bits):
    DeviceID = bits(15, 0)
    PASID_7_0 = bits(23, 16)
    PFCount = bits(31, 24)
    DomainID = bits(47, 32)
    PASID_19_8 = bits(59, 48)
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
    """The tag of the request in 9:0, the response in 15:12: 0 success, 1 invalid, 15 failure."""


class INVALIDATE_IOMMU_ALL(Bits):
    code = _CODE


class RecordType(NamedTuple):
    """One kind of record: its name, and its fields; every other bit is reserved."""

    code: int
    bits: type[Bits]

    @property
    def name(self) -> str:
        return self.bits.__name__


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
    RMP_PAGE_FAULT = 13
    RMP_HARDWARE_ERROR = 14


class _DeviceEvent(Bits):
    """What most events begin with."""

    DeviceID = bits(15, 0)
    code = _CODE
    Address = bits(127, 64)


class ILLEGAL_DEV_TABLE_ENTRY(_DeviceEvent):
    PASID_19_16 = bits(19, 16)
    PASID_15_0 = bits(47, 32)
    GN = bit(48)
    I = bit(51)  # noqa: E741
    RW = bit(53)
    RZ = bit(55)
    TR = bit(56)


class IO_PAGE_FAULT(_DeviceEvent):
    PASID_19_16 = bits(19, 16)
    DomainID = bits(47, 32)
    """PASID 15:0 with GN."""
    GN = bit(48)
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


class PAGE_TAB_HARDWARE_ERROR(_DeviceEvent):
    DomainID = bits(47, 32)
    """PASID 15:0 with GN; there is no room for more of it (2.5.5, table 60)."""
    GN = bit(48)
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

    meanings = {  # noqa: RUF012
        "Type": {
            0: "read-in-interrupt-range", 1: "pretranslated", 2: "port-io-with-IoCtl-abort", 3: "write-in-sysmgt-range",
            4: "read-in-sysmgt-range-or-PASID", 5: "interrupt-with-IntCtl-abort", 6: "write-in-reserved-interrupt-range",
            7: "special-range-with-TV-clear",
        },
    }  # fmt: skip
    """Of accesses (2.5.9, table 64)."""

    @classmethod
    def names(cls, value: int) -> list[str]:
        """Of translation requests (TR) types mean other things: 0 that I, V or TV is clear, 1 a special range, 2 a PASID."""
        words = super().names(value & ~cls.Type if value & cls.TR else value)
        return [*words, f"Type={cls.get(value, 'Type'):#x}"] if value & cls.TR else words


class INVALID_PPR_REQUEST(_DeviceEvent):
    """PASID and tag are where the page request has them."""

    PASID_15_0 = bits(31, 16)
    PPRTag = bits(41, 32)
    PASID_19_16 = bits(45, 42)
    Flags = bits(59, 48)


class EVENT_COUNTER_ZERO(Bits):
    code = _CODE
    Address = bits(127, 64)


class GUEST_EVENT_FAULT(_DeviceEvent):
    pass


class RMP_PAGE_FAULT(_DeviceEvent):
    pass


class RMP_HARDWARE_ERROR(_DeviceEvent):
    pass


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


@dataclass(frozen=True, slots=True)
class Event:
    """An event as the hardware logs it. `flags`: names of `_FLAGS`; GN is set for a `pasid`, which then is where `domain` was."""

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
            value |= kind.bits.fields["GN"] | (self.pasid & 0xFFFF) << 32
            value |= self.pasid >> 16 << 16 & kind.bits.fields.get("PASID_19_16", 0)
        elif "DomainID" in kind.bits.fields:
            value |= self.domain << 32
        for name in self.flags:
            value |= kind.bits.fields.get(name, 0)
        if "Type" in kind.bits.fields:
            value |= self.type << 57
        return value

    @classmethod
    def decode(cls, record: int) -> "Event | None":
        """Of a record; None for an unknown code."""
        kind = event_of(record)
        if kind is None:
            return None
        fields = {name: kind.bits.get(record, name) for name in kind.bits.fields}
        guest = bool(fields.get("GN"))
        low = fields.get("DomainID", fields.get("PASID_15_0", 0))
        return cls(
            EventCode(kind.code), fields.get("DeviceID", 0), fields["Address"],
            frozenset(name for name in _FLAGS if fields.get(name)),
            0 if guest else fields.get("DomainID", 0), fields.get("PASID_19_16", 0) << 16 | low if guest else None,
            fields.get("Type", 0),
        )  # fmt: skip

    def describe(self) -> str:
        return EVENTS[self.code].bits.describe(self.encode() & ~_CODE)


class PPR_RECORD(Bits):
    """Peripheral page request log entry (2.6)."""

    DeviceID = bits(15, 0)
    PASID_15_0 = bits(31, 16)
    PPRTag = bits(41, 32)
    PASID_19_16 = bits(45, 42)
    X = bit(49)
    R = bit(50)
    W = bit(53)
    US = bit(54)
    RZ = bit(55)
    GN = bit(56)
    code = _CODE
    Address = bits(127, 64)


class GA_RECORD(Bits):
    """Guest virtual APIC log entry, 64 bits (2.8): code 1 is GUEST_NR."""

    GATag = bits(31, 0)
    DeviceID = bits(47, 32)
    code = _CODE
