"""The I/O and MSR permission maps (APM2 15.10.1, 15.11). Absent memory reads as ones, that is, intercepts."""

from collections.abc import Iterator
from dataclasses import dataclass

from introspect.sources import Memory, Unreadable

__all__ = [
    "IOPM_SIZE", "MSRPM_SIZE", "MsrRange", "iopm_bits", "iopm_intercepts", "iopm_ranges", "msrpm_bit", "msrpm_intercepts",
    "msrpm_ranges",
]  # fmt: skip

IOPM_SIZE = 0x3000
"""Bytes of the I/O map: 64 Ki ports, then three bits for accesses that run past port FFFF."""

MSRPM_SIZE = 0x2000
_PAGE_MASK = ~0xFFF  # both base fields ignore their low 12 bits
_MSR_BLOCKS = ((0x0000_0000, 0x0000), (0xC000_0000, 0x0800), (0xC001_0000, 0x1000))  # first MSR of 0x2000, map byte
_MSRS_IN_BLOCK = 0x2000


def _byte(memory: Memory, spa: int) -> int:
    try:
        return memory.read(spa, 1)[0]
    except Unreadable:
        return 0xFF


def _bytes(memory: Memory, spa: int, length: int) -> bytes:
    """`length` bytes, ones where there is no memory; page by page, as memory comes."""
    parts = []
    for start in range(spa, spa + length, 0x1000):
        count = min(0x1000, spa + length - start)
        try:
            parts.append(memory.read(start, count))
        except Unreadable as error:
            parts.append(error.readable_prefix.ljust(count, b"\xff"))
    return b"".join(parts)


def iopm_bits(base: int, port: int, size: int) -> list[tuple[int, int]]:
    """(system-physical address of the byte, bit in it) of each bit that decides an access of `size` bytes at `port`."""
    start = base & _PAGE_MASK
    return [(start + (at >> 3), at & 7) for at in range(port, port + size)]


def msrpm_bit(base: int, msr: int, write: bool) -> tuple[int, int] | None:
    """(system-physical address of the byte, bit in it) that decides; None for an MSR that the map does not cover."""
    for first, start in _MSR_BLOCKS:
        if first <= msr < first + _MSRS_IN_BLOCK:
            position = 2 * (msr - first) + write
            return (base & _PAGE_MASK) + start + (position >> 3), position & 7
    return None


def iopm_intercepts(memory: Memory, base: int, port: int, size: int) -> bool:
    """Whether an access of `size` bytes at `port` exits: any of its `size` consecutive bits is set."""
    start = (base & _PAGE_MASK) + (port >> 3)
    window = _byte(memory, start)
    if (port & 7) + size > 8:
        window |= _byte(memory, start + 1) << 8
    return bool(window >> (port & 7) & (1 << size) - 1)


def msrpm_intercepts(memory: Memory, base: int, msr: int, write: bool) -> bool:
    """Whether RDMSR or WRMSR of `msr` exits; an MSR that the map does not cover always does."""
    place = msrpm_bit(base, msr, write)
    return place is None or bool(_byte(memory, place[0]) >> place[1] & 1)


def _runs(values: list[int]) -> Iterator[tuple[int, int, int]]:
    """(first index, last index, value) of each run of equal values other than 0."""
    start = 0
    for index in range(1, len(values) + 1):
        if index == len(values) or values[index] != values[start]:
            if values[start]:
                yield start, index - 1, values[start]
            start = index


def iopm_ranges(memory: Memory, base: int) -> list[tuple[int, int]]:
    """Intercepted ports as (first, last), merged, ascending."""
    data = _bytes(memory, base & _PAGE_MASK, 0x2000)
    return [(first, last) for first, last, _ in _runs([byte >> n & 1 for byte in data for n in range(8)])]


@dataclass(frozen=True, slots=True)
class MsrRange:
    """MSRs first..last, both included, that are intercepted alike."""

    first: int
    last: int
    read: bool
    write: bool


def msrpm_ranges(memory: Memory, base: int) -> list[MsrRange]:
    """Intercepted MSRs of the three mapped blocks, merged, ascending."""
    ranges = []
    for first_msr, start in _MSR_BLOCKS:
        data = _bytes(memory, (base & _PAGE_MASK) + start, _MSRS_IN_BLOCK // 4)
        for first, last, rights in _runs([byte >> n & 3 for byte in data for n in range(0, 8, 2)]):
            ranges.append(MsrRange(first_msr + first, first_msr + last, bool(rights & 1), bool(rights & 2)))
    return ranges
