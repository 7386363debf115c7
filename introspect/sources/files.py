"""Memory in files: stretches of physical memory, each at an offset of a file, read when they are asked for.

Nothing is mapped: a file that another process cuts short, or a disk that fails, must not end the program.
"""

import errno
import os
import struct
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from introspect.sources.memory import Unreadable, Unwritable

__all__ = ["FileMemory", "Segment", "flatten"]

PAGE = 0x1000
_CACHED_PAGES = 1024
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
ADDRESSES = 1 << 64


class Segment(NamedTuple):
    """Physical memory first..end. Its bytes are at `offset` of the file, or zero where that is None."""

    first: int
    end: int
    offset: int | None
    present: int
    """Where knowledge ends: `end`, unless the file was cut off."""


def flatten(segments: Iterable[Segment]) -> tuple[list[Segment], list[tuple[int, int]]]:
    """Segments that do not overlap, ascending, and the stretches for which two segments name different bytes.

    Of overlapping ones that are lower is kept, as dumps whose segments show the same memory twice are common.
    """
    flat: list[Segment] = []
    conflicts = []
    end = 0
    for segment in sorted(segments, key=lambda segment: (segment.first, -segment.end)):
        if segment.first < end:
            last = flat[-1]
            if segment.offset is None or last.offset is None or segment.offset - segment.first != last.offset - last.first:
                conflicts.append((segment.first, min(end, segment.end)))
            if segment.end <= end:
                continue
            offset = None if segment.offset is None else segment.offset + end - segment.first
            segment = Segment(end, segment.end, offset, max(segment.present, end))
        if segment.end > segment.first:
            flat.append(segment)
            end = segment.end
    return flat, conflicts


class FileMemory:
    """Read-only memory from a file's segments, which do not overlap. Implements `Memory`, `Ranged`, `Sparse`."""

    def __init__(self, path: Path, segments: list[Segment]) -> None:
        """OSError if the file cannot be opened."""
        self.path, self.segments = path, segments
        self._firsts = [segment.first for segment in segments]
        self._pages: dict[int, bytes] = {}
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        ranges: list[tuple[int, int]] = []
        for segment in segments:
            if ranges and ranges[-1][1] == segment.first:
                ranges[-1] = (ranges[-1][0], segment.end)
            else:
                ranges.append((segment.first, segment.end))
        self.ranges = ranges

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self.close()

    @property
    def missing(self) -> list[tuple[int, int]]:
        """(first, end) of what should be in the file but was cut off."""
        return [(segment.present, segment.end) for segment in self.segments if segment.present < segment.end]

    def _find(self, spa: int) -> Segment | None:
        index = bisect_right(self._firsts, spa) - 1
        return self.segments[index] if index >= 0 and spa < self.segments[index].end else None

    def read(self, spa: int, length: int, /) -> bytes:
        parts: list[bytes] = []
        done = 0
        while done < length:
            at = spa + done
            segment = self._find(at)
            if segment is None:
                raise Unreadable(at, b"".join(parts))
            if at >= segment.present:
                raise Unreadable(at, b"".join(parts), f"{self.path} was cut off: it ends before what it says it holds")
            count = min(length - done, segment.present - at)
            part = bytes(count) if segment.offset is None else self._pread(count, segment.offset + at - segment.first)
            parts.append(part)
            done += len(part)
            if len(part) < count:
                why = f"{self.path} could not be read that far: it became shorter, or its disk fails"
                raise Unreadable(spa + done, b"".join(parts), why)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _pread(self, count: int, offset: int) -> bytes:
        """As much as the file has."""
        try:
            part = os.pread(self._file, count, offset)
            while len(part) < count and (more := os.pread(self._file, count - len(part), offset + len(part))):
                part += more
        except OSError:
            return b""
        return part

    def _page(self, number: int) -> bytes:
        page = self._pages.get(number)
        if page is None:
            page = self.read(number * PAGE, PAGE)
            if len(self._pages) >= _CACHED_PAGES:
                self._pages.clear()
            self._pages[number] = page
        return page

    def _word(self, spa: int, codec: struct.Struct) -> int:
        """An entry of a table: others of the same page follow soon."""
        if spa & PAGE - 1 <= PAGE - codec.size:
            try:
                value: int = codec.unpack_from(self._page(spa // PAGE), spa & PAGE - 1)[0]
            except Unreadable:
                pass  # the part that is asked for may be there
            else:
                return value
        return int.from_bytes(self.read(spa, codec.size), "little")

    def read_u32(self, spa: int, /) -> int:
        return self._word(spa, _U32)

    def read_u64(self, spa: int, /) -> int:
        return self._word(spa, _U64)

    def write(self, spa: int, data: bytes, /) -> None:
        raise Unwritable(spa)

    def write_u32(self, spa: int, value: int, /) -> None:
        raise Unwritable(spa)

    def write_u64(self, spa: int, value: int, /) -> None:
        raise Unwritable(spa)

    def data(self, first: int, end: int, /) -> Iterator[tuple[int, int]]:
        """(first, end) of what is stored within the given stretch; holes of a sparse file are zeros."""
        index = max(bisect_right(self._firsts, first) - 1, 0)
        for segment in self.segments[index:]:
            if segment.first >= end:
                return
            low, high = max(first, segment.first), min(end, segment.present)
            if segment.offset is None or low >= high:
                continue
            shift = segment.first - segment.offset
            for start, stop in self._stored(low - shift, high - shift):
                yield start + shift, stop + shift

    def _stored(self, at: int, end: int) -> Iterator[tuple[int, int]]:
        """File offsets that are no holes."""
        while at < end:
            try:
                start = os.lseek(self._file, at, os.SEEK_DATA)
                stop = os.lseek(self._file, start, os.SEEK_HOLE)
            except OSError as error:
                if error.errno != errno.ENXIO:  # a file system without SEEK_DATA: all of it may be data
                    yield at, end
                return
            if start >= end:
                return
            yield start, min(stop, end)
            at = stop
