"""Unicorn's code in this process: finding a place by its bytes, writing there, and pages for more code within reach.

The file on disk stays as it is.  Who changes something looks for bytes that occur once, and leaves all alone where they do not.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import re
from pathlib import Path

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_MAP_FIXED_NOREPLACE = 0x100000
PAGE = 4096


def mappings() -> list[tuple[int, int, str]]:
    """First address, end and rights of each mapping of the library in this process."""
    if not os.path.exists("/proc/self/maps"):
        return []
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, rights, *_, path = line.split(maxsplit=5)
        if "libunicorn" in path:
            first, end = (int(part, 16) for part in span.split("-"))
            found.append((first, end, rights))
    return found


def find_all(pattern: re.Pattern[bytes]) -> list[tuple[int, re.Match[bytes]]]:
    """Address of each place in the library's code that matches, and the match."""
    return [
        (first + match.start(), match)
        for first, end, rights in mappings() if "x" in rights
        for match in pattern.finditer((ctypes.c_char * (end - first)).from_address(first))
    ]  # fmt: skip


def find(pattern: re.Pattern[bytes]) -> tuple[int, re.Match[bytes]] | None:
    """The one place that matches."""
    found = find_all(pattern)
    return found[0] if len(found) == 1 else None


def replace(address: int, data: bytes) -> bool:
    """Write into the library; False if its mapping may not be changed."""
    for first, end, rights in mappings():
        if first <= address and address + len(data) <= end:
            keep = mmap.PROT_READ | (mmap.PROT_EXEC if "x" in rights else 0)
            page = address & -PAGE
            span = (address + len(data) + PAGE - 1 & -PAGE) - page
            if libc.mprotect(page, span, keep | mmap.PROT_WRITE):
                return False
            ctypes.memmove(address, data, len(data))
            libc.mprotect(page, span, keep)
            return True
    return False


def near(address: int, size: int) -> int | None:
    """A fresh executable page within reach of a 32-bit jump."""
    base = address & -PAGE
    for distance in range(1 << 24, 1 << 30, 1 << 24):
        for place in (base + distance, base - distance):
            got = libc.mmap(
                place, size, mmap.PROT_READ | mmap.PROT_WRITE,
                mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_FIXED_NOREPLACE, -1, 0,
            )  # fmt: skip
            if got == place:
                return place
    return None


def displacement(at: int, target: int) -> bytes:
    """The 32-bit operand at address `at` of a jump to `target`."""
    return (target - at - 4).to_bytes(4, "little", signed=True)


def distance(operand: bytes) -> int:
    """What such an operand says, counted from its end."""
    return int.from_bytes(operand, "little", signed=True)


def linked(origin: int, *parts: bytes | str | tuple[bytes, str | int]) -> bytes:
    """Code for address `origin` from pieces, names of places, and jumps: short ones to a name, near ones to an address."""
    places, at = {}, 0
    for part in parts:
        if isinstance(part, str):
            places[part] = at
        else:
            at += len(part) if isinstance(part, bytes) else 2 if isinstance(part[1], str) else 5
    code = b""
    for part in parts:
        if isinstance(part, bytes):
            code += part
        elif isinstance(part, tuple):
            opcode, target = part
            if isinstance(target, str):
                code += opcode + (places[target] - len(code) - 2).to_bytes(1, "little", signed=True)
            else:
                code += opcode + displacement(origin + len(code) + 1, target)
    return code
