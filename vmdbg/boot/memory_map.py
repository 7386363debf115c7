"""Where RAM lies in the physical address space, and what the guest is told about it."""

from enum import IntEnum
from typing import NamedTuple

LOW_RAM_LIMIT = 0xC000_0000
"""RAM beyond this size continues at 4 GiB: the space between holds devices."""
HIGH_RAM = 1 << 32
EBDA = 0x9FC00
LEGACY_HOLE = range(0xA0000, 0x100000)
"""Video memory and firmware on a PC; reported as reserved from EBDA on."""


class MemoryType(IntEnum):
    """ACPI 15, address range types."""

    RAM = 1
    RESERVED = 2


class MemoryRange(NamedTuple):
    base: int
    size: int
    type: MemoryType


def ram_ranges(ram_size: int) -> list[tuple[int, int]]:
    """The (base, size) ranges that RAM of `ram_size` bytes occupies.

    ValueError unless it is at least 1 MiB, at most 1 TiB and whole pages.
    """
    if not 1 << 20 <= ram_size <= 1 << 40 or ram_size % 4096:
        raise ValueError(f"RAM size {ram_size:#x} is not 1 MiB to 1 TiB in whole 4 KiB pages")
    if ram_size <= LOW_RAM_LIMIT:
        return [(0, ram_size)]
    return [(0, LOW_RAM_LIMIT), (HIGH_RAM, ram_size - LOW_RAM_LIMIT)]


def memory_map(ram_size: int) -> list[MemoryRange]:
    """The map that a loader reports, as INT 15h E820h would."""
    (_, low), *high = ram_ranges(ram_size)
    ranges = [MemoryRange(0, EBDA, MemoryType.RAM), MemoryRange(EBDA, LEGACY_HOLE.stop - EBDA, MemoryType.RESERVED)]
    if low > LEGACY_HOLE.stop:
        ranges.append(MemoryRange(LEGACY_HOLE.stop, low - LEGACY_HOLE.stop, MemoryType.RAM))
    ranges += [MemoryRange(base, size, MemoryType.RAM) for base, size in high]
    return ranges
