"""Where physical memory comes from: the protocol every analysis reads through, and sources that need no emulator."""

import mmap
import struct
from bisect import bisect_right
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO, Protocol

from elftools.common.exceptions import ELFError
from elftools.elf.elffile import ELFFile

from introspect.layout import Buffer, WritableBuffer

__all__ = ["BytesMemory", "Memory", "SourceError", "Unreadable", "Unwritable", "open_core", "open_dump", "open_raw"]

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")


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
        self.regions: tuple[tuple[int, WritableBuffer], ...] = tuple(pairs)
        self._bases = [base for base, _ in pairs]

    def _find(self, spa: int) -> tuple[int, WritableBuffer] | None:
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
            if found is None or (isinstance(found[1], memoryview) and found[1].readonly):
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
    """An ELF core whose program headers carry physical addresses (QEMU `dump-guest-memory`, vmcore), read-only."""
    with path.open("rb") as file:
        view = _map(file, path)
        try:
            loads = [segment.header for segment in ELFFile(file).iter_segments("PT_LOAD")]
        except (ELFError, UnicodeDecodeError, KeyError, ValueError, AttributeError) as error:
            raise SourceError(f"{path}: not a readable ELF core ({error}); use a raw dump if it is one") from error
    regions = {load.p_paddr: view[load.p_offset : load.p_offset + load.p_filesz] for load in loads if load.p_filesz}
    if not regions:
        raise SourceError(f"{path}: the core has no PT_LOAD segment with contents; dump it with memory included")
    try:
        return BytesMemory(regions)
    except ValueError as error:
        raise SourceError(f"{path}: {error}") from error


def open_dump(path: Path) -> BytesMemory:
    """An ELF core if the file starts like one, else raw memory from address 0."""
    with path.open("rb") as file:
        is_elf = file.read(4) == b"\x7fELF"
    return open_core(path) if is_elf else open_raw(path)
