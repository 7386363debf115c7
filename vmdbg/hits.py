"""Which breakpoint, range or watchpoint a thread has hit, and whether that is a stop for the client."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from gdbstub.target import BreakpointKind, Reason, Stop, ThreadId
from vmdbg.agents import Agents
from vmdbg.breakpoints import Breakpoint, Breakpoints
from vmdbg.contexts import LiveContext
from vmdbg.cpu.processor import Processor
from vmdbg.inferiors import Inferiors
from vmdbg.platform.clock import Clock
from vmdbg.resumed import Resumed
from vmdbg.stops import Why, WorldStop
from vmdbg.watchpoints import Fired, Space, Watchpoint

REASONS = {
    BreakpointKind.SOFTWARE: Reason.SWBREAK, BreakpointKind.HARDWARE: Reason.HWBREAK,
    BreakpointKind.WRITE: Reason.WATCH, BreakpointKind.READ: Reason.RWATCH, BreakpointKind.ACCESS: Reason.AWATCH,
}  # fmt: skip


class Hits:
    """Those of one machine; what there is to say of passes goes to `say`."""

    def __init__(
        self, clock: Clock, inferiors: Inferiors, breakpoints: Breakpoints, agents: Agents, resumed: Resumed,
        say: Callable[[str], object],
    ) -> None:  # fmt: skip
        self.clock = clock
        self.inferiors = inferiors
        self.breakpoints = breakpoints
        self.agents = agents
        self.resumed = resumed
        self.told_of_passing = False
        """The user knows that a breakpoint of a thread that does not run for the client was passed."""
        self.resumed_at = 0
        """Guest time of the last resume: a range does not stop where the client goes on from."""
        self._say = say

    def at(self, cpu: Processor) -> Breakpoint | None:
        """The breakpoint at the CPU's RIP that belongs to the thread it executes, and to its address space."""
        thread, pc = self.inferiors.thread_on(cpu), cpu.state.linear_rip
        self.agents.reached(cpu, thread)
        points = self.breakpoints.at(pc, thread.pid)
        if not points:
            return None
        context = LiveContext(cpu)
        own = [point for point in points if self.breakpoints.owns(point, context)]
        if not own:
            for other in points:
                self._pass(other, context.paging().root)
            return None
        acts = self.resumed.acts(thread)
        for point in own:
            if (acts or point.programs.commands) and self.agents.stops(cpu, thread, point) and acts:
                return point
        if acts or all(point.programs.commands for point in own):
            return None
        if not self.told_of_passing and self.resumed.manner.chosen is None and not self.resumed.holds.active:
            self.told_of_passing = True
            self._say(
                f"[inferior {thread.pid} ran past its breakpoint at {pc:#x}: the debugger resumed "
                "others only; `set schedule-multiple on` makes gdb resume all]\n"
            )
        return None

    def _pass(self, point: Breakpoint, root: int | None) -> None:
        """A breakpoint does not hit, for the address space is another; its user is told once."""
        if not point.passes:
            assert point.home is not None
            elsewhere = "with paging off" if root is None else f"under the page tables at {root:#x}"
            self._say(
                f"[process {point.pid} passes its breakpoint at {point.address:#x} {elsewhere}: it belongs to those at "
                f"{point.home.root:#x}; `monitor breakpoints any` has it hit in every address space]\n"
            )
        point.passes += 1

    def in_range(self, cpu: Processor, thread: ThreadId) -> Stop | None:
        """A stop, if the instruction at RIP lies in a range."""
        pc = cpu.state.linear_rip
        number = self.breakpoints.range_at(pc, thread.pid)
        if number is None or self.clock.now == self.resumed_at or not self.resumed.acts(thread):
            return None
        self.breakpoints.ranges[number].hits += 1
        return WorldStop(thread, text=f"[range {number} was entered at {pc:#x}]", why=Why.RANGE)

    def fired(self, thread: ThreadId, fired: Sequence[Fired], pc: int | None) -> Stop | None:
        """A stop for the first watchpoint whose inferior was told to run; `thread` executed the instruction at `pc`."""
        for point, how, by in fired:
            def waits(t: ThreadId, point: Watchpoint = point) -> bool:
                return (t.pid == point.pid or point.space == Space.SPA) and self.resumed.acts(t)

            where = thread if waits(thread) else next(filter(waits, self.resumed.threads()), None)
            if where is None:
                continue
            point.hits += 1
            text = ""
            if point.number or by or where != thread:
                at = f", {self.inferiors.name(thread)} at {pc:#x}" if pc is not None else ""
                text = f"[{point} was {how} by {by or 'an instruction'}{at}]"
            if point.number:
                return WorldStop(where, text=text, why=Why.WATCHPOINT, points=(point,))
            return Stop(where, reason=REASONS[point.kind], address=point.address, text=text)
        return None
