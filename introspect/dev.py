"""The device exclusion vector (APM2 15.24; BIOS and kernel developer's guides of families 0Fh and 10h).

A bit for each 4 KiB page says whether devices are kept out.  No address is translated, reads and writes are not told apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from introspect.layout import Bits, Field, Structure, bit, bits
from introspect.pci import RequesterId
from introspect.runs import Spans, column, covered, gaps
from introspect.sources import Memory, Unreadable

__all__ = [
    "DEV", "DEV_BASE_HI", "DEV_BASE_LO", "DEV_CAP", "DEV_CR", "DEV_ERR_STATUS", "DEV_MAP", "PAGE", "REGISTERS", "SLB_SIZE",
    "SL_PROTECT", "SL_PROTECT_OFFSET", "Barrier", "DevFunction", "DevRegisters", "Domain", "denied_pages",
]  # fmt: skip

PAGE = 0x1000
SLB_SIZE = 0x10000
SL_PROTECT_OFFSET = 0x384
_REACH = 1 << 52
"""No system-physical address has more bits."""
_GIB4 = 4 << 30


class DEV_HEADER(Bits):
    ID = bits(7, 0)
    NEXT = bits(15, 8)
    TYPE = bits(18, 16)
    """0: a DEV; an IOMMU's has 3."""
    MCE_REPORTING = bit(20)
    INTERRUPT_REPORTING = bit(21)


class DEV_OP(Bits):
    INDEX = bits(7, 0)
    FUNCTION = bits(15, 8)


class DEV_BASE_LO(Bits):
    VALID = bit(0)
    PROTECT = bit(1)
    """Accesses beyond what the bitmap covers are denied."""
    SIZE = bits(6, 2)
    """It covers 4 GiB << SIZE."""
    BASE = bits(31, 12)


class DEV_BASE_HI(Bits):
    BASE = bits(7, 0)


class DEV_MAP(Bits):
    UNIT0 = bits(4, 0)
    VALID0 = bit(5)
    UNIT1 = bits(10, 6)
    VALID1 = bit(11)
    BUS = bits(19, 12)
    DOMAIN0 = bits(25, 20)
    DOMAIN1 = bits(31, 26)


class DEV_CAP(Bits):
    REVISION = bits(7, 0)
    DOMAINS = bits(15, 8)
    MAPS = bits(23, 16)


class DEV_CR(Bits):
    DEVEN = bit(0)
    MEM_CLR = bit(1)
    IODIS = bit(2)
    MCEEN = bit(3)
    INVD = bit(4)
    """Set to make the DEV forget what it has cached; clears itself."""
    SL_DEV_EN = bit(5)
    """Set by SKINIT: the secure loader's block is kept from all devices."""
    WALKPROBE = bit(6)


class DEV_ERR_STATUS(Bits):
    VALID = bit(31)


class SL_PROTECT(Bits):
    """Of families without a DEV: offset 384h of function 0 of the northbridge."""

    ENABLE = bit(0)


DEV = Structure(
    "DEV capability", 12, (Field("header", 0, 4, DEV_HEADER), Field("op", 4, 4, DEV_OP), Field("data", 8, 4))
)


class DevFunction(IntEnum):
    BASE_LO = 0
    BASE_HI = 1
    MAP = 2
    CAP = 3
    CR = 4
    ERR_STATUS = 5
    ERR_ADDR_LO = 6
    ERR_ADDR_HI = 7


REGISTERS: Mapping[DevFunction, type[Bits] | None] = {
    DevFunction.BASE_LO: DEV_BASE_LO, DevFunction.BASE_HI: DEV_BASE_HI, DevFunction.MAP: DEV_MAP, DevFunction.CAP: DEV_CAP,
    DevFunction.CR: DEV_CR, DevFunction.ERR_STATUS: DEV_ERR_STATUS, DevFunction.ERR_ADDR_LO: None, DevFunction.ERR_ADDR_HI: None,
}  # fmt: skip
"""What DEV_OP selects, by its function field; BASE_LO, BASE_HI and MAP are several, by its index."""


@dataclass(frozen=True, slots=True)
class Domain:
    """A protection domain: which bitmap says what its devices are denied."""

    number: int
    valid: bool
    protect: bool
    size: int
    """Bytes that the bitmap covers."""
    base: int

    @classmethod
    def decode(cls, number: int, low: int, high: int) -> Domain:
        size = _GIB4 << DEV_BASE_LO.get(low, "SIZE")
        base = DEV_BASE_HI.get(high, "BASE") << 32 | low & DEV_BASE_LO.BASE
        return cls(number, bool(low & DEV_BASE_LO.VALID), bool(low & DEV_BASE_LO.PROTECT), size, base)

    def bit_of(self, spa: int) -> tuple[int, int]:
        """The byte of memory and the bit in it that decide on a page."""
        page = spa // PAGE
        return self.base + page // 8, page % 8


@dataclass(frozen=True, slots=True)
class DevRegisters:
    """All of a DEV's registers."""

    base_lo: tuple[int, ...]
    base_hi: tuple[int, ...]
    maps: tuple[int, ...]
    cr: int
    err_status: int = 0
    err_addr: int = 0

    def domain(self, number: int) -> Domain:
        """A number that there is no domain of is one without protection."""
        if number >= len(self.base_lo):
            return Domain(number, False, False, 0, 0)
        return Domain.decode(number, self.base_lo[number], self.base_hi[number])

    def domain_of(self, requester: RequesterId) -> int:
        """By the first map that names the bus and the device; without one, 0."""
        for value in self.maps:
            if DEV_MAP.get(value, "BUS") != requester.bus:
                continue
            for n in "01":
                if DEV_MAP.get(value, f"VALID{n}") and DEV_MAP.get(value, f"UNIT{n}") == requester.device:
                    return DEV_MAP.get(value, f"DOMAIN{n}")
        return 0

    def mapped(self) -> list[tuple[int, int, int]]:
        """(bus, device, domain) of each valid half of a map."""
        return [
            (DEV_MAP.get(value, "BUS"), DEV_MAP.get(value, f"UNIT{n}"), DEV_MAP.get(value, f"DOMAIN{n}"))
            for value in self.maps for n in "01" if DEV_MAP.get(value, f"VALID{n}")
        ]  # fmt: skip


def denied_pages(memory: Memory, domain: Domain, end: int) -> list[tuple[int, int]]:
    """(first, end) addresses below `end` that are denied; what cannot be read of the bitmap denies."""
    found: list[tuple[int, int]] = []
    if not domain.valid:
        return found
    covered = min(domain.size, -(-end // PAGE) * PAGE)
    at, step = 0, PAGE * 8 * PAGE
    while at < covered:
        length = min(step, covered - at)
        count = length // PAGE
        try:
            raw = np.frombuffer(memory.read(domain.base + at // PAGE // 8, -(-count // 8)), np.uint8)
            flags = np.unpackbits(raw, bitorder="little")[:count]
        except Unreadable:
            flags = np.ones(count, np.uint8)
        edges = np.flatnonzero(np.diff(np.concatenate(([0], flags, [0]))))
        for first, last in edges.reshape(-1, 2).tolist():
            start, stop = at + first * PAGE, at + last * PAGE
            if found and found[-1][1] == start:
                found[-1] = (found[-1][0], stop)
            else:
                found.append((start, stop))
        at += length
    if domain.protect and end > domain.size:
        found.append((domain.size, end))
    return found


@dataclass(frozen=True, eq=False)
class Barrier:
    """What keeps devices from memory wherever an IOMMU lets them: a DEV, and the protection of a secure loader's block.

    `end` of RAM: bitmaps are not looked at beyond it. `dev` None: there is none. `block`: where SKINIT's is, if it is protected.
    """

    memory: Memory
    end: int
    dev: DevRegisters | None
    block: int | None = None

    @property
    def on(self) -> bool:
        """Whether the DEV denies anything."""
        return self.dev is not None and bool(self.dev.cr & DEV_CR.DEVEN)

    @property
    def apart(self) -> frozenset[int]:
        """DeviceIDs whose domain may not be 0, as all others' is."""
        if self.dev is None:
            return frozenset()
        return frozenset(bus << 8 | device << 3 | n for bus, device, _ in self.dev.mapped() for n in range(8))

    def domain_of(self, device: int) -> int:
        return self.dev.domain_of(RequesterId(device)) if self.dev is not None and self.on else 0

    def words(self, domain: int) -> str:
        """What confines a domain's devices; empty without a DEV."""
        if self.dev is None:
            return ""
        return f"DEV domain {domain}" if self.on else "the DEV is off"

    def left(self, domain: int) -> Spans | None:
        """The memory that devices of a domain reach; None for all of it."""
        denied = [] if self.block is None else [(self.block, self.block + SLB_SIZE)]
        if self.dev is not None and self.on:
            denied += denied_pages(self.memory, self.dev.domain(domain), self.end)
        if not denied:
            return None
        return gaps(covered(column(*(start for start, _ in denied)), column(*(end for _, end in denied))), _REACH)
