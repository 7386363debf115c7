"""One set of page tables walked as a whole: level by level, many tables at a time.

What a table means is read from `introspect.paging`'s formats, the same that single walks go by; `tests/introspect/test_tables.py`
compares the two. Work is bounded whatever the tables hold: a loop makes them describe more pages than there can be, so
there is a limit on entries looked at and on stretches kept, and what lies beyond is told as unknown.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeAlias

import numpy as np

from introspect.layout import bits
from introspect.paging import ENTRY, Format, Level
from introspect.runs import (
    EMPTY,
    U64,
    Indices,
    Mask,
    Runs,
    Spans,
    column,
    covered,
    gaps,
    inside,
    joined,
    merged,
    merged_alike,
    overlaps,
)
from introspect.sources import Memory
from introspect.table_pages import TablePages

__all__ = ["NOWHERE", "NO_TABLES", "SCATTERED", "SIZES", "Dimension", "Limits", "Problem", "Progress", "TableRows"]

Progress: TypeAlias = Callable[[float], bool]
"""Told now and then which share of the addresses is done; says whether to go on."""

NOWHERE = (1 << 64) - 1
"""The system-physical address of a table that nested paging refuses."""
SIZES = 1 << 12 | 1 << 21 | 1 << 22 | 1 << 30
"""Where attributes say the size of the page: by the bit of that value."""
SCATTERED = ENTRY.P
"""The attribute of stretches that do not map linearly."""
_WU = ENTRY.W | ENTRY.U
_ALIKE = ENTRY.P | ENTRY.W | ENTRY.U | ENTRY.PWT | ENTRY.PCD | ENTRY.PS | ENTRY.G | ENTRY.NX
"""What of the entries of last-level tables decides attributes."""
_MARKS = ENTRY.A | ENTRY.D
_UNMARKED = ~_MARKS & NOWHERE
_ADDRESS = bits(51, 12)
_PAT_LARGE = 1 << 12
_BATCH = 512
"""Tables read at once: their entries and what is made of them fit a cache."""
_PROBLEMS = 256


@dataclass(frozen=True, slots=True)
class Limits:
    """How much work a listing may be."""

    entries: int = 1 << 26
    """Entries looked at: 256 GiB in 4 KiB pages."""
    runs: int = 1 << 23
    """Stretches kept, of 32 bytes each."""


class Problem(NamedTuple):
    """Where page tables are not what they should be. `start` and `end` are the addresses that they translate there."""

    kind: Literal["reserved", "no memory", "refused", "loop"]
    """Reserved bits in an entry; a table where there is no memory; one that nested paging refuses; one that leads to itself."""
    start: int
    end: int
    level: int
    """Of the entry, or of the table's entries."""
    where: int
    """System-physical address of the entry; for a table its address as the entry above has it."""
    value: int
    """Of the entry; for a table as `where`."""


class TableRows(NamedTuple):
    """Page tables, as columns."""

    level: U64
    spa: U64
    address: U64
    """The first that each translates."""


NO_TABLES = TableRows(column(), column(), column())


class _Rows(NamedTuple):
    """Tables of one level: what they translate, where they are, and what the levels above grant."""

    address: U64
    table: U64
    rights: U64
    above: U64
    """A row for each: the tables above it, from the root on."""

    def take(self, which: Mask | slice) -> _Rows:
        return _Rows(*(one[which] for one in self))


@dataclass(slots=True)
class _Kept:
    """Tables of one level as they were when they were walked, without accessed and dirty bits."""

    rows: list[_Rows] = field(default_factory=list)
    spa: list[U64] = field(default_factory=list)
    contents: list[U64] = field(default_factory=list)


def _varying(rows: U64) -> U64:
    """The bits that are not the same all over each row."""
    differ: U64 = np.bitwise_or.reduce(rows, axis=1) ^ np.bitwise_and.reduce(rows, axis=1)
    return differ


class Dimension:
    """The page tables of one format under one root.

    `locate` gives the system-physical addresses of tables, for a guest under nested paging: `NOWHERE` where it has none.
    With `keep`, `refresh` walks again only what has changed. Without `targets`, neighbours with the same attributes are one
    stretch wherever they lead: then `SCATTERED` is among its attributes. That is much less where memory is scattered.
    """

    def __init__(
        self,
        memory: Memory,
        form: Format,
        root: int,
        *,
        pdptes: tuple[int, ...] | None = None,
        locate: Callable[[U64], U64] | None = None,
        limits: Limits | None = None,
        progress: Progress | None = None,
        keep: bool = False,
        targets: bool = True,
    ) -> None:
        self.memory, self.form, self.root = memory, form, root & form.base
        self.pdptes, self.locate = pdptes, locate
        self.limits, self.progress, self.keep = limits or Limits(), progress, keep
        self.targets = targets
        self._half = 0 if form.width == 32 else 1 << form.width - 1
        self.walk()

    def walk(self) -> None:
        """Walk everything."""
        self.runs = EMPTY
        self.problems: list[Problem] = []
        self.problems_left_out = 0
        self.tables = [0] * len(self.form.levels)
        """How many tables of each level were visited."""
        self._start()
        self._kept = [_Kept() for _ in self.form.levels]
        nothing = np.zeros((1, 0), np.uint64)
        self._tables(0, _Rows(column(0), column(self.root), column(_WU), nothing))
        self._finish()

    @property
    def unknown(self) -> Spans:
        """The addresses where the limits, or who was told of progress, ended the walk."""
        return self._unknown

    def _start(self) -> None:
        self._parts: list[Runs] = []
        self._entries_left, self._runs_left = self.limits.entries, self.limits.runs
        self._cancelled = False
        self._table_rows: TableRows | None = None
        self._undone: list[Spans] = []
        self._scratch: U64 = np.empty((0, 0), np.uint64)
        self._pages: TablePages | None = TablePages(self.memory, self.form.entry_size)

    def _finish(self) -> None:
        runs = joined([part for part in self._parts if len(part.start)])
        self.runs = merged(runs, self._half) if self.targets else merged_alike(runs, self._half, SCATTERED)
        undone = self._undone
        self._unknown = (
            covered(np.concatenate([one.start for one in undone]), np.concatenate([one.end for one in undone]))
            if undone else Spans(column(), column())
        )  # fmt: skip
        self._parts, self._undone, self._pages, self._scratch = [], [], None, self._scratch[:0]

    # Walking

    def _goes_on(self, address: int) -> bool:
        if self.progress is not None and not self._cancelled:
            self._cancelled = not self.progress(address / (1 << self.form.width))
        return not self._cancelled and self._entries_left > 0 and self._runs_left > 0

    def _tables(self, depth: int, rows: _Rows) -> None:
        """Walk tables of one level and all below them."""
        level = self.form.levels[depth]
        reach = np.uint64((level.mask + 1) << level.shift)
        first = 0
        while first < len(rows.table):
            if not self._goes_on(int(rows.address[first])):
                rest = rows.address[first:]
                self._undone.append(Spans(rest, rest + reach))
                return
            end = first + max(1, min(_BATCH, self._entries_left // (level.mask + 1), self._runs_left // (level.mask + 1) + 1))
            part = rows.take(slice(first, end))
            first, spa = end, part.table
            if self.locate is not None:
                spa = self.locate(spa)
                refused = spa == NOWHERE
                if refused.any():
                    which = np.flatnonzero(refused)
                    for index in which[:_PROBLEMS].tolist():
                        self._table_problem("refused", part, index, level)
                    self.problems_left_out += max(0, len(which) - _PROBLEMS)
                    part, spa = part.take(~refused), spa[~refused]
            if len(spa):
                self._read_and_go_on(depth, part, spa)

    def _read_and_go_on(self, depth: int, part: _Rows, spa: U64) -> None:
        level = self.form.levels[depth]
        contents = self._read(depth, spa, part)
        self.tables[depth] += len(spa)
        self._entries_left -= contents.size
        if self.keep:
            kept = self._kept[depth]
            kept.rows.append(part)
            kept.spa.append(spa)
            kept.contents.append(contents & _UNMARKED)
        if depth == len(self.form.levels) - 1:
            uneven = self._even_tables(level, part, contents)
            if not uneven.any():
                return
            if not uneven.all():
                part, spa, contents = part.take(uneven), spa[uneven], contents[uneven]
        flat = contents.ravel()
        present = np.flatnonzero(flat & ENTRY.P)
        row = present >> level.mask.bit_count()
        index = (present & level.mask).astype(np.uint64)
        self._entries(depth, part, spa, row, index, flat[present])

    def _entries(self, depth: int, part: _Rows, spa: U64, row: Indices, index: U64, entries: U64) -> None:
        """Go on from present entries of some tables: `row` says of which one each is."""
        level = self.form.levels[depth]
        address = part.address[row] + (index << level.shift)
        rights = part.rights[row]
        rights = rights & (entries | level.grants) & _WU | (rights | entries) & ENTRY.NX
        last = depth == len(self.form.levels) - 1
        leaf = None if last else entries & level.leaf != 0
        reserved = level.leaf_reserved if leaf is None else np.where(leaf, np.uint64(level.leaf_reserved), level.table_reserved)
        wrong = entries & reserved != 0
        if wrong.any():
            self._reserved(level, address, spa[row] + index * self.form.entry_size, entries, wrong)
            good = ~wrong
            address, rights, entries, row = address[good], rights[good], entries[good], row[good]
            leaf = None if leaf is None else leaf[good]
        if leaf is None:
            self._map(level, 1, address, rights, entries)
            return
        if leaf.any():
            self._map(level, 1, address[leaf], rights[leaf], entries[leaf])
            inner = ~leaf
            address, rights, entries, row = address[inner], rights[inner], entries[inner], row[inner]
        if len(entries):
            above = np.concatenate((part.above[row], part.table[row][:, None]), axis=1)
            below = _Rows(address, entries & _ADDRESS, rights, above)
            self._loops(self.form.levels[depth + 1], below)
            self._tables(depth + 1, below)

    def _even_tables(self, level: Level, part: _Rows, contents: U64) -> Mask:
        """Map the tables of which all pages are alike, and follow each other: most of them. Says which are not so.

        Without `targets` they need not follow each other. What is alike shows in the bits that differ between "or" and "and".
        """
        first = contents[:, 0]
        even = (contents[:, 1] & _ADDRESS) - (first & _ADDRESS) == 1 << level.shift  # only these are worth a longer look
        if even.any():
            count = len(contents)
            if self._scratch.shape[1:] != contents.shape[1:] or len(self._scratch) < count:
                self._scratch = np.empty_like(contents)
            steps = np.arange(level.mask + 1, dtype=np.uint64) << level.shift
            flat = np.subtract(contents, steps, out=self._scratch[:count])
            even &= _varying(flat) & (_ALIKE | _ADDRESS | level.leaf_reserved) == 0
        scattered = np.zeros(len(even), np.bool_)
        if not self.targets and not even.all():
            alike = _varying(contents) & (_ALIKE | level.leaf_reserved) == 0
            scattered = alike & ~even
        last = (first & _ADDRESS) + (level.mask << level.shift)
        even &= last & (level.leaf_reserved | 1 << 52) == 0
        good: Mask = (even | scattered) & (first & (ENTRY.P | level.leaf_reserved) == ENTRY.P)
        some = np.flatnonzero(good)
        if len(some):
            entries, rights = first[some], part.rights[some]
            rights = rights & (entries | level.grants) & _WU | (rights | entries) & ENTRY.NX
            self._map(level, level.mask + 1, part.address[some], rights | scattered[some] * np.uint64(SCATTERED), entries)
        return ~good

    def _map(self, level: Level, count: int, address: U64, rights: U64, entries: U64) -> None:
        """Note pages. Each entry stands for so many of them, one behind the other."""
        size = 1 << level.shift
        target = entries & (_ADDRESS & -size)
        if level.shift == 22:
            target |= (entries >> 13 & 0xFF) << 32
        flags = entries & (ENTRY.G | ENTRY.PWT | ENTRY.PCD | (ENTRY.PS if size == 1 << 12 else 0))
        if size != 1 << 12:
            flags |= (entries & _PAT_LARGE) >> 5
        length = np.full(len(entries), size * count, np.uint64)
        runs = Runs(address, length, target, rights | flags | size)
        runs = merged(runs, self._half) if self.targets else merged_alike(runs, self._half, SCATTERED)
        self._runs_left -= len(runs.start)
        self._parts.append(runs)

    # Reading

    def _read(self, depth: int, spa: U64, part: _Rows | None) -> U64:
        """The entries of some tables, a row for each; of those that are no memory `part` is told."""
        level = self.form.levels[depth]
        if depth == 0 and self.pdptes is not None:
            return np.array([self.pdptes], np.uint64)
        assert self._pages is not None
        entries, absent = self._pages.read(spa, level.mask + 1)
        for index in absent if part is not None else ():
            assert part is not None
            self._table_problem("no memory", part, index, level)
        return entries

    # Problems

    def _problem(self, problem: Problem) -> None:
        if len(self.problems) < _PROBLEMS:
            self.problems.append(problem)
        else:
            self.problems_left_out += 1

    def _table_problem(self, kind: Literal["no memory", "refused", "loop"], part: _Rows, index: int, level: Level) -> None:
        start, table = int(part.address[index]), int(part.table[index])
        self._problem(Problem(kind, start, start + ((level.mask + 1) << level.shift), level.number, table, table))

    def _reserved(self, level: Level, address: U64, where: U64, entries: U64, wrong: Mask) -> None:
        which = np.flatnonzero(wrong)
        for index in which[:_PROBLEMS].tolist():
            start = int(address[index])
            end = start + (1 << level.shift)
            self._problem(Problem("reserved", start, end, level.number, int(where[index]), int(entries[index])))
        self.problems_left_out += max(0, len(which) - _PROBLEMS)

    def _loops(self, level: Level, rows: _Rows) -> None:
        looping = np.flatnonzero((rows.above == rows.table[:, None]).any(axis=1))
        for index in looping[:_PROBLEMS].tolist():
            self._table_problem("loop", rows, index, level)
        self.problems_left_out += max(0, len(looping) - _PROBLEMS)

    # What changed since

    def refresh(self) -> bool:
        """Look at all tables again, and walk those entries that have changed; accessed and dirty bits are no change.

        Says whether anything has. Only with `keep`.
        """
        if self.problems or self.problems_left_out or len(self._unknown.start):
            before, problems = (*self.runs, *self._unknown), self.problems
            self.walk()  # the few tables that are damaged are not worth keeping account of what is wrong where
            after = (*self.runs, *self._unknown)
            return problems != self.problems or not all(np.array_equal(old, new) for old, new in zip(before, after, strict=True))
        self._start()
        self._parts.append(self.runs)
        self._runs_left -= len(self.runs.start)
        changes = [self._refresh_level(depth) for depth in range(len(self.form.levels))]
        if not any(changes):
            self._parts, self._pages = [], None
            return False
        self._finish()
        return True

    def relocated(self) -> bool:
        """Whether `locate` has another answer for any table than it had. Only with `keep`."""
        if self.locate is None:
            return False
        if any(problem.kind == "refused" for problem in self.problems) or self.problems_left_out:
            return True
        pairs = ((rows, spa) for kept in self._kept for rows, spa in zip(kept.rows, kept.spa, strict=True))
        return not all(np.array_equal(self.locate(rows.table), spa) for rows, spa in pairs)

    def _refresh_level(self, depth: int) -> bool:
        level, kept = self.form.levels[depth], self._kept[depth]
        changed, windows = [], []
        for place, (rows, spa, old) in enumerate(zip(kept.rows, kept.spa, kept.contents, strict=True)):
            new = self._read(depth, spa, None)
            plain = new & _UNMARKED
            if np.array_equal(plain, old):
                continue
            row, index = np.nonzero(plain != old)
            kept.contents[place] = plain
            number = index.astype(np.uint64)
            windows.append(rows.address[row] + (number << level.shift))
            present = new[row, index] & ENTRY.P != 0
            changed.append((rows, spa, row[present], number[present], new[row, index][present]))
        if not windows:
            return False
        start = np.concatenate(windows)
        self._forget(depth, covered(start, start + np.uint64(1 << level.shift)))
        for found in changed:
            self._entries(depth, *found)
        return True

    def _forget(self, depth: int, window: Spans) -> None:
        """Drop what is known of some addresses: their runs, and the tables below a level."""
        runs, keep = joined(self._parts), gaps(window, 1 << self.form.width)
        mine, _, start, end, _ = overlaps(runs.start, runs.end, keep, NOWHERE)
        self._parts = [Runs(start, end - start, runs.target[mine] + (start - runs.start[mine]), runs.attributes[mine])]
        for below in range(depth + 1, len(self.form.levels)):
            kept = self._kept[below]
            for place, rows in enumerate(kept.rows):
                gone = inside(rows.address, window)
                if gone.any():
                    stay = ~gone
                    self.tables[below] -= int(gone.sum())
                    kept.rows[place] = rows.take(stay)
                    kept.spa[place], kept.contents[place] = kept.spa[place][stay], kept.contents[place][stay]

    def table_rows(self) -> TableRows:
        """The tables that were visited, from the root down. Only with `keep`."""
        if self._table_rows is None:
            parts = [
                (np.full(len(spa), level.number, np.uint64), spa, rows.address)
                for level, kept in zip(self.form.levels, self._kept, strict=True)
                for rows, spa in zip(kept.rows, kept.spa, strict=True)
            ]
            self._table_rows = TableRows(*(np.concatenate(one) for one in zip(*parts, strict=True))) if parts else NO_TABLES
        return self._table_rows
