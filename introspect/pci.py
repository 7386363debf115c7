"""PCI as software sees it: requester IDs, configuration space, capabilities (PCI Local Bus 3.0, PCI Express Base)."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum

from introspect.layout import Bits, Buffer, Field, Structure, bit, bits

__all__ = [
    "ACS_CAPABILITY", "ATS_CAPABILITY", "ATS_CONTROL", "BRIDGE_CONTROL", "CAPABILITIES", "COMMAND", "EXTENDED_CAPABILITIES",
    "HEADER0", "HEADER1", "MSIX_CONTROL", "MSI_CONTROL", "PASID_CAPABILITY", "PASID_CONTROL", "PM_CONTROL", "PRI_CONTROL",
    "PRI_STATUS", "SECONDARY_STATUS", "STATUS", "Bar", "CapabilityId", "ExtendedId", "PageResponse", "RequesterId", "bars",
    "capabilities", "class_name", "describe_capability", "describe_extended", "extended_capabilities", "header_of", "windows",
]  # fmt: skip

_BDF = re.compile(r"(?:([0-9a-fA-F]{1,2}):)?([0-9a-fA-F]{1,2})\.([0-7])")


class RequesterId(int):
    """Who sends a transaction: bus 15:8, device 7:3, function 2:0.  The IOMMU calls it DeviceID."""

    @classmethod
    def make(cls, bus: int, device: int, function: int) -> "RequesterId":
        return cls(bus << 8 | device << 3 | function)

    @classmethod
    def parse(cls, text: str) -> "RequesterId | None":
        """Of "00:03.0" or "03.0"; None if it is neither."""
        match = _BDF.fullmatch(text)
        if match is None or int(match[2], 16) > 31:
            return None
        return cls.make(int(match[1] or "0", 16), int(match[2], 16), int(match[3]))

    @property
    def bus(self) -> int:
        return self >> 8

    @property
    def device(self) -> int:
        return self >> 3 & 31

    @property
    def function(self) -> int:
        return self & 7

    def __str__(self) -> str:
        return f"{self.bus:02x}:{self.device:02x}.{self.function}"


class COMMAND(Bits):
    IO = bit(0)
    MEMORY = bit(1)
    BUS_MASTER = bit(2)
    PARITY = bit(6)
    SERR = bit(8)
    INTX_DISABLE = bit(10)


class STATUS(Bits):
    INTERRUPT = bit(3)
    CAPABILITIES = bit(4)
    MASTER_PARITY = bit(8)
    SIGNALLED_TARGET_ABORT = bit(11)
    RECEIVED_TARGET_ABORT = bit(12)
    RECEIVED_MASTER_ABORT = bit(13)
    SIGNALLED_ERROR = bit(14)
    PARITY_ERROR = bit(15)


class SECONDARY_STATUS(Bits):
    MASTER_PARITY = bit(8)
    SIGNALLED_TARGET_ABORT = bit(11)
    RECEIVED_TARGET_ABORT = bit(12)
    RECEIVED_MASTER_ABORT = bit(13)
    RECEIVED_ERROR = bit(14)
    PARITY_ERROR = bit(15)


class BRIDGE_CONTROL(Bits):
    PARITY = bit(0)
    SERR = bit(1)
    ISA = bit(2)
    VGA = bit(3)
    BUS_RESET = bit(6)


class MSI_CONTROL(Bits):
    ENABLE = bit(0)
    CAPABLE = bits(3, 1)
    ENABLED = bits(6, 4)
    ADDRESS_64 = bit(7)
    MASKABLE = bit(8)


class MSIX_CONTROL(Bits):
    LAST = bits(10, 0)
    MASK = bit(14)
    ENABLE = bit(15)


class PM_CONTROL(Bits):
    STATE = bits(1, 0)
    NO_SOFT_RESET = bit(3)
    PME_ENABLE = bit(8)
    PME_STATUS = bit(15)


class ATS_CAPABILITY(Bits):
    QUEUE_DEPTH = bits(4, 0)
    """Invalidations that it takes at once; 0 is 32."""
    PAGE_ALIGNED = bit(5)
    GLOBAL_INVALIDATE = bit(6)


class ATS_CONTROL(Bits):
    STU = bits(4, 0)
    """Smallest translation unit: 4 KiB << n."""
    ENABLE = bit(15)


class PRI_CONTROL(Bits):
    ENABLE = bit(0)
    RESET = bit(1)


class PRI_STATUS(Bits):
    FAILURE = bit(0)
    UNEXPECTED = bit(1)
    STOPPED = bit(8)
    PASID_REQUIRED = bit(15)


class PASID_CAPABILITY(Bits):
    EXECUTE = bit(1)
    PRIVILEGED = bit(2)
    WIDTH = bits(12, 8)


class PASID_CONTROL(Bits):
    ENABLE = bit(0)
    EXECUTE = bit(1)
    PRIVILEGED = bit(2)


class ACS_CAPABILITY(Bits):
    SOURCE_VALIDATION = bit(0)
    TRANSLATION_BLOCKING = bit(1)
    REQUEST_REDIRECT = bit(2)
    COMPLETION_REDIRECT = bit(3)
    UPSTREAM_FORWARDING = bit(4)
    EGRESS_CONTROL = bit(5)
    DIRECT_TRANSLATED = bit(6)


class PageResponse(IntEnum):
    """To a page request (PCI Express Base, 10.4.2): all others are failures, too."""

    SUCCESS = 0
    INVALID = 1
    FAILURE = 15


_COMMON = (
    Field("vendor_id", 0x00, 2),
    Field("device_id", 0x02, 2),
    Field("command", 0x04, 2, COMMAND),
    Field("status", 0x06, 2, STATUS),
    Field("revision", 0x08, 1),
    Field("class_code", 0x09, 3),
    Field("cache_line_size", 0x0C, 1),
    Field("latency_timer", 0x0D, 1),
    Field("header_type", 0x0E, 1),
    Field("bist", 0x0F, 1),
    Field("capabilities", 0x34, 1),
    Field("interrupt_line", 0x3C, 1),
    Field("interrupt_pin", 0x3D, 1),
)

HEADER0 = Structure(
    "config space", 0x40,
    (
        *_COMMON,
        *(Field(f"bar{n}", 0x10 + 4 * n, 4) for n in range(6)),
        Field("cardbus_cis", 0x28, 4),
        Field("subsystem_vendor_id", 0x2C, 2),
        Field("subsystem_id", 0x2E, 2),
        Field("expansion_rom", 0x30, 4),
        Field("min_gnt", 0x3E, 1),
        Field("max_lat", 0x3F, 1),
    ),
)  # fmt: skip

HEADER1 = Structure(
    "config space of a bridge", 0x40,
    (
        *_COMMON,
        *(Field(f"bar{n}", 0x10 + 4 * n, 4) for n in range(2)),
        Field("primary_bus", 0x18, 1),
        Field("secondary_bus", 0x19, 1),
        Field("subordinate_bus", 0x1A, 1),
        Field("secondary_latency", 0x1B, 1),
        Field("io_base", 0x1C, 1),
        Field("io_limit", 0x1D, 1),
        Field("secondary_status", 0x1E, 2, SECONDARY_STATUS),
        Field("memory_base", 0x20, 2),
        Field("memory_limit", 0x22, 2),
        Field("prefetchable_base", 0x24, 2),
        Field("prefetchable_limit", 0x26, 2),
        Field("prefetchable_base_upper", 0x28, 4),
        Field("prefetchable_limit_upper", 0x2C, 4),
        Field("io_base_upper", 0x30, 2),
        Field("io_limit_upper", 0x32, 2),
        Field("expansion_rom", 0x38, 4),
        Field("bridge_control", 0x3E, 2, BRIDGE_CONTROL),
    ),
)  # fmt: skip


def header_of(config: Buffer) -> Structure:
    """The table of a function's header type."""
    return HEADER1 if config[0x0E] & 0x7F == 1 else HEADER0


class CapabilityId:
    """Those that have a meaning here; `CAPABILITIES` has the names of more."""

    PM, MSI, VENDOR, SECURE, EXPRESS, MSIX, AF = 0x01, 0x05, 0x09, 0x0F, 0x10, 0x11, 0x13


CAPABILITIES = {
    0x01: "power management", 0x02: "AGP", 0x03: "vital product data", 0x04: "slot identification", 0x05: "MSI", 0x07: "PCI-X",
    0x08: "HyperTransport", 0x09: "vendor-specific", 0x0D: "bridge subsystem ID", 0x0F: "secure device", 0x10: "PCI Express",
    0x11: "MSI-X", 0x12: "SATA", 0x13: "advanced features",
}  # fmt: skip

class ExtendedId:
    """Those that have a meaning here; `EXTENDED_CAPABILITIES` has the names of more."""

    ACS, ATS, PRI, PASID = 0x0D, 0x0F, 0x13, 0x1B


EXTENDED_CAPABILITIES = {
    0x01: "advanced error reporting", 0x03: "serial number", 0x0B: "vendor-specific", 0x0D: "access control", 0x0E: "ARI",
    0x0F: "ATS", 0x10: "SR-IOV", 0x13: "page requests", 0x15: "resizable BAR", 0x1B: "PASID", 0x1E: "L1 substates",
}  # fmt: skip

_CLASSES = {
    0x0100: "SCSI controller", 0x0106: "SATA controller", 0x0108: "NVM controller", 0x0180: "mass storage controller",
    0x0200: "Ethernet controller", 0x0300: "VGA controller", 0x0600: "host bridge", 0x0601: "ISA bridge", 0x0604: "PCI bridge",
    0x0680: "bridge", 0x0780: "communication controller", 0x0806: "IOMMU", 0x0880: "system peripheral",
    0x00FF: "unclassified device", 0xFF00: "unassigned class", 0x1000: "encryption controller",
}  # fmt: skip


def class_name(code: int) -> str:
    """Of a 24-bit class code."""
    return _CLASSES.get(code >> 8, f"class {code >> 8:04x}")


def capabilities(config: Buffer) -> Iterator[tuple[int, int]]:
    """(offset, ID) of each capability; a chain that loops or leaves the device's part of the space ends."""
    if not HEADER0.read(config, "status") & STATUS.CAPABILITIES:
        return
    at, seen = config[0x34] & 0xFC, set[int]()
    while 0x40 <= at < 0x100 and at not in seen and at + 2 <= len(config):
        seen.add(at)
        yield at, config[at]
        at = config[at + 1] & 0xFC


def extended_capabilities(config: Buffer) -> Iterator[tuple[int, int]]:
    """Likewise of the extended ones, from 100h on."""
    at, seen = 0x100, set[int]()
    while 0x100 <= at <= len(config) - 4 and at not in seen:
        seen.add(at)
        header = int.from_bytes(config[at : at + 4], "little")
        if header in (0, 0xFFFFFFFF):
            return
        yield at, header & 0xFFFF
        at = header >> 20 & 0xFFC


@dataclass(frozen=True, slots=True)
class Bar:
    """What a base address register says now; its size is not in it."""

    index: int
    kind: str
    """"memory" or "io"."""
    address: int
    wide: bool = False
    """64 bits: it takes two registers."""
    prefetchable: bool = False

    @property
    def words(self) -> str:
        return "I/O ports" if self.kind == "io" else f"memory{', 64 bit' * self.wide}{', prefetchable' * self.prefetchable}"


def bars(config: Buffer) -> list[Bar]:
    """Those that are not zero."""
    count, found, index = 2 if header_of(config) is HEADER1 else 6, [], 0
    while index < count:
        at = 0x10 + 4 * index
        value = int.from_bytes(config[at : at + 4], "little")
        wide = not value & 1 and value >> 1 & 3 == 2 and index + 1 < count
        if value & 1:
            found.append(Bar(index, "io", value & 0xFFFFFFFC))
        elif value:
            high = int.from_bytes(config[at + 4 : at + 8], "little") if wide else 0
            found.append(Bar(index, "memory", high << 32 | value & 0xFFFFFFF0, wide, bool(value & 8)))
        index += 1 + wide
    return found


def windows(config: Buffer) -> dict[str, tuple[int, int]]:
    """Of a bridge: (first, last) address of its io, memory and prefetchable windows; a window that is closed is left out."""
    value = {field.name: HEADER1.read(config, field.name) for field in HEADER1}
    wide_io, wide = value["io_base"] & 0xF == 1, value["prefetchable_base"] & 0xF == 1
    found = {
        "io": (
            (value["io_base"] & 0xF0) << 8 | (value["io_base_upper"] << 16) * wide_io,
            (value["io_limit"] & 0xF0) << 8 | 0xFFF | (value["io_limit_upper"] << 16) * wide_io,
        ),
        "memory": ((value["memory_base"] & 0xFFF0) << 16, (value["memory_limit"] & 0xFFF0) << 16 | 0xFFFFF),
        "prefetchable": (
            (value["prefetchable_base"] & 0xFFF0) << 16 | (value["prefetchable_base_upper"] << 32) * wide,
            (value["prefetchable_limit"] & 0xFFF0) << 16 | 0xFFFFF | (value["prefetchable_limit_upper"] << 32) * wide,
        ),
    }
    return {name: window for name, window in found.items() if window[0] <= window[1]}


def describe_capability(config: Sequence[int] | Buffer, at: int) -> str:
    """One capability in words."""
    data = bytes(config[at : at + 24]).ljust(24, b"\0")
    control = int.from_bytes(data[2:4], "little")
    dword = [int.from_bytes(data[n : n + 4], "little") for n in range(0, 24, 4)]
    match data[0]:
        case CapabilityId.MSI:
            wide = bool(control & MSI_CONTROL.ADDRESS_64)
            address = dword[1] | (dword[2] << 32 if wide else 0)
            value = (dword[3] if wide else dword[2]) & 0xFFFF
            state = "on" if control & MSI_CONTROL.ENABLE else "off"
            count = 1 << MSI_CONTROL.get(control, "CAPABLE")
            return f"{state}, {count} vector{'s' * (count > 1)}, address {address:#x}, data {value:#x}"
        case CapabilityId.MSIX:
            state = "masked" if control & MSIX_CONTROL.MASK else "on" if control & MSIX_CONTROL.ENABLE else "off"
            state = state if control & MSIX_CONTROL.ENABLE else "off"
            where = [f"BAR {dword[n] & 7} + {dword[n] & 0xFFFFFFF8:#x}" for n in (1, 2)]
            return f"{state}, {(control & MSIX_CONTROL.LAST) + 1} vectors, table at {where[0]}, pending bits at {where[1]}"
        case CapabilityId.PM:
            return f"D{dword[1] & 3}"
        case CapabilityId.EXPRESS:
            kinds = {0: "endpoint", 4: "root port", 9: "endpoint of the root complex"}
            reset = ", function-level reset" if dword[1] & 1 << 28 else ""
            return f"{kinds.get(control >> 4 & 15, f'type {control >> 4 & 15}')}{reset}"
        case _:
            return " ".join(f"{value:08x}" for value in dword[: max(1, min(6, (data[2] + 3) // 4 if data[0] == 9 else 2))])


def describe_extended(config: Buffer, at: int) -> str:
    """One extended capability in words."""
    words = [int.from_bytes(config[at + n : at + n + 2], "little") for n in range(0, 16, 2)]
    match words[0]:
        case ExtendedId.ACS:
            return ACS_CAPABILITY.describe(words[3]) or "off"
        case ExtendedId.ATS:
            unit = f", unit {4 << (words[3] & ATS_CONTROL.STU)} KiB" if words[3] & ATS_CONTROL.STU else ""
            depth = ATS_CAPABILITY.get(words[2], "QUEUE_DEPTH") or 32
            return f"{'on' if words[3] & ATS_CONTROL.ENABLE else 'off'}{unit}, takes {depth} invalidations at once"
        case ExtendedId.PRI:
            capacity, allocation = words[4] | words[5] << 16, words[6] | words[7] << 16
            state = PRI_STATUS.describe(words[3])
            most = f"{allocation} of {capacity} requests at once"
            return f"{'on' if words[2] & PRI_CONTROL.ENABLE else 'off'}, {most}{f', {state}' if state else ''}"
        case ExtendedId.PASID:
            may = PASID_CONTROL.describe(words[3] & ~PASID_CONTROL.ENABLE)
            state = "on" if words[3] & PASID_CONTROL.ENABLE else "off"
            return f"{state}, {PASID_CAPABILITY.get(words[2], 'WIDTH')} bits{f', {may}' if may else ''}"
        case _:
            return " ".join(f"{low | high << 16:08x}" for low, high in zip(words[2:6:2], words[3:6:2], strict=True))
