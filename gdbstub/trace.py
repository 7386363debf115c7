"""A trace: its tracepoints, trace state variables and buffer, and what is collected at a hit (GDB manual, chapter 13).

It belongs to the target, since it outlives clients.  `commands/tracepoints.py` are the packets that define and read it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from gdbstub.agent import AgentError, Program
from gdbstub.description import Description
from gdbstub.frames import LONGEST_BLOCK, Buffer, Frame, Writer
from gdbstub.hits import ThreadEnvironment
from gdbstub.target import Target, TargetError, ThreadId

__all__ = ["TIMESTAMP", "Action", "Frame", "Memory", "Registers", "Trace", "Tracepoint", "Variable"]

TIMESTAMP = 1
"""Number of $trace_timestamp, which the target's clock has."""
MOST = 1000
"""Tracepoints and variables, each."""
_M = (1 << 64) - 1


class Registers(NamedTuple):
    """Collect registers, those whose bits are set; the whole register block comes along."""

    mask: int


class Memory(NamedTuple):
    """Collect a range at a register's value, or at an address if `base` is None."""

    base: int | None
    offset: int
    length: int


Action = Registers | Memory | Program


@dataclass(eq=False, slots=True)
class Tracepoint:
    """One location of one of the client's tracepoints, in one inferior."""

    number: int
    address: int
    pid: int
    enabled: bool
    steps: int
    """How many instructions behind a hit are collected, too."""
    passes: int
    """The trace stops with this hit; 0: with none."""
    condition: Program | None = None
    actions: list[Action] = field(default_factory=list)
    step_actions: list[Action] = field(default_factory=list)
    texts: list[tuple[bool, bytes]] = field(default_factory=list)
    """The actions as the client sent them, and whether for steps: it may ask for them."""
    sources: list[tuple[str, str]] = field(default_factory=list)
    """What the user typed: kind and text."""
    hits: int = 0
    usage: int = 0
    """Bytes of its frames."""


@dataclass(eq=False, slots=True)
class Variable:
    """A trace state variable; values are of 64 bits."""

    name: str
    initial: int = 0
    value: int = 0
    builtin: bool = False


class Trace:
    """The one trace of a target.  `clock` gives the target's own time, for $trace_timestamp; of its units there are `rate` in a
    microsecond, which is what the client's status speaks of."""

    def __init__(self, target: Target, clock: Callable[[], int], rate: int = 1) -> None:
        self.target = target
        self.clock = clock
        self.rate = rate
        self.buffer = Buffer()
        self.disconnected = False
        """Go on while no client is connected."""
        self.user = self.notes = self.stop_note = ""
        self.running = False
        self.clear()

    def clear(self) -> None:
        """Forget everything; the buffer keeps its size."""
        self.running = False
        self.reason, self.stopping, self.error = "tnotrun", 0, ""
        """Why it stopped, in the protocol's words; the tracepoint that made it stop; what was wrong there."""
        self.started = self.ended = 0
        """By the clock; 0: not yet."""
        self.points: dict[tuple[int, int], Tracepoint] = {}
        """By number and address."""
        self.incomplete: Tracepoint | None = None
        """The one whose actions are still to come: it does not collect yet."""
        self.variables = {TIMESTAMP: Variable("trace_timestamp", builtin=True)}
        self.read_only: list[tuple[int, int]] = []
        """Ranges (start, end) that do not change: they may be read from memory while a frame is looked at."""
        self.stepping: dict[ThreadId, list[tuple[Tracepoint, int]]] = {}
        """Threads that collect at each step: for which tracepoints, and how many steps are done."""
        self.layouts: dict[int, Description] = {}
        """What the register blocks of an inferior's frames are; it may be gone by the time they are read."""
        self.buffer.clear()

    # What runs

    @property
    def armed(self) -> set[tuple[int, int]]:
        """(pid, address) of what is collected at now."""
        return {(point.pid, point.address) for point in self._collecting()}

    def _collecting(self) -> Iterator[Tracepoint]:
        if self.running:
            yield from (p for p in self.points.values() if p.enabled and p is not self.incomplete)

    def at(self, pid: int, address: int) -> list[Tracepoint]:
        """The tracepoints that collect where a thread is, in the order of their definition."""
        return [point for point in self._collecting() if point.address == address and point.pid == pid]

    def start(self) -> None:
        """Run, with counters at zero and no frames."""
        self.buffer.clear()
        self.stepping.clear()
        for point in self.points.values():
            point.hits = point.usage = 0
        self.running = True
        self.reason, self.stopping, self.error, self.stop_note = "tnotrun", 0, "", ""
        self.started, self.ended = max(self.clock(), 1), 0

    def stop(self, reason: str = "tstop", point: Tracepoint | None = None, error: str = "") -> None:
        """Stop; `reason` is tstop, tfull, tpasscount, terror or tdisconnected."""
        if self.running:
            self.running = False
            self.reason, self.stopping, self.error = reason, point.number if point else 0, error
            self.ended = self.clock()
            self.stepping.clear()

    def leave(self) -> bool:
        """The client is gone: stop, unless the trace is to go on without it.  Whether it goes on."""
        if not self.disconnected:
            self.stop("tdisconnected")
        return self.running

    # Trace state variables

    def value(self, number: int) -> int:
        """A variable's value; 0 for one that does not exist."""
        if number == TIMESTAMP:
            return self.clock()
        variable = self.variables.get(number)
        return variable.value if variable is not None else 0

    def set_value(self, number: int, value: int) -> None:
        """Nothing happens for one that does not exist, or is the target's."""
        variable = self.variables.get(number)
        if variable is not None and not variable.builtin:
            variable.value = value

    # Hits

    def reached(self, thread: ThreadId, address: int) -> None:
        """A thread is about to execute at an address: collect what is to be collected there."""
        for point in self.at(thread.pid, address):
            environment = ThreadEnvironment(self.target, thread, _silent)
            try:
                if point.condition is not None and not point.condition(environment):
                    continue
            except TargetError as error:
                self.stop("terror", point, f"the condition: {error}")
                return
            point.hits += 1
            self._collect(thread, point, point.actions, 0)
            if not self.running:
                return
            if point.steps:
                self.stepping.setdefault(thread, []).append((point, 0))
            elif point.passes and point.hits >= point.passes:
                self.stop("tpasscount", point)
                return

    def stepped(self, thread: ThreadId) -> None:
        """A thread of `stepping` has executed an instruction."""
        remaining = []
        for point, done in self.stepping.pop(thread, []):
            self._collect(thread, point, point.step_actions, done + 1)
            if not self.running:
                return
            if done + 1 < point.steps:
                remaining.append((point, done + 1))
            elif point.passes and point.hits >= point.passes:
                self.stop("tpasscount", point)
                return
        if remaining:
            self.stepping[thread] = remaining

    def _collect(self, thread: ThreadId, point: Tracepoint, actions: list[Action], step: int) -> None:
        collector = Collector(self, thread, point.number, step)
        try:
            for action in actions:
                collector.act(action)
        except _Full:
            self.stop("tfull")
            return
        except TargetError as error:
            self.stop("terror", point, str(error))
            return
        frame = collector.writer.done()
        if self.buffer.add(frame):
            point.usage += len(frame)
        else:
            self.stop("tfull")

    # Frames

    def find(self, after: int, wanted: Callable[[Frame], bool]) -> Frame | None:
        """The first wanted frame behind another."""
        frames = (self.buffer[index] for index in range(after + 1, len(self.buffer)))
        return next((frame for frame in frames if wanted(frame)), None)

    def pc(self, frame: Frame) -> int:
        """The address a frame was collected at: of its tracepoint, if its registers were not collected."""
        description = self.layouts.get(frame.pid)
        if description is not None and frame.registers is not None:
            value = frame.register(description, description.numbers[description.pc])
            return int.from_bytes(value or b"", "little")
        return next((p.address for p in self.points.values() if p.number == frame.tracepoint), 0)

    def register(self, frame: Frame, description: Description, number: int) -> bytes | None:
        """A register of a frame, as an inferior with this description has it; None if it was not collected.  The pc is known
        even then."""
        layout = self.layouts.get(frame.pid)
        value = frame.register(description, number) if layout is not None and description.alike(layout) else None
        if value is None and number == description.numbers[description.pc]:
            size = description.size(number)
            value = (self.pc(frame) & (1 << 8 * size) - 1).to_bytes(size, "little")
        return value

    def export(self, whole: bool) -> Iterator[bytes]:
        """The frames as GDB's trace files have them: a register block is what `g` gives, or if `whole` all registers."""
        for frame in self.buffer:
            blocks = [b"R" + self._block(frame, whole)] if frame.registers is not None else []
            for address, data in frame.blocks:
                blocks.append(b"M" + address.to_bytes(8, "little") + len(data).to_bytes(2, "little") + data)
            for number, value in frame.variables.items():
                blocks.append(b"V" + number.to_bytes(4, "little") + value.to_bytes(8, "little"))
            data = b"".join(blocks)
            yield frame.tracepoint.to_bytes(2, "little") + len(data).to_bytes(4, "little") + data

    def _block(self, frame: Frame, whole: bool) -> bytes:
        block, description = frame.registers or b"", self.layouts[frame.pid]
        if whole:
            for number in range(description.block_count, len(description.registers)):
                block += frame.others.get(number, bytes(description.size(number)))
        return block


def _silent(text: str) -> None:
    """A tracepoint's expressions print nothing."""


class _Full(Exception):
    """The frame is larger than the buffer."""


class Collector(ThreadEnvironment):
    """Evaluates a tracepoint's actions into one frame."""

    def __init__(self, trace: Trace, thread: ThreadId, number: int, step: int) -> None:
        super().__init__(trace.target, thread, _silent)
        self.writer = Writer(number, step, thread.pid)
        self._variables = trace
        self._limit = trace.buffer.size

    def act(self, action: Action) -> None:
        """One action.  TargetError if an expression cannot be evaluated."""
        if isinstance(action, Registers):
            self._registers(action.mask)
        elif isinstance(action, Memory):
            base = 0 if action.base is None else self.register(action.base)
            self.trace(base + action.offset & _M, action.length)
        else:
            action(self)

    def _registers(self, mask: int) -> None:
        self.writer.registers(self.target.read_registers(self.thread))
        description = self._variables.layouts[self.thread.pid] = self.target.description(self.thread.pid)
        for number in range(description.block_count, len(description.registers)):
            if mask >> number & 1:
                value = self.target.read_register(self.thread, number)
                if value is not None:
                    self.writer.register(number, value)

    def trace(self, address: int, length: int) -> None:
        """The readable prefix; the rest is then unavailable."""
        while length > 0:
            size = min(length, LONGEST_BLOCK)
            data = self.memory(address, size)
            if data:
                self._memory(address, data)
            if len(data) < size:
                break
            address, length = address + size, length - size

    def trace_string(self, address: int, length: int) -> None:
        """A page at a time, since it may end where memory does."""
        while length > 0:
            size = min(length, 4096 - address % 4096)
            data = self.memory(address, size)
            text, end, _ = data.partition(b"\0")
            if data:
                self._memory(address, text + end)
            if end or len(data) < size:
                break
            address, length = address + size, length - size

    def _memory(self, address: int, data: bytes) -> None:
        self.writer.memory(address, data)
        if self.writer.size > self._limit:
            raise _Full

    def trace_variable(self, number: int) -> None:
        self.writer.variable(number, self._variables.value(number))
        if self.writer.size > self._limit:
            raise _Full

    def register(self, number: int) -> int:
        if number < 0:
            raise AgentError("there is no such register")
        return super().register(number)
