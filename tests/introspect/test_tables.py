"""Address spaces as a whole: what each mode's tables map, in ranges, and what is told of tables that are not in order.

The oracle of the property tests is one walk after the other (`plain.py`).
"""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from introspect.dimension import Dimension, Limits, Problem
from introspect.paging import Access, Fault, Nested, PagingState, translate
from introspect.registers import CR0, CR4
from introspect.runs import Runs, column
from introspect.sources import BytesMemory
from introspect.tables import AddressSpace, Listing, Mapped, NestedSpace, Range, canonical, list_nested, list_space

from .plain import plain_space
from .tables import MODES, NX, SHIFTS, A, D, G, P, Tables, U, W, nested, state

PAGES = 12
SMALL = Limits(entries=1 << 17, runs=1 << 13)
ENTRIES = st.integers(0, 2**32)


def shown(listing: Listing, *, linear: bool = False) -> list[tuple[int, int, int, str]]:
    """(start, end, target, rights) of the ranges; target -1 where they do not map linearly."""
    return [
        (one.start, one.end, one.target if one.linear else -1, rights(one)) for one in listing.ranges(linear=linear)
    ]  # fmt: skip


def rights(one: Range) -> str:
    flags = (("w", one.writable), ("x", one.executable), ("u", one.user), ("g", one.shared))
    return "r" + "".join(letter for letter, has in flags if has)


# Each mode


@pytest.mark.parametrize("mode", MODES)
def test_small_pages_become_ranges_with_their_rights(mode: str) -> None:
    tables = Tables(BytesMemory(1 << 16), mode, range(0x1000, 0x10000, 0x1000))
    for page in range(8):
        tables.map(0x400000 + page * 0x1000, 0x20000 + page * 0x1000, P | (W if page < 3 else 0) | U)
    tables.map(0x408000, 0x50000, P | U | G)
    tables.map(0x40A000, 0x28000, P)
    assert shown(list_space(tables.memory, state(mode, tables.root))) == [
        (0x400000, 0x403000, 0x20000, "rwxu"), (0x403000, 0x408000, 0x23000, "rxu"), (0x408000, 0x409000, 0x50000, "rxug"),
        (0x40A000, 0x40B000, 0x28000, "rx"),
    ]  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_large_pages_and_small_ones_beside_them_are_one_range(mode: str) -> None:
    tables = Tables(BytesMemory(1 << 16), mode, range(0x1000, 0x10000, 0x1000))
    large = 1 << SHIFTS[mode][-2]
    tables.map(large, large, P | W, level=2)
    tables.map(2 * large, 2 * large, P | W)
    tables.map(2 * large + 0x1000, 0x1000, P | W)
    (found,) = list_space(tables.memory, state(mode, tables.root)).ranges()
    assert found[:4] == (large, 2 * large + 0x2000, large, False)
    assert found.page_sizes == (0x1000, large)
    two = list(list_space(tables.memory, state(mode, tables.root)).ranges(linear=True))
    assert [one[:4] for one in two] == [
        (large, 2 * large, large, True), (2 * large, 2 * large + 0x1000, 2 * large, True),
        (2 * large + 0x1000, 2 * large + 0x2000, 0x1000, True),
    ]  # fmt: skip


def test_pages_of_one_gigabyte_and_the_upper_half() -> None:
    tables = Tables(BytesMemory(1 << 16), "4-level", range(0x1000, 0x10000, 0x1000))
    tables.map(0x7FFF_C000_0000, 0, P | W, level=3)
    tables.map(0xFFFF_8000_0000_0000, 1 << 30, P | W, level=3)
    listing = list_space(tables.memory, state("4-level", tables.root))
    assert [(listing.shown(one.start), one.end) for one in listing.ranges()] == [
        (0x7FFF_C000_0000, 1 << 47), (0xFFFF_8000_0000_0000, (1 << 47) + (1 << 30))
    ], "the two halves do not touch"  # fmt: skip
    assert [one.page_sizes for one in listing.ranges()] == [(1 << 30,)] * 2
    assert listing.find(0xFFFF_8000_0000_1234) == Mapped((1 << 30) + 0x1234, W, 1 << 30, 1 << 30)
    assert listing.find(0xFFFF_9000_0000_0000) is None
    assert listing.bytes_mapped == 2 << 30
    assert canonical(1 << 47, 48) == 0xFFFF_8000_0000_0000
    assert canonical(1 << 31, 32) == 1 << 31


def test_rights_are_those_of_all_levels() -> None:
    tables = Tables(BytesMemory(1 << 16), "4-level", range(0x1000, 0x10000, 0x1000))
    tables.map(0x40_0000, 0x5000, P | W | U)
    tables.change(0x40_0000, 3, drop=W)
    tables.change(0x40_0000, 4, add=NX)
    assert shown(list_space(tables.memory, state("4-level", tables.root))) == [(0x40_0000, 0x40_1000, 0x5000, "ru")]


def test_memory_types_are_told_by_their_index() -> None:
    tables = Tables(BytesMemory(1 << 16), "4-level", range(0x1000, 0x10000, 0x1000))
    for index in range(8):
        flags = P | (index & 1) << 3 | (index >> 1 & 1) << 4
        tables.map(0x1000 * index, 0, flags | (index >> 2) << 7)
        tables.map(0x20_0000 * (index + 1), 0, flags | (index >> 2) << 12, level=2)
    ranges = list(list_space(tables.memory, state("4-level", tables.root)).ranges())
    assert [one.pat_index for one in ranges] == list(range(8)) * 2
    assert {one.page_sizes for one in ranges} == {(0x1000,), (0x20_0000,)}


def test_pae_uses_the_pdptes_that_the_processor_holds() -> None:
    tables = Tables(BytesMemory(1 << 16), "PAE", range(0x1000, 0x10000, 0x1000))
    tables.map(0x5000, 0x9000)
    held = tuple(tables.memory.read_u64(tables.root + 8 * n) for n in range(4))
    tables.memory.write(tables.root, bytes(32))
    assert shown(list_space(tables.memory, state("PAE", tables.root, pdptes=held))) == [(0x5000, 0x6000, 0x9000, "rwxu")]
    assert not shown(list_space(tables.memory, state("PAE", tables.root)))


def test_without_paging_everything_is_itself() -> None:
    off = PagingState(CR0.PE, 0x1000, 0, 0)
    listing = list_space(BytesMemory(0x1000), off)
    assert shown(listing) == [(0, 1 << 32, 0, "rwxu")]
    assert listing.find(0x1234) == Mapped(0x1234, W | U, 0, 0)
    host = Tables(BytesMemory(1 << 16), "4-level", range(0x1000, 0x10000, 0x1000))
    host.map(0x7000, 0xC000, P | U)
    listing = list_space(host.memory, off, nested("4-level", host.root))
    assert shown(listing) == [(0x7000, 0x8000, 0xC000, "rxu")]
    assert listing.refused.start.tolist() == [0, 0x8000]


# Both dimensions


def two_dimensions(inner_mode: str = "4-level", outer_mode: str = "4-level") -> tuple[Tables, Tables]:
    """A guest whose memory, 64 KiB, is at 1 MiB; and its nested tables."""
    memory = BytesMemory(2 << 20)
    outer = Tables(memory, outer_mode, range(0x1000, 0x10000, 0x1000))
    for gpa in range(0, 0x10000, 0x1000):
        outer.map(gpa, 0x100000 + gpa)
    inside = BytesMemory({0: memory.regions[0][1][0x100000:0x110000]})
    return Tables(inside, inner_mode, range(0x8000, 0x10000, 0x1000)), outer


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("host", MODES)
def test_both_dimensions_combine(mode: str, host: str) -> None:
    tables, outer = two_dimensions(mode, host)
    for page in range(4):
        tables.map(0x40_0000 + page * 0x1000, 0x4000 + page * 0x1000)
    tables.map(0x40_4000, 0x20000)
    outer.change(0x5000, 1, drop=W)
    outer.map(0x6000, 0x18000, P | W | U)
    outer.change(0x7000, 1, drop=P)
    where, inner = state(mode, tables.root), nested(host, outer.root)
    listing = list_space(outer.memory, where, inner)
    assert shown(listing) == [
        (0x40_0000, 0x40_1000, 0x104000, "rwxu"), (0x40_1000, 0x40_2000, 0x105000, "rxu"), (0x40_2000, 0x40_3000, 0x18000, "rwxu"),
    ]  # fmt: skip
    assert [one[:3] for one in listing.refused.rows()] == [(0x40_3000, 0x1000, 0x7000), (0x40_4000, 0x1000, 0x20000)]
    for page in range(6):
        gva = 0x40_0000 + page * 0x1000
        found = listing.find(gva)
        assert (found is None) == isinstance(translate(outer.memory, where, gva, Access(), inner, set_ad=False), Fault)





def test_the_smaller_page_of_both_dimensions() -> None:
    memory = BytesMemory(4 << 20)
    outer = Tables(memory, "4-level", range(0x1000, 0x10000, 0x1000))
    outer.map(0, 2 << 20, P | W | U, level=2)
    tables = Tables(BytesMemory({0: memory.regions[0][1][2 << 20 :]}), "4-level", range(0x8000, 0x10000, 0x1000))
    tables.map(0x5000, 0x3000)
    listing = list_space(memory, state("4-level", tables.root), nested("4-level", outer.root))
    (found,) = listing.ranges()
    assert (found.page_sizes, found.nested_page_sizes) == ((0x1000,), (2 << 20,))
    assert listing.find(0x5678) == Mapped((2 << 20) + 0x3678, W | U, 0x1000, 0x1000)


def test_nested_tables_alone() -> None:
    _, outer = two_dimensions()
    outer.map(0x20_0000, 0x40_0000, P | W | U | NX, level=2)
    listing = list_nested(outer.memory, nested("4-level", outer.root))
    assert shown(listing) == [(0, 0x10000, 0x100000, "rwxu"), (0x20_0000, 0x40_0000, 0x40_0000, "rwu")]
    assert (listing.mode, listing.nested_mode, listing.tables) == ("4-level", None, (1, 1, 1, 1))
    assert listing.shown(1 << 47) == 1 << 47, "guest-physical addresses have no sign"


def test_guest_tables_that_the_nested_ones_withhold() -> None:
    tables, outer = two_dimensions()
    tables.map(0x40_0000, 0x4000)
    tables.map(1 << 30, 0x5000)
    table = tables.get(tables.entry(1 << 30, 2)) & 0xFFFFF000
    outer.change(table, 1, drop=W)  # page tables are read as if they were written
    listing = list_space(outer.memory, state("4-level", tables.root), nested("4-level", outer.root))
    assert shown(listing) == [(0x40_0000, 0x40_1000, 0x104000, "rwxu")]
    assert listing.problems == (Problem("refused", 1 << 30, (1 << 30) + (2 << 20), 1, table, table),)


def test_the_apic_page_leads_to_the_backing_page() -> None:
    _, outer = two_dimensions()
    outer.map(0x20_0000, 0x40_0000, P | W | U, level=2)
    for bar in (0x3000, 0x20_0000, 0x21_0000, 0x3F_F000):
        listing = list_nested(outer.memory, replace(nested("4-level", outer.root), apic=(bar, 0x9000)))
        assert listing.find(bar + 0x10) == Mapped(0x9010, W | U, 0x1000, 0x1000)
        for beside in (bar - 0x1000, bar + 0x1000):
            found = listing.find(beside)
            assert found is None or found.target == (0x100000 if beside < 0x20_0000 else 0x20_0000) + beside
    assert list_nested(outer.memory, replace(nested("4-level", outer.root), apic=(1 << 30, 0x9000))).find(1 << 30) is None


# Tables that are not in order


def test_reserved_bits_are_told_with_the_entry() -> None:
    tables = Tables(BytesMemory(1 << 16), "4-level", range(0x1000, 0x10000, 0x1000))
    tables.map(0x5000, 0x9000)
    tables.map(0x6000, 0x9000)
    tables.change(0x5000, 1, add=1 << 50)
    listing = list_space(tables.memory, state("4-level", tables.root))
    entry = tables.entry(0x5000, 1)
    assert listing.problems == (Problem("reserved", 0x5000, 0x6000, 1, entry, tables.get(entry)),)
    assert [one.start for one in listing.ranges()] == [0x6000]


def test_a_table_where_there_is_no_memory() -> None:
    tables = Tables(BytesMemory(1 << 16), "4-level", range(0x1000, 0x10000, 0x1000))
    tables.map(0x5000, 0x9000)
    tables.put(tables.entry(1 << 39, 4), 0xDEAD_F000 | P | W)
    listing = list_space(tables.memory, state("4-level", tables.root))
    assert listing.problems[0] == Problem("no memory", 1 << 39, 1 << 40, 3, 0xDEAD_F000, 0xDEAD_F000)
    assert {one.kind for one in listing.problems[1:]} == {"reserved"}, "ones, as a single walk has it"
    assert [one.start for one in listing.ranges()] == [0x5000]


def test_a_dump_that_ends_within_a_table() -> None:
    tables = Tables(BytesMemory(1 << 16), "4-level", (0x1000, 0x2000, 0x3000, 0x4000))
    tables.map(0x1000, 0x9000)
    tables.map(0x8_0000, 0xA000)
    cut = BytesMemory({0: bytes(tables.memory.read(0, 0x4000 + 0x20 + 4))})
    listing = list_space(cut, state("4-level", tables.root))
    assert shown(listing) == [(0x1000, 0x2000, 0x9000, "rwxu")]
    assert listing.problems[0][:3] == ("no memory", 0, 2 << 20)


def test_a_loop_ends_and_is_told() -> None:
    memory = BytesMemory(0x1000)
    for index in range(512):
        memory.write_u64(8 * index, P | W | U)
    limits = Limits(entries=1 << 20, runs=1 << 30)
    listing = list_space(memory, state("4-level", 0), limits=limits)
    assert listing.problems[0] == Problem("loop", 0, 1 << 39, 3, 0, 0)
    assert listing.problems_left_out > 0
    ((start, end),) = listing.unknown.rows()
    assert 0 < start < end == 1 << 48, "what was seen comes first, in order"
    assert listing.find(start - 1) == Mapped(0xFFF, W | U, 0x1000, 0x1000)
    assert shown(listing)[-1][1] == start


def test_one_entry_for_the_tables_themselves_is_no_damage() -> None:
    tables = Tables(BytesMemory(1 << 16), "4-level", range(0x1000, 0x10000, 0x1000))
    tables.map(0x5000, 0x9000)
    tables.put(tables.root + 8 * 511, tables.root | P | W)
    listing = list_space(tables.memory, state("4-level", tables.root))
    assert listing.find((1 << 64) - 0x1000) == Mapped(tables.root, W, 0x1000, 0x1000)
    assert listing.problems[0].kind == "loop"
    assert not len(listing.unknown.start)


def test_whoever_is_told_of_progress_may_end_it() -> None:
    tables = Tables(BytesMemory(1 << 22), "4-level", range(0x1000, 1 << 22, 0x1000))
    for page in range(600):
        tables.map(page << 21, page << 21)
    told: list[float] = []

    def progress(share: float) -> bool:
        told.append(share)
        return len(told) < 5

    listing = list_space(tables.memory, state("4-level", tables.root), progress=progress)
    assert len(told) == 5
    assert told == sorted(told)
    assert all(0 <= share <= 1 for share in told)
    ((start, _),) = listing.unknown.rows()
    assert 0 < start <= 512 << 21
    assert listing.find(0) is not None


def test_a_terabyte_of_small_pages_is_bounded() -> None:
    """One page table, used for all."""
    memory = BytesMemory(0x4000)
    for index in range(512):
        memory.write_u64(8 * index, 0x1000 | P | W | U)
        memory.write_u64(0x1000 + 8 * index, 0x2000 | P | W | U)
        memory.write_u64(0x2000 + 8 * index, 0x3000 | P | W | U)
        memory.write_u64(0x3000 + 8 * index, index << 12 | P | W | U)
    listing = list_space(memory, state("4-level", 0), limits=SMALL)
    assert len(listing.runs.start) <= SMALL.runs + 512 * 512
    assert listing.unknown.end.tolist() == [1 << 48]


# Against single walks


def contents(chance: random.Random, width: int, odd: float) -> BytesMemory:
    """A few tables with some entries each, pointing at one another, at nothing, and at where no memory is."""
    memory = BytesMemory(PAGES << 12)
    for page in range(PAGES):
        for _ in range(chance.choice((0, 2, 4, 6, 6))):
            entry = chance.randrange(PAGES + 1) << 12 | P | chance.choice((W, W | U, U, 0, W | U | A, W | U | D | G))
            if chance.random() < odd:
                entry ^= chance.choice((P, 1 << 7, 1 << 12, 1 << 13, NX, 1 << 48, 1 << 51, 0xFFFF << 12, 1 << 32, 1 << 5))
            index = chance.choice((0, 1, 2, 3, 255, 256, 511, chance.randrange(0x1000 // width))) % (0x1000 // width)
            memory.write(page << 12 | index * width, (entry & (1 << 8 * width) - 1).to_bytes(width, "little"))
    return memory


@st.composite
def spaces(draw: st.DrawFn) -> tuple[BytesMemory, PagingState, Nested | None]:
    chance = random.Random(draw(ENTRIES))
    root = st.integers(0, PAGES).map(lambda page: page << 12)
    mode, host = draw(st.sampled_from((*MODES, "off"))), draw(st.sampled_from((None, *MODES)))
    width = (4 if mode == "legacy" else 8) if draw(st.integers(0, 7)) else 4
    memory = contents(chance, width, draw(st.sampled_from((0.0, 0.05, 0.3))))
    cr4 = draw(st.sampled_from((0, CR4.SMEP | CR4.SMAP)))
    maxphyaddr = draw(st.integers(32, 52))
    where = PagingState(CR0.PE, draw(root), 0, 0) if mode == "off" else state(mode, draw(root), cr4=cr4, maxphyaddr=maxphyaddr)
    if host is None:
        return memory, where, None
    inner = nested(host, draw(root), draw(st.integers(36, 52)))
    if draw(st.integers(0, 3)):  # so that walks of the guest's tables get somewhere
        tables = Tables(BytesMemory({0: memory.regions[0][1], 1 << 21: bytearray(0x8000)}), host, range(1 << 21, (1 << 21) + 0x8000, 0x1000))
        for page in range(PAGES):
            if chance.random() < 0.95:
                tables.map(page << 12, chance.choice((page, page, PAGES - page)) << 12, P | U | (0 if chance.random() < 0.1 else W if host == "legacy" or chance.random() < 0.8 else W | NX))
        memory, inner = tables.memory, nested(host, tables.root)
    extra = draw(st.sampled_from(("", "", "apic", "gmet")))
    if extra == "apic":
        inner = replace(inner, apic=(chance.randrange(PAGES) << 12, 0x7000))
    return memory, where, replace(inner, gmet=extra == "gmet")


@settings(max_examples=300, deadline=None)
@given(spaces(), ENTRIES)
def test_a_listing_is_what_single_walks_find(space: tuple[BytesMemory, PagingState, Nested | None], seed: int) -> None:
    memory, where, inner = space
    before = [bytes(view) for _, view in memory.regions]
    listing = list_space(memory, where, inner, limits=SMALL)
    assert [bytes(view) for _, view in memory.regions] == before
    unknown = list(listing.unknown.rows())
    total, reached = 0, 0
    for start, end, mapped in plain_space(memory, where, inner, 2500):
        reached = end
        if any(first < end and start < last for first, last in unknown):
            continue
        assert listing.find(start) == mapped, hex(start)
        if mapped is not None:
            total += end - start
            assert listing.find(end - 1) == mapped._replace(target=mapped.target + end - 1 - start)
    if reached == 1 << listing.width and not unknown and not len(listing.nested_unknown.start):
        assert total == listing.bytes_mapped
    assert_in_order(listing)
    if not unknown:
        brief = list_space(memory, where, inner, targets=False, limits=SMALL)
        assert list(brief.ranges()) == list(listing.ranges())
        assert brief.problems == listing.problems
        if inner is not None:
            assert list(list_nested(memory, inner, targets=False).ranges()) == list(list_nested(memory, inner).ranges())


def assert_in_order(listing: Listing) -> None:
    start, length = listing.runs.start, listing.runs.length
    assert (start[1:] >= start[:-1] + length[:-1]).all()
    assert (length > 0).all()
    ranges = list(listing.ranges())
    assert sum(one.end - one.start for one in ranges) == listing.bytes_mapped


@settings(max_examples=200, deadline=None)
@given(spaces(), st.lists(st.tuples(st.integers(0, PAGES * 512 - 1), st.sampled_from((P, W, U, NX, A, D, 0x2000, 1 << 7, 1 << 52))), max_size=6))
def test_what_has_changed_is_found_again(space: tuple[BytesMemory, PagingState, Nested | None], changes: list[tuple[int, int]]) -> None:
    memory, where, inner = space
    limits = Limits(entries=1 << 16, runs=1 << 12)
    outer = None if inner is None else NestedSpace(memory, inner, limits=limits, keep=True)
    kept = AddressSpace(memory, where, outer, limits=limits, keep=True)
    for at, flip in changes:
        memory.write_u64(8 * at, memory.read_u64(8 * at) ^ flip)
        before = kept.runs
        changed = kept.refresh(outer.refresh() if outer is not None else False)
        fresh = list_space(memory, where, inner, limits=limits)
        if not len(fresh.unknown.start) and not len(fresh.nested_unknown.start):
            assert all(np.array_equal(old, new) for old, new in zip(kept.runs, fresh.runs, strict=True))
            assert kept.listing().tables == fresh.tables
            if not changed:
                assert all(np.array_equal(old, new) for old, new in zip(before, fresh.runs, strict=True))


def test_tables_that_have_not_changed_are_not_walked_again() -> None:
    memory = BytesMemory(1 << 20)
    tables = Tables(memory, "4-level", range(0x1000, 1 << 20, 0x1000))
    for page in range(64):
        tables.map(page << 21, 0x5000)
    form = state("4-level", tables.root).format
    assert form is not None
    space = Dimension(memory, form, tables.root, keep=True)
    walked: list[int] = []
    whole = Dimension._read_and_go_on

    def counting(self: Dimension, depth: int, part: object, spa: object) -> None:
        walked.append(depth)
        whole(self, depth, part, spa)  # type: ignore[arg-type]

    patch = pytest.MonkeyPatch()
    with patch.context() as context:
        context.setattr(Dimension, "_read_and_go_on", counting)
        assert not space.refresh()
        tables.change(3 << 21, 1, add=A | D)
        assert not space.refresh(), "accessed and dirty bits are no change"
        tables.change(3 << 21, 1, drop=W)
        assert space.refresh()
        assert not walked, "an entry that maps a page needs no table"
        tables.change(5 << 21, 2, drop=U)
        assert space.refresh()
        assert walked == [3], "only the tables below a changed entry"
    fresh = Dimension(memory, form, tables.root)
    assert all(np.array_equal(old, new) for old, new in zip(space.runs, fresh.runs, strict=True))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("maxphyaddr", [34, 36, 52])
def test_whole_tables_of_pages_that_are_alike(mode: str, maxphyaddr: int) -> None:
    """What is found at a glance is what each entry says: whole, with one entry that is not alike, up to the last address."""
    entries = 1024 if mode == "legacy" else 512
    span = entries << 12
    change = {
        "none": 0, "not present": P, "rights": W, "accessed": A | D, "global": G, "elsewhere": 1 << 20, "reserved": NX if mode == "PAE" else 1 << 51,
    }  # fmt: skip
    for first in (0, 0x5000, (1 << min(maxphyaddr, 32)) - span, (1 << min(maxphyaddr, 32)) - 0x3000, (1 << 52) - span, (1 << 52) - 0x2000):
        for place, (_, bits) in enumerate(change.items()):
            tables = Tables(BytesMemory(1 << 17), mode, range(0x1000, 1 << 17, 0x1000))
            for page in range(2 * entries):
                target = first + (page << 12)
                if mode == "legacy":
                    target &= 0xFFFF_FFFF
                tables.map((4 * span) + (page << 12), target % (1 << 64), P | W | U)
            at = tables.entry(4 * span + (place * 37 << 12), 1)
            tables.put(at, (tables.get(at) ^ bits) & ((1 << 32) - 1 if mode == "legacy" else (1 << 64) - 1))
            where = state(mode, tables.root, maxphyaddr=maxphyaddr)
            listing = list_space(tables.memory, where)
            for page in range(2 * entries):
                gva = 4 * span + (page << 12)
                found = translate(tables.memory, where, gva, Access(), set_ad=False)
                mapped = listing.find(gva)
                assert (mapped is None) == isinstance(found, Fault)
                assert mapped is None or isinstance(found, Fault) or (mapped.target, mapped.rights) == (found.spa, found.rights)
            assert list(list_space(tables.memory, where, targets=False).ranges()) == list(listing.ranges())


def test_without_targets_only_ranges_are_told() -> None:
    tables = Tables(BytesMemory(1 << 16), "4-level", range(0x1000, 0x10000, 0x1000))
    for page in range(512):
        tables.map(page << 12, (page * 5 % 512) << 12)
    listing = list_space(tables.memory, state("4-level", tables.root), targets=False)
    assert [(*one[:4],) for one in listing.ranges()] == [(0, 2 << 20, 0, False)]
    with pytest.raises(ValueError, match="made without targets"):
        listing.find(0x1000)


def test_runs_are_columns() -> None:
    runs = Runs(column(1), column(2), column(3), column(4))
    assert list(runs.rows()) == [(1, 2, 3, 4)]
    assert runs.end.tolist() == [3]
