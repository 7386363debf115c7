"""The ACPI table that tells software of IOMMUs (AMD 48882, chapter 5): IVHD blocks of every type, and IVMD blocks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from struct import pack

from introspect.pci import RequesterId
from vmdbg.iommu.config import Reserved
from vmdbg.iommu.topology import Share
from vmdbg.platform import acpi

RANGE_START, RANGE_END, ALIAS_RANGE_START, SELECT, SPECIAL = 0x03, 0x04, 0x43, 0x02, 0x48
"""Types of device entries."""
IVHD_OLD, IVHD, IVHD_WIDE = KINDS = 0x10, 0x11, 0x40
IVMD_ALL, IVMD_SELECT, IVMD_RANGE = 0x20, 0x21, 0x22
UNITY, READ, WRITE, EXCLUSION = 1 << 0, 1 << 1, 1 << 2, 1 << 3
IOAPIC = 1
"""Variety of a special device."""
PASS_ALL = 0xD7
"""DTE settings of the I/O APIC: INIT, ExtINT, NMI, system management, LINT0 and LINT1 pass."""
IOTLB_SUPPORT, COHERENT, PREFETCH, PPR = 1 << 4, 1 << 5, 1 << 6, 1 << 7
"""Flags of an IVHD."""


@dataclass(frozen=True)
class Alias:
    """Devices first..last whose transactions carry `source`'s number."""

    first: RequesterId
    last: RequesterId
    source: RequesterId


@dataclass(frozen=True)
class UnitTable:
    """What the IVHD blocks of one IOMMU say of it."""

    function: RequesterId
    capability: int
    """Offset in its configuration space."""
    base: int
    features: int
    features2: int
    info: int = 0
    """MSI number and unit ID."""


@dataclass(frozen=True)
class Facts:
    """The whole table's: sizes in bits, the requester of the I/O APIC."""

    physical_bits: int
    virtual_bits: int
    ioapic: RequesterId
    ioapic_id: int = 0


def build(
    facts: Facts, units: Sequence[UnitTable], shares: Sequence[Share], aliases: Sequence[Alias] = (),
    reserved: Sequence[Reserved] = (), kinds: Sequence[int] = KINDS,
) -> bytes:  # fmt: skip
    """The IVRS.  Software takes the IVHD blocks of the highest type it knows, and no others; an IVMD is about the IVHD before it,
    and so follows each of those whose devices it concerns (5.2.2).

    IVinfo does not say that DMA is remapped before the system starts, since it is not (table 88).
    """
    five_levels = 3
    info = 1 | five_levels << 5 | facts.physical_bits << 8 | facts.virtual_bits << 15
    blocks = bytearray()
    for kind in kinds:
        for number, unit in enumerate(units):
            own = [share for share in shares if share.unit == number]
            blocks += _ivhd(kind, unit, b"".join(_entries(own, facts, aliases)))
            blocks += b"".join(_ivmd(one) for one in reserved if any(_overlap(one, share) for share in own))
    return acpi.table(b"IVRS", 2, pack("<IQ", info, 0) + blocks)


def _overlap(one: Reserved | Alias, share: Share) -> bool:
    return one.first <= share.last and share.first <= one.last


def _ivhd(kind: int, unit: UnitTable, entries: bytes) -> bytes:
    old = kind == IVHD_OLD
    head = pack(
        "<BBHHHQHHI", kind, IOTLB_SUPPORT | COHERENT | (PREFETCH | PPR if old else 0), (24 if old else 40) + len(entries),
        unit.function, unit.capability, unit.base, 0, unit.info, _old_features(unit.features) if old else 0,
    )  # fmt: skip
    return head + (b"" if old else pack("<QQ", unit.features, unit.features2)) + entries


def _old_features(features: int) -> int:
    """The features register in the layout of type 10h."""
    def field(low: int, size: int) -> int:
        return features >> low & (1 << size) - 1

    return (
        field(2, 1) | field(3, 1) << 1 | field(4, 1) << 2 | field(14, 2) << 3 | field(6, 1) << 5 | field(7, 1) << 6
        | field(8, 1) << 7 | field(32, 5) << 8 | field(12, 2) << 28 | field(10, 2) << 30
    )  # fmt: skip


def _entries(own: Sequence[Share], facts: Facts, aliases: Sequence[Alias]) -> Iterable[bytes]:
    """Each DeviceID once: what has an alias is in no other range (5.2.2.1, below table 107)."""
    def owned(requester: RequesterId) -> bool:
        return any(one.first <= requester <= one.last for one in own)

    for share in own:
        at = int(share.first)
        for alias in sorted((one for one in aliases if _overlap(one, share)), key=lambda one: one.first):
            yield from _range(at, alias.first - 1)
            at = max(at, alias.last + 1)
        yield from _range(at, share.last)
    for alias in aliases:
        if owned(alias.source):
            yield pack("<BHBBHB", ALIAS_RANGE_START, alias.first, 0, 0, alias.source, 0) + pack("<BHB", RANGE_END, alias.last, 0)
    if owned(facts.ioapic):
        yield pack("<BHBBHB", SPECIAL, 0, PASS_ALL, facts.ioapic_id, facts.ioapic, IOAPIC)


def _range(first: int, last: int) -> Iterable[bytes]:
    if first == last:
        yield pack("<BHB", SELECT, first, 0)
    elif first < last:
        yield pack("<BHB", RANGE_START, first, 0) + pack("<BHB", RANGE_END, last, 0)


def _ivmd(one: Reserved) -> bytes:
    everyone = (one.first, one.last) == (0, 0xFFFF)
    kind = IVMD_ALL if everyone else IVMD_SELECT if one.first == one.last else IVMD_RANGE
    flags = EXCLUSION if one.exclusion else UNITY | READ * one.read | WRITE * one.write
    first, last = (0, 0) if everyone else (one.first, one.last if kind == IVMD_RANGE else 0)
    return pack("<BBHHHQQQ", kind, flags, 32, first, last, 0, one.start, one.end - one.start)
