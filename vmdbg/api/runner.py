# SPDX-License-Identifier: GPL-2.0-or-later
"""Running a machine to its next stop: what `until` means, limits, ^C, and why it stands then."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import FrameType
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from gdbstub.target import Reason as TargetReason
from gdbstub.target import Signal
from vmdbg.api.errors import CommandFailed, TimeUp, translated
from vmdbg.api.points import Breakpoint, Catchpoint, Watchpoint
from vmdbg.api.stop import Reason, Stop
from vmdbg.catchpoints import Catchpoint as CatchpointData
from vmdbg.catchpoints import Sort
from vmdbg.console.control import Goal, Report
from vmdbg.platform.serial import BufferSerial, FileSerial, NullSerial
from vmdbg.stops import Why, WorldStop

if TYPE_CHECKING:
    from vmdbg.api.machine import Machine

__all__ = ["Limits", "Runner", "Until"]

AnyPoint: TypeAlias = Breakpoint | Watchpoint | Catchpoint
Until: TypeAlias = str | int | AnyPoint | Sequence[AnyPoint] | Callable[["Machine"], bool] | None

_EVENTS = frozenset((*Sort, "once", "catch"))
"""What an `until` that is no location begins with."""
_REASONS = {
    Why.CATCHPOINT: Reason.CATCHPOINT, Why.WATCHPOINT: Reason.WATCHPOINT, Why.RANGE: Reason.RANGE,
    Why.WORLD_SWITCH: Reason.WORLD_SWITCH, Why.NOTICE: Reason.NOTICE, Why.DEADLINE: Reason.LIMIT, Why.SHUTDOWN: Reason.SHUTDOWN,
}  # fmt: skip


_CUT_SHORT = (Reason.LIMIT, Reason.IDLE, Reason.INTERRUPTED)


@dataclass
class _Interrupts:
    came: bool = False


@contextmanager
def _interrupts() -> Iterator[_Interrupts]:
    """^C is noted, and raises nothing: it could come amid an instruction."""
    state = _Interrupts()

    def note(number: int, frame: FrameType | None) -> None:
        state.came = True

    try:
        before = signal.signal(signal.SIGINT, note)
    except ValueError:  # not the main thread: signals do not come here
        yield state
        return
    try:
        yield state
    finally:
        signal.signal(signal.SIGINT, before)


class Limits(NamedTuple):
    """What bounds a run: instructions of all CPUs together, ticks of guest time, seconds."""

    instructions: int | None = None
    ticks: int | None = None
    wall: float | None = None


NO_LIMITS = Limits()


class Runner:
    """Of one machine."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.last: Stop | None = None

    # What is to be reached

    def run(self, until: Until, limits: Limits) -> Stop:
        for name, value in limits._asdict().items():
            if value is not None and not value > 0:
                raise CommandFailed(f"{name}={value}", "a limit is more than 0", "leave it out for none")
        machine = self.machine
        if until is None:
            return self.go(Goal(), limits)
        if isinstance(until, str | int):
            event = isinstance(until, str) and until.split()[:1] and until.split()[0] in _EVENTS
            aim = machine.catch(str(until)) if event else machine.breakpoint(until, once=True)
            return self._reach(aim, limits)
        if callable(until):
            return self._reach(machine.catch("vmexit"), limits, until)
        points = (until,) if isinstance(until, AnyPoint) else tuple(until)
        if not points:
            raise CommandFailed("until=()", "it names nothing to run to", "name a point, or leave it out")
        for point in points:
            if not point.exists:
                raise CommandFailed(repr(point), "it is not set any more", "set it anew")
        return self.go(Goal(), limits, only=points)

    def _reach(
        self, point: Breakpoint | Catchpoint, limits: Limits, condition: Callable[[Machine], bool] | None = None
    ) -> Stop:
        """Run to a point that serves this alone."""
        try:
            return self.go(Goal(), limits, aim=point, condition=condition)
        finally:
            point.delete()

    # Running

    def go(
        self, goal: Goal, limits: Limits = NO_LIMITS, *, only: tuple[AnyPoint, ...] = (), aim: AnyPoint | None = None,
        condition: Callable[[Machine], bool] | None = None,
    ) -> Stop:  # fmt: skip
        """Run.  `only`: other points are passed; `aim`: the one that is to be reached; `condition`: and what must hold there."""
        machine = self.machine.debugger.machine
        machine.limit_instructions(limits.instructions)
        try:
            return self._go(goal, limits, only, aim, condition)
        finally:
            machine.limit_instructions(None)

    def _go(
        self, goal: Goal, limits: Limits, only: tuple[AnyPoint, ...], aim: AnyPoint | None,
        condition: Callable[[Machine], bool] | None,
    ) -> Stop:  # fmt: skip
        machine, control = self.machine, self.machine.control
        end = machine.time + limits.ticks if limits.ticks is not None else None
        until = time.monotonic() + limits.wall if limits.wall is not None else None
        notes: list[str] = []
        while True:
            with translated():
                control.go(goal, end - machine.time if end is not None else None)
            stop = self._wait(until, limits.wall, notes)
            passes = False
            if only:
                stop = replace(stop, reached=any(point in only for point in stop.points))
                passes = bool(stop.points) and not stop.reached
            elif condition is not None and aim in stop.points:
                others = tuple(point for point in stop.points if point != aim)
                stop = replace(stop, reached=False, points=others)
                if condition(machine):
                    stop = replace(stop, reached=True, reason=Reason.CONDITION, text="the condition is met")
                passes = not stop.reached and not others
            else:
                stop = replace(stop, reached=aim in stop.points if aim is not None else stop.reason not in _CUT_SHORT)
            if not passes:
                self.last = stop
                return stop
            goal = Goal()

    def wait(self) -> Stop:
        """To the next stop of what runs already."""
        self.last = self._wait(None, None, [])
        return self.last

    def _wait(self, until: float | None, wall: float | None, notes: list[str]) -> Stop:
        machine, control = self.machine, self.machine.control
        deadline = machine.deadline if machine.deadline is not None else math.inf
        final: Report | None = None
        reason: Reason | None = None
        with translated(), _interrupts() as interrupts:
            machine.debugger.machine.poll_input()
            while control.running:
                for report in control.advance():
                    if report.thread is None:
                        notes.append(report.text)
                    else:
                        final = report
                if not control.running:
                    break
                if interrupts.came:
                    reason = Reason.INTERRUPTED
                elif time.monotonic() >= min(deadline, math.inf if until is None else until):
                    reason = Reason.LIMIT
                elif self._idle():
                    reason = Reason.IDLE
                else:
                    machine.debugger.machine.poll_input()
                    continue
                for report in control.interrupt():
                    final = report
        text = {
            Reason.LIMIT: f"{wall} s of wall time are used up",
            Reason.IDLE: "every processor waits, and nothing is left that could wake one; `send` may",
            Reason.INTERRUPTED: "interrupted",
        }.get(reason, "") if reason is not None else final.text if final is not None else ""  # fmt: skip
        stop = self._stop(reason, text, final, notes)
        if time.monotonic() >= deadline and machine.exit_status is None:
            self.last = stop
            where = f"{stop.inferior.name}, {_place(stop)}, guest time {stop.time}"
            raise TimeUp(f"the time for this machine is over: it stands at {where}")
        if reason == Reason.INTERRUPTED:
            self.last = stop
            raise KeyboardInterrupt
        return stop

    def _idle(self) -> bool:
        """Whether nothing will happen any more unless the script does something."""
        machine = self.machine.debugger.machine
        if machine.exit_status is not None or any(cpu.runnable or cpu.pause for cpu in machine.cpus):
            return False
        serial = machine.config.serial
        silent = isinstance(serial, NullSerial | FileSerial) or (isinstance(serial, BufferSerial) and not serial.input)
        return machine.clock.next_deadline() is None and not machine.chipset.hears and silent

    def _stop(self, reason: Reason | None, text: str, report: Report | None, notes: list[str]) -> Stop:
        machine, control = self.machine, self.machine.control
        thread = report.thread if report is not None and report.thread is not None else control.selected
        last = control.last_stop
        if isinstance(last, WorldStop) and last.about is not None and last.thread == thread:
            thread = last.about
        met = report.points if report is not None else ()
        points: list[AnyPoint] = [Breakpoint(machine, point) for point in met if point.number]
        if reason is None and met and not points:
            reason = Reason.STEP
        elif reason is None:
            reason, more = self._cause(points)
            points += more
        machine.source.select(thread)
        pc = machine.control.pc(thread)
        return Stop(
            reason, text.strip("[]\n"), machine.inferior_of(thread.pid), thread.tid, machine.time, pc,
            machine.source.symbol(thread.pid, pc) if pc is not None else "", machine.exit_status, True, tuple(points),
            tuple(notes),
        )  # fmt: skip

    def _cause(self, points: list[AnyPoint]) -> tuple[Reason, list[AnyPoint]]:
        machine = self.machine
        last = machine.control.last_stop
        if machine.exit_status is not None:
            shut = isinstance(last, WorldStop) and last.why == Why.SHUTDOWN
            return Reason.SHUTDOWN if shut else Reason.ENDED, []
        if points:
            return Reason.BREAKPOINT, []
        if isinstance(last, WorldStop):
            found: list[AnyPoint] = [
                Catchpoint(machine, point) if isinstance(point, CatchpointData) else Watchpoint(machine, point)
                for point in last.points
            ]
            return _REASONS[last.why], found
        if last is not None and last.reason in (TargetReason.WATCH, TargetReason.RWATCH, TargetReason.AWATCH):
            return Reason.WATCHPOINT, []
        if last is not None and last.reason in (TargetReason.SWBREAK, TargetReason.HWBREAK):
            return Reason.BREAKPOINT, []
        return Reason.INTERRUPTED if last is not None and last.signal == Signal.INT else Reason.STEP, []


def _place(stop: Stop) -> str:
    return "?" if stop.pc is None else f"{stop.pc:#x}{f' <{stop.symbol}>' if stop.symbol else ''}"
