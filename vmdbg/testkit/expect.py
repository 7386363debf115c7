# SPDX-License-Identifier: GPL-2.0-or-later
"""Assertions for authors of hypervisors.  Each that fails says what was expected, what came instead, and from where."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from typing import TYPE_CHECKING

from introspect.audit import RULES, Severity
from introspect.commands.mappers import Audit
from introspect.commands.vmcb import Why
from introspect.exitlog import RECORD_FACTS
from introspect.exits import exit_name
from introspect.facts import EXIT_FACTS
from vmdbg.api.errors import Error
from vmdbg.api.inferior import Inferior
from vmdbg.cpu.core import Notice
from vmdbg.history import HOST

if TYPE_CHECKING:
    from vmdbg.api.exits import Exit
    from vmdbg.api.machine import Machine
    from vmdbg.api.stop import Stop

__all__ = ["assert_vmrun_ok", "expect_exit", "expect_isolation", "expect_no_exit", "expect_no_notice"]

Fact = int | range | str | Collection[int]
NEAREST, LATEST = 3, 5

_NAMES = EXIT_FACTS | RECORD_FACTS


class Wanted:
    """What an exit must be."""

    def __init__(self, whom: Machine | Inferior, code: str | int | None, facts: dict[str, Fact]) -> None:
        self.machine: Machine = whom.machine if isinstance(whom, Inferior) else whom
        self.guest = whom.number if isinstance(whom, Inferior) else None
        self.code = code
        self.facts = facts
        for name, value in facts.items():
            if name not in _NAMES:
                near = difflib.get_close_matches(name, _NAMES, 1)
                known = f"did you mean {near[0]}" if near else f"there are {', '.join(sorted(_NAMES))}"
                raise Error(f"{name}: exits have no such fact; {known}")
            if isinstance(value, str) and name not in ("rip", "host_rip"):
                raise Error(f"{name}={value!r}: only rip and host_rip are compared with symbols; give a number, a range or a set")

    def __str__(self) -> str:
        code = "an exit" if self.code is None else self.code.upper() if isinstance(self.code, str) else exit_name(self.code)
        whose = f" of guest {self.guest}" if self.guest is not None else ""
        facts = ", ".join(f"{name} {_told(value)}" for name, value in self.facts.items())
        return f"{code}{whose}" + (f" with {facts}" if facts else "")

    def event(self) -> str:
        """For `catch`: what it can tell by itself; `misses` looks at the rest."""
        conditions = [text for name, value in self.facts.items() if name in EXIT_FACTS and (text := _condition(name, value))]
        code = "any" if self.code is None else self.code.lower() if isinstance(self.code, str) else f"{self.code:#x}"
        words = ["vmexit", code, *([f"guest {self.guest}"] if self.guest is not None else [])]
        return " ".join([*words, *(["if", " && ".join(conditions)] if conditions else [])])

    def misses(self, one: Exit) -> dict[str, str]:
        """The facts that are others, with what they are."""
        wrong = {}
        for name, value in self.facts.items():
            found = one.facts.get(name)
            if isinstance(value, str):
                symbol = one.symbol if name == "rip" else self._host_symbol(one.host_rip)
                if value not in (symbol, symbol.partition("+")[0]):
                    wrong[name] = symbol or f"{found:#x}"
            elif found is None:
                wrong[name] = "nothing"
            elif not (found in value if not isinstance(value, int) else found == value):
                wrong[name] = f"{found:#x}"
        return wrong

    def _host_symbol(self, address: int) -> str:
        symbols = self.machine.context.symbols(HOST)
        return symbols.name(address) if symbols else ""

    def among(self, exits: Iterable[Exit]) -> Exit | None:
        return next((one for one in exits if not self.misses(one)), None)

    def remembered(self, since: int = 0) -> list[Exit]:
        return list(self.machine.exits(self.guest, self.code, since=since))

    def run(self, within: int | None, ticks: int | None, wall: float | None) -> tuple[Exit | None, Stop | None]:
        """Run to such an exit, or until something else ends it.  With `within` 0 nothing runs: the past is looked at."""
        if within == 0:
            return self.among(self.remembered()), None
        machine = self.machine
        if machine.exit_status is not None:
            return None, machine.stop
        engine = machine.debugger.machine.engine
        began, executed, point = machine.time, engine.instructions, machine.catch(self.event())
        try:
            while True:
                before = machine.exit_count
                left = None if ticks is None else ticks - (machine.time - began)
                instructions = None if within is None else within - (engine.instructions - executed)
                if 0 in (left, instructions) or min(left or 1, instructions or 1) < 0:
                    return None, machine.stop
                stop = machine.run(point, instructions=instructions, ticks=left, wall=wall)
                if not stop.reached:
                    return None, stop
                came = self.among(machine.exits(self.guest, self.code, since=before))
                if came is not None:
                    return came, stop
        finally:
            point.delete()


def _condition(name: str, value: Fact) -> str:
    if isinstance(value, int):
        return f"{name} == {int(value):#x}"
    if isinstance(value, range) and value.step == 1 and value:
        return f"{name} >= {value.start:#x} && {name} <= {value[-1]:#x}"
    return ""


def _told(value: Fact) -> str:
    match value:
        case str():
            return f"in {value}"
        case int():
            return f"{value:#x}"
        case range():
            return f"{value.start:#x}-{value[-1]:#x}" if value else "in no range"
    return "one of " + ", ".join(f"{one:#x}" for one in sorted(value))


def _within(within: int | None, ticks: int | None, wall: float | None) -> str:
    limits = [f"{value:,} {unit}" for value, unit in ((within, "instructions"), (ticks, "ticks"), (wall, "s")) if value]
    return f" within {' and '.join(limits)}" if limits else ""


def expect_exit(
    whom: Machine | Inferior, code: str | int | None = None, *, within: int | None = None, ticks: int | None = None,
    wall: float | None = None, **facts: Fact,
) -> Exit:  # fmt: skip
    """Run until a guest (of a machine: any guest) leaves with this EXITCODE and these facts; the machine stands at the exit.

    Facts are those of `exits --if`: gpa, port, msr, write, rip, vector, cpu ...; each a number, a range or a set of numbers, and
    `rip` a symbol as well: `expect_exit(guest, "NPF", gpa=range(0x40000, 0x50000), write=1, within=1_000_000)`.

    `within`: instructions of the machine, `ticks`: guest time, `wall`: seconds; without any to the machine's end.  `within=0`
    runs nothing: such an exit must be among those that are remembered.  Breakpoints and other catchpoints are passed.

    AssertionError names the nearest exits that came instead.  `Error` for a fact that exits do not have.
    """
    __tracebackhide__ = True
    wanted = Wanted(whom, code, facts)
    before = 0 if within == 0 else wanted.machine.exit_count
    ended = wanted.machine.exit_status is not None
    came, stop = wanted.run(within, ticks, wall)
    if came is None:
        where = " among the exits that are remembered" if within == 0 else _within(within, ticks, wall)
        over = "; the machine had ended before: within=0 looks at what is remembered" if within != 0 and ended else ""
        raise AssertionError("\n".join((f"expected {wanted}{where}, which did not come{over}", *_instead(wanted, before, stop))))
    return came


def expect_no_exit(
    whom: Machine | Inferior, code: str | int | None = None, *, within: int | None = None, ticks: int | None = None,
    wall: float | None = None, **facts: Fact,
) -> None:  # fmt: skip
    """The same, where no such exit may come: AssertionError shows the one that did, and what led to it."""
    __tracebackhide__ = True
    wanted = Wanted(whom, code, facts)
    came, _ = wanted.run(within, ticks, wall)
    if came is not None:
        before = [one for one in wanted.machine.exits(came.guest) if one.number < came.number][-LATEST:]
        lines = [f"expected no {wanted}{_within(within, ticks, wall)}, and it came:", f"  {came}"]
        lines += [f"    {name} {value:#x}" for name, value in came.facts.items() if name in facts]
        if before:
            lines += [f"before it, of guest {came.guest}:", *(f"  {one}" for one in before)]
        raise AssertionError("\n".join(lines))


def _instead(wanted: Wanted, since: int, stop: Stop | None) -> Iterator[str]:
    machine = wanted.machine
    if stop is not None:
        yield f"the run ended with: {stop}"
    exits = [one for one in machine.exits(wanted.guest) if one.number > since]
    if not exits:
        there = ", ".join(str(guest.number) for guest in machine.guests) or "none"
        whose = f" of guest {wanted.guest}" if wanted.guest is not None else ""
        yield f"there were no exits{whose} meanwhile; guests are {there}"
        return
    counts = ", ".join(f"{name} {count}" for name, count in Counter(one.name for one in exits).most_common())
    yield f"what came instead: {len(exits)} exits ({counts})"
    alike = wanted.remembered(since)
    if alike and wanted.facts:
        nearest = sorted(alike, key=lambda one: _distance(wanted, one))[:NEAREST]
        yield f"nearest of {len(alike)} {nearest[0].name if wanted.code is not None else 'exits'}:"
        for one in nearest:
            wrong = "; ".join(f"{name} is {value}" for name, value in wanted.misses(one).items())
            yield f"  {one}" + (f"  <- {wrong}" if wrong else "")
    yield "the last exits:"
    yield from (f"  {one}" for one in exits[-LATEST:])


def _distance(wanted: Wanted, one: Exit) -> tuple[int, int]:
    """How many facts are others, and how far the numbers are away."""
    wrong, far = wanted.misses(one), 0
    for name in wrong:
        value, found = wanted.facts[name], one.facts.get(name)
        if found is None or isinstance(value, str):
            continue
        ends = [value] if isinstance(value, int) else [value[0], value[-1]] if isinstance(value, range) and value else list(value)
        far += min((abs(found - end) for end in ends), default=0)
    return len(wrong), far


def expect_isolation(machine: Machine, *, severity: str = "high", allow: Iterable[str] = ()) -> None:
    """No finding of `audit isolation` at least so bad: guests are kept apart by the tables as they are now.

    `severity`: low, medium, high or critical; `allow`: rules that may be broken, as "shared-writable".  AssertionError lists
    the findings, each rule with its remedy; also where tables could not be looked at wholly.
    """
    __tracebackhide__ = True
    allowed = set(allow)
    for rule in allowed - set(RULES):
        raise Error(f"allow: there is no rule {rule!r}; there are {', '.join(RULES)}")
    worst = next((one for one in Severity if one.word == severity), None)
    if worst is None:
        raise Error(f"severity: {severity!r} is none; write {', '.join(one.word for one in Severity)}")
    audit = machine.command("audit isolation")
    assert isinstance(audit, Audit)
    findings = tuple(one for one in audit.findings if one.severity >= worst and one.rule not in allowed)
    if findings or audit.incomplete:
        shown = Audit(findings, worst, audit.mappers, audit.incomplete)
        raise AssertionError(f"expected isolation, and it has holes:\n{shown.text()}")


def assert_vmrun_ok(whom: Machine | Inferior) -> None:
    """VMRUN would accept every VMCB of a guest (of a machine: of all guests) as they are now, and has refused none.

    AssertionError names each rule that is broken, with the fields and the manual's section.
    """
    __tracebackhide__ = True
    machine: Machine = whom.machine if isinstance(whom, Inferior) else whom
    guests = [whom.number] if isinstance(whom, Inferior) else [guest.number for guest in machine.guests]
    if not guests:
        raise AssertionError("expected VMCBs that VMRUN accepts: VMRUN has not been executed yet; run the machine first")
    wrong = []
    for number in guests:
        for vmcb in machine.debugger.history.guests[number].vcpus:
            verdict = machine.command(f"vmrun why {vmcb:#x}")
            assert isinstance(verdict, Why)
            if verdict.exit_status:
                wrong.append(verdict.text())
        refused = list(machine.exits(number, "INVALID"))
        if refused:
            wrong.append(f"VMRUN has refused a VMCB of guest {number}, {len(refused)} times; the last time: {refused[-1]}")
    if wrong:
        raise AssertionError("\n".join(("expected VMCBs that VMRUN accepts, and it does not:", *wrong)))


def expect_no_notice(machine: Machine, *kinds: str) -> None:
    """Nothing of these kinds has been noticed so far: "stale" (under tlb="strict" and the like), "vmrun-fail", "shutdown"; all
    of them if none is named.  AssertionError lists what was."""
    __tracebackhide__ = True
    known = [str(kind) for kind in Notice]
    for kind in kinds:
        if kind not in known:
            raise Error(f"{kind!r}: there are no such notices; there are {', '.join(known)}")
    found = [line for line in machine.debugger.history.notices if line.split(" ", 1)[0] in (kinds or known)]
    if found:
        head = f"expected no notices of {', '.join(kinds or known)}, and there are:"
        raise AssertionError("\n".join((head, *(f"  {line}" for line in found))))
