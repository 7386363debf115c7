"""Just enough ACPI machine language to describe the machine: terms as bytes (ACPI 20.2), resources (ACPI 6.4)."""

from __future__ import annotations

from collections.abc import Iterable
from struct import pack

ARG0 = b"\x68"


def _name_segment(name: str) -> bytes:
    return name.ljust(4, "_").encode("ascii")


def path(name: str) -> bytes:
    """A name like "PCI0", "\\_SB" or "\\_SB.PCI0"."""
    root = b"\\" if name.startswith("\\") else b""
    parts = [_name_segment(part) for part in name.removeprefix("\\").split(".")]
    prefix = {1: b"", 2: b"\x2e"}.get(len(parts), b"\x2f" + bytes([len(parts)]))
    return root + prefix + b"".join(parts)


def _package(content: bytes) -> bytes:
    """PkgLength, which counts itself, and what it is the length of."""
    for extra in range(4):
        length = len(content) + 1 + extra
        if extra == 0 and length < 64:
            return bytes([length]) + content
        if extra and length < 1 << 4 + 8 * extra:
            head = extra << 6 | length & 0xF
            return bytes([head]) + (length >> 4).to_bytes(extra, "little") + content
    raise ValueError(f"an AML package of {len(content)} bytes is too long")


def integer(value: int) -> bytes:
    if value in (0, 1):
        return bytes([value])
    for prefix, size in ((0x0A, 1), (0x0B, 2), (0x0C, 4), (0x0E, 8)):
        if value < 1 << 8 * size:
            return bytes([prefix]) + value.to_bytes(size, "little")
    raise ValueError(f"{value:#x} has more than 64 bits")


def string(text: str) -> bytes:
    return b"\x0d" + text.encode("ascii") + b"\0"


def eisa_id(text: str) -> bytes:
    """A compressed ID like "PNP0A08"."""
    letters = [ord(letter) - 0x40 for letter in text[:3]]
    value = letters[0] << 26 | letters[1] << 21 | letters[2] << 16 | int(text[3:], 16)
    return b"\x0c" + value.to_bytes(4, "big")


def scope(name: str, *terms: bytes) -> bytes:
    return b"\x10" + _package(path(name) + b"".join(terms))


def device(name: str, *terms: bytes) -> bytes:
    return b"\x5b\x82" + _package(path(name) + b"".join(terms))


def name(word: str, value: bytes) -> bytes:
    return b"\x08" + path(word) + value


def method(word: str, arguments: int, *terms: bytes) -> bytes:
    return b"\x14" + _package(path(word) + bytes([arguments]) + b"".join(terms))


def package(*elements: bytes) -> bytes:
    return b"\x12" + _package(bytes([len(elements)]) + b"".join(elements))


def if_(predicate: bytes, *terms: bytes) -> bytes:
    return b"\xa0" + _package(predicate + b"".join(terms))


def return_(value: bytes) -> bytes:
    return b"\xa4" + value


def store(source: bytes, target: str) -> bytes:
    return b"\x70" + source + path(target)


def resources(*descriptors: bytes) -> bytes:
    """A ResourceTemplate: a buffer of descriptors with an end tag."""
    data = b"".join(descriptors) + b"\x79\x00"
    return b"\x11" + _package(integer(len(data)) + data)


def io_ports(first: int, length: int) -> bytes:
    return pack("<BBHHBB", 0x47, 1, first, first, 1, length)


def irq(number: int) -> bytes:
    """Edge-triggered, active high, not shared."""
    return pack("<BH", 0x22, 1 << number)


def memory(first: int, length: int) -> bytes:
    return pack("<BHBII", 0x86, 9, 1, first, length)


_FIXED = 0x0C
"""Minimum and maximum are both fixed; the device produces the range for those below it."""
_RANGES: dict[int, tuple[int, str]] = {2: (0x88, "H"), 4: (0x87, "I"), 8: (0x8A, "Q")}


def _address_range(kind: int, flags: int, size: int, first: int, last: int) -> bytes:
    tag, form = _RANGES[size]
    body = pack(f"<BBB5{form}", kind, _FIXED, flags, 0, first, last, 0, last - first + 1)
    return pack("<BH", tag, len(body)) + body


def bus_numbers(first: int, last: int) -> bytes:
    return _address_range(2, 0, 2, first, last)


def port_range(first: int, last: int) -> bytes:
    return _address_range(1, 3, 2, first, last)


def memory_range(first: int, last: int) -> bytes:
    return _address_range(0, 1, 8 if last >> 32 else 4, first, last)


def join(terms: Iterable[bytes]) -> bytes:
    return b"".join(terms)
