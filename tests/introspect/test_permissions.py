from introspect.permissions import MsrRange, iopm_intercepts, iopm_ranges, msrpm_intercepts, msrpm_ranges
from introspect.sources import BytesMemory

BASE = 0x4000


def memory_with(*bits: int) -> BytesMemory:
    """Ones at these bit positions of the map at BASE."""
    memory = BytesMemory(0x8000)
    for position in bits:
        spa = BASE + position // 8
        memory.write(spa, bytes([memory.read(spa, 1)[0] | 1 << position % 8]))
    return memory


def test_an_access_tests_as_many_bits_as_it_has_bytes() -> None:
    memory = memory_with(0x3F8, 0x10000)
    assert iopm_intercepts(memory, BASE, 0x3F8, 1)
    assert [iopm_intercepts(memory, BASE, 0x3F5, size) for size in (1, 2, 4)] == [False, False, True]
    assert not iopm_intercepts(memory, BASE, 0x3F9, 4)
    assert iopm_intercepts(memory, BASE, 0xFFFF, 2), "the map goes on past port FFFF"
    assert not iopm_intercepts(memory, BASE, 0xFFFF, 1)


def test_low_bits_of_the_base_are_ignored() -> None:
    assert iopm_intercepts(memory_with(0x60), BASE + 0xABC, 0x60, 1)
    assert msrpm_intercepts(memory_with(0x20), BASE + 0xFFF, 0x10, False)


def test_iopm_ranges_merge_across_bytes_and_pages() -> None:
    assert iopm_ranges(memory_with(*range(6, 19), 0x7FFF, 0x8000, 0xFFFF), BASE) == [
        (6, 18), (0x7FFF, 0x8000), (0xFFFF, 0xFFFF),
    ]  # fmt: skip
    assert iopm_ranges(memory_with(), BASE) == []


def test_msrpm_blocks() -> None:
    memory = memory_with(2 * 0x174, 0x800 * 8 + 2 * 0x80 + 1, 0x1000 * 8 + 2 * 0x1FFF)
    assert msrpm_intercepts(memory, BASE, 0x174, False)
    assert not msrpm_intercepts(memory, BASE, 0x174, True)
    assert msrpm_intercepts(memory, BASE, 0xC000_0080, True)
    assert not msrpm_intercepts(memory, BASE, 0xC000_0080, False)
    assert msrpm_intercepts(memory, BASE, 0xC001_1FFF, False)
    assert not msrpm_intercepts(memory, BASE, 0xC001_1FFE, True)


def test_an_unmapped_msr_always_exits() -> None:
    for msr in (0x2000, 0xBFFF_FFFF, 0xC000_2000, 0xC001_2000, 0xFFFF_FFFF):
        assert msrpm_intercepts(memory_with(), BASE, msr, False)


def test_msrpm_ranges_merge_what_is_alike() -> None:
    both, read = range(2 * 0x10, 2 * 0x12), (2 * 0x12,)
    assert msrpm_ranges(memory_with(*both, *read, 0x800 * 8 + 1), BASE) == [
        MsrRange(0x10, 0x11, True, True),
        MsrRange(0x12, 0x12, True, False),
        MsrRange(0xC000_0000, 0xC000_0000, False, True),
    ]


def test_absent_maps_intercept() -> None:
    memory = BytesMemory(0x1000)
    assert iopm_intercepts(memory, BASE, 0, 1)
    assert msrpm_intercepts(memory, BASE, 0, True)
    assert iopm_ranges(memory, BASE) == [(0, 0xFFFF)]
    assert len(msrpm_ranges(memory, BASE)) == 3
