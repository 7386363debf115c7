"""Memory types: the tables are whole and agree with each other, MTRRs, and what a walk's leaves select."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from introspect.memtypes import COMBINED_PAT, EFFECTIVE, Caching, MemoryType, Mtrrs, memory_type
from introspect.paging import Access, PagingState, walk
from introspect.registers import CR0
from introspect.sources import BytesMemory

from .tables import MODES, P, Tables, U, W, nested, state

PATS, MTRRS = ("UC", "UC-", "WC", "WP", "WT", "WB"), ("UC", "WC", "WP", "WT", "WB")
RESET = 0x0007_0406_0007_0406
WB_EVERYWHERE = Mtrrs(0x806)
E, FE, V = 1 << 11, 1 << 10, 1 << 11


def test_every_combination_has_a_type() -> None:
    for guest, host, mtrr in product(PATS, PATS, MTRRS):
        assert EFFECTIVE[COMBINED_PAT[guest][host]][mtrr] in ("UC", "CD", "WC", "WC+", "WP", "WT", "WB")
    assert set(COMBINED_PAT) == set(PATS)
    assert set(EFFECTIVE) == {*PATS, "WC+"}
    assert all(set(row) == set(PATS) for row in COMBINED_PAT.values())
    assert all(set(row) == set(MTRRS) for row in EFFECTIVE.values())


def test_the_hosts_pat_can_stand_for_the_guests_mtrrs() -> None:
    """The purpose of table 15-19: it is table 7-11, where CD is no PAT type, and WC over what is cached is WC+."""
    for guest, host in product(PATS, MTRRS):
        plain = EFFECTIVE[guest][host]
        expected = "UC" if plain == "CD" else "WC+" if guest == "WC" and host in ("WP", "WT", "WB") else plain
        assert COMBINED_PAT[guest][host] == expected


@pytest.mark.parametrize("guest", PATS)
def test_a_host_page_of_uc_minus_is_uncached(guest: str) -> None:
    """Table 15-19: only a guest's UC- and WC let it be combined with writes."""
    assert COMBINED_PAT[guest]["UC-"] == {"UC-": "UC-", "WC": "WC"}.get(guest, "UC")


def test_a_host_with_wb_everywhere_changes_little() -> None:
    """WC becomes WC+ where the MTRRs would cache; UC- is not overridden by WC any more."""
    for guest, mtrr in product(PATS, MTRRS):
        alone, nested_ = EFFECTIVE[guest][mtrr], EFFECTIVE[COMBINED_PAT[guest]["WB"]][mtrr]
        if alone != nested_:
            assert (guest, mtrr, alone, nested_) in [("UC-", "WC", "WC", "CD"), *(("WC", m, "WC", "WC+") for m in MTRRS[2:])]


@pytest.mark.parametrize(
    ("mtrrs", "spa", "expected"),
    [
        (Mtrrs(6), 0x1000, "UC"), (Mtrrs(E | 6), 0x1000, "WB"), (Mtrrs(E | FE | 6), 0x1000, "UC"),
        (Mtrrs(E | FE | 6), 0x100000, "WB"), (Mtrrs(E | 3), 0x1000, None),
        (Mtrrs(E | FE, (0x0504060100000006, *[0] * 10)), 0xFFFF, "WB"),
        (Mtrrs(E | FE, (0x0504060100000006, *[0] * 10)), 0x40000, "WC"),
        (Mtrrs(E | FE, (0x0504060100000006, *[0] * 10)), 0x7FFFF, "WP"),
        (Mtrrs(E | FE, (0, 0, 6 << 56, *[0] * 8)), 0xBC000, "WB"), (Mtrrs(E | FE, (0, 0, 6 << 56, *[0] * 8)), 0xBBFFF, "UC"),
        (Mtrrs(E | FE, (0, 6 | 0x18, *[0] * 9)), 0x80000, "WB"),
        (Mtrrs(E | FE, (*[0] * 10, 4 << 56)), 0xFF000, "WT"), (Mtrrs(E | FE, (0, 0, 0, 5 << 8, *[0] * 7)), 0xC1FFF, "WP"),
        (Mtrrs(E | 6, variable=((0xC0000000, 0xFFC0000000 | V),)), 0xFFFFFFFF, "UC"),
        (Mtrrs(E | 6, variable=((0xC0000000, 0xFFC0000000 | V),)), 0xBFFFFFFF, "WB"),
        (Mtrrs(E | 6, variable=((0xC0000000, 0xFFC0000000),)), 0xC0000000, "WB"),
        (Mtrrs(E, variable=((4, 0xFFFFF00000 | V), (6, 0xFFFFE00000 | V))), 0x1000, "WT"),
        (Mtrrs(E, variable=((4, 0xFFFFF00000 | V), (0, 0xFFFFE00000 | V))), 0x1000, "UC"),
        (Mtrrs(E, variable=((1, 0xFFFFF00000 | V), (6, 0xFFFFE00000 | V))), 0x1000, None),
        (Mtrrs(E, variable=((1, 0xFFFFF00000 | V), (1, 0xFFFFE00000 | V))), 0x1000, "WC"),
    ],
)  # fmt: skip
def test_mtrrs(mtrrs: Mtrrs, spa: int, expected: str | None) -> None:
    """APM2 7.7: fixed ranges first, then pairs, where UC wins and WT over WB, then the default; off, all is UC."""
    assert mtrrs.type_of(spa) == expected


@given(
    st.integers(0, 2**12 - 1), st.tuples(*[st.integers(0, 2**64 - 1)] * 11),
    st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1)), max_size=8), st.integers(0, 2**52 - 1),
)  # fmt: skip
def test_any_mtrrs_have_an_answer(
    def_type: int, fixed: tuple[int, ...], variable: list[tuple[int, int]], spa: int
) -> None:
    for address in (spa, spa & 0xFFFFF):
        assert Mtrrs(def_type, fixed, tuple(variable)).type_of(address) in (*MTRRS, None)


@pytest.mark.parametrize("level", [1, 2])
@pytest.mark.parametrize("mode", MODES)
def test_the_index_of_a_leaf(mode: str, level: int) -> None:
    """PAT, PCD and PWT (7.8.2); the PAT bit is bit 7 of a PTE, and bit 12 of a large page."""
    pat = sum(n << 8 * index for index, n in enumerate((6, 4, 7, 0, 1, 5, 6, 4)))
    for index, expected in enumerate(("WB", "WT", "UC-", "UC", "WC", "WP", "WB", "WT")):
        memory = BytesMemory(0x40000)
        tables = Tables(memory, mode, range(0x1000, 0x40000, 0x1000))
        flags = (0x80 if level == 1 else 0x1000) * (index >> 2) | (index & 3) << 3
        tables.map(0, 0, P | W | flags, level=level)
        seen = walk(memory, state(mode, tables.root), 0x123, Access())
        found = memory_type(seen, False, Caching(pat, None, WB_EVERYWHERE))
        assert found is not None
        assert (found.pat, found.nested_pat, found.mtrr) == (expected, None, "WB")
        assert found.type == EFFECTIVE[expected]["WB"]


def test_both_dimensions() -> None:
    """Each indexes its own PAT; without paging the guest's type is WB."""
    memory = BytesMemory(0x40000)
    npt = Tables(memory, "4-level", range(0x1000, 0x40000, 0x1000))
    npt.map(0x5000, 0x6000, P | W | U | 0x10)
    inner = nested("4-level", npt.root)
    seen = walk(memory, PagingState(CR0.PE, 0, 0, 0), 0x5000, Access(), inner)
    types = Caching(0, RESET, WB_EVERYWHERE)
    assert memory_type(seen, False, types) == MemoryType("CD", "WB", "UC-", "WB", True, False, False)
    types = Caching(0, 0x06_06_06_06_06_05_06_06, WB_EVERYWHERE)
    assert memory_type(seen, False, types) == MemoryType("WP", "WB", "WP", "WB", True, False, False)
    assert memory_type(seen, True, types) == MemoryType("CD", "WB", "WP", "WB", True, True, False)
    off = Caching(0, types.host_pat, WB_EVERYWHERE, host_cd=True)
    assert memory_type(seen, False, off) == MemoryType("CD", "WB", "WP", "WB", True, True, False)
    refused = walk(memory, PagingState(CR0.PE, 0, 0, 0), 0x9000, Access(), inner)
    assert memory_type(refused, False, types) is None


def test_a_reserved_type_is_undefined() -> None:
    memory = BytesMemory(0x40000)
    tables = Tables(memory, "4-level", range(0x1000, 0x40000, 0x1000))
    tables.map(0x5000, 0x6000)
    seen = walk(memory, state("4-level", tables.root), 0x5000, Access())
    found = memory_type(seen, False, Caching(2, None, WB_EVERYWHERE))
    assert found is not None
    assert (found.type, found.text()) == (None, "undefined (PAT undefined, MTRR WB)")
