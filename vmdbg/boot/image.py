"""What a loader makes of a file: bytes to place, symbols, and the state of the boot CPU."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Protocol

from vmdbg.boot.memory_map import LEGACY_HOLE, ram_ranges
from vmdbg.boot.state import CpuState, Mode


class ImageError(Exception):
    """An image cannot be loaded: one line that names what, why and the remedy."""


class Memory(Protocol):
    """Physical memory to load into."""

    def write(self, address: int, data: bytes) -> None: ...


@dataclass(frozen=True, slots=True)
class Segment:
    """`data` at physical `address`, followed by zeros up to `size` bytes."""

    name: str
    address: int
    data: bytes
    size: int

    @property
    def end(self) -> int:
        return self.address + self.size


@dataclass(frozen=True, slots=True)
class Symbol:
    """`address` is as linked, mostly virtual."""

    name: str
    address: int
    size: int


@dataclass(frozen=True, slots=True)
class BootImage:
    """`format` is one of multiboot, bzImage, elf, flat, boot sector; `entry` is physical; `debug_file` may hold DWARF."""

    format: str
    segments: tuple[Segment, ...]
    entry: int
    mode: Mode
    symbols: tuple[Symbol, ...]
    debug_file: Path | None
    state: CpuState

    def place(self, memory: Memory) -> None:
        """Write all segments.  Memory outside of them is left as it is."""
        for segment in self.segments:
            memory.write(segment.address, segment.data)
            zeros = segment.address + len(segment.data)
            while zeros < segment.end:
                step = min(segment.end - zeros, 1 << 20)
                memory.write(zeros, bytes(step))
                zeros += step


class Extent(Protocol):
    """What occupies physical memory."""

    @property
    def name(self) -> str: ...

    @property
    def address(self) -> int: ...

    @property
    def end(self) -> int: ...


def check_layout(extents: Sequence[Extent], ram_size: int) -> None:
    """ImageError unless all extents lie in RAM and none overlaps another."""
    ranges = ram_ranges(ram_size)
    for extent in extents:
        if not any(base <= extent.address and extent.end <= base + size for base, size in ranges):
            places = ", ".join(f"{base:#x}..{base + size - 1:#x}" for base, size in ranges)
            raise ImageError(
                f"{extent.name} at {extent.address:#x}..{extent.end - 1:#x} is outside RAM ({places}); "
                "give the machine more RAM or link the image lower"
            )
    ordered = sorted(extents, key=lambda extent: (extent.address, extent.end))
    for lower, upper in pairwise(ordered):
        if upper.address < lower.end:
            raise ImageError(
                f"{lower.name} at {lower.address:#x}..{lower.end - 1:#x} and {upper.name} at "
                f"{upper.address:#x}..{upper.end - 1:#x} overlap; give them separate addresses"
            )


def find_space(name: str, size: int, start: int, occupied: Sequence[Extent], ram_size: int) -> int:
    """The lowest free page-aligned address at or above `start`, in RAM below 4 GiB and off the legacy hole."""
    limit = ram_ranges(ram_size)[0][1]
    taken = sorted([(LEGACY_HOLE.start, LEGACY_HOLE.stop), *((extent.address, extent.end) for extent in occupied)])
    address = _page_up(start)
    for first, end in taken:
        if address < end and first < address + size:
            address = _page_up(end)
    if address + size > limit:
        raise ImageError(f"{name}, {size:#x} bytes, finds no room in {ram_size:#x} bytes of RAM; give the machine more")
    return address


def c_string(name: str, text: str) -> bytes:
    """`text` as an image is given it, with the NUL that ends it; `name` says in errors what it is."""
    try:
        encoded = text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:
        raise ImageError(f"{name} cannot be encoded: {error.reason}; use valid Unicode") from error
    if b"\0" in encoded:
        raise ImageError(f"{name} contains a NUL character, which would end it; remove it")
    return encoded + b"\0"


def _page_up(address: int) -> int:
    return (address + 0xFFF) & ~0xFFF
