"""Breakpoints of inferiors on one machine, and the address spaces they belong to.

They are linear addresses that the engine stops at, whoever executes them; whose they are is looked up then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum

from gdbstub.target import BreakpointKind, Programs, ThreadId
from vmdbg.contexts import Context, Space, space
from vmdbg.machine import Machine

EXECUTE = (BreakpointKind.SOFTWARE, BreakpointKind.HARDWARE)


class Rule(StrEnum):
    """Where breakpoints hit and watchpoints look."""

    ANY = "any"
    """In every address space of their inferior."""
    SHARED = "shared"
    """In their own, and where another maps the address to the same page."""
    OWN = "own"
    """In their own."""


@dataclass(slots=True, eq=False)
class Breakpoint:
    """Of one inferior, and of what its address names in one address space.

    A client takes all of them out at every stop, and puts them in again when it resumes, whatever is running then: what is
    out is forgotten only when the machine continues without it.
    """

    kind: BreakpointKind
    address: int
    length: int
    pid: int
    inserted: bool = True
    home: Space | None = None
    """Where it was set; None while the address was not translated to anything there, and it has not hit since."""
    hits: int = 0
    passes: int = 0
    """Executions in address spaces that it does not belong to."""
    programs: Programs = field(default_factory=Programs)
    """Conditions and commands."""
    test: Callable[[ThreadId], bool] | None = None
    """A condition of somebody in this process: whether it stops a thread, evaluated before anything stops."""
    text: str = ""
    """What the user must hear when it stops a thread: why a condition could not be evaluated."""


@dataclass(slots=True, eq=False)
class Range:
    """Every instruction of an inferior at `start` <= linear address < `end`, in any of its address spaces."""

    start: int
    end: int
    pid: int
    hits: int = 0


class Breakpoints:
    """All of them."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.rule = Rule.SHARED
        self.traced: frozenset[int] = frozenset()
        """Addresses of tracepoints."""
        self._known: dict[tuple[BreakpointKind, int, int, int], Breakpoint] = {}
        self._places: dict[int, list[Breakpoint]] = {}
        """Those that are inserted, by linear address."""
        self.ranges: dict[int, Range] = {}
        """By number; clients know nothing of them."""
        self._next_range = 1

    def __iter__(self) -> Iterator[Breakpoint]:
        """Those that the client has, inserted or not."""
        return iter(self._known.values())

    def __bool__(self) -> bool:
        """Whether there is any to stop at."""
        return bool(self._places or self.ranges or self.traced)

    def add_range(self, start: int, end: int, pid: int) -> int:
        """Its number."""
        number = self._next_range
        self._next_range += 1
        self.ranges[number] = Range(start, end, pid)
        return number

    def range_at(self, address: int, pid: int) -> int | None:
        """The number of the first range of an inferior that holds an address."""
        return next((n for n, r in self.ranges.items() if r.pid == pid and r.start <= address < r.end), None)

    def insert(self, kind: BreakpointKind, address: int, length: int, pid: int, context: Context) -> None:
        """`context`: the thread in whose address space the address is meant."""
        key = kind, address, length, pid
        point = self._known.get(key)
        if point is None:
            point = self._known[key] = Breakpoint(*key)
            self.settle(point, context)
        elif point.inserted:
            return
        point.inserted = True
        self._places.setdefault(address, []).append(point)

    def set_programs(self, kind: BreakpointKind, address: int, length: int, pid: int, programs: Programs) -> None:
        """Conditions and commands of one that is inserted."""
        self._known[kind, address, length, pid].programs = programs

    def remove(self, kind: BreakpointKind, address: int, length: int, pid: int) -> None:
        point = self._known.get((kind, address, length, pid))
        if point is not None and point.inserted:
            point.inserted, point.test = False, None
            self._take_out(point)

    def _take_out(self, point: Breakpoint) -> None:
        here = self._places[point.address]
        here.remove(point)
        if not here:
            del self._places[point.address]

    def forget_removed(self) -> None:
        """The machine continues without those that are not inserted: the client has deleted them."""
        if any(not point.inserted for point in self._known.values()):
            self._known = {key: point for key, point in self._known.items() if point.inserted}

    def forget(self, pid: int) -> None:
        """An inferior is gone."""
        for key in [key for key, point in self._known.items() if point.pid == pid]:
            point = self._known.pop(key)
            if point.inserted:
                self._take_out(point)
        self.ranges = {number: each for number, each in self.ranges.items() if each.pid != pid}

    def at(self, address: int, pid: int) -> list[Breakpoint]:
        """The inferior's breakpoints at a linear address."""
        return [point for point in self._places.get(address, ()) if point.pid == pid]

    def owns(self, point: Breakpoint, context: Context) -> bool:
        """Whether it belongs to the address space that a thread is in."""
        home = point.home
        if home is None or self.rule == Rule.ANY or context.paging().root == home.root:
            return True
        return self.rule == Rule.SHARED and space(self.machine.ram, context, point.address).page == home.page

    def hit(self, point: Breakpoint, context: Context) -> None:
        """It stops a thread; if it had no address space yet, the thread's is its own."""
        point.hits += 1
        self.settle(point, context)

    def settle(self, point: Breakpoint, context: Context) -> None:
        """Give it the address space of a thread, if it has none yet and that has something at its address."""
        if point.home is None:
            here = space(self.machine.ram, context, point.address)
            if here.root is not None and here.page is not None:
                point.home = here

    def arm(self, also: Iterable[int] = ()) -> None:
        """Have the engine stop at all of them, and at further addresses."""
        self.machine.engine.arm({*self._places, *self.traced, *also})
        self.machine.engine.arm_ranges({(each.start, each.end) for each in self.ranges.values()})
