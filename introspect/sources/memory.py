"""Physical memory: the protocol that every analysis reads through, and memory made of buffers."""

import struct
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Protocol, runtime_checkable

from introspect.layout import Buffer

__all__ = [
    "BytesMemory", "Memory", "Ranged", "SourceError", "Sparse", "Unreadable", "Unwritable", "data_ranges", "memory_ranges",
]  # fmt: skip

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")


class Unreadable(Exception):
    """No memory at `address` (system-physical); `readable_prefix` is what the read got before it.

    `why` is there where a source knows more: that a dump was cut off before this, or a stub is gone.
    """

    def __init__(self, address: int, readable_prefix: bytes = b"", why: str = "") -> None:
        reason = why or "ask for an address inside the machine's RAM"
        super().__init__(f"no memory at physical address {address:#x}; {reason}")
        self.address = address
        self.readable_prefix = readable_prefix
        self.why = why


class Unwritable(Exception):
    """No writable memory at `address` (system-physical); nothing was written."""

    def __init__(self, address: int) -> None:
        super().__init__(f"no writable memory at physical address {address:#x}; dumps and ROM are read-only")
        self.address = address


class SourceError(Exception):
    """A source that cannot be opened or is not what its name says."""


class Memory(Protocol):
    """System-physical memory, little-endian. Reads raise `Unreadable` and writes `Unwritable` outside it."""

    def read(self, spa: int, length: int, /) -> bytes:
        """Exactly `length` bytes."""

    def write(self, spa: int, data: bytes, /) -> None: ...

    def read_u32(self, spa: int, /) -> int: ...

    def read_u64(self, spa: int, /) -> int: ...

    def write_u32(self, spa: int, value: int, /) -> None: ...

    def write_u64(self, spa: int, value: int, /) -> None: ...


@runtime_checkable
class Ranged(Protocol):
    """Memory that knows where it is."""

    @property
    def ranges(self) -> Sequence[tuple[int, int]]:
        """(first, end) of every stretch, ascending."""


@runtime_checkable
class Sparse(Protocol):
    """Memory that knows where it holds nothing but zeros without reading them."""

    def data(self, first: int, end: int, /) -> Iterator[tuple[int, int]]:
        """(first, end) of stretches that may hold other bytes, ascending, within the given one."""


EVERYWHERE = (0, 1 << 52)
"""What memory that does not know where it is may be."""


def memory_ranges(memory: Memory) -> Sequence[tuple[int, int]]:
    """Where there is memory, as far as the source knows: (first, end), ascending."""
    return memory.ranges if isinstance(memory, Ranged) else [EVERYWHERE]


def data_ranges(memory: Memory) -> Iterator[tuple[int, int]]:
    """The same without what is known to be zeros: what a search has to read."""
    for first, end in memory_ranges(memory):
        if isinstance(memory, Sparse):
            yield from memory.data(first, end)
        else:
            yield first, end


class BytesMemory:
    """Memory made of buffers: {physical base: buffer}. Reads cross from one buffer into an adjoining one.

    ValueError if two buffers overlap. Buffers of type `bytes` (or read-only views) refuse writes.
    """

    def __init__(self, regions: Mapping[int, Buffer] | int) -> None:
        """An int makes that many zero bytes at address 0."""
        chosen = {0: bytearray(regions)} if isinstance(regions, int) else regions
        pairs = sorted(((base, memoryview(buffer)) for base, buffer in chosen.items()), key=lambda pair: pair[0])
        pairs = [(base, view.cast("B")) for base, view in pairs if len(view)]
        for (base, view), (following, _) in pairwise(pairs):
            if base + len(view) > following:
                raise ValueError(f"the regions at {base:#x} and {following:#x} overlap; give each byte one home")
        self.regions = tuple(pairs)
        self.ranges = [(base, base + len(view)) for base, view in pairs]
        self._bases = [base for base, _ in pairs]

    def buffers(self) -> Sequence[tuple[int, memoryview]]:
        """(base, contents) of all there is: for who looks at so much of it that reads would take most of the time."""
        return self.regions

    def _find(self, spa: int) -> tuple[int, memoryview] | None:
        """Offset and buffer of one address."""
        index = bisect_right(self._bases, spa) - 1
        if index < 0:
            return None
        base, view = self.regions[index]
        return (spa - base, view) if spa - base < len(view) else None

    def read(self, spa: int, length: int, /) -> bytes:
        found = self._find(spa)
        if found is not None and found[0] + length <= len(found[1]):
            return bytes(found[1][found[0] : found[0] + length])
        parts = b""
        while len(parts) < length:
            found = self._find(spa + len(parts))
            if found is None:
                raise Unreadable(spa + len(parts), parts)
            parts += bytes(found[1][found[0] : found[0] + length - len(parts)])
        return parts

    def write(self, spa: int, data: bytes, /) -> None:
        pieces, done = [], 0
        while done < len(data):
            found = self._find(spa + done)
            if found is None or found[1].readonly:
                raise Unwritable(spa + done)
            offset, view = found
            count = min(len(view) - offset, len(data) - done)
            pieces.append((view, offset, done, count))
            done += count
        for view, offset, start, count in pieces:
            view[offset : offset + count] = data[start : start + count]

    def read_u32(self, spa: int, /) -> int:
        value: int = _U32.unpack(self.read(spa, 4))[0]
        return value

    def read_u64(self, spa: int, /) -> int:
        value: int = _U64.unpack(self.read(spa, 8))[0]
        return value

    def write_u32(self, spa: int, value: int, /) -> None:
        self.write(spa, _U32.pack(value))

    def write_u64(self, spa: int, value: int, /) -> None:
        self.write(spa, _U64.pack(value))
