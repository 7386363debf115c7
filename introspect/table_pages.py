"""Page tables as arrays of entries, many at a time: straight from a memory that is buffers, else by reads."""

from __future__ import annotations

from bisect import bisect_right

import numpy as np

from introspect.runs import U64
from introspect.sources import Memory, Unreadable

__all__ = ["TablePages"]

_PAGE = 0x1000


class TablePages:
    """Reads tables with entries of one size. Not to be kept: it may hold on to the memory's buffers."""

    def __init__(self, memory: Memory, entry_size: int) -> None:
        self._memory, self._entry = memory, entry_size
        self._type = "<u8" if entry_size == 8 else "<u4"
        self._bases: list[int] = []
        self._pages: list[U64] = []
        buffers = getattr(memory, "buffers", None)
        for base, view in buffers() if buffers is not None else ():
            whole = len(view) & -_PAGE
            if whole and not base & _PAGE - 1:
                self._bases.append(base)
                self._pages.append(np.frombuffer(view[:whole], self._type).reshape(-1, _PAGE // entry_size))

    def read(self, spa: U64, count: int) -> tuple[U64, list[int]]:
        """A row of so many entries for each table, and which of the tables are not wholly memory.

        What is no memory reads as ones, as single walks have it.
        """
        if count * self._entry == _PAGE and len(spa):
            low, high = int(spa.min()), int(spa.max())
            region = bisect_right(self._bases, low) - 1
            if region >= 0 and high - self._bases[region] < len(self._pages[region]) * _PAGE and not int(spa[0]) & _PAGE - 1:
                pages, first = self._pages[region], (low - self._bases[region]) >> 12
                if high - low == (len(spa) - 1) * _PAGE and int(spa[0]) == low and bool((spa[1:] > spa[:-1]).all()):
                    found = pages[first : first + len(spa)]  # one behind the other: as they are
                else:
                    found = pages[(spa - self._bases[region]) >> 12]
                return found.astype(np.uint64, copy=False), []
        size = count * self._entry
        read, parts, absent = self._memory.read, [], []
        for index, where in enumerate(spa.tolist()):
            try:
                parts.append(read(where, size))
            except Unreadable as error:
                parts.append(self._partly(where, size) if error.readable_prefix else b"\xff" * size)
                absent.append(index)
        numbers = np.frombuffer(b"".join(parts), self._type)
        return numbers.astype(np.uint64, copy=False).reshape(len(spa), count), absent

    def _partly(self, where: int, size: int) -> bytes:
        """A table of which a part is memory, entry by entry."""
        data = bytearray(b"\xff" * size)
        for at in range(0, size, self._entry):
            try:
                data[at : at + self._entry] = self._memory.read(where + at, self._entry)
            except Unreadable:
                continue
        return bytes(data)
