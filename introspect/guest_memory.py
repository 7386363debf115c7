"""A guest's physical memory as a `Memory` of its own: what a dump of that guest as a machine would hold."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from introspect.paging import Nested, NestedTranslation, nested_translate
from introspect.runs import Spans, column, covered, overlaps
from introspect.sources import Memory, Unreadable, Unwritable, memory_ranges
from introspect.tables import list_nested

__all__ = ["GuestMemory"]

PAGE = 0x1000
_KEPT = 1 << 16
_MOST_RANGES = 1 << 22


class GuestMemory:
    """Addresses are guest-physical. The nested tables are taken not to change while it is in use, unless `keep` is False."""

    def __init__(self, memory: Memory, nested: Nested, *, keep: bool = True) -> None:
        self.memory, self.nested, self.keep = memory, nested, keep
        self._pages: dict[int, int | None] = {}

    def locate(self, gpa: int) -> int | None:
        """System-physical address; None where the nested tables have none."""
        page = gpa // PAGE
        if page not in self._pages or not self.keep:
            if len(self._pages) >= _KEPT:
                self._pages.clear()
            found = nested_translate(self.memory, self.nested, page * PAGE, write=False, execute=False, set_ad=False)
            self._pages[page] = int(found.spa) if isinstance(found, NestedTranslation) else None
        spa = self._pages[page]
        return None if spa is None else spa + gpa % PAGE

    def physical(self, gpa: int) -> int | None:
        """The address in the machine's memory, also where this is the memory of a guest's guest."""
        spa = self.locate(gpa)
        return spa if spa is None or not isinstance(self.memory, GuestMemory) else self.memory.physical(spa)

    @cached_property
    def ranges(self) -> Sequence[tuple[int, int]]:
        """(first, end) of what the nested tables map to memory, and not to devices."""
        runs = list_nested(self.memory, self.nested).runs
        known = memory_ranges(self.memory)
        spans = Spans(column(*(first for first, _ in known)), column(*(end for _, end in known)))
        mine, _, start, end, _ = overlaps(runs.target, runs.target + runs.length, spans, _MOST_RANGES)
        first = runs.start[mine] + (start - runs.target[mine])
        return list(covered(first, first + (end - start)).rows())

    def read(self, gpa: int, length: int, /) -> bytes:
        parts = bytearray()
        while len(parts) < length:
            at = gpa + len(parts)
            spa = self.locate(at)
            if spa is None:
                raise Unreadable(at, bytes(parts), "the guest's nested page tables map nothing there")
            try:
                parts += self.memory.read(spa, min(length - len(parts), PAGE - at % PAGE))
            except Unreadable as error:
                parts += error.readable_prefix
                raise Unreadable(gpa + len(parts), bytes(parts), f"it is spa {error.address:#x}, where is none") from None
        return bytes(parts)

    def read_u32(self, gpa: int, /) -> int:
        return int.from_bytes(self.read(gpa, 4), "little")

    def read_u64(self, gpa: int, /) -> int:
        return int.from_bytes(self.read(gpa, 8), "little")

    def write(self, gpa: int, data: bytes, /) -> None:
        """All of it or nothing."""
        pieces, done = [], 0
        while done < len(data):
            at = gpa + done
            spa, size = self.locate(at), min(len(data) - done, PAGE - at % PAGE)
            if spa is None:
                raise Unwritable(at)
            pieces.append((spa, done, size))
            done += size
        for spa, start, size in pieces:
            self.memory.write(spa, data[start : start + size])

    def write_u32(self, gpa: int, value: int, /) -> None:
        self.write(gpa, value.to_bytes(4, "little"))

    def write_u64(self, gpa: int, value: int, /) -> None:
        self.write(gpa, value.to_bytes(8, "little"))
