"""Translations for people who look, made again and again: kept together with the entries that they rest on.

A translation is a function of the registers, the address and the entries that the walk reads. So one made before still
holds if those entries are in memory as they were, and reading three of them is much less than a walk. There is no
state to be told of changes.
"""

from __future__ import annotations

from typing import NamedTuple

from introspect.paging import Access, Nested, PagingState, Translation, translate
from introspect.sources import Memory

__all__ = ["Memo", "Place"]

_READ = Access()
_PAGE = 4096
_MOST = 1024


class Place(NamedTuple):
    """Where a linear address leads; `page_size` as in `Translation`."""

    spa: int
    gpa: int
    page_size: int


class _Recorder:
    """Memory that notes what is read."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self.quads: list[tuple[int, int]] = []
        self.words: list[tuple[int, int]] = []
        self.read, self.write = memory.read, memory.write
        self.write_u32, self.write_u64 = memory.write_u32, memory.write_u64

    def read_u32(self, spa: int, /) -> int:
        value = self._memory.read_u32(spa)
        self.words.append((spa, value))
        return value

    def read_u64(self, spa: int, /) -> int:
        value = self._memory.read_u64(spa)
        self.quads.append((spa, value))
        return value


class _Entry(NamedTuple):
    state: PagingState
    nested: Nested | None
    quads: list[tuple[int, int]]
    words: list[tuple[int, int]]
    found: Place | None
    """Of the page's first byte."""


class Memo:
    """Over one memory; `find` has no side effects on it.  `quads`, if there is such a view, has its 8-byte words by spa / 8."""

    def __init__(self, memory: Memory, quads: memoryview | None = None) -> None:
        self._memory = memory
        self._quads = quads
        self._entries: dict[tuple[int, int], _Entry] = {}

    def find(self, state: PagingState, gva: int, nested: Nested | None = None) -> Place | None:
        """Translate a read with every right; None if it leads nowhere. `Unreadable` as `translate` raises it."""
        gva &= 0xFFFFFFFFFFFFFFFF
        key = gva >> 12, state.cr3
        entry = self._entries.get(key)
        if entry is None or not self._holds(entry, state, nested):
            entry = self._entries[key] = self._make(state, gva & -_PAGE, nested)
            if len(self._entries) > _MOST:
                self._entries.clear()
        found, offset = entry.found, gva & _PAGE - 1
        if found is None or not offset:
            return found
        return Place(found.spa + offset, found.gpa + offset, found.page_size)

    def _holds(self, entry: _Entry, state: PagingState, nested: Nested | None) -> bool:
        if (entry.state is not state and entry.state != state) or entry.nested != nested:
            return False
        read_u64, read_u32, view = self._memory.read_u64, self._memory.read_u32, self._quads
        for spa, value in entry.quads:
            if (read_u64(spa) if view is None else view[spa >> 3]) != value:
                return False
        return not entry.words or all(read_u32(spa) == value for spa, value in entry.words)

    def _make(self, state: PagingState, gva: int, nested: Nested | None) -> _Entry:
        recorder = _Recorder(self._memory)
        found = translate(recorder, state.privileged(), gva, _READ, nested, set_ad=False)
        place = None
        if isinstance(found, Translation):
            place = Place(int(found.spa), int(found.gpa), found.page_size)
        return _Entry(state, nested, recorder.quads, recorder.words, place)
