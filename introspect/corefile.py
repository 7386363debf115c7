"""Writing ELF64 cores: physical memory, where page tables map it, and registers.

Every piece of memory is in the file once. It has a program header for each linear address that maps it: p_vaddr is that address,
p_paddr the physical one, and headers that show the same memory show the same bytes of the file. Pieces that nothing maps have
p_vaddr = `UNMAPPED` + p_paddr, which is canonical in no paging mode: a debugger may read them there, and finds nothing at 0.
Headers ascend by p_paddr, and those with common memory have all of it in common: some readers look for one by bisection.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from introspect.paging import ENTRY
from introspect.runs import U64, Runs, Spans, column, overlaps
from introspect.sources import Memory, Unreadable, data_ranges

__all__ = ["MOST_HEADERS", "UNMAPPED", "CoreError", "CoreSize", "Loads", "plan_loads", "whole_pages", "write_core"]

PAGE = 0x1000
CHUNK = 4 << 20
UNMAPPED = 1 << 62
MOST_HEADERS = 12000
"""Program headers: readers that build an object for each take long over more."""
_EHDR = struct.Struct("<16sHHIQQQIHHHHHH")
_PHDR = struct.Struct("<IIQQQQQQ")
_PT_LOAD, _PT_NOTE, _ET_CORE, _EM_X86_64 = 1, 4, 4, 62
_R, _W, _X = 4, 2, 1
_MOST_LOADS = 0xFFFE
"""From there on their count would stand elsewhere, where not all look."""


@dataclass(frozen=True, slots=True)
class Loads:
    """What the program headers say: columns of linear address, physical address, length, flags; in order of the physical one."""

    linear: U64
    physical: U64
    length: U64
    flags: U64
    left_out: int
    """Stretches of linear addresses that have no header, as there would be too many: the smallest."""

    def __len__(self) -> int:
        return len(self.linear)


@dataclass(frozen=True, slots=True)
class CoreSize:
    """What was written."""

    size: int
    """Bytes of the file, holes included."""
    stored: int
    """Bytes of memory that are no holes."""
    unreadable: int
    """Bytes that could not be read; they are zeros."""


class CoreError(Exception):
    """A core that cannot be written."""


def whole_pages(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same rounded to pages; those that touch then are one."""
    found: list[tuple[int, int]] = []
    for first, end in ranges:
        low, high = first & -PAGE, end + PAGE - 1 & -PAGE
        if found and low <= found[-1][1]:
            found[-1] = (found[-1][0], max(high, found[-1][1]))
        else:
            found.append((low, high))
    return found


def plan_loads(ranges: Sequence[tuple[int, int]], mapped: Runs, most: int = MOST_HEADERS) -> Loads:
    """The headers for memory in `ranges`, whole pages, that page tables map so: `mapped.start` is canonical.

    CoreError if memory alone is in too many pieces.
    """
    if len(ranges) >= _MOST_LOADS:
        raise CoreError(f"memory is in {len(ranges)} pieces; a core has at most {_MOST_LOADS} program headers")
    spans = Spans(column(*(first for first, _ in ranges)), column(*(end for _, end in ranges)))
    mine, _, start, end, _ = overlaps(mapped.target, mapped.target + mapped.length, spans, 1 << 22)
    linear = mapped.start[mine] + (start - mapped.target[mine])
    attributes = mapped.attributes[mine]
    flags = _R + _W * (attributes & ENTRY.W != 0).astype(np.uint64) + _X * (attributes & ENTRY.NX == 0).astype(np.uint64)
    length = end - start
    least, left_out = 0, 0
    while True:
        kept = length > least
        many = int(np.count_nonzero(kept))
        left_out = len(length) - many
        cut = _cut(spans, linear[kept], start[kept], end[kept], flags[kept], most) if many <= most else None
        if cut is not None:
            return Loads(*cut, left_out)
        least = max(least * 2, PAGE)


def _cut(spans: Spans, linear: U64, start: U64, end: U64, flags: U64, most: int) -> tuple[U64, U64, U64, U64] | None:
    """All headers, each linear stretch in pieces that are the same for all that have memory in common; None for too many."""
    points = np.unique(np.concatenate((spans.start, spans.end, start, end)))
    pieces = Spans(points[:-1], points[1:])
    _, _, first, last, _ = overlaps(pieces.start, pieces.end, spans, len(points) + len(spans.start))
    pieces = Spans(first, last)
    mine, which, first, last, done = overlaps(start, end, pieces, 4 * most)
    if len(mine) > most or done < len(start):
        return None
    seen = np.zeros(len(pieces.start), np.bool_)
    seen[which] = True
    bare = np.flatnonzero(~seen)
    linear = np.concatenate((linear[mine] + (first - start[mine]), pieces.start[bare] + np.uint64(UNMAPPED)))
    physical = np.concatenate((first, pieces.start[bare]))
    length = np.concatenate((last - first, pieces.end[bare] - pieces.start[bare]))
    flags = np.concatenate((flags[mine], np.full(len(bare), _R | _W, np.uint64)))
    if len(linear) > most and len(start):
        return None
    order = np.lexsort((linear, physical))
    return linear[order], physical[order], length[order], flags[order]


def write_core(
    path: Path, memory: Memory, ranges: Sequence[tuple[int, int]], loads: Loads, notes: bytes,
    progress: Callable[[float], object] | None = None,
) -> CoreSize:  # fmt: skip
    """Write the core: streamed, zero pages as holes. OSError if it cannot be written; what `progress` raises ends it.

    The file appears under its name when it is complete.
    """
    table = _EHDR.size + _PHDR.size * (len(loads) + 1)
    begin = table + len(notes) + PAGE - 1 & -PAGE
    firsts = column(*(first for first, _ in ranges))
    lengths = column(*(end - first for first, end in ranges))
    offsets = np.cumsum(np.append(column(begin), lengths))[:-1]
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            file.write(_header(len(loads) + 1))
            file.write(_PHDR.pack(_PT_NOTE, 0, table, 0, 0, len(notes), len(notes), 4))
            file.write(_table(loads, firsts, offsets))
            file.write(notes)
            file.flush()
            stored, unreadable = _pour(file.fileno(), memory, list(zip(ranges, offsets.tolist(), strict=True)), progress)
            size = begin + sum(lengths.tolist())
            os.truncate(file.fileno(), size)
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    return CoreSize(size, stored, unreadable)


def _header(count: int) -> bytes:
    ident = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    return _EHDR.pack(ident, _ET_CORE, _EM_X86_64, 1, 0, _EHDR.size, 0, 0, _EHDR.size, _PHDR.size, count, 0, 0, 0)


def _table(loads: Loads, firsts: U64, offsets: U64) -> bytes:
    """The headers of all pieces."""
    index = np.searchsorted(firsts, loads.physical, "right") - 1
    rows = np.zeros(len(loads), np.dtype([("type", "<u4"), ("flags", "<u4"), *((name, "<u8") for name in "ovpfma")]))
    rows["type"], rows["flags"] = _PT_LOAD, loads.flags
    rows["o"] = offsets[index] + (loads.physical - firsts[index])
    rows["v"], rows["p"] = loads.linear, loads.physical
    rows["f"] = rows["m"] = loads.length
    rows["a"] = PAGE
    return rows.tobytes()


def _pour(
    file: int, memory: Memory, ranges: Sequence[tuple[tuple[int, int], int]], progress: Callable[[float], object] | None
) -> tuple[int, int]:
    """Write what is not zero. Bytes written, and bytes that could not be read."""
    stretches = list(data_ranges(memory))
    total = sum(end - first for (first, end), _ in ranges) or 1
    stored = unreadable = done = 0
    for (first, end), offset in ranges:
        for low, high in _within(stretches, first, end):
            at = low
            while at < high:
                if progress is not None:
                    progress(min((done + at - first) / total, 1.0))
                count = min(CHUNK, high - at)
                try:
                    data, following = memory.read(at, count), at + count
                except Unreadable as error:
                    data = error.readable_prefix
                    following = min((at + len(data)) // PAGE * PAGE + PAGE, high)
                    unreadable += following - at - len(data)
                stored += _write(file, data, offset + at - first)
                at = following
        done += end - first
    return stored, unreadable


def _within(stretches: Sequence[tuple[int, int]], first: int, end: int) -> Iterator[tuple[int, int]]:
    for low, high in stretches:
        if low < end and high > first:
            yield max(low, first), min(high, end)


def _write(file: int, data: bytes, offset: int) -> int:
    """Pages that are not zero, neighbours together."""
    whole = len(data) & -PAGE
    pages = np.frombuffer(data, np.uint64, whole // 8).reshape(-1, PAGE // 8)
    some = pages.any(axis=1)
    edges = np.flatnonzero(np.diff(np.concatenate(([False], some, [False])).astype(np.int8)))
    written = 0
    pieces = [(int(low) * PAGE, int(high) * PAGE) for low, high in edges.reshape(-1, 2)]
    if any(data[whole:]):
        pieces.append((whole, len(data)))
    view = memoryview(data)
    for low, high in pieces:
        at = low
        while at < high:
            at += os.pwrite(file, view[at:high], offset + at)
        written += high - low
    return written
