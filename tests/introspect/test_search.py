"""Search: every match and no other, across pieces and holes, in every space."""

from __future__ import annotations

from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from introspect.commands import Cancelled, CommandError, GuestView, HostView, run_line
from introspect.paging import Nested, PagingState
from introspect.search import Piece, hex_pattern, linear_pieces, nested_pieces, pattern, physical_pieces, scan
from introspect.sources import BytesMemory
from introspect.symbols import Symbol, Symbols

from .tables import LONG, PAGED, Tables, nested
from .world import World

PAGE = 0x1000


def every(data: bytes, wanted: bytes) -> list[int]:
    return [at for at in range(len(data) - len(wanted) + 1) if data[at : at + len(wanted)] == wanted]


@given(st.binary(max_size=300), st.binary(min_size=1, max_size=3), st.lists(st.integers(1, 50), max_size=10), st.integers(1, 4))
def test_all_matches_in_pieces_of_any_size(data: bytes, wanted: bytes, sizes: list[int], align: int) -> None:
    memory, at, pieces = BytesMemory({0: data}) if data else BytesMemory(1), 0, []
    for size in [*sizes, len(data)]:
        size = min(size, len(data) - at)
        if size:
            pieces.append(Piece(at, size, at))
        at += size
    found = list(scan(memory, iter(pieces), pattern(wanted), align))
    assert found == [at for at in every(data, wanted) if not at % align]


@given(st.binary(min_size=1, max_size=200), st.binary(min_size=1, max_size=6), st.integers(0, 63))
def test_wildcards(data: bytes, wanted: bytes, hidden: int) -> None:
    digits = "".join("?" if hidden >> n & 1 else digit for n, digit in enumerate(wanted.hex()))
    found = hex_pattern(" ".join(digits[at : at + 2] for at in range(0, len(digits), 2)))
    assert found is not None
    assert found.size == len(wanted)
    expected = [
        at for at in range(len(data) - len(wanted) + 1)
        if all(mark in ("?", digit) for mark, digit in zip(digits, data[at : at + len(wanted)].hex(), strict=True))
    ]  # fmt: skip
    assert list(scan(BytesMemory({0: data}), iter([Piece(0, len(data), 0)]), found, 1)) == expected


@pytest.mark.parametrize("text", ["", "4", "48 8", "zz", "48 8b 9x"])
def test_no_pattern(text: str) -> None:
    assert hex_pattern(text) is None


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 5)), max_size=5))
def test_physical_pieces_cover_the_range(places: list[tuple[int, int]]) -> None:
    regions: dict[int, bytearray] = {}
    taken: set[int] = set()
    for first, count in places:
        pages = set(range(first, first + count))
        if not pages & taken:
            taken |= pages
            regions[first * PAGE] = bytearray(count * PAGE)
    memory = BytesMemory(dict(regions) or {50 * PAGE: bytearray(PAGE)})
    at = 0
    for piece in physical_pieces(memory, 0, 46 * PAGE):
        assert piece.address == at
        at += piece.size
        for page in range(piece.address // PAGE, (piece.address + piece.size) // PAGE):
            assert (page in taken) == (piece.spa is not None) or piece.spa is not None  # a piece may end amid memory
    assert at == 46 * PAGE


def test_a_hole_without_end_is_given_up() -> None:
    memory = BytesMemory({0: bytearray(PAGE)})
    assert len(list(physical_pieces(memory, 0, 1 << 52))) < 70000


def paged() -> tuple[BytesMemory, PagingState]:
    memory = BytesMemory(0x100000)
    tables = Tables(memory, "4-level", range(0x80000, 0x100000, PAGE))
    tables.map(0x400000, 0x5000)
    tables.map(0x401000, 0x9000)
    tables.map(0xFFFF800000000000, 0x6000)
    return memory, PagingState(PAGED, tables.root, 0x20, LONG)


def test_matches_cross_pages_that_adjoin_only_linearly() -> None:
    memory, state = paged()
    memory.write(0x5FFC, b"need")
    memory.write(0x9000, b"les!")
    memory.write(0x6800, b"needles!")
    pieces = linear_pieces(memory, state, None, 0, 1 << 64)
    assert list(scan(memory, pieces, pattern(b"needles!"), 1)) == [0x400FFC, 0xFFFF800000000800]


def test_a_whole_address_space_takes_few_pieces() -> None:
    memory, state = paged()
    pieces = list(linear_pieces(memory, state, None, 0, 1 << 64))
    assert len(pieces) < 4000
    assert sum(piece.size for piece in pieces) == 1 << 64
    assert [piece.address for piece in pieces if piece.spa is not None] == [0x400000, 0x401000, 0xFFFF800000000000]


def test_tables_that_are_not_there() -> None:
    memory = BytesMemory(0x1000)
    for cr3 in (0x5000, 0):
        pieces = list(islice(linear_pieces(memory, PagingState(PAGED, cr3, 0x20, LONG), None, 0, 1 << 64), 2000))
        assert sum(piece.size for piece in pieces) == 1 << 64
        assert all(piece.spa is None for piece in pieces)


def guest() -> tuple[BytesMemory, GuestView]:
    memory = BytesMemory(0x200000)
    npt = Tables(memory, "4-level", range(0x100000, 0x200000, PAGE))
    for gpa, spa in ((0x2000, 0x80000), (0x3000, 0x70000), (1 << 40, 0x60000)):
        npt.map(gpa, spa)
    state = PagingState(1, 0, 0, 0)
    return memory, GuestView(number=2, name="linux", paging=state, nested=nested("4-level", npt.root), vmcbs=(), asid=1, ncr3=npt.root)


def test_guest_physical() -> None:
    memory, view = guest()
    memory.write(0x80FFE, b"PASSED"[:2])
    memory.write(0x70000, b"PASSED"[2:])
    memory.write(0x60123, b"PASSED")
    assert isinstance(view.nested, Nested)
    pieces = list(nested_pieces(memory, view.nested, 0, 1 << 48))
    assert len(pieces) < 4000
    assert list(scan(memory, iter(pieces), pattern(b"PASSED"), 1)) == [0x2FFE, (1 << 40) + 0x123]


def world() -> World:
    memory, view = guest()
    memory.write(0x80010, b"hello, world\0")
    memory.write(0x80020, (0x12345678).to_bytes(4, "little") + (0x1_0000_0000).to_bytes(8, "little"))
    memory.write(0x80040, "wide".encode("utf-16-le"))
    host = HostView(number=0, paging=PagingState(1, 0, 0, 0))
    symbols = Symbols([Symbol("buffer", 0x80000, 0x100)])
    return World(memory, [view], host=host, known_symbols={0: symbols}, known_registers={0: {"rax": 0x12345678}})


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("search hello in buffer", [0x80010]),
        ("search hello in host:buffer", [0x80010]),
        ("search 'str:hello, world' in 0 +1m", [0x80010]),
        ("search 0x12345678 in 0 0x200000", [0x80020]),
        ("search u32:rax in spa:0 +2m", [0x80020]),
        ("search u64:0x100000000 in 2:gpa:0 +1m", [0x2024]),
        ("search 0x100000000 in 2:gpa:0x2000 +4k", [0x2024]),
        ("search utf16:wide in 2:0x2000 +4k", [0x2040]),
        ("search '68 65 6? 6c' in 2:gpa:0 +16k", [0x2010]),
        ("search hex:686??c6c in 2:gpa:0 +16k", [0x2010]),
        ("search l in 2:gpa:0 +16k --max 2", [0x2012, 0x2013]),
        ("search l in 2:gpa:0 +16k --align 4 --max 2", []),
        ("search moon in 2:gpa:0 0xffffffffffff", []),
    ],
)
def test_command(line: str, found: list[int]) -> None:
    shown = run_line(world(), line)
    data = shown.json()
    assert isinstance(data, dict)
    assert [one["address"] for one in data["matches"]] == found
    assert shown.text()


def test_what_is_left_out_is_said() -> None:
    text = run_line(world(), "search hello in 2:gpa:0 +64k").text()
    assert text.endswith("56 KiB of it is not mapped, or no memory")
    assert "there are more: --max shows them" in run_line(world(), "search l in 2:gpa:0 +16k --max 1").text()


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        ("search x in 5", "no symbol with a size"), ("search u8:256 in buffer", "does not fit 1 bytes"), ("search hex:4 in buffer", "pairs of digits"),
        ("search x in 5 4", "is empty"), ("search x in iova:0 +4k", "cannot be searched"), ("search u32:moon in buffer", "no such name"),
        ("search '' in buffer", "1 to 4096 characters"), ("search x on buffer", "one of in"), ("search", "missing"),
        (f"search {'x' * 5000} in buffer", "1 to 4096 characters"),
    ],
)  # fmt: skip
def test_errors(line: str, rule: str) -> None:
    with pytest.raises(CommandError, match=rule):
        run_line(world(), line)


class Sparse(BytesMemory):
    """Knows where its zeros are."""

    def data(self, first: int, end: int, /) -> list[tuple[int, int]]:
        return [(start, stop) for start, stop in ((0x4000, 0x5000),) if first <= start and stop <= end]


def test_known_zeros_are_not_read_unless_they_are_looked_for() -> None:
    memory = Sparse(0x100000)
    memory.write(0x4000, b"\x00PASS")
    assert sum(piece.size for piece in physical_pieces(memory, 0, 0x100000, 5) if piece.spa is not None) == 0x1000 + 10
    where = World(memory)
    for line, count in (("search '00 00 50 41' in spa:0 +1m", 1), ("search PASS in spa:0 +1m", 1), ("search u64:0 in spa:0 +64 --align 8", 8)):
        shown = run_line(where, line).json()
        assert isinstance(shown, dict)
        assert len(shown["matches"]) == count


class Impatient(World):
    """Wants no answer that takes long."""

    told: float = 0

    def progress(self, part: float, what: str) -> None:
        if part > 0.5:
            raise Cancelled
        self.told = part


def test_a_search_can_be_cancelled() -> None:
    where = Impatient(BytesMemory(16 << 20))
    with pytest.raises(Cancelled):
        run_line(where, "search moon in spa:0 +16m")
    assert 0 < where.told <= 0.5
