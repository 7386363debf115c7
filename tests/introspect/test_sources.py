import struct
import tempfile
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from introspect.sources import BytesMemory, SourceError, Unreadable, Unwritable, open_core, open_dump, open_raw


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


def elf_core(loads: list[tuple[int, bytes]]) -> bytes:
    """A minimal 64-bit ELF core with these PT_LOAD segments."""
    header = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    header += struct.pack("<HHIQQQIHHHHHH", 4, 62, 1, 0, 64, 0, 0, 64, 56, len(loads), 0, 0, 0)
    offset, table, contents = 64 + 56 * len(loads), b"", b""
    for paddr, data in loads:
        table += struct.pack("<IIQQQQQQ", 1, 6, offset + len(contents), 0, paddr, len(data), len(data), 0)
        contents += data
    return header + table + contents


def test_core_is_read_by_physical_address(tmp_path: Path) -> None:
    path = tmp_path / "core"
    path.write_bytes(elf_core([(0x1000, b"low."), (1 << 32, b"high")]))
    memory = open_dump(path)
    assert (memory.read(0x1000, 4), memory.read(1 << 32, 4)) == (b"low.", b"high")
    with pytest.raises(Unwritable):
        memory.write(0x1000, b"x")


def test_raw_dump(tmp_path: Path) -> None:
    path = tmp_path / "raw"
    path.write_bytes(b"abcdefgh")
    assert open_dump(path).read(2, 3) == b"cde"
    assert open_raw(path, base=0x100).read(0x102, 3) == b"cde"


@pytest.mark.parametrize("contents", [b"", b"\x7fELF", b"\x7fELF\x02\x01" + b"\xff" * 80, elf_core([])])
def test_bad_cores_are_refused_in_words(tmp_path: Path, contents: bytes) -> None:
    path = tmp_path / "bad"
    path.write_bytes(contents)
    with pytest.raises(SourceError, match="bad"):
        open_core(path)


def test_overlapping_segments_show_the_same_memory(tmp_path: Path) -> None:
    path = tmp_path / "core"
    path.write_bytes(elf_core([(0, b"abcd"), (2, b"cdef"), (1, b"bc")]))
    assert open_core(path).read(0, 6) == b"abcdef"


def test_many_segments_are_counted_in_the_first_section_header(tmp_path: Path) -> None:
    core = bytearray(elf_core([(0x1000, b"low."), (0x2000, b"high")]))
    core[56:58] = b"\xff\xff"
    core[40:48] = len(core).to_bytes(8, "little")
    path = tmp_path / "core"
    path.write_bytes(core + struct.pack("<44xI16x", 2))
    assert open_core(path).read(0x2000, 4) == b"high"


CORE = elf_core([(0x1000, b"low."), (1 << 32, b"high")])


@given(st.dictionaries(st.integers(0, len(CORE) - 1), st.integers(0, 255), max_size=8), st.integers(0, len(CORE)))
def test_damaged_cores_never_escape(changes: dict[int, int], length: int) -> None:
    damaged = bytearray(CORE)
    for position, value in changes.items():
        damaged[position] = value
    with tempfile.NamedTemporaryFile() as file:
        file.write(damaged[:length])
        file.flush()
        with suppress(SourceError):
            open_core(Path(file.name))
