"""How the machine runs under a debugger: which threads act, where they stop, what a step of one of them takes."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from gdbstub.target import Action, BreakpointKind, Created, Exited, Output, Reason, Signal, Stop, ThreadId
from gdbstub.target import Event as StubEvent
from introspect.exits import EVENT, exit_name
from vmdbg.breakpoints import Breakpoint, Breakpoints
from vmdbg.contexts import Context, LiveContext, SavedContext
from vmdbg.cpu.faults import Kind
from vmdbg.cpu.processor import Processor
from vmdbg.history import HOST
from vmdbg.inferiors import Inferiors
from vmdbg.machine import Event, Machine
from vmdbg.stepping import Place, Stepping
from vmdbg.watchpoints import Fired, Space, Watchpoints

if TYPE_CHECKING:
    from vmdbg.cpu.core import Cpu
    from vmdbg.svm.guest import Guest

LEAST_TICKS, MOST_TICKS = 2_000, 2_000_000
SLICE_SECONDS = 0.001
LOOKS = 32
"""How often in a slice the client's requests are looked for."""

_REASONS = {
    BreakpointKind.SOFTWARE: Reason.SWBREAK, BreakpointKind.HARDWARE: Reason.HWBREAK,
    BreakpointKind.WRITE: Reason.WATCH, BreakpointKind.READ: Reason.RWATCH, BreakpointKind.ACCESS: Reason.AWATCH,
}  # fmt: skip


class Running:
    """One machine between two resumes: the half of a target that `resume`, `run_slice` and `halt` are."""

    def __init__(
        self, machine: Machine, inferiors: Inferiors, breakpoints: Breakpoints, watchpoints: Watchpoints
    ) -> None:
        self.machine = machine
        self.history = machine.history
        self.inferiors = inferiors
        self.breakpoints = breakpoints
        self.watchpoints = watchpoints
        self.stop_codes: dict[int, int | None] = {}
        """EXITCODEs to stop on next, to the guest they are for (None: any)."""
        self.ended = False
        """The machine is at its end, and the client has been told or needs not be."""
        self._acting: dict[ThreadId, Action] = {}
        """The threads that the client resumed; others run where these could not go on without them, and never stop."""
        self._resting: set[ThreadId] = set()
        """Threads of the same inferiors that it did not resume."""
        self._stepping: Stepping | None = None
        self._events: deque[StubEvent] = deque()
        self._told_of_passing = False
        self._ticks = LEAST_TICKS
        self._known: set[int] = set()
        self._version = -1
        self._exit_stop: Stop | None = None
        self._resumed_at = 0
        """Guest time of the last resume: a range does not stop where the client goes on from."""
        self.input = -1
        """A file descriptor to look at while the machine runs; -1 for none."""
        machine.history.on_switch = self._on_switch

    def resume(self, actions: Mapping[ThreadId, Action]) -> None:
        self._acting = dict(actions)
        pids = {thread.pid for thread in actions}
        self._resting = {ThreadId(pid, t.tid) for pid in pids for t in self.inferiors.threads(pid)} - actions.keys()
        self._stepping = next((self._step(t, action) for t, action in actions.items() if action.step), None)
        if self._stepping is None:
            self.breakpoints.forget_removed()
            self.watchpoints.forget_removed()
        self.breakpoints.arm()
        self._resumed_at = self.machine.clock.now
        if self.watchpoints:
            self.watchpoints.guard()

    def _acts(self, thread: ThreadId) -> bool:
        """Whether the client expects stops of a thread: it resumed it, or the thread is new in what it resumed."""
        return thread in self._acting or (
            thread not in self._resting and any(other.pid == thread.pid for other in self._acting)
        )

    def _step(self, thread: ThreadId, action: Action) -> Stepping:
        return Stepping(thread, action, self._place(self.inferiors.context(thread)))

    @staticmethod
    def _place(context: Context) -> Place:
        return Place(context.read("rip") or 0, context.read("rsp") or 0)

    def halt(self) -> ThreadId:
        thread = self._reported(self.inferiors.thread_on(self.machine.cpu))
        self._stepping = None
        self._events = deque(event for event in self._events if not isinstance(event, Stop))
        return thread

    def _reported(self, thread: ThreadId) -> ThreadId:
        """The thread to tell the client of: a client that let some threads run only expects one of them to stop."""
        acting = [t for t in self._acting if self.inferiors.alive(t.pid)]
        if self._acts(thread) or not acting:
            return thread
        return next((t for t in acting if t.pid == thread.pid), acting[0])

    def run_slice(self) -> StubEvent | None:
        until = time.perf_counter() + SLICE_SECONDS
        while not self._events:
            event = self._advance()
            self._notice_guests()
            if event is not None:
                self._events.append(event)
            elif self.machine.engine.asked or time.perf_counter() >= until:
                return None
        event = self._events.popleft()
        if isinstance(event, Stop):
            self._stepping = None
            if self._acting and not self._acts(event.thread):
                return None  # of a resume that another event ended
        return event

    def _advance(self) -> StubEvent | None:
        """Run a little; an event if something happened that the client must know."""
        stepping = self._stepping
        self.history.watching = bool(stepping is not None or self.stop_codes or self.watchpoints)
        if stepping is not None and self.inferiors.alive(stepping.thread.pid):
            return self._advance_step(stepping)
        self._stepping = None
        return self._run(bool(self.breakpoints))

    def _run(self, breakpoints: bool, watch: Processor | None = None) -> StubEvent | None:
        """Run for about `SLICE_SECONDS`: what that is in guest time, world switches and devices decide."""
        self.machine.engine.look_at(self.input, self._ticks // LOOKS)
        started = time.perf_counter()
        event = self.machine.run(self._ticks, breakpoints=breakpoints, watch=watch)
        if not self.machine.engine.asked:
            factor = SLICE_SECONDS / (time.perf_counter() - started)
            self._ticks = min(max(int(self._ticks * min(factor, 2)), LEAST_TICKS), MOST_TICKS)
        return self._happened(event)

    def _advance_step(self, stepping: Stepping) -> StubEvent | None:
        machine, thread = self.machine, stepping.thread
        cpu = machine.turn(machine.clock.now + self._ticks)
        if isinstance(cpu, Event):
            return self._happened(cpu)
        if self.inferiors.thread_on(cpu) != thread:
            return self._run_others(stepping)
        here = self._place(LiveContext(cpu))
        if stepping.back is not None:
            if here != stepping.back:
                return self._run_others(stepping)
            stepping.back = None
            self.breakpoints.arm()
        if stepping.ends_at(here.pc):
            return Stop(thread)
        if self._hit(cpu):
            return self._happened(Event.BREAKPOINT)
        stepping.start = here
        started = cpu.wait_for_sipi
        outcome = machine.step(cpu)
        stays = self.inferiors.thread_on(cpu) == thread
        if outcome == Event.INTERRUPTED and not started:
            # A guest that left by a #VMEXIT is met again at its next VMRUN.
            stepping.back = here if stays else None
            if stays:
                self.breakpoints.arm(here.pc)
        elif outcome != Event.WATCHED:
            stepping.executed |= stays or thread.pid == HOST
        event = self._happened(outcome)
        if event is None and stays and stepping.back is None and stepping.ends_at(cpu.state.linear_rip):
            return Stop(thread)
        return event

    def _run_others(self, stepping: Stepping) -> StubEvent | None:
        """The stepping thread is not at its instruction: go on until it is, or until its CPU has its turn."""
        breakpoints = bool(self.breakpoints) or stepping.back is not None
        waiting = next((c for c in self.machine.cpus if self.inferiors.thread_on(c) == stepping.thread), None)
        watch = waiting if waiting is not self.machine.cpu else None
        return self._run(breakpoints, watch)

    def _on_switch(self, cpu: Cpu, guest: Guest, code: int | None) -> None:
        """A world switch: pause if somebody waits for what it brings."""
        assert isinstance(cpu, Processor)
        owner, vcpu = self.history.by_vmcb[guest.vmcb]
        thread = ThreadId(owner.number, vcpu.thread)
        stepping = self._stepping
        if code is None:
            if self._version != self.history.version:
                cpu.pause = True
            if stepping is not None and stepping.thread == thread:
                event = guest.eventinj
                injected = Kind(EVENT.get(event, "type")) if event & EVENT.v else None
                stepping.entered(self._place(SavedContext(cpu, guest.view, vcpu)), injected)
                if stepping.back is not None:
                    self.breakpoints.arm(stepping.back.pc)
                cpu.pause = True
            return
        if self.watchpoints:
            self.watchpoints.remap(owner.number)
        if stepping is not None and stepping.thread == (HOST, cpu.index + 1):
            cpu.pause = True
        if self._acting and code in self.stop_codes and self.stop_codes[code] in (None, owner.number):
            del self.stop_codes[code]
            self._exit_stop = Stop(self._reported(thread), text=f"#VMEXIT {exit_name(code)} of {owner.name}")
            cpu.pause = True

    def _hit(self, cpu: Processor) -> Breakpoint | None:
        """The breakpoint at the CPU's RIP that belongs to the thread it executes, and to its address space."""
        thread, pc = self.inferiors.thread_on(cpu), cpu.state.linear_rip
        points = self.breakpoints.at(pc, thread.pid)
        if not points:
            return None
        context = LiveContext(cpu)
        point = next((point for point in points if self.breakpoints.owns(point, context)), None)
        if point is None:
            for other in points:
                self._pass(other, context.paging().root)
            return None
        if self._acts(thread):
            return point
        if not self._told_of_passing:
            self._told_of_passing = True
            self._events.append(Output(
                f"[inferior {thread.pid} ran past its breakpoint at {pc:#x}: the debugger resumed "
                "others only; `set schedule-multiple on` makes gdb resume all]\n"
            ))  # fmt: skip
        return None

    def _in_range(self, cpu: Processor) -> Stop | None:
        """A stop, if the instruction at RIP lies in a range."""
        thread, pc = self.inferiors.thread_on(cpu), cpu.state.linear_rip
        number = self.breakpoints.range_at(pc, thread.pid)
        if number is None or self.machine.clock.now == self._resumed_at or not self._acts(thread):
            return None
        self.breakpoints.ranges[number].hits += 1
        return Stop(thread, text=f"[range {number} was entered at {pc:#x}]")

    def _pass(self, point: Breakpoint, root: int | None) -> None:
        """A breakpoint does not hit, for the address space is another; its user is told once."""
        if not point.passes:
            assert point.home is not None
            elsewhere = "with paging off" if root is None else f"under the page tables at {root:#x}"
            self._events.append(Output(
                f"[process {point.pid} passes its breakpoint at {point.address:#x} {elsewhere}: it belongs to those at "
                f"{point.home.root:#x}; `monitor breakpoints any` has it hit in every address space]\n"
            ))  # fmt: skip
        point.passes += 1

    def _happened(self, event: Event) -> StubEvent | None:
        machine = self.machine
        cpu = machine.cpu
        if self._exit_stop is not None:
            stop, self._exit_stop = self._exit_stop, None
            return stop
        if self.history.stopped_for and self._acting:
            text, self.history.stopped_for = self.history.stopped_for, ""
            return Stop(self._reported(self.inferiors.thread_on(cpu)), text=f"[{text}]")
        if event == Event.BREAKPOINT:
            point = self._hit(cpu)
            if point is not None:
                self.breakpoints.hit(point, LiveContext(cpu))
                return Stop(self.inferiors.thread_on(cpu), reason=_REASONS[point.kind])
            stepping = self._stepping
            if stepping is not None and stepping.back == self._place(LiveContext(cpu)):
                return None
            return self._in_range(cpu) or self._happened(machine.step(cpu))
        if event == Event.WATCHED:
            return self._watched(cpu)
        if event == Event.EXIT:
            return self._machine_ended()
        if event == Event.IDLE:
            time.sleep(SLICE_SECONDS)
            machine.poll_input()
        elif self.watchpoints.noted:
            return self._fired(self.inferiors.thread_on(cpu), self.watchpoints.due(), None)
        return None

    def _machine_ended(self) -> StubEvent | None:
        machine = self.machine
        if any(cpu.shutdown for cpu in machine.cpus):
            return Stop(self._reported(self.inferiors.thread_on(machine.cpu)), Signal.SEGV, text=machine.ended)
        if not self.ended:
            self.ended = True
            self._events += [Output(f"[{machine.ended}]\n"), Exited(HOST, (machine.exit_status or 0) & 0xFF)]
            self._events += [Exited(number) for number, guest in self.history.guests.items() if not guest.gone]
            return None
        return Exited(HOST, 0)

    def _watched(self, cpu: Processor) -> StubEvent | None:
        """Execute the instruction that accesses a watched page, and see whether it touched the watched bytes."""
        thread, pc = self.inferiors.thread_on(cpu), cpu.state.linear_rip
        event, fired = self.watchpoints.execute(cpu)
        stepping = self._stepping
        if stepping is not None and stepping.thread == thread:
            stepping.executed |= thread.pid == HOST or self.inferiors.thread_on(cpu) == thread
        stop = self._fired(thread, fired, pc)
        return stop or (self._happened(event) if event != Event.WATCHED else None)

    def _fired(self, thread: ThreadId, fired: Sequence[Fired], pc: int | None) -> StubEvent | None:
        """A stop for the first watchpoint whose inferior was told to run; `thread` executed the instruction at `pc`."""
        for point, how, by in fired:
            owners = [t for t in self._acting if t.pid == point.pid or point.space == Space.SPA]
            if not owners:
                continue
            point.hits += 1
            own = self._acts(thread) and (thread.pid == point.pid or point.space == Space.SPA)
            where = thread if own else owners[0]
            text = ""
            if point.number or by or where != thread:
                at = f", {self.inferiors.name(thread)} at {pc:#x}" if pc is not None else ""
                text = f"[{point} was {how} by {by or 'an instruction'}{at}]"
            if point.number:
                return Stop(where, text=text)
            return Stop(where, reason=_REASONS[point.kind], address=point.address, text=text)
        return None

    def _notice_guests(self) -> None:
        """Tell of guests that appeared and went since the last look."""
        if self._version == self.history.version:
            return
        self._version = self.history.version
        alive = {number for number, guest in self.history.guests.items() if not guest.gone}
        for number in sorted(self._known - alive):
            self.breakpoints.forget(number)
            self.watchpoints.forget(number)
            self._events.append(Exited(number))
        for number in sorted(alive - self._known):
            self._events.append(Created(self.inferiors.first_thread(number), ThreadId(HOST, self.machine.cpu.index + 1)))
        self._known = alive
