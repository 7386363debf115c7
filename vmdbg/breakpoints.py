"""Breakpoints and watchpoints of inferiors on one machine.

Execution breakpoints are linear addresses that the engine stops at, whoever executes them; who owns them is looked up
then.  Watchpoints lie in system-physical memory, so that a store through any mapping is seen: the engine stops at every
access to their pages, and the bytes are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from gdbstub.target import BreakpointKind, TargetError
from vmdbg.contexts import Context, locate
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


@dataclass(slots=True, eq=False)
class Watchpoint:
    """A watched linear range of one inferior; `pieces` are the (spa, length) it lies in now, none while unmapped."""

    kind: BreakpointKind
    address: int
    length: int
    pid: int
    pieces: list[tuple[int, int]] = field(default_factory=list)
    value: bytes = b""

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
        self.watchpoints: list[Watchpoint] = []
        self.stored = False
        """The processor's own stores (an exit's fields in the VMCB, an interrupt's frame) went to a watched page."""
        self._context_of = context_of
        self._points: dict[int, set[tuple[BreakpointKind, int]]] = {}
        self._guarded: dict[int, int] = {}
        machine.engine.physical.on_watched = self._on_store

    def __bool__(self) -> bool:
        """Whether there is any to execute."""
        return bool(self._points)

    def insert(self, kind: BreakpointKind, address: int, length: int, pid: int) -> None:
        if kind in _EXECUTE:
            self._points.setdefault(address, set()).add((kind, pid))
            return
        if not 1 <= length <= PAGE:
            raise TargetError(f"a watchpoint of {length} bytes is not possible; watch 1 to {PAGE} bytes")
        self.watchpoints.append(Watchpoint(kind, address, length, pid))

    def remove(self, kind: BreakpointKind, address: int, length: int, pid: int) -> None:
        if kind in _EXECUTE:
            owners = self._points.get(address, set())
            owners.discard((kind, pid))
            if not owners:
                self._points.pop(address, None)
            return
        for point in self.watchpoints:
            if (point.kind, point.address, point.length, point.pid) == (kind, address, length, pid):
                self.watchpoints.remove(point)
                break
        self.guard()

    def forget(self, pid: int) -> None:
        """An inferior is gone."""
        self._points = {a: left for a, owners in self._points.items() if (left := {o for o in owners if o[1] != pid})}
        self.watchpoints = [point for point in self.watchpoints if point.pid != pid]

    def kind_at(self, address: int, pid: int) -> BreakpointKind | None:
        """The inferior's breakpoint at a linear address."""
        return next((kind for kind, owner in sorted(self._points.get(address, ())) if owner == pid), None)

    def arm(self, also: int | None = None) -> None:
        """Have the engine stop at all of them, and at one more address."""
        self.machine.engine.arm(self._points.keys() | ({also} if also is not None else set()))

    # Watchpoints

    def guard(self) -> None:
        """Have the engine stop at accesses to exactly the pages that hold watched bytes now."""
        machine = self.machine
        wanted: dict[int, int] = {}
        for point in self.watchpoints:
            point.pieces = list(self._pieces(point))
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
        if any(point.pid == pid and point.pieces != list(self._pieces(point)) for point in self.watchpoints):
            self.guard()

    def _pieces(self, point: Watchpoint) -> Iterator[tuple[int, int]]:
        context = self._context_of(point.pid)
        address, left = point.address, point.length if context is not None else 0
        while left:
            assert context is not None
            size = min(left, PAGE - address % PAGE)
            spa = locate(self.machine.ram, context, address)
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
