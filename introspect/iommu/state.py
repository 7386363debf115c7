"""The registers of one IOMMU as translation and rings need them: a value, to be made anew when a register changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from introspect.iommu.registers import (
    CONTROL,
    EXCLUSION_BASE,
    FEATURES,
    FEATURES2,
    LONGEST_GA_LOG,
    RING_BASE,
    TABLE_BASE,
    ring_bytes,
)
from introspect.iommu.structures import DTE_SIZE, PTE_LEAF_RESERVED, PTE_MIGRATION
from introspect.layout import bits

__all__ = ["EVERY_FEATURE", "RINGS", "Iommu", "Ring", "RingType"]

EVERY_FEATURE = FEATURES.make(
    PreFSup=1, PPRSup=1, XTSup=1, NXSup=1, GTSup=1, IASup=1, GASup=1, HATS=2, GATS=1, GLXSup=2, GAMSup=1, PASMax=19, USSup=1,
    DevTblSegSup=3, GIoSup=1, HASup=1, EPHSup=1, AttrFWSup=1, HDSup=1,
)  # fmt: skip
"""What a dump is read with, where nothing says which features the hardware had."""


class Ring(NamedTuple):
    """One ring: `head` and `tail` in bytes; `entries` of `entry_size` bytes each."""

    name: str
    base: int
    entries: int
    entry_size: int
    head: int
    tail: int

    @property
    def size(self) -> int:
        return self.entries * self.entry_size

    @property
    def pending(self) -> int:
        """Entries from head to tail."""
        return (self.tail - self.head) % self.size // self.entry_size if self.size else 0


class RingType(NamedTuple):
    name: str
    base: str
    head: str
    tail: str
    entry_size: int
    longest: int = 15
    """Of the base register's Length."""

    def size(self, base: int) -> int:
        """Bytes, by the base register; 0 for a reserved length."""
        return ring_bytes(base, self.longest)


RINGS = {
    one.name: one
    for one in (
        RingType("command", "command_base", "command_head", "command_tail", 16),
        RingType("event", "event_base", "event_head", "event_tail", 16),
        RingType("ppr", "ppr_base", "ppr_head", "ppr_tail", 16),
        RingType("ga", "ga_base", "ga_head", "ga_tail", 8, LONGEST_GA_LOG),
    )
}


@dataclass(frozen=True, slots=True)
class Iommu:
    """One IOMMU. `registers` by the names of `registers.REGISTERS`; those that are missing are 0.

    `manages`: the (first, last) DeviceIDs that it translates for, by its PCI range register or the IVRS.
    """

    registers: Mapping[str, int]
    index: int = 0
    manages: tuple[tuple[int, int], ...] = ((0, 0xFFFF),)
    device: int | None = None
    """Its own DeviceID, where it is a PCI function that is known."""
    window: int | None = None
    """System-physical address of its MMIO window, if that is known."""
    control: int = field(init=False)
    features: int = field(init=False)
    features2: int = field(init=False)
    tables: tuple[tuple[int, int], ...] = field(init=False, repr=False)
    """(address, entries) of each segment of the device table."""
    exclusion: tuple[int, int, bool] | None = field(init=False, repr=False)
    """(first, last address, whether for all devices); None while it is off."""
    host_levels: int = field(init=False, repr=False)
    """Levels of host tables that it walks at most; 0 for none."""

    def __post_init__(self) -> None:
        get = self.registers.get
        control, features = get("control", 0), get("extended_features", 0)
        segments = min(CONTROL.get(control, "DevTblSegEn"), FEATURES.get(features, "DevTblSegSup"), 3)
        names = ("device_table_base", *(f"device_table_base{n}" for n in range(1, 1 << segments)))
        tables = tuple(
            (value & TABLE_BASE.Base, (TABLE_BASE.get(value, "Size") + 1) * (0x1000 // DTE_SIZE))
            for value in (get(name, 0) for name in names)
        )
        base, exclusion = get("exclusion_base", 0), None
        if base & EXCLUSION_BASE.ExEn:
            limit = get("exclusion_limit", 0) & bits(51, 12) | 0xFFF
            exclusion = base & EXCLUSION_BASE.Base, limit, bool(base & EXCLUSION_BASE.Allow)
        hats = FEATURES.get(features, "HATS")
        for name, value in (
            ("control", control), ("features", features), ("features2", get("extended_features2", 0)), ("tables", tables),
            ("exclusion", exclusion), ("host_levels", 0 if hats == 3 else 4 + hats),
        ):  # fmt: skip
            object.__setattr__(self, name, value)

    @property
    def enabled(self) -> bool:
        return bool(self.control & CONTROL.IommuEn)

    @property
    def leaf_reserved(self) -> int:
        """Reserved bits of a host leaf (2.2.3, table 17; 3.4.13)."""
        if self.features2 & FEATURES2.HpteRsvdBitsMode:
            return 0
        migration = self.features2 & FEATURES2.TMPMSup and self.control & CONTROL.TMPMEn
        return PTE_LEAF_RESERVED & ~PTE_MIGRATION if migration else PTE_LEAF_RESERVED

    @property
    def segment_bits(self) -> int:
        return len(self.tables).bit_length() - 1

    def entry_address(self, device: int) -> int | None:
        """System-physical address of a device's DTE; None beyond the end of the table."""
        low = 16 - self.segment_bits
        base, entries = self.tables[device >> low]
        index = device & (1 << low) - 1
        return base + index * DTE_SIZE if index < entries else None

    def ring(self, name: str) -> Ring:
        """"command", "event", "ppr" or "ga"."""
        kind = RINGS[name]
        value = self.registers.get(kind.base, 0)
        head, tail = self.registers.get(kind.head, 0), self.registers.get(kind.tail, 0)
        count = kind.size(value) // kind.entry_size
        size = kind.size(value) or 1
        return Ring(name, value & RING_BASE.Base, count, kind.entry_size, head % size, tail % size)

    def handles(self, device: int) -> bool:
        return any(first <= device <= last for first, last in self.manages)
