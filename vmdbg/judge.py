"""Conditions and tracepoints in C (engine/judge.c): what it is told of a breakpoint, and what it has collected.

`agents.py` deals with a hit first, and then teaches it what a hit at this address, in this address space, means; from then on
such a hit needs no Python while it comes to nothing that Python must do.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

from gdbstub.agent import REG, Program
from gdbstub.description import Description
from gdbstub.trace import TIMESTAMP, Action, Memory, Registers, Trace, Tracepoint
from introspect.paging import ENTRY, Nested, PagingState
from vmdbg.contexts import NUMBERS, SEGMENTS, LiveContext
from vmdbg.engine import layout
from vmdbg.engine.errors import EngineError
from vmdbg.engine.physical import Shadow

if TYPE_CHECKING:
    from vmdbg.breakpoints import Breakpoint
    from vmdbg.cpu.processor import Processor
    from vmdbg.machine import Machine

native: ModuleType | None = None
if os.environ.get("VMDBG_JUDGE") != "python":  # as continuous integration has it once: the twin under all tests
    with suppress(ImportError):  # no compiler at installation
        native = import_module("vmdbg.engine._judge")

VIEWS, ACTIONS, WORDS, COUNTERS, VARIABLES, SOURCES, LAYOUTS, CPUS = 1024, 4096, 65536, 4096, 1024, 256, 16, 256
FRAMES = 1 << 20
"""Bytes of frames that are collected before they go into the trace's buffer."""
CONDITION, OWN_CONDITION, PASSED, TRACEPOINT = range(1, 5)
_FIELD, _LINEAR_RIP, _CR8, _ST, _FSTAT, _FTAG, _ZERO = range(1, 8)
_COLLECT_REGISTERS, _COLLECT_MEMORY, _COLLECT_PROGRAM = range(1, 4)
_GETV, _SETV, _TRACEV, _PRINTF = 0x2C, 0x2D, 0x2E, 0x34


class _Level(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_uint64) for name in ("shift", "mask", "leaf", "leaf_reserved", "table_reserved", "grants")
    )  # fmt: skip


class _Form(ctypes.Structure):
    _fields_ = (
        ("levels", ctypes.c_uint64), ("entry_size", ctypes.c_uint64), ("width", ctypes.c_uint64), ("base", ctypes.c_uint64),
        ("level", _Level * 5),
    )  # fmt: skip


class _Source(ctypes.Structure):
    _fields_ = (
        ("kind", ctypes.c_uint32), ("offset", ctypes.c_uint32), ("size", ctypes.c_uint32), ("width", ctypes.c_uint32),
        ("flip", ctypes.c_uint64),
    )  # fmt: skip


class _Layout(ctypes.Structure):
    _fields_ = (("count", ctypes.c_uint64), ("size", ctypes.c_uint64), ("source", _Source * SOURCES))


class _Action(ctypes.Structure):
    _fields_ = (
        ("kind", ctypes.c_uint32), ("code", ctypes.c_uint32), ("actions", ctypes.c_uint32), ("counter", ctypes.c_uint32),
        ("page", ctypes.c_uint64), ("number", ctypes.c_uint64), ("limit", ctypes.c_uint64),
    )  # fmt: skip


class _Space(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_uint64) for name in ("cr3", "ncr3", "needs")), ("guest", _Form), ("nested", _Form),
    )  # fmt: skip


class _View(ctypes.Structure):
    _fields_ = (
        ("address", ctypes.c_uint64), ("context", ctypes.c_void_p),
        *((name, ctypes.c_uint64) for name in ("nested_cr3", "cr0", "cr4", "efer", "pid")),
        ("space", _Space), ("first", ctypes.c_uint32), ("count", ctypes.c_uint32),
        ("layout", ctypes.c_uint32), ("pad", ctypes.c_uint32),
    )  # fmt: skip


class _Cpu(ctypes.Structure):
    _fields_ = (
        ("context", ctypes.c_void_p), ("v_intr", ctypes.c_void_p), ("cr8", ctypes.c_uint64), ("host_root", ctypes.c_uint64),
    )  # fmt: skip


class State(ctypes.Structure):
    _fields_ = (
        ("ram", ctypes.c_void_p), ("ranges", ctypes.c_uint64 * 4), ("scratch", ctypes.c_void_p), ("hits", ctypes.c_uint64),
        ("last_now", ctypes.c_uint64), ("last_address", ctypes.c_uint64), ("last_context", ctypes.c_void_p),
        ("wrote", ctypes.c_uint64), ("frames", ctypes.c_void_p), ("size", ctypes.c_uint64), ("used", ctypes.c_uint64),
        ("count", ctypes.c_uint64), ("cpu", _Cpu * CPUS), ("view", _View * VIEWS), ("action", _Action * ACTIONS),
        ("layout", _Layout * LAYOUTS), ("counter", ctypes.c_uint64 * COUNTERS), ("variable", ctypes.c_int64 * VARIABLES),
        ("next", ctypes.c_int64 * VARIABLES), ("words", ctypes.c_uint64 * WORDS),
    )  # fmt: skip


_AT = (
    layout.REGS, layout.EIP, layout.EFLAGS, layout.HFLAGS, layout.SEGMENTS, layout.CR, layout.EFER, layout.NESTED_CR3,
    layout.FPU,
)  # fmt: skip
"""As `at` of judge.c."""


@cache
def function() -> int:
    """Address of the extension's function, set up; 0 where it was not built."""
    if native is None:
        return 0
    found = native.symbols((ctypes.c_uint32 * len(_AT))(*_AT))
    if found["size"] != ctypes.sizeof(State):
        raise EngineError("the native evaluation was built for another version of vmdbg. Remedy: pip install .")
    return int(found["judge"])


class _No(Exception):
    """This is Python's: it has an instruction or a register that C does not, or there is no room."""


@dataclass(frozen=True)
class Condition:
    """What is evaluated at a hit of a breakpoint, for `Judge.teach`.

    `page`: the guest-physical page to which the address must lead for the breakpoint to be one of this address space; None if
    it is in any case.  `own` false: it never is.  Where it is not its passes are counted; Python sees the first one.
    """

    point: Breakpoint
    page: int | None = None
    own: bool = True


class Judge:
    """The native evaluation of one machine; an `engine.Judge`."""

    def __init__(self, machine: Machine, trace: Trace) -> None:
        self.enabled = True
        """No thread steps: C may deal with breakpoints."""
        self._machine = machine
        self._trace = trace
        self.state = state = State()
        self._address = ctypes.addressof(state)
        ram, engine = machine.ram, machine.engine
        state.ram = ram.address
        for index, bound in enumerate(bound for pair in ram.ranges for bound in pair):
            state.ranges[index] = bound
        self._scratch = engine.state()
        state.scratch = self._scratch.address
        self._frames = ctypes.create_string_buffer(FRAMES)
        state.frames = ctypes.addressof(self._frames)
        self._v_intr = (ctypes.c_uint64 * CPUS)()
        for index, cpu in enumerate(machine.cpus):
            own = state.cpu[index]
            own.context, own.host_root = cpu.state.address, engine.physical.host.root
            own.v_intr = ctypes.addressof(self._v_intr) + 8 * index
            if cpu.switcher is not None:
                own.v_intr = ctypes.addressof(cpu.switcher.state) + type(cpu.switcher.state).v_intr.offset
        self._version = -1
        self._known: dict[tuple[int, ...], int] = {}
        """Views by what finds them."""
        self._programs: dict[bytes, int] = {}
        self._layouts: dict[int, int] = {}
        self._points: dict[Tracepoint, int] = {}
        self._passes: dict[int, Breakpoint] = {}
        self._variables: dict[int, int] = {}
        self.available = bool(function()) and engine.binding.name == "native" and len(machine.cpus) <= CPUS
        if self.available:
            engine.rt.on_break = function()
            engine.judge = self
            before = engine.physical.on_unfit

            def unfit(root: int) -> None:
                before(root)
                self.forget()

            engine.physical.on_unfit = unfit
        self.clear()

    @property
    def hits(self) -> int:
        """Hits dealt with in C, ever."""
        return int(self.state.hits)

    def prepare(self, cpu: Processor) -> int:
        """See `engine.Judge`.  Only CPUs whose context says in which address space they are can do without Python."""
        guest = cpu.guest
        if not self.enabled or not self._known or cpu.tlb is not None or cpu.state.root is not None or cpu.ne_is_ours:
            return 0
        if guest is not None and (not guest.np or guest.avic is not None):
            return 0
        if self._version != self._machine.history.version:
            self.forget()
            return 0
        own = self.state.cpu[cpu.index]
        own.cr8 = cpu.lapic.cr8
        if guest is not None:
            self._v_intr[cpu.index] = guest.v_intr & ~0xFF | guest.v_tpr & 0xFF
        return self._address

    # What Python learns of C

    def seen(self, cpu: Processor, address: int) -> bool:
        """Whether C has dealt with the instruction that is about to execute."""
        state = self.state
        here = self._machine.clock.now, address, cpu.state.address
        return here == (state.last_now, state.last_address, state.last_context)

    def flush(self) -> None:
        """Bring what was collected and counted to where Python has it."""
        state = self.state
        if state.count:
            self._trace.buffer.extend(ctypes.string_at(state.frames, state.used), state.count)
            state.count = state.used = 0
            self._limit()
        for traced, index in self._points.items():
            traced.hits, traced.usage = state.counter[index], state.counter[index + 1]
        for index, point in self._passes.items():
            if state.counter[index] > 1:
                point.passes += state.counter[index] - 1
                state.counter[index] = 1
        if state.wrote:
            state.wrote = 0
            for number, index in self._variables.items():
                self._trace.set_value(number, state.variable[index] & 0xFFFFFFFFFFFFFFFF)

    def clear(self) -> None:
        """Forget all that was taught, and what `flush` has not fetched."""
        state = self.state
        for index in self._known.values():
            state.view[index].context = None
        state.count = state.used = state.wrote = 0
        self._known.clear()
        self._actions = self._counters = 0
        self._words = 1
        self._programs.clear()
        self._layouts.clear()
        self._points.clear()
        self._passes.clear()

    def forget(self) -> None:
        """What was taught may be otherwise now."""
        if self._known:
            self.flush()
            self.clear()

    # What C learns of Python

    def teach(
        self, cpu: Processor, pid: int, address: int, description: Description, conditions: Sequence[Condition],
        points: Sequence[Tracepoint],
    ) -> None:  # fmt: skip
        """What a hit at an address means in the address space that a CPU is in now.  Nothing, if C cannot deal with it."""
        if not self.available or not self.enabled or cpu.tlb is not None or cpu.state.root is not None or cpu.ne_is_ours:
            return
        if cpu.guest is not None and not isinstance(cpu.npt, Shadow):
            return
        if not self._known:
            self._version = self._machine.history.version
            self._variables = {number: at for at, number in enumerate(self._trace.variables) if number != TIMESTAMP}
        self.refresh()
        paging, nested = cpu.paging, cpu.nested
        if paging.pdptes is not None or (nested is not None and nested.apic is not None):
            return
        try:
            self._teach(cpu, pid, address, description, conditions, points, paging, nested)
        except _No:
            pass
        except _NoRoom:
            self.forget()

    def refresh(self) -> None:
        """Python has dealt with a hit: counters and variables, and the room for frames, may be others now."""
        state, trace = self.state, self._trace
        for traced, index in self._points.items():
            state.counter[index], state.counter[index + 1] = traced.hits, traced.usage
        for index, point in self._passes.items():
            state.counter[index] = bool(point.passes)
        for number, index in self._variables.items():
            value = trace.value(number)
            state.variable[index] = value - (1 << 64) if value >> 63 else value
        self._limit()

    def _limit(self) -> None:
        """C collects no more than the trace's buffer has room for."""
        buffer = self._trace.buffer
        self.state.size = min(FRAMES, buffer.size if buffer.circular else buffer.free)

    def _teach(
        self, cpu: Processor, pid: int, address: int, description: Description, conditions: Sequence[Condition],
        points: Sequence[Tracepoint], paging: PagingState, nested: Nested | None,
    ) -> None:  # fmt: skip
        state, q = self.state, cpu.state.q
        cr, root = [q[layout.CR // 8 + n] for n in range(5)], q[layout.NESTED_CR3 // 8]
        key = address, cpu.index, root, cr[0], cr[3], cr[4], cpu.state.efer
        if key in self._known:
            return
        sources = self._layout(cpu, pid, description)
        if sum(len(condition.point.programs.conditions) for condition in conditions) + len(conditions) + len(points) > 64:
            raise _No
        first = self._actions
        for point in points:  # first, as Python does
            self._point(point, description)
        for condition in conditions:
            self._condition(condition, description)
        assert native is not None
        index = native.slot(self._address, address, cr[3], root)
        if index is None:
            raise _NoRoom
        view = state.view[index]
        view.address, view.nested_cr3, view.pid = address, root, pid
        view.cr0, view.cr4, view.efer = cr[0], cr[4], cpu.state.efer
        set_space(view.space, cr[3], paging, nested)
        view.first, view.count, view.layout = first, self._actions - first, sources
        view.context = cpu.state.address
        self._known[key] = index

    def _action(self, kind: int) -> _Action:
        if self._actions == ACTIONS:
            raise _NoRoom
        action: _Action = self.state.action[self._actions]
        self._actions += 1
        action.kind, action.code, action.actions, action.counter = kind, 0, 0, 0
        action.page = action.number = action.limit = 0
        return action

    def _counter(self, values: Sequence[int]) -> int:
        """The first of some new counters."""
        if self._counters + len(values) > COUNTERS:
            raise _NoRoom
        index, self._counters = self._counters, self._counters + len(values)
        self.state.counter[index : self._counters] = values
        return index

    def _condition(self, condition: Condition, description: Description) -> None:
        point = condition.point
        if not condition.own:
            self._passing(self._action(PASSED), point)
            return
        for number, program in enumerate(point.programs.conditions):
            code = self._program(program, description)
            action = self._action(CONDITION if condition.page is None else OWN_CONDITION)
            action.code, action.page = code, condition.page or 0
            if condition.page is not None and number == 0:
                self._passing(action, point)
            elif condition.page is not None:  # counted with the first one
                action.counter = self._counter([1])

    def _passing(self, action: _Action, point: Breakpoint) -> None:
        action.counter = self._counter([bool(point.passes)])
        self._passes[action.counter] = point

    def _point(self, point: Tracepoint, description: Description) -> None:
        if point.steps:
            raise _No
        code = self._program(point.condition, description) if point.condition is not None else 0
        actions = self._collection(point.actions, description)
        if point not in self._points:
            self._points[point] = self._counter([point.hits, point.usage])
        action = self._action(TRACEPOINT)
        action.code, action.actions, action.counter = code, actions, self._points[point]
        action.number, action.limit = point.number, point.passes

    def _collection(self, actions: Sequence[Action], description: Description) -> int:
        words = [len(actions)]
        for action in actions:
            if isinstance(action, Registers):
                if action.mask >> description.block_count:
                    raise _No
                words += [_COLLECT_REGISTERS, 0, 0]
            elif isinstance(action, Memory):
                if action.base is not None:
                    raise _No
                words += [_COLLECT_MEMORY, action.offset, action.length]
            else:
                words += [_COLLECT_PROGRAM, self._program(action, description), 0]
        return self._put(words)

    def _put(self, words: Sequence[int]) -> int:
        start = self._words
        if start + len(words) > WORDS:
            raise _NoRoom
        self.state.words[start : start + len(words)] = words
        self._words += len(words)
        return start

    def _program(self, program: Program, description: Description) -> int:
        known = self._programs.get(program.code)
        if known is None:
            words: list[int] = []
            for op, operand, _ in program.instructions:
                words += [op, self._operand(op, operand, description)]
            known = self._programs[program.code] = self._put(words)
        return known

    def _operand(self, op: int, operand: int, description: Description) -> int:
        if op == _PRINTF or (op == REG and operand >= description.block_count):
            raise _No
        if op not in (_GETV, _SETV, _TRACEV):
            return operand
        index = 0 if operand == TIMESTAMP else self._variables.get(operand)
        if index is None:
            raise _No
        return index << 32 | operand if op == _TRACEV else index

    def _layout(self, cpu: Processor, pid: int, description: Description) -> int:
        index = self._layouts.get(pid)
        if index is None:
            if len(self._layouts) == LAYOUTS or description.block_count > SOURCES:
                raise _NoRoom
            index = self._layouts[pid] = len(self._layouts)
            sources = self.state.layout[index]
            sources.count, sources.size = description.block_count, description.block_size
            for number, register in enumerate(description.registers[: description.block_count]):
                kind, offset, width = _source(register.name)
                size = register.bits // 8
                flip = (LiveContext(cpu).read("cr0") or 0) ^ cpu.state.cr(0) if register.name == "cr0" else 0
                sources.source[number] = _Source(kind, offset, size, min(width, size) if width else size, flip)
            self._trace.layouts[pid] = description
        return index


class _NoRoom(Exception):
    """All is to be forgotten and learned anew."""


def set_space(space: _Space, cr3: int, paging: PagingState, nested: Nested | None) -> None:
    """An address space, for C."""
    space.cr3, space.ncr3 = cr3, nested.ncr3 if nested is not None else 0
    space.needs = 0 if nested is not None and nested.gmet else ENTRY.U
    _set_form(space.guest, paging)
    _set_form(space.nested, nested)


def _set_form(form: _Form, of: PagingState | Nested | None) -> None:
    """introspect's table of a paging mode."""
    found = of.format if of is not None else None
    form.levels = 0 if found is None else len(found.levels)
    if found is None:
        return
    form.entry_size, form.width, form.base = found.entry_size, found.width, found.base
    for own, level in zip(form.level, found.levels, strict=False):
        own.shift, own.mask, own.leaf = level.shift, level.mask, level.leaf
        own.leaf_reserved, own.table_reserved, own.grants = level.leaf_reserved, level.table_reserved, level.grants


_PLACES = {
    "eflags": layout.EFLAGS, "fs_base": layout.SEGMENTS + 4 * 24 + 8, "gs_base": layout.SEGMENTS + 5 * 24 + 8,
    "k_gs_base": layout.KERNEL_GS_BASE, "efer": layout.EFER,
    **{f"cr{n}": layout.CR + 8 * n for n in (0, 2, 3, 4)},
    **{name: layout.REGS + 8 * number for name, number in NUMBERS.items()},
}  # fmt: skip


def _source(name: str) -> tuple[int, int, int]:
    """Kind, offset and bytes (0: as many as the register has) of a register; what `LiveContext.read` gives of it."""
    if name in ("rip", "eip"):
        return _LINEAR_RIP, 0, 8
    if name in _PLACES:
        return _FIELD, _PLACES[name], 8
    if name in SEGMENTS:
        return _FIELD, layout.SEGMENTS + 24 * SEGMENTS[name], 2
    if name.startswith("xmm"):
        return _FIELD, layout.XMM + 64 * int(name[3:]), 0
    if name.startswith("st") and name[2:].isdecimal():
        return _ST, int(name[2:]), 0
    found = {
        "cr8": (_CR8, 0, 8), "mxcsr": (_FIELD, layout.MXCSR, 4), "fctrl": (_FIELD, layout.FPU + 10, 2), "fstat": (_FSTAT, 0, 2),
        "ftag": (_FTAG, 0, 2), **dict.fromkeys(("fiseg", "fioff", "foseg", "fooff", "fop"), (_ZERO, 0, 8)),
    }.get(name)  # fmt: skip
    if found is None:
        raise _No
    return found
