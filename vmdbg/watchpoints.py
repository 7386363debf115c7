"""Watchpoints on one machine: linear, guest-physical and system-physical ranges, and who touched them.

All of them lie in system-physical memory in the end, so that a store through any mapping is seen, of any inferior, of the
processor itself or of a device.  The engine stops at every access to their pages; that instruction is stepped, and the bytes
are compared, or for reads its operands.  What the processor and devices do in Python is noted as it is done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple

from gdbstub.target import BreakpointKind, Programs, TargetError
from introspect.paging import Access, walk
from vmdbg.breakpoints import Breakpoint, Breakpoints, Rule
from vmdbg.contexts import Context, LiveContext, locate_gpa
from vmdbg.cpu.operands import accesses
from vmdbg.cpu.processor import Processor
from vmdbg.engine.physical import WATCH_READ, WATCH_WRITE
from vmdbg.engine.state import GDTR, IDTR, LDTR, TR
from vmdbg.history import HOST
from vmdbg.machine import Event, Machine

if TYPE_CHECKING:
    from vmdbg.cpu.core import Cpu

PAGE = 4096
WATCH = WATCH_READ | WATCH_WRITE

_FLAGS = {BreakpointKind.WRITE: WATCH_WRITE, BreakpointKind.READ: WATCH_READ, BreakpointKind.ACCESS: WATCH}
_TABLES = {GDTR: "the GDT", IDTR: "the IDT", LDTR: "the LDT", TR: "the TSS"}


class Space(StrEnum):
    """What a watchpoint's address is one of."""

    GVA = "gva"
    GPA = "gpa"
    SPA = "spa"


@dataclass(slots=True, eq=False)
class Watchpoint(Breakpoint):
    """One with a `length` in bytes.  `pieces` are the (spa, length) that the watched range lies in now, none while unmapped."""

    space: Space = Space.GVA
    number: int = 0
    """Of one that was set with `monitor watch`: it stops at each access.  The client's own, which are 0, stop for writes that
    change something only: a client looks at the value, and goes on silently."""
    pieces: list[tuple[int, int]] = field(default_factory=list)
    value: bytes = b""
    pages: dict[int, int | None] = field(default_factory=dict)
    """Guest-physical addresses of its linear pages, as its address space had them last."""

    def meets(self, spa: int, size: int) -> bool:
        for at, length in self.pieces:  # noqa: SIM110 - a generator costs three times as much, and this is asked often
            if spa < at + length and at < spa + size:
                return True
        return False

    def __str__(self) -> str:
        where = f"{self.space}:{self.address:#x}"
        return f"watchpoint {self.number} on {where}" if self.number else where


class Touch(NamedTuple):
    """A range of memory that was accessed."""

    spa: int
    size: int
    reads: bool
    writes: bool
    by: str = ""
    """Who did it: empty for an operand of the instruction."""


class Fired(NamedTuple):
    """A watchpoint that was met, and in words how."""

    point: Watchpoint
    how: str
    by: str
    """Who did it, if not an operand of an instruction."""


class Watchpoints:
    """All of them; `context_of` gives the context of a live inferior's first thread, None for one that is gone."""

    def __init__(self, machine: Machine, breakpoints: Breakpoints, context_of: Callable[[int], Context | None]) -> None:
        self.machine = machine
        self.noted: list[Touch] = []
        """What the processor (an exit's fields in the VMCB, an interrupt's frame) and devices did to watched pages."""
        self._breakpoints = breakpoints
        self._context_of = context_of
        self._known: dict[tuple[BreakpointKind, int, int, int], Watchpoint] = {}
        """The client's, inserted or not."""
        self._numbered: dict[int, Watchpoint] = {}
        self._next = 1
        self._active: list[Watchpoint] = []
        self._selected = False
        """They are others than those that pages are guarded for."""
        self._by_page: dict[int, list[Watchpoint]] = {}
        self._guarded: dict[int, int] = {}
        machine.engine.physical.on_watched = self._note

    def __iter__(self) -> Iterator[Watchpoint]:
        """Those of the client, inserted or not, and the numbered ones."""
        yield from self._known.values()
        yield from self._numbered.values()

    def __bool__(self) -> bool:
        """Whether any is looked at now."""
        return bool(self._active)

    def insert(self, kind: BreakpointKind, address: int, length: int, pid: int, context: Context) -> None:
        """The client's; `context`: the thread in whose address space the address is meant."""
        key = kind, address, length, pid
        point = self._known.get(key)
        if point is None:
            _check(length)
            point = self._known[key] = Watchpoint(*key)
            self._breakpoints.settle(point, context)
            point.pieces = self._pieces(point, context)
        point.inserted = True
        self._select()

    def set_programs(self, kind: BreakpointKind, address: int, length: int, pid: int, programs: Programs) -> None:
        """Conditions and commands of one that is inserted."""
        self._known[kind, address, length, pid].programs = programs

    def remove(self, kind: BreakpointKind, address: int, length: int, pid: int) -> None:
        point = self._known.get((kind, address, length, pid))
        if point is not None:
            point.inserted = False
            self._select()
            self.guard()

    def add(self, kind: BreakpointKind, space: Space, address: int, length: int, pid: int, context: Context) -> Watchpoint:
        """A numbered one, of an inferior; its system-physical addresses are everybody's."""
        _check(length)
        point = Watchpoint(kind, address, length, pid, space=space, number=self._next)
        if space == Space.GVA:
            self._breakpoints.settle(point, context)
        point.pieces = self._pieces(point, context)
        if not point.pieces:
            raise TargetError(f"{space}:{address:#x} leads to no memory now; `monitor walk` shows why")
        self._numbered[self._next] = point
        self._next += 1
        self._select()
        self.guard()
        return point

    def delete(self, number: int) -> None:
        if self._numbered.pop(number, None) is None:
            raise TargetError(f"there is no watchpoint {number}; `monitor watch` lists them")
        self._select()
        self.guard()

    def forget_removed(self) -> None:
        """The machine continues without those that are not inserted: the client has deleted them."""
        if any(not point.inserted for point in self._known.values()):
            self._known = {key: point for key, point in self._known.items() if point.inserted}

    def forget(self, pid: int) -> None:
        """An inferior is gone."""
        self._known = {key: point for key, point in self._known.items() if point.pid != pid}
        gone = [n for n, point in self._numbered.items() if point.pid == pid and point.space != Space.SPA]
        for number in gone:
            del self._numbered[number]
        self._select()
        self.guard()

    def _select(self) -> None:
        self._active = [point for point in self if point.inserted]
        self._selected = True
        follows = any(point.space != Space.SPA for point in self._active)
        for cpu in self.machine.cpus:
            if follows != (cpu.debug.follower is not None):
                cpu.debug.follow(self._follow if follows else None)

    def renew(self) -> None:
        """Memory is as it was at another time: what is there now is what stores are to be compared with."""
        self._selected = True
        self.guard()

    # Where they are

    def guard(self) -> None:
        """Have the engine stop at accesses to exactly the pages that hold watched bytes now."""
        contexts: dict[int, Context | None] = {}
        moved = self._selected
        for point in self._active:
            if point.pid not in contexts:
                contexts[point.pid] = self._context_of(point.pid)
            pieces = self._pieces(point, contexts[point.pid])
            moved |= pieces != point.pieces
            point.pieces = pieces
        if moved or self.noted:  # else all is as it was when the machine stopped
            self._guard()
            self.noted.clear()

    def _guard(self) -> None:
        self._selected = False
        wanted: dict[int, int] = {}
        self._by_page = {}
        for point in self._active:
            point.value = self._value(point)
            for spa, _ in point.pieces:
                page = spa // PAGE
                wanted[page] = wanted.get(page, 0) | _FLAGS[point.kind]
                self._by_page.setdefault(page, []).append(point)
        if wanted == self._guarded:
            return
        physical = self.machine.engine.physical
        for page in self._guarded.keys() | wanted.keys():
            flags = wanted.get(page, 0)
            if self._guarded.get(page, 0) != flags:
                physical.watch(page, WATCH, False)
                if flags:
                    physical.watch(page, flags, True)
        self._guarded = wanted

    def _follow(self, cpu: Cpu) -> None:
        """Page tables may have changed: have the watchpoints of whom the CPU runs where they lead now."""
        assert isinstance(cpu, Processor)
        guest = cpu.guest
        self.remap(HOST if guest is None else self.machine.history.by_vmcb[guest.vmcb][0].number, LiveContext(cpu))

    def remap(self, pid: int, context: Context | None = None) -> None:
        """Follow an inferior's watched addresses to where its page tables map them now."""
        if context is None:
            context = self._context_of(pid)
        moved = False
        for point in self._active:
            if point.pid == pid and point.space != Space.SPA:
                pieces = self._pieces(point, context)
                moved |= pieces != point.pieces
                point.pieces = pieces
        if moved:
            self._guard()

    def _pieces(self, point: Watchpoint, context: Context | None) -> list[tuple[int, int]]:
        """Where its address space has the range: as that had it last, while `context` is in another one."""
        ram = self.machine.ram
        address, left = point.address, point.length
        if point.space == Space.SPA:
            return list(_by_pages(address, ram.extent(address, left)))
        if context is None:
            return []
        pieces: list[tuple[int, int]] = []
        rule, home = self._breakpoints.rule, point.home
        paging = context.paging()
        elsewhere = rule != Rule.ANY and home is not None and paging.root != home.root
        while left:
            size, page, spa = min(left, PAGE - address % PAGE), address // PAGE, None
            if point.space == Space.GPA:
                spa = locate_gpa(ram, context, address)
            elif not elsewhere:
                found = ram.memo.find(paging, address, context.nested())
                point.pages[page] = found.gpa & -PAGE if found is not None else None
                spa = found.spa if found is not None and ram.contains(found.spa) else None
            elif (gpa := point.pages.get(page)) is not None:
                spa = locate_gpa(ram, context, gpa + address % PAGE)
            if spa is not None:
                pieces.append((spa, size))
            address += size
            left -= size
        return pieces

    def _value(self, point: Watchpoint) -> bytes:
        view = self.machine.ram.view
        if len(point.pieces) == 1:
            (spa, size), = point.pieces
            return bytes(view[spa : spa + size])
        return b"".join([view[spa : spa + size] for spa, size in point.pieces])

    # Who touches them

    def _note(self, spa: int, length: int, write: bool) -> None:
        device = self.machine.ram.device
        self.noted.append(Touch(spa, length, not write, write, device or "the processor itself"))
        self.machine.cpu.pause = True

    def due(self) -> list[Fired]:
        """Those that what was noted since the last time has met."""
        noted, self.noted = self.noted, []
        return self._fired(noted)

    def execute(self, cpu: Processor) -> tuple[Event, list[Fired]]:
        """Execute the instruction that is about to access a watched page; what came of it, and what it fired."""
        machine = self.machine
        physical = machine.engine.physical
        touched = [
            Touch(spa, size, reads, writes)
            for address, size, reads, writes in accesses(cpu) if (spa := cpu.translate_quietly(address)) is not None
        ]  # fmt: skip
        lifted: dict[int, int] = {}
        event = Event.WATCHED
        while event == Event.WATCHED:
            stop = cpu.watched
            assert stop is not None
            assert stop.watched is not None
            page = stop.watched // PAGE
            if page in lifted:
                break
            if not any(t.spa <= stop.watched < t.spa + t.size for t in touched):
                touched.extend(_own(cpu, stop.watched, stop.write, touched))
            lifted[page] = physical.lift(page)
            event = machine.step(cpu)
        for page, flags in lifted.items():
            physical.watch(page, flags, True)
        touched += self.noted
        self.noted = []
        return event, self._fired(touched, lifted)

    def _fired(self, touched: list[Touch], pages: Iterable[int] = ()) -> list[Fired]:
        """Those on these pages that changed since the last look, or that `touched` accessed."""
        found: list[Fired] = []
        looked: set[int] = set()
        where = set(pages)
        for touch in touched:
            where.add(touch.spa // PAGE)
            where.add((touch.spa + touch.size - 1) // PAGE)
        for page in where:
            for point in self._by_page.get(page, ()):
                if id(point) not in looked:
                    looked.add(id(point))
                    fired = self._look(point, touched)
                    if fired is not None:
                        found.append(fired)
        return found

    def _look(self, point: Watchpoint, touched: list[Touch]) -> Fired | None:
        value = self._value(point)
        changed, point.value = value != point.value, value
        met: Touch | None = None  # the first of each
        stored: Touch | None = None
        loaded: Touch | None = None
        for touch in touched:
            if point.meets(touch.spa, touch.size):
                met = met or touch
                stored = stored or (touch if touch.writes else None)
                loaded = loaded or (touch if touch.reads else None)
        if point.kind != BreakpointKind.READ:
            every = point.number or point.kind == BreakpointKind.ACCESS
            if changed or (stored is not None and every):
                how = "written" if changed else "written with what was there"
                return Fired(point, how, stored.by if stored is not None else met.by if met is not None else "")
        if point.kind != BreakpointKind.WRITE and loaded is not None:
            return Fired(point, "read", loaded.by)
        return None


def _check(length: int) -> None:
    if not 1 <= length <= PAGE:
        raise TargetError(f"a watchpoint of {length} bytes is not possible; watch 1 to {PAGE} bytes")


def _by_pages(address: int, length: int) -> Iterator[tuple[int, int]]:
    while length:
        size = min(length, PAGE - address % PAGE)
        yield address, size
        address += size
        length -= size


def _own(cpu: Processor, spa: int, write: bool, operands: list[Touch]) -> Iterator[Touch]:
    """What the processor itself accesses for the instruction at RIP, of which `spa` has been seen: an entry of a page table
    on the way to what it accesses, or of a descriptor table.

    An entry's accessed and dirty bits are found by comparing.
    """
    linear = [(cpu.state.linear_rip, Access(execute=True)), *((address, Access()) for address, *_ in accesses(cpu))]
    for address, access in linear:
        for step in walk(cpu.ram, cpu.paging, address, access, cpu.nested).steps:
            if step.spa is not None and step.spa <= spa < step.spa + 8:
                yield Touch(int(step.spa), 8, True, False, f"the processor's walk of the page tables, for {address:#x}")
                return
    s = cpu.state
    for table, name in _TABLES.items():
        base = cpu.translate_quietly(s.base(table))
        if base is not None and base <= spa <= base + s.limit(table):
            yield Touch(spa, 8, not write, write, f"the processor's access to {name}")
            return
    yield Touch(spa, 1, not write, write, "the processor itself")
