"""Dumps made of bytes."""

import struct
from collections.abc import Sequence


def elf_core(loads: Sequence[tuple[int, bytes]], notes: bytes = b"", machine: int = 62) -> bytes:
    """A 64-bit ELF core with these PT_LOAD segments, and a PT_NOTE segment if there are notes."""
    count = len(loads) + bool(notes)
    header = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    header += struct.pack("<HHIQQQIHHHHHH", 4, machine, 1, 0, 64, 0, 0, 64, 56, count, 0, 0, 0)
    offset, table, contents = 64 + 56 * count, b"", notes
    if notes:
        table += struct.pack("<IIQQQQQQ", 4, 0, offset, 0, 0, len(notes), len(notes), 0)
    for paddr, data in loads:
        table += struct.pack("<IIQQQQQQ", 1, 6, offset + len(contents), 0, paddr, len(data), len(data), 0)
        contents += data
    return header + table + contents


def elf32_core(loads: Sequence[tuple[int, bytes]], notes: bytes = b"") -> bytes:
    """The same for 32 bits."""
    count = len(loads) + bool(notes)
    header = b"\x7fELF\x01\x01\x01".ljust(16, b"\0")
    header += struct.pack("<HHIIIIIHHHHHH", 4, 3, 1, 0, 52, 0, 0, 52, 32, count, 0, 0, 0)
    offset, table, contents = 52 + 32 * count, b"", notes
    if notes:
        table += struct.pack("<8I", 4, offset, 0, 0, len(notes), len(notes), 0, 0)
    for paddr, data in loads:
        table += struct.pack("<8I", 1, offset + len(contents), 0, paddr, len(data), len(data), 6, 0)
        contents += data
    return header + table + contents


def lime(ranges: Sequence[tuple[int, bytes]]) -> bytes:
    """A LiME image of these stretches."""
    return b"".join(
        struct.pack("<IIQQ8x", 0x4C694D45, 1, first, first + len(data) - 1) + data for first, data in ranges
    )
