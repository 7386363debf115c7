"""Where physical memory comes from: the protocol every analysis reads through, and sources that need no emulator."""

import mmap
import struct
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO, Protocol

from introspect.layout import Buffer

__all__ = ["BytesMemory", "Memory", "SourceError", "Unreadable", "Unwritable", "open_core", "open_dump", "open_raw"]

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_EHDR = struct.Struct("<32xQQ6xHH6x")  # e_phoff, e_shoff, e_phentsize, e_phnum
_PHDR = struct.Struct("<I4xQ8xQQ16x")  # p_type, p_offset, p_paddr, p_filesz
_SHDR_INFO = struct.Struct("<44xI16x")  # sh_info, which holds the count of program headers from 65535 on
_PT_LOAD, _PN_XNUM = 1, 0xFFFF


class Unreadable(Exception):
    """No memory at `address` (system-physical); `readable_prefix` is what the read got before it."""

    def __init__(self, address: int, readable_prefix: bytes = b"") -> None:
        super().__init__(f"no memory at physical address {address:#x}; ask for an address inside the machine's RAM")
        self.address = address
        self.readable_prefix = readable_prefix


class Unwritable(Exception):
    """No writable memory at `address` (system-physical); nothing was written."""

    def __init__(self, address: int) -> None:
        super().__init__(f"no writable memory at physical address {address:#x}; dumps and ROM are read-only")
        self.address = address


class SourceError(Exception):
    """A dump that cannot be opened or is not what its name says."""


class Memory(Protocol):
    """System-physical memory, little-endian. Reads raise `Unreadable` and writes `Unwritable` outside it."""

    def read(self, spa: int, length: int, /) -> bytes:
        """Exactly `length` bytes."""

    def write(self, spa: int, data: bytes, /) -> None: ...

    def read_u32(self, spa: int, /) -> int: ...

    def read_u64(self, spa: int, /) -> int: ...

    def write_u32(self, spa: int, value: int, /) -> None: ...

    def write_u64(self, spa: int, value: int, /) -> None: ...


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


def _map(file: BinaryIO, path: Path) -> memoryview:
    try:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except ValueError as error:
        raise SourceError(f"{path}: {error}; a dump has at least one byte") from error


def open_raw(path: Path, base: int = 0) -> BytesMemory:
    """A file that is physical memory from `base` on, mapped read-only. OSError if it cannot be opened."""
    with path.open("rb") as file:
        return BytesMemory({base: _map(file, path)})


def open_core(path: Path) -> BytesMemory:
    """A 64-bit ELF core whose program headers carry physical addresses (QEMU `dump-guest-memory`, vmcore), read-only.

    Segments may overlap, as a vmcore's kernel text does its direct map: they show the same memory.
    """
    with path.open("rb") as file:
        view = _map(file, path)
    regions, end = {}, 0
    for paddr, offset, length in sorted(_load_segments(view, path)):
        start = max(paddr, end)
        contents = view[offset : offset + length][start - paddr :]
        if contents:
            regions[start] = contents
            end = start + len(contents)
    if not regions:
        raise SourceError(f"{path}: the core has no PT_LOAD segment with contents; dump it with memory included")
    return BytesMemory(regions)


def _load_segments(view: memoryview, path: Path) -> list[tuple[int, int, int]]:
    """(physical address, file offset, length) of the PT_LOAD segments.

    Read here rather than by a library: a damaged header must neither escape nor cost time.
    """
    if bytes(view[:6]) != b"\x7fELF\x02\x01" or len(view) < _EHDR.size:
        raise SourceError(f"{path}: not a little-endian 64-bit ELF file; open it as a raw dump if it is one")
    table, sections, entry_size, count = _EHDR.unpack_from(view)
    if count == _PN_XNUM and sections + _SHDR_INFO.size <= len(view):
        (count,) = _SHDR_INFO.unpack_from(view, sections)
    if entry_size < _PHDR.size or table + count * entry_size > len(view):
        raise SourceError(f"{path}: {count} program headers at {table:#x} do not fit the file; dump it again")
    headers = (_PHDR.unpack_from(view, table + n * entry_size) for n in range(count))
    return [(paddr, offset, length) for kind, offset, paddr, length in headers if kind == _PT_LOAD]


def open_dump(path: Path) -> BytesMemory:
    """An ELF core if the file starts like one, else raw memory from address 0."""
    with path.open("rb") as file:
        is_elf = file.read(4) == b"\x7fELF"
    return open_core(path) if is_elf else open_raw(path)
