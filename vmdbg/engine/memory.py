"""System-physical memory: one sparse mapping that the engine, the devices and introspection share without copies."""

from __future__ import annotations

import ctypes
import mmap
import struct
from collections.abc import Callable, Iterator

import numpy as np

from introspect.memo import Memo
from introspect.sources import Unreadable, Unwritable

PAGE = 4096
HOLE = 0xC0000000
"""RAM stops here; devices follow, up to 4 GiB."""
HIGH = 0x100000000
"""RAM beyond `HOLE` goes on here."""

_U16 = struct.Struct("<H")
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")

_NORESERVE = 0x4000
_WINDOW = 1 << 32
_IN_RAM_OR_SWAP = 62
"""The two uppermost bits of an entry of pagemap say that there is something (Linux, admin-guide/mm/pagemap.rst)."""


def sparse(size: int) -> mmap.mmap:
    """Anonymous zero memory that costs only the pages touched."""
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE)


class Ram:
    """RAM of `size` bytes in `ranges` of (first, end) system-physical addresses; offset in `view` = address.

    Implements `introspect.sources.Memory`.  `written` is called with (spa, length) after every write through this
    interface, so that the engine drops what it translated from there.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.written: Callable[[int, int], None] = lambda spa, length: None
        self.ranges = [(0, min(size, HOLE))]
        if size > HOLE:
            self.ranges.append((HIGH, HIGH + size - HOLE))
        self.end = self.ranges[-1][1]
        self.buffer = sparse(self.end)
        self.view = memoryview(self.buffer)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.buffer))
        self.memo = Memo(self, self.view.cast("Q"))
        """Translations through tables that lie here, for debuggers."""
        self.device = ""
        """Who writes now, if not a processor: see `dma`."""
        self.pages = memoryview(sparse(max(self.end // PAGE, PAGE)))
        """One byte of state a page; see engine/physical.py."""

    def contains(self, spa: int, length: int = 1) -> bool:
        for first, end in self.ranges:  # noqa: SIM110 - a generator costs three times as much, and this is asked often
            if first <= spa and spa + length <= end:
                return True
        return False

    def extent(self, spa: int, length: int) -> int:
        """How many of `length` bytes from `spa` on are RAM without a gap."""
        return next((min(length, end - spa) for first, end in self.ranges if first <= spa < end), 0)

    def data(self, first: int, end: int, /) -> Iterator[tuple[int, int]]:
        """(first, end) of pages within the given stretch that were ever touched; all others are zero."""
        for start in range(first & -PAGE, end, _WINDOW):
            count = (min(end, start + _WINDOW) - start + PAGE - 1) // PAGE
            try:
                with open("/proc/self/pagemap", "rb", buffering=0) as file:
                    file.seek((self.address + start) // PAGE * 8)
                    entries = np.frombuffer(file.read(count * 8), np.uint64)
            except OSError:
                entries = np.zeros(0, np.uint64)
            if len(entries) < count:  # no such file: not Linux
                yield max(start, first), end
                return
            touched = np.concatenate(([0], (entries >> _IN_RAM_OR_SWAP != 0).astype(np.int8), [0]))
            for low, high in np.flatnonzero(np.diff(touched)).reshape(-1, 2).tolist():
                yield max(start + low * PAGE, first), min(start + high * PAGE, end)

    def _check(self, spa: int, length: int) -> None:
        for first, end in self.ranges:
            if first <= spa < end:
                if spa + length <= end:
                    return
                raise Unreadable(end, bytes(self.view[spa:end]))
        raise Unreadable(spa)

    def buffers(self) -> list[tuple[int, memoryview]]:
        """(first address, contents) of each range: see `introspect.sources.BytesMemory.buffers`."""
        return [(first, self.view[first:end]) for first, end in self.ranges]

    def read(self, spa: int, length: int, /) -> bytes:
        self._check(spa, length)
        return bytes(self.view[spa : spa + length])

    def write(self, spa: int, data: bytes, /) -> None:
        if not self.contains(spa, len(data)):
            raise Unwritable(spa)
        self.view[spa : spa + len(data)] = data
        self.written(spa, len(data))

    def dma(self, device: str, spa: int, data: bytes) -> None:
        """A device writes: debuggers can tell whose store it was.  `Unwritable` as for `write`."""
        self.device = device
        try:
            self.write(spa, data)
        finally:
            self.device = ""

    def read_u32(self, spa: int, /) -> int:
        if spa + 4 > HOLE:
            self._check(spa, 4)
        elif spa + 4 > self.end:
            raise Unreadable(spa)
        return int(_U32.unpack_from(self.buffer, spa)[0])

    def read_u64(self, spa: int, /) -> int:
        if spa + 8 > HOLE:
            self._check(spa, 8)
        elif spa + 8 > self.end:
            raise Unreadable(spa)
        return int(_U64.unpack_from(self.buffer, spa)[0])

    def write_u32(self, spa: int, value: int, /) -> None:
        self.write(spa, _U32.pack(value))

    def write_u64(self, spa: int, value: int, /) -> None:
        self.write(spa, _U64.pack(value))
