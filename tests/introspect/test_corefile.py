"""Cores: each mapped address leads to its bytes, each physical one too, and readers that bisect find their way."""

from __future__ import annotations

import struct
from bisect import bisect_right
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from introspect.corefile import UNMAPPED, CoreError, Loads, plan_loads, whole_pages, write_core
from introspect.runs import EMPTY, Runs, column, joined
from introspect.sources import BytesMemory, open_core
from introspect.sources.notes import make_note

PAGE = 0x1000


def runs(*rows: tuple[int, int, int]) -> Runs:
    """(linear, length, physical) in pages."""
    parts = [Runs(column(a * PAGE), column(b * PAGE), column(c * PAGE), column(3)) for a, b, c in rows]
    return joined(parts) if parts else EMPTY


def rows(loads: Loads) -> list[tuple[int, int, int]]:
    columns = (loads.linear.tolist(), loads.physical.tolist(), loads.length.tolist())
    return list(zip(*columns, strict=True))


def program_headers(data: bytes) -> list[tuple[int, int, int, int, int]]:
    """(type, offset, vaddr, paddr, filesz)."""
    (count,) = struct.unpack_from("<H", data, 56)
    found = [struct.unpack_from("<IIQQQQQQ", data, 64 + 56 * n) for n in range(count)]
    return [(kind, offset, vaddr, paddr, size) for kind, _, offset, vaddr, paddr, size, _, _ in found]


def test_what_nothing_maps_is_there_by_its_physical_address() -> None:
    loads = plan_loads([(0, 4 * PAGE)], runs((0x100, 1, 1)))
    assert rows(loads) == [
        (UNMAPPED, 0, PAGE), (0x100 * PAGE, PAGE, PAGE), (UNMAPPED + 2 * PAGE, 2 * PAGE, 2 * PAGE),
    ]  # fmt: skip


def test_memory_that_is_mapped_twice_has_two_headers_of_the_same_pieces() -> None:
    loads = plan_loads([(0, 4 * PAGE)], runs((0x100, 4, 0), (0x200, 1, 2)))
    assert [(linear // PAGE, physical // PAGE, length // PAGE) for linear, physical, length in rows(loads)] == [
        (0x100, 0, 2), (0x102, 2, 1), (0x200, 2, 1), (0x103, 3, 1),
    ]  # fmt: skip


def test_devices_are_left_out() -> None:
    loads = plan_loads([(0, 2 * PAGE)], runs((0x100, 16, 0)))
    assert [(linear, physical, length) for linear, physical, length in rows(loads)] == [(0x100 * PAGE, 0, 2 * PAGE)]


def test_too_many_headers_leave_out_the_smallest() -> None:
    small = [(0x1000 + 2 * n, 1, (7 * n) % 512) for n in range(64)]
    loads = plan_loads([(0, 512 * PAGE)], runs((0x100000, 512, 0), *small), most=60)
    assert len(loads) <= 60
    assert loads.left_out == 64
    assert rows(loads) == [(0x100000 * PAGE, 0, 512 * PAGE)]


def test_memory_in_too_many_pieces_is_refused() -> None:
    with pytest.raises(CoreError, match="70000 pieces"):
        plan_loads([(2 * n * PAGE, (2 * n + 1) * PAGE) for n in range(70000)], EMPTY)


def test_whole_pages() -> None:
    assert whole_pages([(1, 2), (0x1800, 0x1900), (0x2000, 0x2001), (0x8000, 0x9000)]) == [(0, 0x3000), (0x8000, 0x9000)]


mapped = st.lists(st.tuples(st.integers(1, 12), st.integers(0, 70)), max_size=12)
ranges = st.lists(st.integers(0, 64), min_size=2, max_size=8, unique=True).map(lambda cuts: [
    (low * PAGE, high * PAGE) for low, high in zip(sorted(cuts)[::2], sorted(cuts)[1::2], strict=False)])  # fmt: skip


@settings(max_examples=80, deadline=None)
@given(mapped, ranges, st.integers(0, 2**32))
def test_every_address_leads_to_its_bytes(tmp_path_factory: pytest.TempPathFactory, chosen: list[tuple[int, int]], parts: list[tuple[int, int]], seed: int) -> None:
    at, table = 0x1000, []
    for length, physical in chosen:
        table.append((at, length, physical))
        at += length + 1
    memory = BytesMemory({low: b"".join(bytes([low // PAGE + n + 1]) * PAGE for n in range((high - low) // PAGE)) for low, high in parts})
    loads = plan_loads(parts, runs(*table))
    path = tmp_path_factory.mktemp("cores") / "core"
    write_core(path, memory, parts, loads, b"")
    data = path.read_bytes()
    headers = [header[1:] for header in program_headers(data) if header[0] == 1]

    def expected(physical: int) -> bytes | None:
        inside = any(low <= physical < high for low, high in parts)
        return memory.read(physical, 1) if inside else None

    # By linear address, as gdb.
    for linear, length, physical in table:
        for n in range(length):
            found = [data[offset + (linear + n) * PAGE - vaddr] for offset, vaddr, _, size in headers
                     if vaddr <= (linear + n) * PAGE < vaddr + size]  # fmt: skip
            wanted = expected((physical + n) * PAGE)
            assert found == ([] if wanted is None else list(wanted))
    # By physical address, bisecting, as Volatility.
    firsts = [paddr for _, _, paddr, _ in headers]
    assert firsts == sorted(firsts)
    for page in range(72):
        index = bisect_right(firsts, page * PAGE) - 1
        wanted = expected(page * PAGE)
        hit = index >= 0 and page * PAGE < headers[index][2] + headers[index][3]
        assert hit == (wanted is not None)
        if wanted is not None:
            assert data[headers[index][0] + page * PAGE - headers[index][2]] == wanted[0]
    # And ourselves.
    assert open_core(path).memory.read(parts[0][0], PAGE) == memory.read(parts[0][0], PAGE)


def test_zeros_are_holes(tmp_path: Path) -> None:
    path = tmp_path / "core"
    memory = BytesMemory({0: bytes(1 << 24) + b"end".ljust(PAGE, b"\0")})
    told: list[float] = []
    size = write_core(path, memory, [(0, (1 << 24) + PAGE)], plan_loads([(0, (1 << 24) + PAGE)], EMPTY), make_note(b"A", 1, b"x"), told.append)
    assert (size.stored, size.unreadable, size.size) == (PAGE, 0, path.stat().st_size)
    assert path.stat().st_blocks * 512 < 1 << 17
    assert open_core(path).memory.read((1 << 24) - 2, 5) == b"\0\0end"
    assert told[0] == 0.0
    assert told == sorted(told)


def test_what_cannot_be_read_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "core"
    memory = BytesMemory({0: b"a" * PAGE, 2 * PAGE: b"b" * 100})
    size = write_core(path, memory, [(0, 3 * PAGE)], plan_loads([(0, 3 * PAGE)], EMPTY), b"")
    assert size.unreadable == 0  # ranges say where memory is; beyond them nothing is expected
    assert open_core(path).memory.read(2 * PAGE, 101) == b"b" * 100 + b"\0"


def test_a_core_that_is_ended_leaves_no_file(tmp_path: Path) -> None:
    path = tmp_path / "core"
    path.write_bytes(b"before")

    def end(part: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_core(path, BytesMemory(PAGE), [(0, PAGE)], plan_loads([(0, PAGE)], EMPTY), b"", end)
    assert [one.name for one in tmp_path.iterdir()] == ["core"]
    assert path.read_bytes() == b"before"
