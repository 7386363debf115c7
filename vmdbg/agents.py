"""Agent expressions on a machine: conditions and commands of breakpoints, and what tracepoints collect.

All of it happens between two instructions and reads only, so the guest and its clock are as without it.  An instruction that
has to be begun again (a nested page fault of ours, a watched page) is met again at the same guest time: it counts once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from gdbstub.hits import ThreadEnvironment, judge
from gdbstub.target import Target, ThreadId
from gdbstub.trace import Trace

if TYPE_CHECKING:
    from vmdbg.breakpoints import Breakpoint
    from vmdbg.cpu.processor import Processor
    from vmdbg.machine import Machine


class Agents:
    """Those of one debugger."""

    def __init__(self, target: Target, machine: Machine, trace: Trace, output: Callable[[str], object]) -> None:
        self._target = target
        self._machine = machine
        self._trace = trace
        self._output = output
        self._traced: tuple[int, int, int] | None = None
        """The last instruction that was collected at: guest time, CPU, address."""
        self._judged: dict[Breakpoint, tuple[tuple[int, int, int], bool]] = {}

    def _moment(self, cpu: Processor) -> tuple[int, int, int]:
        return self._machine.clock.now, cpu.index, cpu.state.linear_rip

    def reached(self, cpu: Processor, thread: ThreadId) -> None:
        """A thread is about to execute an instruction: collect, if there is a tracepoint."""
        if self._trace.running:
            moment = self._moment(cpu)
            if moment != self._traced and self._trace.at(thread.pid, moment[2]):
                self._traced = moment
                self._trace.reached(thread, moment[2])

    def stops(self, cpu: Processor, thread: ThreadId, point: Breakpoint) -> bool:
        """Whether a breakpoint of its own stops a thread; if it has commands they are carried out instead."""
        programs = point.programs
        if not programs.conditions and not programs.commands:
            return True
        moment = self._moment(cpu)
        seen, stops = self._judged.get(point, (None, False))
        if seen != moment:
            verdict = judge(programs, ThreadEnvironment(self._target, thread, self._output), point.address)
            stops, point.text = verdict.stops, verdict.text
            point.hits += verdict.hit and not stops
            self._judged[point] = moment, stops
        return stops

    def forget(self) -> None:
        """Breakpoints may be others now."""
        self._judged.clear()
