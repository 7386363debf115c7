"""Whether guests are kept apart: from one another, from the structures that confine them, and from the hypervisor.

Everything is judged by the tables as they are now. What an *agent* reaches is what its outermost tables map: a guest's nested
ones, or without nested paging the page tables in its VMCB; a device's, as soon as there is a mapper of its kind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import numpy as np

from introspect.expression import Space
from introspect.iommu.space import UNREADABLE
from introspect.paging import ENTRY
from introspect.reverse_map import Mapper, ReverseMap
from introspect.runs import U64, Spans, column, covered, overlaps

__all__ = ["RULES", "Finding", "Severity", "audit_isolation"]

_PAGE = 0x1000
_STEPS = 1 << 16
"""Pairs of stretches that are compared at most, so that a thousand guests that share everything take no longer."""
_PIECES = 1 << 22
"""Pieces that one party has in common with others, or with structures, at most: who has more is not looked at wholly."""
_TOLD = 16
"""Stretches that a finding names at most."""


class Severity(IntEnum):
    """`LOW`: worth knowing; `HIGH`: isolation rests on somebody's good will; `CRITICAL`: there is none."""

    LOW = 1
    MEDIUM = 2
    HIGH = 3
    CRITICAL = 4

    @property
    def word(self) -> str:
        return self.name.lower()


class Rule(NamedTuple):
    """What must not be, and what to do about it."""

    says: str
    remedy: str


RULES: Mapping[str, Rule] = {
    "shared-writable": Rule(
        "two parties write the same pages", "give each its own, or take W from all but one of them"),
    "written-and-read": Rule(
        "one party reads what another writes", "if that is no channel they were given, unmap it from one of them"),
    "control-writable": Rule(
        "an agent writes the structures that confine it or others", "unmap them from its tables"),
    "control-readable": Rule(
        "an agent reads the structures that confine it or others", "unmap them from its tables"),
    "image-writable": Rule("an agent writes the hypervisor's image", "unmap it from its tables"),
    "image-readable": Rule("an agent reads the hypervisor's image", "unmap it from its tables"),
    "user-reaches-tables": Rule(
        "user code reaches the structures that confine guests", "clear U in the page tables that map them"),
    "interrupts-not-remapped": Rule(
        "a device that a guest has may send interrupts that the hypervisor did not choose",
        "set IV with IntCtl 2 and a table, and clear InitPass, EIntPass and NMIPass"),
    "addresses-not-checked": Rule(
        "a device that a guest has reaches all of memory if it lies about what it was answered",
        "clear I, unless nobody but its maker can make the device send what it likes"),
    "writable-executable": Rule(
        "pages are writable and executable at once", "set NX where data is, clear W where code is"),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that breaks a rule. `ranges` are system-physical, (start, end), the first few."""

    severity: Severity
    rule: str
    who: str
    what: str
    ranges: tuple[tuple[int, int], ...]
    bytes: int
    """In all ranges, also those that are not listed."""


def audit_isolation(
    found: ReverseMap, parents: Mapping[int, int | None], progress: Callable[[float], bool] | None = None,
    unseen: set[str] | None = None,
) -> list[Finding]:
    """All findings, the worst first. `parents` of guests: a guest within a guest shares that one's memory by design.

    Parties of whom not everything was compared are added to `unseen`.
    """
    unseen = set() if unseen is None else unseen
    agents = list(_agents(found.mappers))
    areas = _Areas(found)
    findings: list[Finding] = []
    checks: Sequence[Callable[[], Iterable[Finding]]] = (
        lambda: _shared(agents, parents, unseen),
        lambda: (finding for agent in agents for finding in _reaches(agent, areas, unseen)),
        lambda: (finding for mapper in found.mappers for finding in _user_reaches(mapper, areas, unseen)),
        lambda: (finding for mapper in found.mappers for finding in _writable_code(mapper)),
    )
    for number, check in enumerate(checks):
        if progress is not None and not progress(number / len(checks)):
            break
        findings += check()
    return sorted(findings, key=lambda one: -one.severity)


# Who reaches what


@dataclass(frozen=True, eq=False)
class _Agent:
    name: str
    number: int | None
    read: Spans
    write: Spans


def _reach(mapper: Mapper, wanted: int, unwanted: int = 0) -> Spans:
    """The memory that runs with some flags lead to."""
    runs = mapper.runs
    if wanted or unwanted:
        runs = runs.take(runs.attributes & (wanted | unwanted) == wanted)
    return covered(runs.target, runs.target + runs.length)


def _agents(mappers: Iterable[Mapper]) -> Iterator[_Agent]:
    for mapper in mappers:
        if not mapper.confines:
            continue
        name = mapper.party + (f" ({mapper.label})" if mapper.label else "")
        yield _Agent(name, mapper.number, _reach(mapper, 0, UNREADABLE), _reach(mapper, ENTRY.W))


def _finding(severity: Severity, rule: str, who: str, what: str, start: U64, end: U64) -> Finding:
    spans = covered(start, end)
    return Finding(severity, rule, who, what, tuple(spans.rows())[:_TOLD], sum((spans.end - spans.start).tolist()))


def _related(first: int | None, second: int | None, parents: Mapping[int, int | None]) -> bool:
    """Whether one of two guests runs within the other, or they are the same."""
    for inner, outer in ((first, second), (second, first)):
        at, steps = inner, 0
        while at is not None and steps <= len(parents):
            if at == outer:
                return True
            at, steps = parents.get(at), steps + 1
    return False


def _shared(agents: Sequence[_Agent], parents: Mapping[int, int | None], unseen: set[str]) -> Iterator[Finding]:
    """Pages that somebody writes and somebody else writes, or reads."""
    writes = [agent.write for agent in agents]
    if not agents:
        return
    written = covered(np.concatenate([one.start for one in writes]), np.concatenate([one.end for one in writes]))
    # Writers come first where both begin at the same address: a pair that is both is then told as what is worse.
    rows = [(agent.write.start, agent.write.end, index, True) for index, agent in enumerate(agents)]
    for index, agent in enumerate(agents):
        _, _, start, end, done = overlaps(agent.read.start, agent.read.end, written, _PIECES)
        if done < len(agent.read.start):
            unseen.add(agent.name)
        rows.append((start, end, index, False))
    starts, ends = np.concatenate([row[0] for row in rows]), np.concatenate([row[1] for row in rows])
    who = np.concatenate([np.full(len(row[0]), row[2]) for row in rows])
    writing = np.concatenate([np.full(len(row[0]), row[3]) for row in rows])
    order = np.argsort(starts, kind="stable")
    starts, ends, who, writing = starts[order], ends[order], who[order], writing[order]
    pairs: dict[tuple[int, int, bool], list[tuple[int, int]]] = {}
    for first, second in _meeting(starts, ends):
        if first < 0:
            more, stop = starts[second:], ends[second:]
            what = "and others share pages that somebody writes: only the first pairs are told"
            yield _finding(Severity.HIGH, "shared-writable", agents[int(who[second])].name, what, more, stop)
            break
        one, other, both = int(who[first]), int(who[second]), bool(writing[first] and writing[second])
        if one == other or not (writing[first] or writing[second]):
            continue
        if _related(agents[one].number, agents[other].number, parents):
            continue
        key = (min(one, other), max(one, other), True) if both else (one, other, False) if writing[first] else (other, one, False)
        last = min(int(ends[first]), int(ends[second]))
        pairs.setdefault(key, []).append((int(starts[second]), last))
    for (one, other, both), ranges in sorted(pairs.items()):
        start, stop = column(*(row[0] for row in ranges)), column(*(row[1] for row in ranges))
        names = f"{agents[one].name}, {agents[other].name}"
        if both:
            yield _finding(Severity.HIGH, "shared-writable", names, "both write", start, stop)
        elif (min(one, other), max(one, other), True) not in pairs:
            what = f"{agents[other].name} reads what {agents[one].name} writes"
            yield _finding(Severity.MEDIUM, "written-and-read", names, what, start, stop)


def _meeting(starts: U64, ends: U64) -> Iterator[tuple[int, int]]:
    """Pairs of stretches, in order of their starts, that have addresses in common; (-1, where) when there are too many."""
    if len(starts) < 2:
        return
    furthest = np.maximum.accumulate(ends)
    steps = 0
    for second in (np.flatnonzero(starts[1:] < furthest[:-1]) + 1).tolist():
        start, first = starts[second], second - 1
        while first >= 0 and furthest[first] > start:
            steps += 1
            if steps > _STEPS:
                yield -1, second
                return
            if ends[first] > start:
                yield first, second
            first -= 1


# Structures


class _Areas:
    """Where the structures are that confine guests, and what each is."""

    def __init__(self, found: ReverseMap) -> None:
        rows: dict[str, list[tuple[U64, U64]]] = {}
        same: dict[tuple[str, int, int], list[str]] = {}
        for area in found.areas:
            if area.kind != "AVIC backing page":  # its guest is to reach it
                same.setdefault((area.kind, area.start, area.end), []).append(area.who)
        for (kind, start, end), who in same.items():
            others = f" and {len(who) - 1} more" if len(who) > 1 else ""
            name = "the hypervisor's image" if kind == "image" else f"{kind} of {who[0]}{others}"
            rows.setdefault(name, []).append((column(start), column(end)))
        for mapper in found.mappers:
            if not mapper.confines and not mapper.host:
                continue
            name = f"page tables of {mapper.party}" if mapper.host else f"tables that confine {mapper.party}"
            pages = mapper.tables().spa & -_PAGE % (1 << 64)
            rows.setdefault(name, []).append((pages, pages + np.uint64(_PAGE)))
        self.image = covered(*_columns(rows.pop("the hypervisor's image", [])))
        self.names = list(rows)
        self.start, self.end = _columns([one for spans in rows.values() for one in spans])
        counts = [sum(len(start) for start, _ in spans) for spans in rows.values()]
        self.name = np.repeat(np.arange(len(counts)), counts)
        self.all = covered(self.start, self.end)

    def named(self, reached: Spans, who: str, unseen: set[str]) -> dict[str, tuple[U64, U64]]:
        """What of some stretches is part of which structure: starts and ends. `who` reaches them."""
        _, _, start, end, done = overlaps(reached.start, reached.end, self.all, _PIECES)
        mine, _, start, end, looked = overlaps(self.start, self.end, Spans(start, end), _PIECES)
        if done < len(reached.start) or looked < len(self.start):
            unseen.add(who)
        name = self.name[mine]
        return {self.names[one]: (start[name == one], end[name == one]) for one in np.unique(name).tolist()}


def _columns(rows: Sequence[tuple[U64, U64]]) -> tuple[U64, U64]:
    if not rows:
        return column(), column()
    return np.concatenate([row[0] for row in rows]), np.concatenate([row[1] for row in rows])


def _reaches(agent: _Agent, areas: _Areas, unseen: set[str]) -> Iterator[Finding]:
    written = areas.named(agent.write, agent.name, unseen)
    for name, where in written.items():
        yield _finding(Severity.CRITICAL, "control-writable", agent.name, f"writes {name}", *where)
    for name, where in areas.named(agent.read, agent.name, unseen).items():
        if name not in written:
            yield _finding(Severity.HIGH, "control-readable", agent.name, f"reads {name}", *where)
    for severity, rule, word, spans in (
        (Severity.CRITICAL, "image-writable", "writes", agent.write), (Severity.HIGH, "image-readable", "reads", agent.read),
    ):  # fmt: skip
        _, _, start, end, done = overlaps(spans.start, spans.end, areas.image, _PIECES)
        if done < len(spans.start):
            unseen.add(agent.name)
        if len(start):
            yield _finding(severity, rule, agent.name, f"{word} the hypervisor's image", start, end)
            break


def _user_reaches(mapper: Mapper, areas: _Areas, unseen: set[str]) -> Iterator[Finding]:
    """Linear addresses that user code may use: in the host as in a guest. Without paging there are no users."""
    if mapper.space != Space.GVA or not len(mapper.tables().spa):
        return
    severity = Severity.HIGH if mapper.host else Severity.CRITICAL
    for name, where in areas.named(_reach(mapper, ENTRY.U), mapper.party, unseen).items():
        yield _finding(severity, "user-reaches-tables", f"user code of {mapper.party}", f"reaches {name}", *where)


def _writable_code(mapper: Mapper) -> Iterator[Finding]:
    if mapper.space != Space.GVA or not len(mapper.tables().spa):
        return
    for wanted, unwanted, whose in ((ENTRY.W | ENTRY.U, ENTRY.NX, "user"), (ENTRY.W, ENTRY.NX | ENTRY.U, "supervisor")):
        spans = _reach(mapper, wanted, unwanted)
        if len(spans.start):
            severity = Severity.MEDIUM if mapper.host else Severity.LOW
            what = f"{whose} pages are writable and executable"
            yield _finding(severity, "writable-executable", mapper.party, what, spans.start, spans.end)
