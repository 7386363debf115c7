"""Everything that a device reaches, as stretches: the walk of `introspect.iommu.walk`, of many tables at once.

tests/introspect/iommu/test_space.py compares the two. Work is bounded: levels only descend, and there is a limit on entries.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from introspect.dimension import NO_TABLES, NOWHERE, Dimension, Limits, Progress, TableRows
from introspect.iommu.checks import dma_problem
from introspect.iommu.registers import CONTROL, FEATURES, FEATURES2
from introspect.iommu.state import Iommu
from introspect.iommu.structures import DTE, PTE, PTE_TABLE_RESERVED, host_root
from introspect.iommu.walk import (
    HYPERTRANSPORT_INTERRUPTS,
    INTERRUPT_RANGE,
    PORT_RANGE,
    SYSTEM_RANGE,
    guest_format,
    guest_root,
    host_translate,
)
from introspect.layout import bits
from introspect.paging import ENTRY
from introspect.runs import EMPTY, U64, Runs, Spans, column, joined, merged, merged_alike, overlaps, within
from introspect.sources import Memory
from introspect.table_pages import TablePages

__all__ = ["LIMITS", "SIZE_BITS", "UNREADABLE", "IoRange", "IoSpace", "identity"]

SIZE_BITS = bits(52, 12)
"""Where attributes say the size of the page: by the bit of that value."""
UNREADABLE = 1 << 62
"""The attribute of what may be written, but not read. Others are those of page tables: W; U and NX always."""
_SCATTERED = 1 << 61
_PLAIN = ENTRY.U | ENTRY.NX
_REACH = 1 << 52
_BATCH = 256
LIMITS = Limits(entries=1 << 24, runs=1 << 21)
_U = np.uint64


class IoRange(NamedTuple):
    """I/O addresses with the same rights. `linear`: all of it leads to `target` and on; else only its first page does."""

    start: int
    last: int
    target: int
    linear: bool
    readable: bool
    writable: bool
    page_sizes: tuple[int, ...]

    @property
    def rights(self) -> str:
        return f"{'r' if self.readable else '-'}{'w' if self.writable else '-'}"


def identity(readable: bool = True, writable: bool = True) -> Runs:
    """All of memory, each address as it is."""
    if not (readable or writable):
        return EMPTY
    flags = _PLAIN | (ENTRY.W if writable else 0) | (0 if readable else UNREADABLE)
    return Runs(column(0), column(_REACH), column(0), column(flags))


class _Rows(NamedTuple):
    address: U64
    table: U64
    rights: U64


class IoSpace:
    """The I/O addresses of a device, of one PASID if it is given: with `dte` as its entry.

    `left`: the memory that a DEV, or the protection of a secure loader's block, leaves to the device; None for all.
    """

    def __init__(
        self, memory: Memory, iommu: Iommu, dte: int, *, pasid: int | None = None, limits: Limits = LIMITS,
        progress: Progress | None = None, left: Spans | None = None,
    ) -> None:  # fmt: skip
        self.memory, self.iommu, self.dte, self.limits, self.progress = memory, iommu, dte, limits, progress
        self.translated: Runs = EMPTY
        """What the IOMMU lets pass."""
        self.complete = True
        """False where the limits, or who was told of progress, ended it."""
        self.host_tables: list[tuple[int, U64, U64]] = []
        self._left = limits.entries
        self._ended = False
        self._guest_tables = NO_TABLES
        self._prefixed = pasid is not None
        """Requests have a PASID, not just a default one."""
        guest = bool(dte & DTE.GV and iommu.control & CONTROL.GTEn)
        if pasid is None and guest and dte & DTE.GIoV:
            pasid = 0
        self.pasid = pasid
        self._make(guest)
        self.runs = self.translated
        """What the device reaches."""
        if left is not None:
            self.runs, whole = within(self.translated, left, limits.runs)
            self.complete = self.complete and whole

    def _make(self, guest: bool) -> None:
        dte, iommu, pasid = self.dte, self.iommu, self.pasid
        if not iommu.enabled or not dte & DTE.V:
            self.translated = identity()
            return
        if dma_problem(dte, iommu.features) is not None:
            return
        runs = EMPTY
        if dte & DTE.TV and (pasid is None or guest):
            host = self._host()
            runs = host if pasid is None else self._through(pasid, host)
        self.translated = self._special(runs)

    # Host tables

    def _host(self) -> Runs:
        mode = DTE.get(self.dte, "Mode")
        rights = self.dte & (PTE.IR | PTE.IW)
        if mode > self.iommu.host_levels or not rights:
            return EMPTY
        if not mode:
            return identity(bool(rights & PTE.IR), bool(rights & PTE.IW))
        parts: list[Runs] = []
        self._pages = TablePages(self.memory, 8)
        self._runs_left = self.limits.runs
        self._tables(mode, _Rows(column(0), column(host_root(self.dte)), column(rights)), parts)
        del self._pages
        runs = joined([one for one in parts if len(one.start)])
        return merged(runs)

    def _goes_on(self, address: int) -> bool:
        if self.progress is not None and not self._ended:
            self._ended = not self.progress(address / (1 << 12 + 9 * DTE.get(self.dte, "Mode")))
        return not self._ended and self._left > 0 and self._runs_left > 0

    def _tables(self, level: int, rows: _Rows, parts: list[Runs]) -> None:
        """Tables of one level, some at a time with all below them."""
        for first in range(0, len(rows.table), _BATCH):
            if not self._goes_on(int(rows.address[first])):
                self.complete = False
                return
            self._batch(level, _Rows(*(one[first : first + _BATCH] for one in rows)), parts)

    def _batch(self, level: int, rows: _Rows, parts: list[Runs]) -> None:
        count = 0x80 if level == 6 else 0x200
        self.host_tables.append((level, rows.table, rows.address))
        contents, _ = self._pages.read(rows.table, 0x200)
        self._left -= contents.size
        row, index = np.nonzero(contents[:, :count] & _U(PTE.PR))
        entry = contents[row, index]
        rights = rows.rights[row] & entry & _U(PTE.IR | PTE.IW)
        below = (entry >> _U(9)) & _U(7)
        leaf = (below == 0) | (below == 7)
        reserved = np.where(leaf, _U(self.iommu.leaf_reserved), _U(PTE_TABLE_RESERVED))
        good = (rights != 0) & (entry & reserved == 0) & (leaf | (below < level))
        row, index, entry, rights, below, leaf = (one[good] for one in (row, index, entry, rights, below, leaf))
        address = rows.address[row] + (index.astype(np.uint64) << _U(3 + 9 * level))
        if level < 6 and leaf.any():
            parts.append(self._leaves(level, address[leaf], entry[leaf], rights[leaf], below[leaf]))
            self._runs_left -= len(parts[-1].start)
        for next_level in range(level - 1, 0, -1):
            chosen = ~leaf & (below == next_level)
            if chosen.any():
                inner = _Rows(address[chosen], entry[chosen] & _U(PTE.Address), rights[chosen])
                self._tables(next_level, inner, parts)

    @staticmethod
    def _leaves(level: int, address: U64, entry: U64, rights: U64, below: U64) -> Runs:
        natural = 3 + 9 * level
        field = (entry & _U(PTE.Address)) >> _U(12)
        above = ~field & (field + _U(1))  # the lowest zero bit
        size = np.where(below == 7, above << _U(13), _U(1 << natural))
        most = min(1 << natural + 9, 1 << 53)
        aligned = entry & _U(PTE.Address & (1 << natural) - 1) == 0
        good = np.where(below == 0, aligned, (size > _U(1 << natural)) & (size < _U(most)))
        address, entry, rights, size = address[good], entry[good], rights[good], size[good]
        target = (entry & _U(PTE.Address) & ~(size - _U(1))) | (address & (size - _U(1)))
        flags = size | _U(_PLAIN) | np.where(rights & _U(PTE.IW) != 0, _U(ENTRY.W), _U(0))
        flags |= np.where(rights & _U(PTE.IR) != 0, _U(0), _U(UNREADABLE))
        order = np.argsort(address)
        runs = Runs(address, np.full(len(address), 1 << natural, np.uint64), target, flags).take(order)
        return merged(runs)

    # Guest tables

    def _through(self, pasid: int, host: Runs) -> Runs:
        root = guest_root(self.memory, self.iommu, self.dte, pasid)
        if root is None:
            return EMPTY
        form = guest_format(self.iommu, self.dte)
        guest = Dimension(
            self.memory, form, root, locate=self._locate, limits=self.limits, progress=self.progress, keep=True
        )
        self._guest_tables = guest.table_rows()
        self.complete = self.complete and not len(guest.unknown.start)
        runs = guest.runs
        if self.iommu.features & FEATURES.USSup:  # else the IOMMU does not look at U
            runs = runs.take(runs.attributes & _U(ENTRY.U) != 0)
        mine, theirs, start, end, done = overlaps(
            runs.target, runs.target + runs.length, Spans(host.start, host.end), self.limits.runs
        )
        self.complete = self.complete and done == len(runs.start)
        inner = host.attributes[theirs]
        flags = runs.attributes[mine]
        attributes = (flags & _U(SIZE_BITS)) | _U(_PLAIN) | (flags & inner & _U(ENTRY.W)) | (inner & _U(UNREADABLE))
        useful = attributes & _U(ENTRY.W | UNREADABLE) != _U(UNREADABLE)
        address = runs.start[mine] + (start - runs.target[mine])
        found = Runs(address, end - start, host.target[theirs] + (start - host.start[theirs]), attributes)
        width = form.width
        return merged(joined([found.take(useful)]), 1 << width - 1)

    def _locate(self, tables: U64) -> U64:
        """Where guest tables are, one by one: there are few."""
        found = np.full(len(tables), NOWHERE, np.uint64)
        for place, gpa in enumerate(tables.tolist()):
            spa = host_translate(self.memory, self.iommu, self.dte, gpa)
            if spa is not None:
                found[place] = spa
        return found

    # Special addresses

    def _special(self, runs: Runs) -> Runs:
        """Interrupts are no memory; the exclusion range, and what the entry forwards, are themselves."""
        dte = self.dte
        runs = _without(runs, *INTERRUPT_RANGE)
        if self._prefixed:
            return runs
        if self.iommu.exclusion is not None:
            first, last, everybody = self.iommu.exclusion
            if (everybody or dte & DTE.EX) and first <= last:
                whole = identity()
                own = Runs(column(first), column(last + 1 - first), column(first), whole.attributes)
                runs = joined([_without(runs, first, last), _without(own, *INTERRUPT_RANGE)])
        if self.iommu.features2 & FEATURES2.HTRangeIgnore:
            return merged(runs)
        runs = _without(runs, *HYPERTRANSPORT_INTERRUPTS)
        if DTE.get(dte, "SysMgt") != 3:
            runs = _without(runs, *SYSTEM_RANGE)
        if DTE.get(dte, "IoCtl") != 2:
            runs = _without(runs, *PORT_RANGE)
        return merged(runs)

    # What was found

    def tables(self) -> TableRows:
        """The host's tables, from the root down; without those, a guest's but for GCR3 tables."""
        if not self.host_tables:
            return self._guest_tables
        levels = np.concatenate([np.full(len(spa), level, np.uint64) for level, spa, _ in self.host_tables])
        return TableRows(levels, *(np.concatenate([one[n] for one in self.host_tables]) for n in (1, 2)))

    @property
    def bytes_mapped(self) -> int:
        return sum(self.runs.length.tolist())

    @property
    def bytes_denied(self) -> int:
        """What the tables map, and is out of reach nevertheless."""
        mapped: int = sum(self.translated.length.tolist())
        return mapped - self.bytes_mapped

    def ranges(self, *, linear: bool = False) -> Iterator[IoRange]:
        """Neighbours with the same rights as one; with `linear` only where they lead on linearly, too."""
        runs = self.runs if linear else merged_alike(self.runs, 0, _SCATTERED, SIZE_BITS)
        for start, length, target, flags in runs.rows():
            sizes = tuple(1 << n for n in range(12, 53) if flags >> n & 1)
            yield IoRange(
                start, start + length - 1, target, not flags & _SCATTERED, not flags & UNREADABLE, bool(flags & ENTRY.W), sizes
            )


def _without(runs: Runs, first: int, last: int) -> Runs:
    """Runs with a hole."""
    parts = []
    met = (runs.start <= _U(last)) & (runs.start + (runs.length - _U(1)) >= _U(first))
    for start, length, target, flags in runs.take(met).rows():
        for begin, end in ((start, min(first, start + length)), (max(last + 1, start), start + length)):
            if begin < end:
                parts.append(Runs(column(begin), column(end - begin), column(target + begin - start), column(flags)))
    return joined([one for one in (runs.take(~met), *parts) if len(one.start)])
