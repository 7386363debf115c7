"""Stretches as columns, against the same done one by one."""

from __future__ import annotations

import itertools
from bisect import bisect_right

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from introspect.runs import (
    ByTarget,
    Runs,
    Spans,
    column,
    covered,
    gaps,
    inside,
    joined,
    leading_to,
    merged,
    merged_alike,
    overlaps,
)

END = 64
BITS = st.lists(st.booleans(), min_size=END, max_size=END)
STRETCHES = st.lists(st.tuples(st.integers(0, END - 1), st.integers(1, 9)), max_size=12)


def spans_of(bits: list[bool]) -> Spans:
    """Those of the addresses whose bits are set."""
    edges = [at for at in range(END + 1) if (at < END and bits[at]) != (at > 0 and bits[at - 1])]
    return Spans(column(*edges[::2]), column(*edges[1::2]))


def addresses(spans: Spans) -> set[int]:
    return {at for start, end in spans.rows() for at in range(start, end)}


@given(BITS)
def test_gaps_and_inside(bits: list[bool]) -> None:
    spans = spans_of(bits)
    everything = set(range(END))
    assert addresses(gaps(spans, END)) == everything - addresses(spans)
    found = inside(np.arange(END + 3, dtype=np.uint64), spans)
    assert set(np.flatnonzero(found).tolist()) == addresses(spans)


@given(STRETCHES)
def test_covered(stretches: list[tuple[int, int]]) -> None:
    start, end = column(*(at for at, _ in stretches)), column(*(at + length for at, length in stretches))
    spans = covered(start, end)
    assert addresses(spans) == {at for first, length in stretches for at in range(first, first + length)}
    assert (spans.start[1:] > spans.end[:-1]).all(), "none touch"


@given(STRETCHES, BITS, st.integers(0, 40))
def test_overlaps(stretches: list[tuple[int, int]], bits: list[bool], limit: int) -> None:
    spans = spans_of(bits)
    start, end = column(*(at for at, _ in stretches)), column(*(at + length for at, length in stretches))
    mine, theirs, first, last, done = overlaps(start, end, spans, limit)
    expected = []
    for index, (at, length) in enumerate(stretches[:done]):
        expected += [
            (index, number, max(at, low), min(at + length, high))
            for number, (low, high) in enumerate(spans.rows()) if max(at, low) < min(at + length, high)
        ]  # fmt: skip
    assert list(zip(*(one.tolist() for one in (mine, theirs, first, last)), strict=True)) == expected
    assert len(expected) <= limit
    assert done == len(stretches) or not limit or expected or len(spans.start) > limit


@pytest.mark.parametrize("unit", [0x1000, 0x1001])
def test_many_addresses_in_no_order(unit: int) -> None:
    """By page, where spans are pages; else by searching."""
    chance = np.random.default_rng(1)
    bits = chance.random(3000) < 0.7
    edges = np.flatnonzero(np.diff(np.concatenate(([0], bits.astype(np.int8), [0]))))
    spans = Spans(edges[::2].astype(np.uint64) * np.uint64(unit), edges[1::2].astype(np.uint64) * np.uint64(unit))
    start = chance.integers(0, 3100 * unit, 6000).astype(np.uint64)
    end = start + chance.integers(1, 5 * unit, 6000).astype(np.uint64)
    mine, theirs, first, last, _ = overlaps(start, end, spans, 1 << 40)
    found: dict[int, list[tuple[int, int, int]]] = {}
    for index, number, low, high in zip(*(one.tolist() for one in (mine, theirs, first, last)), strict=True):
        found.setdefault(index, []).append((number, low, high))
    ends = spans.end.tolist()
    rows = list(spans.rows())
    for index, (low, high) in enumerate(zip(start.tolist(), end.tolist(), strict=True)):
        expected, number = [], bisect_right(ends, low)
        while number < len(rows) and rows[number][0] < high:
            expected.append((number, max(low, rows[number][0]), min(high, rows[number][1])))
            number += 1
        assert found.get(index, []) == expected


RUNS = st.lists(st.tuples(st.integers(0, 2), st.integers(1, 3), st.integers(0, 6), st.sampled_from((2, 3, 6))), max_size=12)


def runs_of(rows: list[tuple[int, int, int, int]]) -> Runs:
    """From (gap before, length, target, attributes); a target of 0 goes on where the last one ended."""
    at, target, made = 0, 100, []
    for gap, length, where, attributes in rows:
        at += gap
        target = target if where == 0 else 10 * where
        made.append((at, length, target, attributes))
        at, target = at + length, target + length
    return Runs(*(column(*(row[n] for row in made)) for n in range(4)))


def mapping(runs: Runs) -> dict[int, tuple[int, int]]:
    return {start + n: (target + n, flags) for start, length, target, flags in runs.rows() for n in range(length)}


@given(RUNS, st.integers(0, 20))
def test_merged_says_the_same_in_fewer_words(rows: list[tuple[int, int, int, int]], apart: int) -> None:
    runs = runs_of(rows)
    found = merged(runs, apart)
    assert mapping(found) == mapping(runs)
    pairs = list(found.rows())
    for (start, length, target, flags), (after, _, going, others) in itertools.pairwise(pairs):
        goes_on = start + length == after and target + length == going and flags == others
        assert not goes_on or after == apart
    assert mapping(joined([runs.take(slice(n, n + 1)) for n in reversed(range(len(runs.start)))])) == mapping(runs)


@given(RUNS, st.integers(1, 20))
def test_merged_alike_forgets_only_where_they_lead(rows: list[tuple[int, int, int, int]], apart: int) -> None:
    runs, scattered, differing = runs_of(rows), 1 << 8, 1
    found = merged_alike(runs, apart, scattered, differing)
    expected = mapping(runs)
    seen: set[int] = set()
    for start, length, target, flags in found.rows():
        seen |= set(range(start, start + length))
        assert target == expected[start][0]
        parts = [expected[start + n] for n in range(length)]
        assert bool(flags & scattered) == any(where != target + n for n, (where, _) in enumerate(parts))
        assert len({one & ~differing for _, one in parts}) == 1
        assert flags & ~scattered == parts[0][1] | max(one & differing for _, one in parts)
    assert seen == expected.keys()


@given(RUNS, st.integers(0, 110))
def test_leading_to(rows: list[tuple[int, int, int, int]], target: int) -> None:
    runs = runs_of(rows)
    expected = {row for row in runs.rows() if row[2] <= target < row[2] + row[1]}
    assert set(leading_to(runs, target, 99)) == expected
    assert set(ByTarget(runs).find(target, target + 1, 99)) == expected
