"""Breakpoints and watchpoints of inferiors on one machine, and the address spaces they belong to.

Execution breakpoints are linear addresses that the engine stops at, whoever executes them; whose they are is looked up
then.  Watchpoints lie in system-physical memory, so that a store through any mapping is seen: the engine stops at every
access to their pages, and the bytes are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from gdbstub.target import BreakpointKind, Programs, TargetError
from vmdbg.contexts import Context, Space, locate_gpa, lookup, space
from vmdbg.cpu.operands import accesses
from vmdbg.engine.physical import WATCH_READ, WATCH_WRITE
from vmdbg.machine import Event, Machine

if TYPE_CHECKING:
    from vmdbg.cpu.processor import Processor

PAGE = 4096
WATCH = WATCH_READ | WATCH_WRITE

_EXECUTE = (BreakpointKind.SOFTWARE, BreakpointKind.HARDWARE)
_FLAGS = {BreakpointKind.WRITE: WATCH_WRITE, BreakpointKind.READ: WATCH_READ, BreakpointKind.ACCESS: WATCH}

Touched = list[tuple[int | None, int, bool, bool]]
"""(spa, bytes, reads, writes) of an instruction's accesses."""


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
    """Of one inferior, and of what its address names in one address space.  A watchpoint is one with a `length` in bytes.

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
    text: str = ""
    """What the user must hear when it stops a thread: why a condition could not be evaluated."""


@dataclass(slots=True, eq=False)
class Watchpoint(Breakpoint):
    """`pieces` are the (spa, length) that the watched range lies in now, none while unmapped."""

    pieces: list[tuple[int, int]] = field(default_factory=list)
    value: bytes = b""
    pages: dict[int, int | None] = field(default_factory=dict)
    """Guest-physical addresses of its linear pages, as its address space had them last."""

    def accessed(self, touched: Touched) -> bool:
        """Whether accesses fire it that a comparison of values would not show."""
        if self.kind == BreakpointKind.WRITE:
            return False
        every = self.kind == BreakpointKind.ACCESS
        return any(
            spa is not None and (reads or (every and writes)) and spa < at + length and at < spa + size
            for spa, size, reads, writes in touched for at, length in self.pieces
        )  # fmt: skip


class Breakpoints:
    """All of them; `context_of` gives the context of a live inferior's first thread, None for one that is gone."""

    def __init__(self, machine: Machine, context_of: Callable[[int], Context | None]) -> None:
        self.machine = machine
        self.rule = Rule.SHARED
        self.stored = False
        """The processor's own stores (an exit's fields in the VMCB, an interrupt's frame) went to a watched page."""
        self.traced: frozenset[int] = frozenset()
        """Addresses of tracepoints."""
        self._context_of = context_of
        self._known: dict[tuple[BreakpointKind, int, int, int], Breakpoint] = {}
        self._guarded: dict[int, int] = {}
        machine.engine.physical.on_watched = self._on_store

    def __iter__(self) -> Iterator[Breakpoint]:
        """Those that the client has, inserted or not."""
        return iter(self._known.values())

    @property
    def _inserted(self) -> Iterator[Breakpoint]:
        return (point for point in self if point.inserted)

    @property
    def watchpoints(self) -> list[Watchpoint]:
        return [point for point in self._inserted if isinstance(point, Watchpoint)]

    def __bool__(self) -> bool:
        """Whether there is any to execute."""
        return bool(self.traced) or any(point.kind in _EXECUTE for point in self._inserted)

    def insert(self, kind: BreakpointKind, address: int, length: int, pid: int, context: Context) -> None:
        """`context`: the thread in whose address space the address is meant."""
        key = kind, address, length, pid
        point = self._known.get(key)
        if point is not None:
            point.inserted = True
            return
        if kind not in _EXECUTE and not 1 <= length <= PAGE:
            raise TargetError(f"a watchpoint of {length} bytes is not possible; watch 1 to {PAGE} bytes")
        point = self._known[key] = (Breakpoint if kind in _EXECUTE else Watchpoint)(*key)
        self._settle(point, context)
        if isinstance(point, Watchpoint):
            point.pieces = list(self._pieces(point, context))

    def set_programs(self, kind: BreakpointKind, address: int, length: int, pid: int, programs: Programs) -> None:
        """Conditions and commands of one that is inserted."""
        self._known[kind, address, length, pid].programs = programs

    def remove(self, kind: BreakpointKind, address: int, length: int, pid: int) -> None:
        point = self._known.get((kind, address, length, pid))
        if point is not None:
            point.inserted = False
            if isinstance(point, Watchpoint):
                self.guard()

    def forget_removed(self) -> None:
        """The machine continues without those that are not inserted: the client has deleted them."""
        self._known = {key: point for key, point in self._known.items() if point.inserted}

    def forget(self, pid: int) -> None:
        """An inferior is gone."""
        self._known = {key: point for key, point in self._known.items() if point.pid != pid}

    def at(self, address: int, pid: int) -> list[Breakpoint]:
        """The inferior's breakpoints at a linear address."""
        return [p for p in self._inserted if p.address == address and p.pid == pid and p.kind in _EXECUTE]

    def owns(self, point: Breakpoint, context: Context) -> bool:
        """Whether it belongs to the address space that a thread is in."""
        home = point.home
        if home is None or self.rule == Rule.ANY or context.paging().root == home.root:
            return True
        return self.rule == Rule.SHARED and space(self.machine.ram, context, point.address).page == home.page

    def hit(self, point: Breakpoint, context: Context) -> None:
        """It stops a thread; if it had no address space yet, the thread's is its own."""
        point.hits += 1
        self._settle(point, context)

    def _settle(self, point: Breakpoint, context: Context) -> None:
        if point.home is None:
            here = space(self.machine.ram, context, point.address)
            if here.root is not None and here.page is not None:
                point.home = here

    def arm(self, also: Iterable[int] = ()) -> None:
        """Have the engine stop at all of them, and at further addresses."""
        addresses = {point.address for point in self._inserted if point.kind in _EXECUTE}
        self.machine.engine.arm(addresses.union(self.traced, also))

    # Watchpoints

    def guard(self) -> None:
        """Have the engine stop at accesses to exactly the pages that hold watched bytes now."""
        machine = self.machine
        wanted: dict[int, int] = {}
        for point in self.watchpoints:
            point.pieces = list(self._pieces(point, self._context_of(point.pid)))
            point.value = self._value(point)
            for spa, _ in point.pieces:
                wanted[spa // PAGE] = wanted.get(spa // PAGE, 0) | _FLAGS[point.kind]
        physical = machine.engine.physical
        for page in self._guarded.keys() | wanted.keys():
            flags = wanted.get(page, 0)
            if self._guarded.get(page, 0) != flags:
                physical.watch(page, WATCH, False)
                if flags:
                    physical.watch(page, flags, True)
        self._guarded = wanted
        self.stored = False

    def remap(self, pid: int) -> None:
        """Follow an inferior's watched addresses to where its page tables map them now."""
        context = self._context_of(pid)
        if any(point.pid == pid and point.pieces != list(self._pieces(point, context)) for point in self.watchpoints):
            self.guard()

    def _pieces(self, point: Watchpoint, context: Context | None) -> Iterator[tuple[int, int]]:
        """Where its address space has the range: as that had it last, while `context` is in another one."""
        ram = self.machine.ram
        if context is None:
            return
        elsewhere = self.rule != Rule.ANY and point.home is not None and context.paging().root != point.home.root
        address, left = point.address, point.length
        while left:
            size, page, spa = min(left, PAGE - address % PAGE), address // PAGE, None
            if not elsewhere:
                found = lookup(ram, context, address)
                point.pages[page] = int(found.gpa) & -PAGE if found is not None else None
                spa = int(found.spa) if found is not None and ram.contains(found.spa) else None
            elif (gpa := point.pages.get(page)) is not None:
                spa = locate_gpa(ram, context, gpa + address % PAGE)
            if spa is not None:
                yield spa, size
            address += size
            left -= size

    def _value(self, point: Watchpoint) -> bytes:
        view = self.machine.ram.view
        return b"".join(bytes(view[spa : spa + size]) for spa, size in point.pieces)

    def fired(self, touched: Touched) -> list[Watchpoint]:
        """Those that changed since the last look, or that `touched` accessed."""
        found = []
        for point in self.watchpoints:
            value = self._value(point)
            changed, point.value = value != point.value, value
            if (changed and point.kind != BreakpointKind.READ) or point.accessed(touched):
                found.append(point)
        return found

    def _on_store(self) -> None:
        self.stored = True
        self.machine.cpu.pause = True

    def execute(self, cpu: Processor) -> tuple[Event, list[Watchpoint]]:
        """Execute the instruction that is about to access a watched page; what came of it, and what it fired."""
        machine = self.machine
        ram, physical = machine.ram, machine.engine.physical
        touched: Touched = [(cpu.translate_quietly(address), size, r, w) for address, size, r, w in accesses(cpu)]
        lifted: dict[int, int] = {}
        event = Event.WATCHED
        while event == Event.WATCHED:
            assert cpu.watched is not None
            assert cpu.watched.watched is not None
            page = cpu.watched.watched // PAGE
            if page in lifted:
                break
            lifted[page] = ram.pages[page] & WATCH
            physical.watch(page, WATCH, False)
            event = machine.step(cpu)
        for page, flags in lifted.items():
            physical.watch(page, flags, True)
        return event, self.fired(touched)
