"""Stretches of addresses by the million, as columns of numbers, and the few operations that listings of page tables need."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = [
    "EMPTY", "U64", "ByTarget", "Indices", "Mask", "Runs", "Spans", "column", "covered", "gaps", "inside", "joined", "leading_to",
    "merged", "merged_alike", "overlaps", "within",
]  # fmt: skip

U64: TypeAlias = npt.NDArray[Any]
"""Of uint64. numpy's own annotations take such an array with an int for a signed one, which it is not."""
Indices: TypeAlias = npt.NDArray[np.intp]
Mask: TypeAlias = npt.NDArray[np.bool_]


class Runs(NamedTuple):
    """Stretches that map linearly: `start` + n to `target` + n, for n below `length`. In order of `start`, none overlapping."""

    start: U64
    length: U64
    target: U64
    attributes: U64
    """Flags that are the same all over a stretch; what they mean is the maker's."""

    @property
    def end(self) -> U64:
        return self.start + self.length

    def take(self, which: Mask | Indices | slice) -> Runs:
        """Those that an index or a mask chooses."""
        return Runs(*(one[which] for one in self))

    def rows(self) -> Iterator[tuple[int, int, int, int]]:
        """(start, length, target, attributes), as ints."""
        return zip(*(one.tolist() for one in self), strict=True)


class Spans(NamedTuple):
    """Stretches without a target, in order, none overlapping or touching."""

    start: U64
    end: U64

    def take(self, which: Mask) -> Spans:
        return Spans(self.start[which], self.end[which])

    def rows(self) -> Iterator[tuple[int, int]]:
        return zip(self.start.tolist(), self.end.tolist(), strict=True)


def column(*values: int) -> U64:
    return np.array(values, np.uint64)


EMPTY = Runs(column(), column(), column(), column())


def joined(parts: Sequence[Runs]) -> Runs:
    """All of them as one, in order of start. The parts may lie in any order, and must not overlap."""
    if not parts:
        return EMPTY
    runs = parts[0] if len(parts) == 1 else Runs(*(np.concatenate(one) for one in zip(*parts, strict=True)))
    start = runs.start
    if len(start) > 1 and not bool((start[1:] > start[:-1]).all()):
        runs = runs.take(np.argsort(start))
    return runs


def merged(runs: Runs, apart: int = 0) -> Runs:
    """Neighbours that continue each other made one, but never across the address `apart`, unless it is 0."""
    start, length, target, attributes = runs
    if len(start) < 2:
        return runs
    fresh = np.empty(len(start), np.bool_)
    fresh[0] = True
    step = start[1:] - start[:-1]
    np.not_equal(step, length[:-1], out=fresh[1:])
    fresh[1:] |= target[1:] - target[:-1] != step
    fresh[1:] |= attributes[1:] != attributes[:-1]
    if apart:
        fresh |= start == apart
    first = np.flatnonzero(fresh)
    if len(first) == len(start):
        return runs
    return Runs(start[first], np.add.reduceat(length, first), target[first], attributes[first])


def merged_alike(runs: Runs, apart: int, scattered: int, differing: int = 0) -> Runs:
    """Neighbours with the same attributes made one wherever they lead, but never across `apart`, unless it is 0.

    Those that do not lead on linearly, in the result or before, have the attribute `scattered`. Attributes in `differing` may
    differ, and the result has them all.
    """
    starts, lengths, targets, attributes = runs
    if len(starts) < 2:
        return runs
    step = starts[1:] - starts[:-1]
    deciding = ~(scattered | differing) % (1 << 64)
    fresh = np.append(True, (step != lengths[:-1]) | ((attributes[1:] ^ attributes[:-1]) & deciding != 0))
    if apart:
        fresh |= starts == apart
    first = np.flatnonzero(fresh)
    straight = np.append(False, targets[1:] - targets[:-1] == step) | fresh
    attributes = np.bitwise_or.reduceat(attributes, first)
    attributes |= ~np.logical_and.reduceat(straight, first) * np.uint64(scattered)
    return Runs(starts[first], np.add.reduceat(lengths, first), targets[first], attributes)


def covered(start: U64, end: U64) -> Spans:
    """What stretches in any order, overlapping or not, cover together."""
    if not len(start):
        return Spans(column(), column())
    order = np.argsort(start)
    start, end = start[order], np.maximum.accumulate(end[order])
    fresh = np.append(True, start[1:] > end[:-1])
    last = np.append(np.flatnonzero(fresh[1:]), len(start) - 1)
    return Spans(start[fresh], end[last])


def gaps(spans: Spans, end: int) -> Spans:
    """What spans leave of the addresses below `end`."""
    start, stop = np.append(column(0), spans.end), np.append(spans.start, column(end))
    some = stop > start
    return Spans(start[some], stop[some])


def inside(addresses: U64, spans: Spans) -> Mask:
    """Which of the addresses lie in the spans."""
    if not len(spans.start):
        return np.zeros(len(addresses), np.bool_)
    index = np.searchsorted(spans.start, addresses, "right") - 1
    return (index >= 0) & (addresses < spans.end[index])


def _first_beyond(ends: U64, addresses: U64) -> Indices:
    """Of ascending ends, for each address the first that is beyond it.

    Many addresses in no order are looked up by their page: searching would wait for memory at each step.
    """
    pages = (int(ends[-1]) >> 12) + 1 if len(ends) else 0
    if len(addresses) < 1 << 12 or not pages or pages > 4 * len(addresses) or bool((ends & 0xFFF).any()):
        return np.searchsorted(ends, addresses, "right")
    table = np.searchsorted(ends, np.arange(pages, dtype=np.uint64) << 12, "right")
    found: Indices = table[np.minimum(addresses >> 12, pages - 1)]  # at the last page's end nothing is beyond
    return found


def overlaps(start: U64, end: U64, spans: Spans, limit: int) -> tuple[Indices, Indices, U64, U64, int]:
    """Every common stretch of some stretches (in any order) and of spans: indices of both, its start and end.

    The spans may touch. At most about `limit` are made: the last number is how many of the stretches were looked at.
    """
    low = _first_beyond(spans.end, start)
    known = len(spans.start)
    if not known or not len(start):
        none = np.zeros(0, np.intp)
        return none, none, column(), column(), len(start)
    near = np.minimum(low, known - 1)
    count = ((low < known) & (spans.start[near] < end)).astype(np.intp)
    # Nearly all end in the first span that they meet; only the others need a second search.
    longer = np.flatnonzero((count > 0) & (end > spans.end[near]))
    count[longer] = np.searchsorted(spans.start, end[longer], "left") - low[longer]
    total = np.cumsum(count)
    done = len(start)
    if int(total[-1]) > limit:
        done = int(np.searchsorted(total, limit, "right"))
        low, count, total = low[:done], count[:done], total[:done]
    mine = np.repeat(np.arange(done), count)
    theirs = np.arange(int(total[-1]) if done else 0) + np.repeat(low - (total - count), count)
    return mine, theirs, np.maximum(start[mine], spans.start[theirs]), np.minimum(end[mine], spans.end[theirs]), done


def within(runs: Runs, spans: Spans, limit: int) -> tuple[Runs, bool]:
    """Of runs that which leads into the spans, and whether `limit` pieces were enough for all."""
    mine, _, start, end, done = overlaps(runs.target, runs.end - runs.start + runs.target, spans, limit)
    clipped = Runs(runs.start[mine] + (start - runs.target[mine]), end - start, start, runs.attributes[mine])
    return clipped, done == len(runs.start)


def leading_to(runs: Runs, target: int, limit: int) -> list[tuple[int, int, int, int]]:
    """The runs that lead to an address, as rows, the first `limit` of them.

    All are looked at. To sort them (`ByTarget`) takes as long as a hundred such questions.
    """
    which = np.flatnonzero(np.uint64(target) - runs.target < runs.length)[:limit]  # those beyond it wrap around
    return list(runs.take(which).rows())


class ByTarget:
    """Runs to be asked by target again and again: which of them lead to some addresses."""

    def __init__(self, runs: Runs) -> None:
        order = np.argsort(runs.target)
        self.runs = runs.take(order)
        self._furthest = np.maximum.accumulate(self.runs.target + self.runs.length) if len(order) else column()

    def find(self, first: int, end: int, limit: int) -> list[tuple[int, int, int, int]]:
        """Those that lead to any of the addresses first..end (not included), as rows, the first `limit` by target."""
        low = int(np.searchsorted(self._furthest, np.uint64(first), "right"))
        high = int(np.searchsorted(self.runs.target, np.uint64(end), "left"))
        near = self.runs.take(slice(low, high))
        which = np.flatnonzero(near.target + near.length > first)[:limit]
        return list(near.take(which).rows())
