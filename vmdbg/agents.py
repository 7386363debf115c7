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
from vmdbg.breakpoints import Rule
from vmdbg.contexts import LiveContext
from vmdbg.judge import Condition, Judge

if TYPE_CHECKING:
    from vmdbg.breakpoints import Breakpoint, Breakpoints
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
        self.judge = Judge(machine, trace)

    def _moment(self, cpu: Processor) -> tuple[int, int, int]:
        return self._machine.clock.now, cpu.index, cpu.state.linear_rip

    def reached(self, cpu: Processor, thread: ThreadId) -> None:
        """A thread is about to execute an instruction: collect, if there is a tracepoint."""
        self.judge.flush()
        trace = self._trace
        if trace.running:
            moment = self._moment(cpu)
            if moment != self._traced and trace.at(thread.pid, moment[2]) and not self.judge.seen(cpu, moment[2]):
                self._traced = moment
                trace.reached(thread, moment[2])
                if trace.running:
                    self.judge.refresh()
                else:
                    self.judge.clear()

    def stops(self, cpu: Processor, thread: ThreadId, point: Breakpoint) -> bool:
        """Whether a breakpoint of its own stops a thread; if it has commands they are carried out instead."""
        programs = point.programs
        if not programs.conditions and not programs.commands:
            return point.test is None or point.test(thread)
        moment = self._moment(cpu)
        seen, stops = self._judged.get(point, (None, False))
        if seen != moment:
            verdict = judge(programs, ThreadEnvironment(self._target, thread, self._output), point.address)
            stops, point.text = verdict.stops, verdict.text
            point.hits += verdict.hit and not stops
            self._judged[point] = moment, stops
            self.judge.refresh()
        return stops

    def teach(self, cpu: Processor, thread: ThreadId, breakpoints: Breakpoints) -> None:
        """A thread goes on at an armed address: from now on C deals with what is there as far as it can."""
        judge, address, conditions = self.judge, cpu.state.linear_rip, []
        if not judge.available or not judge.enabled:
            return
        root = LiveContext(cpu).paging().root
        for point in breakpoints.at(address, thread.pid):
            home, own = point.home, True
            page = None
            if home is not None and breakpoints.rule != Rule.ANY and home.root != root:
                own = breakpoints.rule == Rule.SHARED
                page = home.page
            if own and (not point.programs.conditions or point.programs.commands):
                return
            conditions.append(Condition(point, page, own))
        description = self._target.description(thread.pid)
        judge.teach(cpu, thread.pid, address, description, conditions, self._trace.at(thread.pid, address))

    def forget(self) -> None:
        """Breakpoints, or who stops at them, may be others now."""
        self._judged.clear()
        self.judge.forget()
