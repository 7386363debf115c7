# SPDX-License-Identifier: GPL-2.0-or-later
"""Where a run parts from a golden trace, and what it looks like to whoever has to find out why."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from introspect.commands.render import columns
from introspect.exitlog import what
from introspect.exits import exit_name
from vmdbg.testkit.golden import GoldenError, Rip, Seen, Tolerance, Trace, View

__all__ = ["Divergence", "compare"]

BEFORE, BEHIND = 4, 4
"""Exits shown before the first that differs, and from it on of each side."""
AGAIN = 4
"""Exits that must agree before both sides count as together again."""
FAR = 200
"""Exits that one side may have more until then."""


@dataclass(frozen=True)
class Divergence:
    """The first exit that differs."""

    golden: Sequence[Seen]
    """The exits that were compared, of all guests or of one, without those that the tolerance leaves out."""
    run: Sequence[Seen]
    at: int
    """Index in both of the first that differs; the length of one that has ended."""
    guest: int | None
    """Whose exits were compared; None: everyone's, in their order."""
    fields: tuple[str, ...]
    """Which differ; empty if it is another guest or another kind of exit, or if one side has ended."""
    lacks: int
    """Exits of the golden trace that the run lacks here, before both agree again."""
    adds: int
    """And those it has besides.  Both 0: they do not come together soon."""
    agree: int
    """How many agree behind that."""
    source: str = ""
    rip: Rip = "address"
    """What RIPs were compared by."""

    def __str__(self) -> str:
        return self.text()

    def text(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        name = self.source or "golden trace"
        whose = "" if self.guest is None else f" of guest {self.guest}"
        number = self.run[self.at].record.number if self.at < len(self.run) else None
        place = f" (#{number} of this run)" if number is not None else ""
        yield f"{name}: exit {self.at + 1}{whose}{place} differs: {self._reason()}"
        rows: list[tuple[str, ...]] = [("", "#", "guest", "exit", "rip", "what")]
        rows += [_row(" ", seen, str(seen.record.number)) for seen in self.run[max(self.at - BEFORE, 0) : self.at]]
        for sign, side, most in (("-", self.golden, self.lacks), ("+", self.run, self.adds)):
            shown = min(most, BEHIND) if self.together else BEHIND
            line = "line {}" if sign == "-" and self.source else "{}"
            rows += [_row(sign, seen, line.format(seen.record.number)) for seen in side[self.at : self.at + shown]]
            if self.at == len(side):
                rows.append((sign, "", "", "end", "", "no more exits"))
            elif self.together and most > shown:
                rows.append((sign, "", "", "...", "", f"{most - shown} more"))
        if self.together:
            behind = self.run[self.at + self.adds : self.at + self.adds + 2]
            rows += [_row(" ", seen, str(seen.record.number)) for seen in behind]
        yield from columns(rows, "  ")
        for field in self.fields:
            golden, run = (_value(side[self.at], field) for side in (self.golden, self.run))
            yield f"  {field}: {golden} in the golden trace (-), {run} in this run (+)"
        if "rip" in self.fields and self.rip != "address":
            yield from self._without_symbols(self.golden[self.at], self.run[self.at])
        yield self._afterwards()

    def _without_symbols(self, golden: Seen, run: Seen) -> Iterator[str]:
        """Where one side only has a symbol: that may be all that differs."""
        if bool(golden.symbol) != bool(run.symbol):
            who = "this run" if golden.symbol else "the golden trace"
            remedy = "run it" if golden.symbol else "record it anew"
            rule = f"by {self.rip} RIPs are compared, and {who} has no symbol there"
            yield f"  {rule}; {remedy} with those of guest {run.record.guest} (symbols)"

    @property
    def together(self) -> bool:
        """Whether they come together again soon."""
        return bool(self.lacks or self.adds)

    def _reason(self) -> str:
        golden, run = self.golden[self.at : self.at + 1], self.run[self.at : self.at + 1]
        if not run:
            return f"this run has ended, where the golden trace has {len(self.golden) - self.at} more"
        if not golden:
            return f"the golden trace has ended, this run goes on with {len(self.run) - self.at} more"
        if self.fields:
            return ", ".join(self.fields)
        if golden[0].record.guest != run[0].record.guest:
            return f"guest {run[0].record.guest} instead of guest {golden[0].record.guest}"
        return f"{exit_name(run[0].record.code)} instead of {exit_name(golden[0].record.code)}"

    def _afterwards(self) -> str:
        if not self.together:
            return f"golden trace (-): {len(self.golden)} exits, this run (+): {len(self.run)}; they do not agree soon again"
        if self.lacks and self.adds:
            change = f"{_exits(self.lacks)} of the golden trace came as {_exits(self.adds)}"
        elif self.lacks:
            change = f"this run lacks {_exits(self.lacks)} of the golden trace"
        else:
            change = f"this run has {_exits(self.adds)} that the golden trace has not"
        return f"{change}; behind that " + (f"{self.agree} agree" if self.agree else "both end")


def _exits(count: int) -> str:
    return f"{count} exit{'s' * (count != 1)}"


def _row(sign: str, seen: Seen, number: str) -> tuple[str, ...]:
    record = seen.record
    place = f"{record.rip:#x}" + (f" <{seen.symbol}>" if seen.symbol else "")
    return sign, number, str(record.guest), exit_name(record.code), place, what(record)


def _value(seen: Seen, field: str) -> str:
    if field == "rip":
        return f"{seen.record.rip:#x}" + (f" <{seen.symbol}>" if seen.symbol else "")
    value = getattr(seen.record, field)
    return value.hex() if isinstance(value, bytes) else hex(value)


def compare(golden: Trace, run: Trace, tolerance: Tolerance | None = None) -> Divergence | None:
    """The first exit of `run` that is not as in `golden`, or None.  `tolerance`: the golden trace's, if none is given.

    GoldenError for one that grants less than the golden trace was recorded with: the file does not hold what would be compared.
    """
    tolerance = golden.tolerance if tolerance is None else tolerance
    lacking = tolerance.within(golden.tolerance)
    if lacking:
        name = golden.source or "golden trace"
        raise GoldenError(f"{name}: recorded with {lacking}, which cannot be taken back; record it anew")
    view = View(tolerance)
    sides = [[(seen, key) for seen in trace.exits if (key := view.key(seen)) is not None] for trace in (golden, run)]
    if tolerance.reorder == "guests":
        guests = sorted({seen.record.guest for side in sides for seen, _ in side})
        groups: list[int | None] = list(guests)
    else:
        groups = [None]
    found = []
    for guest in groups:
        one, other = ([pair for pair in side if guest in (None, pair[0].record.guest)] for side in sides)
        difference = _first(one, other, guest, view, golden.source)
        if difference is not None:
            found.append(difference)
    # Whose difference came first is the likelier cause of the others'.
    return min(found, key=_when, default=None)


Pair = tuple[Seen, tuple[object, ...]]


def _when(one: Divergence) -> tuple[bool, int]:
    """A side that only ended earlier comes behind all that differs."""
    ended = one.at >= len(one.run)
    return ended, one.golden[one.at].record.number if ended else one.run[one.at].record.number


def _first(golden: list[Pair], run: list[Pair], guest: int | None, view: View, source: str) -> Divergence | None:
    here, there = [key for _, key in golden], [key for _, key in run]
    if here == there:
        return None
    at = next((n for n, (a, b) in enumerate(zip(here, there, strict=False)) if a != b), min(len(here), len(there)))
    lacks, adds = _together(here, there, at)
    agree = 0
    if lacks or adds:
        agree = sum(1 for _ in _same(here, there, at + lacks, at + adds))
    fields: tuple[str, ...] = ()
    if at < min(len(here), len(there)) and here[at][:2] == there[at][:2]:
        fields = view.differing(golden[at][0], run[at][0])
    return Divergence(
        [seen for seen, _ in golden], [seen for seen, _ in run], at, guest, fields, lacks, adds, agree, source, view.how
    )  # fmt: skip


def _together(here: list[tuple[object, ...]], there: list[tuple[object, ...]], at: int) -> tuple[int, int]:
    """The smallest numbers of exits to leave out behind `at` on both sides so that some agree; (0, 0) if there are none."""
    for most in range(1, FAR):
        fewer = range(1, most)
        for lacks, adds in ((most, 0), (0, most), *((most, n) for n in fewer), *((n, most) for n in fewer), (most, most)):
            left = max(len(here) - at - lacks, 0), max(len(there) - at - adds, 0)
            needed = min(AGAIN, max(left))
            if at + lacks > len(here) or at + adds > len(there):
                continue
            if sum(1 for _ in islice(_same(here, there, at + lacks, at + adds), needed)) == needed:
                return lacks, adds
    return 0, 0


def _same(here: list[tuple[object, ...]], there: list[tuple[object, ...]], i: int, j: int) -> Iterator[None]:
    while i < len(here) and j < len(there) and here[i] == there[j]:
        yield None
        i, j = i + 1, j + 1
