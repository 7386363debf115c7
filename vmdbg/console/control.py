"""Running and stopping for the console: its breakpoints, and what is to be reached before it stops again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from gdbstub.target import (
    CONTINUE,
    STEP,
    BreakpointKind,
    Created,
    Exited,
    Output,
    Reason,
    Signal,
    Stop,
    TargetError,
    ThreadId,
)  # fmt: skip
from introspect.commands import CommandError
from introspect.disassembly import MAX_INSTRUCTION, Instruction, instructions
from introspect.execution import execution_mode, linear_pc, linear_sp
from vmdbg.console.driver import Driver
from vmdbg.history import HOST

__all__ = ["Control", "Goal", "Point", "Report"]

KIND = BreakpointKind.SOFTWARE
_PATIENCE = 10_000
"""Instructions of no line that a step by lines goes through at most."""
_STEPPED_OVER = ("call", "lcall", "rep")
"""Mnemonics of what `next` takes for one step: the function, and all of a repeated string instruction."""


@dataclass(slots=True, eq=False)
class Point:
    """A breakpoint of the console's. `number` 0 is one that serves a step, and nobody sees."""

    number: int
    pid: int
    address: int | None
    """None while what it was set on does not exist yet."""
    text: str
    """The address as it was written."""
    condition: str = ""
    once: bool = False
    enabled: bool = True
    hits: int = 0
    above: int | None = None
    """It counts only with the stack pointer above this: the frame of a step's."""
    thread: ThreadId | None = None
    """Whose alone it is."""
    inserted: bool = field(default=False, repr=False)

    def words(self) -> str:
        what = "Temporary breakpoint" if self.once else "Breakpoint"
        return f"{what} {self.number}" + (f" if {self.condition}" if self.condition else "")


@dataclass(frozen=True, slots=True)
class Goal:
    """What was asked for: to continue, or to make some steps of a thread, over calls or into them."""

    kind: str = "continue"
    thread: ThreadId | None = None
    count: int = 0
    lines: bool = False
    """A step is all instructions of a line of the source, where that is known."""


@dataclass(frozen=True, slots=True)
class Report:
    """Something to tell: a stop, with the thread to look at, or (`thread` None) a line while it goes on."""

    text: str
    thread: ThreadId | None = None
    points: tuple[Point, ...] = ()
    """Breakpoints that it stopped for, whose condition held."""


class Control:
    """One machine that the console runs. Nothing here waits: `advance` makes a slice of it, and yields what is to be told."""

    def __init__(self, driver: Driver, holds: Callable[[Point, ThreadId], bool]) -> None:
        """`holds` evaluates a breakpoint's condition where a thread has stopped. It may raise `CommandError`."""
        self.driver = driver
        self.holds = holds
        self.resolve: Callable[[Point], None] = lambda point: None
        """Find the address of a breakpoint that waits for its inferior, if that is there now."""
        self.line_of: Callable[[ThreadId], str] = lambda thread: ""
        """The line of the source where a thread is; empty where that is not known."""
        self.by_lines = False
        """What `step` and `next` mean."""
        self.points: dict[int, Point] = {}
        self._helpers: list[Point] = []
        self._next = 1
        self.selected = ThreadId(HOST, 1)
        self.running = False
        self.last_stop: Stop | None = None
        self._goal = Goal()
        self._left = 0
        self._line, self._unknown = "", 0
        """Where the step began, by lines; and how many instructions of no line there were."""
        self._limited = False
        self._over: ThreadId | None = None
        """The thread that is just stepped off a breakpoint."""

    # Breakpoints

    def add(self, point: Point) -> Point:
        if point.number == 0 and not point.once:
            point.number, self._next = self._next, self._next + 1
            self.points[point.number] = point
        self._insert(point)
        return point

    def numbered(self) -> int:
        """The next breakpoint's."""
        number, self._next = self._next, self._next + 1
        return number

    def _insert(self, point: Point) -> None:
        if point.address is None or point.inserted or not point.enabled or self.driver.holder or self.driver.ended:
            return
        if not self._shared(point):
            thread = self.selected if self.selected.pid == point.pid else self._first(point.pid)
            self.driver.insert(KIND, point.address, 1, point.thread or thread)
        point.inserted = True
        self._judge(point)

    def _take_out(self, point: Point) -> None:
        if not point.inserted:
            return
        point.inserted = False
        if point.address is not None and not self._shared(point) and any(i.pid == point.pid for i in self.driver.inferiors()):
            self.driver.remove(KIND, point.address, 1, point.pid)
        else:
            self._judge(point)

    def _judge(self, point: Point) -> None:
        """Tell the driver the conditions at a place, if there are no others than such."""
        here = [one for one in (*self.points.values(), *self._helpers)
                if one.inserted and (one.pid, one.address) == (point.pid, point.address)]  # fmt: skip
        if here and point.address is not None and any(one.pid == point.pid for one in self.driver.inferiors()):
            plain = any(not one.condition for one in here)
            self.driver.judge(point.address, point.pid, [] if plain else [one.condition for one in here])

    def _shared(self, point: Point) -> bool:
        """Whether another one is inserted at the same place: the target has one of each."""
        return any(other is not point and other.inserted and (other.pid, other.address) == (point.pid, point.address)
                   for other in (*self.points.values(), *self._helpers))  # fmt: skip

    def delete(self, point: Point) -> None:
        self._take_out(point)
        self.points.pop(point.number, None)

    def enable(self, point: Point, on: bool) -> None:
        point.enabled = on
        if on:
            self._insert(point)
        else:
            self._take_out(point)

    def release(self) -> None:
        """Somebody else takes the machine over: nothing of the console's is left in it."""
        if self.running:
            self._halt()
        self._drop_helpers()
        for point in self.points.values():
            self._take_out(point)

    def take_back(self) -> None:
        """The machine is the console's again."""
        for point in self.points.values():
            self._insert(point)

    @contextmanager
    def restoring(self) -> Iterator[None]:
        """The machine becomes what it was at another time.  Breakpoints of guests that are not there then wait for them."""
        self.release()
        yield
        self.last_stop = None
        alive = {inferior.pid for inferior in self.driver.inferiors()}
        for point in self.points.values():
            if point.pid != HOST:
                point.address = None
                self.resolve(point)
        self.take_back()
        if self.selected.pid not in alive:
            self.selected = ThreadId(HOST, 1)

    # Running

    def _first(self, pid: int) -> ThreadId:
        return ThreadId(pid, self.driver.threads(pid)[0].tid)

    def pc(self, thread: ThreadId) -> int | None:
        return self.driver.pc(thread)

    def _check(self, what: str) -> None:
        self.driver.claim()
        if self.driver.holder:
            raise CommandError(
                what, f"{self.driver.holder} holds the machine", "use its commands, or disconnect it; reading works"
            )
        if self.running:
            raise CommandError(what, "it runs already", "^C, or `interrupt`, stops it")
        if self.driver.ended:
            raise CommandError(what, f"there is nothing to run: {self.driver.ended}", "`restart` starts over")

    def go(self, goal: Goal, limit: int | None = None) -> None:
        """Begin.  `limit`: ticks to run at most.  CommandError if it cannot."""
        self._check(goal.kind)
        self._drop_helpers()
        if self.selected not in self._threads():
            self.selected = self._first(HOST)
        self._goal, self._left = goal, goal.count
        self._line = self.line_of(goal.thread) if goal.lines and goal.thread is not None else ""
        self._limit(limit)
        self.take_back()
        try:
            self._begin()
        except TargetError:
            self.running = False
            raise

    def _limit(self, ticks: int | None) -> None:
        """What the user has set with `stop-at` stays."""
        if ticks is not None or self._limited:
            self.driver.stop_at(self.driver.now + ticks if ticks is not None else None)
        self._limited = ticks is not None

    def reach(self, point: Point, what: str) -> None:
        """Continue to a place that serves this alone."""
        self._check(what)
        self._drop_helpers()
        self._goal, self._left = Goal("continue"), 0
        self._limit(None)
        self.take_back()
        self._help(point)
        self._begin()

    def _help(self, point: Point) -> None:
        self._helpers.append(point)
        self._insert(point)

    def _drop_helpers(self) -> None:
        for point in self._helpers:
            self._take_out(point)
        self._helpers = []

    def _begin(self) -> None:
        self.running, goal = True, self._goal
        if goal.kind == "next" and goal.thread is not None:
            self._begin_next(goal.thread)
        elif goal.kind == "step" and goal.thread is not None:
            self._step(goal.thread)
        else:
            self._continue()

    def _begin_next(self, thread: ThreadId) -> None:
        here = self.instruction(thread)
        if here is None or not here.mnemonic.startswith(_STEPPED_OVER):
            self._step(thread)
            return
        stack = linear_sp(self.driver.registers(thread))
        above = stack - 1 if stack else None
        self._help(Point(0, thread.pid, here.address + len(here.code), "", once=True, above=above, thread=thread))
        self._continue()

    def instruction(self, thread: ThreadId) -> Instruction | None:
        """The one that a thread executes next."""
        registers = self.driver.registers(thread)
        pc = linear_pc(registers)
        if pc is None:
            return None
        code, bits = self.driver.read(thread, pc, MAX_INSTRUCTION), execution_mode(registers).code_bits
        return next(instructions(code, pc, bits, 1, registers.get("cs.base", 0)), None)

    def _threads(self) -> list[ThreadId]:
        return [ThreadId(one.pid, thread.tid) for one in self.driver.inferiors() for thread in self.driver.threads(one.pid)]

    def _step(self, thread: ThreadId) -> None:
        """One step of a thread, off its breakpoint if there is one."""
        here = self._standing_on(thread)
        for point in here:
            self._take_out(point)
        self._over = thread if here else None
        self.driver.resume({thread: STEP} if here else {one: STEP if one == thread else CONTINUE for one in self._threads()})

    def _standing_on(self, thread: ThreadId) -> list[Point]:
        points = [point for point in (*self.points.values(), *self._helpers) if point.inserted and point.pid == thread.pid]
        pc = self.pc(thread) if points else None
        return [point for point in points if point.address == pc]

    def _continue(self) -> None:
        stopped = self.last_stop.thread if self.last_stop is not None else self.selected
        for thread in dict.fromkeys((stopped, self.selected)):
            if thread in self._threads() and self._standing_on(thread):
                self._step(thread)
                return
        self._over = None
        self.driver.resume(dict.fromkeys(self._threads(), CONTINUE))

    def interrupt(self) -> Iterator[Report]:
        """^C."""
        if self.running:
            yield self._stop(Stop(self._halt(), Signal.INT), "interrupted")

    def _halt(self) -> ThreadId:
        self.running = False
        thread = self.driver.halt()
        return thread if thread in self._threads() else self._first(HOST)

    def advance(self) -> Iterator[Report]:
        """Run for a slice, if it runs."""
        if not self.running:
            return
        try:
            event = self.driver.run_slice()
        except TargetError:
            self.running = False
            raise
        if isinstance(event, Output):
            if not self.driver.ended:
                yield Report(event.text.rstrip("\n"))
        elif isinstance(event, Created):
            yield from self._appeared(event.thread)
        elif isinstance(event, Exited):
            yield from self._gone(event)
        elif isinstance(event, Stop):
            yield from self._stopped(event)

    def _appeared(self, thread: ThreadId) -> Iterator[Report]:
        self.driver.adopt(thread.pid)
        yield Report(f"[guest {thread.pid} has appeared]")
        for point in self.points.values():
            if point.address is None:
                self.resolve(point)
                if point.address is not None:
                    self._insert(point)
                    yield Report(f"[breakpoint {point.number}: {point.text} is {point.address:#x}]")
        if self._over is None and self._goal.kind == "continue":
            self.driver.resume(dict.fromkeys(self._threads(), CONTINUE))

    def _gone(self, event: Exited) -> Iterator[Report]:
        if event.pid != HOST:
            for point in self.points.values():
                if point.pid == event.pid:
                    point.inserted = False
            if self.selected.pid == event.pid:
                self.selected = self._first(HOST)
            yield Report(f"[guest {event.pid} is gone]")
            return
        self.running = False
        for point in self.points.values():
            point.inserted = False
        self._helpers = []
        yield Report(f"[{self.driver.ended or 'the machine has ended'}]", self.selected)

    def _stop(self, stop: Stop, why: str, points: Iterable[Point] = ()) -> Report:
        self.running = False
        self.last_stop, self.selected, self._over = stop, stop.thread, None
        self._drop_helpers()
        return Report(why, stop.thread, tuple(points))

    def _stopped(self, stop: Stop) -> Iterator[Report]:
        plain = stop.reason == Reason.NONE and not stop.text and stop.signal == Signal.TRAP
        stepped = self._over
        self._over = None
        if stepped is not None:
            self.take_back()
            for point in self._helpers:
                self._insert(point)
        if plain and stepped is not None and self._goal.kind != "step" and (self._goal.kind != "next" or self._helpers):
            self.last_stop = None
            self._resume_all()
            return
        if plain and self._goal.kind in ("step", "next"):
            yield from self._made_step(stop)
            return
        if stop.reason in (Reason.SWBREAK, Reason.HWBREAK):
            yield from self._hit(stop)
            return
        yield self._stop(
            stop,
            stop.text.strip("[]\n")
            or {Reason.NONE: "stopped"}.get(stop.reason, f"{stop.reason.value}point at {stop.address:#x}"),
        )

    def _resume_all(self) -> None:
        self.driver.resume(dict.fromkeys(self._threads(), CONTINUE))

    def _made_step(self, stop: Stop) -> Iterator[Report]:
        self._left -= self._done(stop.thread)
        here = [point for point in self._standing_on(stop.thread) if self._stops(point, stop.thread)] if self._left > 0 else []
        if self._left <= 0 or here:
            yield self._stop(stop, ", ".join(point.words() for point in here), here)
            return
        self._go_on(stop)

    def _done(self, thread: ThreadId) -> bool:
        """Whether a thread that has executed an instruction has made its step."""
        if not self._line:
            return True
        line = self.line_of(thread)
        self._unknown = 0 if line else self._unknown + 1
        if line == self._line or (not line and self._unknown < _PATIENCE):
            return False
        self._line = line
        return True

    def _stops(self, point: Point, thread: ThreadId) -> bool:
        """Whether a breakpoint that a step has come to ends it."""
        try:
            return bool(point.number) and (not point.condition or self.holds(point, thread))
        except CommandError:
            return True

    def _go_on(self, stop: Stop) -> None:
        """With the steps that are left."""
        self.last_stop = stop
        self._drop_helpers()
        self._begin()

    def _hit(self, stop: Stop) -> Iterator[Report]:
        """A breakpoint: one of those here that counts stops it."""
        pc, stack = self.pc(stop.thread), None
        told, met = [], []
        for point in [*self._helpers, *self.points.values()]:
            if not point.inserted or point.pid != stop.thread.pid or point.address != pc:
                continue
            if point.thread is not None and point.thread != stop.thread:
                continue
            if point.above is not None:
                stack = stack if stack is not None else linear_sp(self.driver.registers(stop.thread))
                if stack is None or stack <= point.above:
                    continue
            try:
                if point.condition and not self.holds(point, stop.thread):
                    continue
            except CommandError as error:
                told.append(f"{point.words()}: its condition has no value: {error}")
                continue
            point.hits += point.number > 0
            told.append(point.words() if point.number else "")
            met.append(point)
            if point.once and point.number:
                self.delete(point)
        if not told:  # nobody's that counts: go on, off it
            self.last_stop = stop
            self._continue()
            return
        reached = not any(told)
        if reached and self._goal.kind == "next":
            self._left -= self._done(stop.thread)
            if self._left > 0:
                self._go_on(stop)
                return
        yield self._stop(stop, ", ".join(text for text in told if text), met)

    def restart(self) -> None:
        """Start over, with all breakpoints: those of guests wait for them."""
        if self.driver.holder:
            self._check("restart")
        self.running = False
        self._drop_helpers()
        for point in self.points.values():
            point.inserted = False
        self.selected = self.driver.restart()
        self.last_stop = None
        for point in self.points.values():
            if point.pid != HOST:
                point.address = None
            self._insert(point)
