import pytest

from introspect.sources import BytesMemory, Unreadable, Unwritable


def test_reads_cross_adjoining_regions() -> None:
    memory = BytesMemory({0x1000: b"abcd", 0x1004: bytearray(b"efgh")})
    assert memory.read(0x1002, 4) == b"cdef"
    assert memory.read_u32(0x1004) == int.from_bytes(b"efgh", "little")


def test_unreadable_tells_where_and_what_came_before() -> None:
    memory = BytesMemory({0x1000: b"abcd"})
    with pytest.raises(Unreadable, match="0x1004") as caught:
        memory.read(0x1002, 8)
    assert (caught.value.address, caught.value.readable_prefix) == (0x1004, b"cd")
    with pytest.raises(Unreadable):
        memory.read(0, 1)
    assert memory.read(0x9999_9999, 0) == b""


def test_writes_are_all_or_nothing() -> None:
    memory = BytesMemory({0: bytearray(8), 8: b"rom."})
    memory.write_u64(0, 0x1122_3344_5566_7788)
    assert memory.read_u64(0) == 0x1122_3344_5566_7788
    with pytest.raises(Unwritable, match="0x8"):
        memory.write(6, b"\xff\xff\xff")
    assert memory.read(6, 2) == b"\x22\x11"


def test_regions_must_not_overlap() -> None:
    with pytest.raises(ValueError, match="overlap"):
        BytesMemory({0: bytes(8), 4: bytes(8)})
