"""How the machine runs under a debugger: which threads act, where they stop, what a step of one of them takes."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from gdbstub.target import (
    Action,
    BreakpointKind,
    Created,
    Exited,
    Output,
    Reason,
    Signal,
    Stop,
    Target,
    ThreadEnded,
    ThreadId,
    ThreadStarted,
)  # fmt: skip
from gdbstub.target import Event as StubEvent
from gdbstub.trace import Trace
from introspect.exits import EVENT, ExitCode, exit_name
from vmdbg.agents import Agents
from vmdbg.breakpoints import Breakpoint, Breakpoints
from vmdbg.catchpoints import Catchpoints
from vmdbg.contexts import Context, LiveContext, SavedContext
from vmdbg.cpu.faults import Kind
from vmdbg.cpu.processor import Processor
from vmdbg.history import HOST
from vmdbg.holds import Holds
from vmdbg.inferiors import Inferiors
from vmdbg.machine import Event, Machine
from vmdbg.stepping import Manner, Place, Stepping
from vmdbg.watchpoints import Fired, Space, Watchpoint, Watchpoints

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
_INTERRUPTS = frozenset((ExitCode.INTR, ExitCode.NMI, ExitCode.SMI, ExitCode.INIT, ExitCode.VINTR))
"""Exits that no instruction of the guest has caused."""


class Running:
    """One machine between two resumes: the half of a target that `resume`, `run_slice` and `halt` are.

    Stopping together, the client resumes some threads, and everything stops with the first of them that does; the other
    threads run where these could not go on without them, and never stop.  One by one (non-stop), each thread of an
    attached inferior runs unless it is held.
    """

    def __init__(
        self, machine: Machine, inferiors: Inferiors, breakpoints: Breakpoints, watchpoints: Watchpoints,
        catchpoints: Catchpoints, target: Target, trace: Trace,
    ) -> None:  # fmt: skip
        self.machine = machine
        self.trace = trace
        self.agents = Agents(target, machine, trace, lambda text: self._events.append(Output(text)))
        self.history = machine.history
        self.inferiors = inferiors
        self.breakpoints = breakpoints
        self.watchpoints = watchpoints
        self.catchpoints = catchpoints
        self.manner = Manner()
        self.attached: set[int] = set()
        self.into_guest = False
        """Stop at the first instruction of a guest behind the next VMRUN."""
        self.wanted_guest: int | None = None
        """The guest that is meant; None: any."""
        self.last_stop: Stop | None = None
        self.ended = False
        """The machine is at its end, and the client has been told or needs not be."""
        self._acting: dict[ThreadId, Action] = {}
        """Stopping together: the threads that the client resumed."""
        self._resting: set[ThreadId] = set()
        """Threads of the same inferiors that it did not resume."""
        self._steppings: dict[ThreadId, Stepping] = {}
        self.holds = Holds(machine, inferiors, lambda: self._steppings.keys())
        self._events: deque[StubEvent] = deque()
        self._told_of_passing = False
        self._ticks = LEAST_TICKS
        self._known: dict[int, set[int]] = {}
        self._version = -1
        self._exit_stop: Stop | None = None
        self._resumed_at = 0
        """Guest time of the last resume: a range does not stop where the client goes on from."""
        self.input = -1
        """A file descriptor to look at while the machine runs; -1 for none."""
        self._entering = False
        """VMRUN has begun to enter the guest to stop in: it may refuse yet."""
        machine.history.on_switch = self._on_switch

    # Stopping together

    def resume(self, actions: Mapping[ThreadId, Action]) -> None:
        self.holds.end()
        self._acting = dict(actions)
        pids = {thread.pid for thread in actions}
        self._resting = {thread for pid in pids for thread in self.inferiors.thread_ids(pid)} - actions.keys()
        self._steppings = {}
        self._start(actions)

    def _start(self, actions: Mapping[ThreadId, Action]) -> None:
        for thread, action in actions.items():
            if action.step:
                self._steppings[thread] = Stepping(thread, action, self._place(self.inferiors.context(thread)))
        if not self._steppings:
            self.breakpoints.forget_removed()
            self.watchpoints.forget_removed()
        self._resumed_at = self.machine.clock.now
        self.rearm()

    def rearm(self) -> None:
        """Breakpoints, or what steps wait for, have changed."""
        self.agents.forget()
        self._arm()
        if self.watchpoints:
            self.watchpoints.guard()

    def _arm(self) -> None:
        self.breakpoints.arm(stepping.back.pc for stepping in self._steppings.values() if stepping.back is not None)

    def halt(self) -> ThreadId:
        thread = self._reported(self.inferiors.thread_on(self.machine.cpu))
        self.holds.end()
        self._steppings = {}
        self._events = deque(event for event in self._events if not isinstance(event, Stop))
        return thread

    # Stopping one by one

    def hold(self, threads: Collection[ThreadId]) -> None:
        if not self.holds.active:
            self._acting, self._resting, self._steppings = {}, set(), {}
            self.rearm()
        self.holds.add(threads)
        for thread in threads:
            self._steppings.pop(thread, None)
        self._events = deque(e for e in self._events if not (isinstance(e, Stop) and e.thread in self.holds))

    def go(self, actions: Mapping[ThreadId, Action]) -> None:
        self.holds.remove(actions)
        self._start(actions)

    def moves(self) -> bool:
        """Whether anything could happen."""
        return bool(self._events) or (not self.ended and self.holds.move())

    def let_go(self, pid: int) -> None:
        """The client has detached from an inferior, or it is gone."""
        self.attached.discard(pid)
        self.holds.forget(pid)

    # Who stops

    def _acts(self, thread: ThreadId) -> bool:
        """Whether the client expects stops of a thread: it runs, for the client, and is one of those chosen to stop.

        Stopping together, a thread that is new in what the client resumed runs for it, too.
        """
        if self.manner.chosen is not None and thread.pid not in self.manner.chosen:
            return False
        if self.holds.active:
            return thread.pid in self.attached and thread not in self.holds
        return thread in self._acting or (
            thread not in self._resting and any(other.pid == thread.pid for other in self._acting)
        )

    def _acting_threads(self) -> list[ThreadId]:
        """Those that run for the client."""
        if not self.holds.active:
            return [thread for thread in self._acting if self.inferiors.alive(thread.pid)]
        threads = (thread for pid in self.attached for thread in self.inferiors.thread_ids(pid))
        return [thread for thread in threads if thread not in self.holds]

    @property
    def _client_waits(self) -> bool:
        return bool(self._acting) or self.holds.active

    @staticmethod
    def _place(context: Context) -> Place:
        return Place(context.read("rip") or 0, context.read("rsp") or 0)

    def _reported(self, thread: ThreadId) -> ThreadId:
        """The thread to tell the client of: a client that let some threads run only expects one of them to stop."""
        acting = self._acting_threads()
        if self._acts(thread) or not acting:
            return thread
        return next((t for t in acting if t.pid == thread.pid), acting[0])

    # Slices

    def run_slice(self) -> StubEvent | None:
        until = time.perf_counter() + SLICE_SECONDS
        while not self._events:
            if self.holds.active:
                self.holds.tell_cpus()
                if not self.moves():
                    time.sleep(SLICE_SECONDS)
                    return None
            event = self._advance()
            self._notice_guests()
            if event is not None:
                self._events.append(event)
            elif self.machine.engine.asked or time.perf_counter() >= until:
                return None
        event = self._events.popleft()
        if isinstance(event, Stop):
            if self._client_waits and not (event.thread in self._steppings or self._acts(event.thread)):
                return None  # of a resume that another event ended
            self._stopped(event)
        return event

    def _stopped(self, stop: Stop) -> None:
        self.last_stop = stop
        if not self.holds.active:
            self._steppings = {}
        else:
            self.holds.add([stop.thread])
            self._steppings.pop(stop.thread, None)

    def why(self) -> str:
        """The last stop in words: who, where and why; in the hypervisor also how the last guest has left on its CPU."""
        stop = self.last_stop
        if stop is None or not self.inferiors.alive(stop.thread.pid):
            return ""
        why = stop.text.strip("[]") or {Reason.NONE: "a step or an interrupt"}.get(stop.reason, f"a {stop.reason.value}")
        who = self.inferiors.name(stop.thread)
        pc = self.inferiors.context(stop.thread).read("rip") or 0
        text = f"{who} stopped at {pc:#x}: {why}"
        if stop.thread.pid == HOST:
            last = [(guest.last_exit(stop.thread.tid - 1), guest) for guest in self.history.guests.values()]
            record, guest = max(last, key=lambda pair: pair[0].number, default=(None, None))
            if record is not None and guest is not None and record.number:
                text += (
                    f"; {guest.name} has left there last by #VMEXIT {exit_name(record.code)} at {record.rip:#x}, "
                    f"EXITINFO1 {record.info1:#x}, EXITINFO2 {record.info2:#x}"
                )
        return text

    def _advance(self) -> StubEvent | None:
        """Run a little; an event if something happened that the client must know."""
        for thread in [thread for thread in self._steppings if not self.inferiors.alive(thread.pid)]:
            del self._steppings[thread]
        self.catchpoints.live = self._client_waits
        collecting = any(thread not in self.holds for thread in self.trace.stepping)
        self.history.watching = bool(
            self._steppings or collecting or self.watchpoints or self.holds or self.into_guest
        )
        self.agents.judge.enabled = not (self._steppings or collecting)
        if self._steppings:
            return self._advance_steps()
        return self._advance_collecting() if collecting else self._run(bool(self.breakpoints))

    def _run(self, breakpoints: bool, watch: Collection[Processor] = ()) -> StubEvent | None:
        """Run for about `SLICE_SECONDS`: what that is in guest time, world switches and devices decide."""
        self.machine.engine.look_at(self.input, self._ticks // LOOKS)
        started = time.perf_counter()
        event = self.machine.run(self._ticks, breakpoints=breakpoints, watch=watch)
        if not self.machine.engine.asked:
            factor = SLICE_SECONDS / (time.perf_counter() - started)
            self._ticks = min(max(int(self._ticks * min(factor, 2)), LEAST_TICKS), MOST_TICKS)
        return self._happened(event)

    def _advance_steps(self) -> StubEvent | None:
        machine = self.machine
        cpu = machine.turn(machine.clock.now + self._ticks)
        if isinstance(cpu, Event):
            return self._happened(cpu)
        stepping = self._steppings.get(self.inferiors.thread_on(cpu))
        return self._run_others() if stepping is None else self._advance_step(cpu, stepping)

    def _advance_step(self, cpu: Processor, stepping: Stepping) -> StubEvent | None:
        machine, thread = self.machine, stepping.thread
        here = self._place(LiveContext(cpu))
        if stepping.back is not None:
            if here != stepping.back:
                return self._run_others()
            stepping.back = None
            self._arm()
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
            if stays and self.manner.into_handlers:
                return Stop(thread)
            stepping.back = here if stays else None
            if stays:
                self._arm()
        elif outcome != Event.WATCHED:
            stepping.executed |= stays or thread.pid == HOST
        event = self._happened(outcome)
        if event is None and stays and stepping.back is None and stepping.ends_at(cpu.state.linear_rip):
            return Stop(thread)
        return event

    def _advance_collecting(self) -> StubEvent | None:
        """Tracepoints collect at each step of some threads: step these, and run what else has its turn until one of them has."""
        machine = self.machine
        cpu = machine.turn(machine.clock.now + self._ticks)
        if isinstance(cpu, Event):
            return self._happened(cpu)
        thread = self.inferiors.thread_on(cpu)
        if thread not in self.trace.stepping or thread in self.holds:
            waiting = [c for c in machine.cpus if c is not cpu and self.inferiors.thread_on(c) in self.trace.stepping]
            return self._run(bool(self.breakpoints), waiting)
        if self._hit(cpu):
            return self._happened(Event.BREAKPOINT)
        return self._happened(self._step_and_collect(cpu, thread))

    def _step_and_collect(self, cpu: Processor, thread: ThreadId) -> Event:
        outcome = self.machine.step(cpu)
        self._stepped(cpu, thread, outcome)
        return outcome

    def _stepped(self, cpu: Processor, thread: ThreadId, outcome: Event) -> None:
        """Collect if a thread that does at each step has executed an instruction; one that its hypervisor executes is none."""
        done = outcome not in (Event.INTERRUPTED, Event.WATCHED)
        if thread in self.trace.stepping and done and (thread.pid == HOST or self.inferiors.thread_on(cpu) == thread):
            self.trace.stepped(thread)

    def _run_others(self) -> StubEvent | None:
        """No stepping thread is at its instruction: go on until one is, or until a CPU of one has its turn."""
        breakpoints = bool(self.breakpoints) or any(stepping.back is not None for stepping in self._steppings.values())
        cpus = [cpu for cpu in self.machine.cpus if self.inferiors.thread_on(cpu) in self._steppings]
        return self._run(breakpoints, [cpu for cpu in cpus if cpu is not self.machine.cpu])

    def _on_switch(self, cpu: Cpu, guest: Guest, code: int | None) -> None:
        """A world switch: pause if somebody waits for what it brings."""
        assert isinstance(cpu, Processor)
        owner, vcpu = self.history.by_vmcb[guest.vmcb]
        thread = ThreadId(owner.number, vcpu.thread)
        if code is None:
            self._on_entry(cpu, guest, thread)
        else:
            self._on_exit(cpu, thread, code)

    def _on_entry(self, cpu: Processor, guest: Guest, thread: ThreadId) -> None:
        vcpu = self.history.by_vmcb[guest.vmcb][1]
        if self._version != self.history.version or self.holds.stops(thread) or thread in self.trace.stepping:
            cpu.pause = True
            cpu.hold = self.holds.of(cpu)
        stepping = self._steppings.get(thread)
        if stepping is not None:
            event = guest.eventinj
            injected = Kind(EVENT.get(event, "type")) if event & EVENT.v else None
            here = self._place(SavedContext(cpu, guest.view, vcpu))
            stepping.entered(here, injected, into_handlers=self.manner.into_handlers)
            self._arm()
            cpu.pause = True
        if self.into_guest and self._client_waits and self.wanted_guest in (None, thread.pid):
            self.into_guest = False
            self._steppings.pop(ThreadId(HOST, cpu.index + 1), None)
            number = thread.pid
            text = "" if self._acts(thread) else (
                f": it does not run for gdb. `attach {number}` in a new inferior, or resume it, too (schedule-multiple)"
            )  # fmt: skip
            self._exit_stop = Stop(self._reported(thread), text=f"[VMRUN has entered guest {number}{text}]")
            self._entering = cpu.pause = True

    def _on_exit(self, cpu: Processor, thread: ThreadId, code: int) -> None:
        owner, host = self.history.guests[thread.pid], ThreadId(HOST, cpu.index + 1)
        if self.watchpoints:
            self.watchpoints.remap(owner.number)
        if host in self._steppings or self.holds.stops(host):
            cpu.pause = True
        if not self._client_waits:
            return
        if self._entering:
            refused = f"VMRUN has not entered {owner.name}: {cpu.last_fault}"
            left = f"VMRUN has entered {owner.name}, which left at once by #VMEXIT {exit_name(code)}"
            self._stop_behind_exit(cpu, host, f"[{refused if code == ExitCode.INVALID else left}]")
        elif self._follows(thread, code):
            self._stop_behind_exit(cpu, host, f"[the step has left {owner.name} by #VMEXIT {exit_name(code)}]")

    def _follows(self, thread: ThreadId, code: int) -> bool:
        """Whether a step that leaves its guest so is to end in the hypervisor."""
        stepping = self._steppings.get(thread)
        wanted = code not in _INTERRUPTS or self.manner.into_handlers
        return self.manner.follow_host and wanted and stepping is not None and stepping.back is None

    def _stop_behind_exit(self, cpu: Processor, thread: ThreadId, text: str) -> None:
        """Stop at the hypervisor's first instruction behind VMRUN."""
        self._exit_stop = Stop(self._reported(thread), text=text)
        cpu.pause = True

    def _hit(self, cpu: Processor) -> Breakpoint | None:
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
        acts = self._acts(thread)
        for point in own:
            if (acts or point.programs.commands) and self.agents.stops(cpu, thread, point) and acts:
                return point
        if acts or all(point.programs.commands for point in own):
            return None
        if not self._told_of_passing and self.manner.chosen is None and not self.holds.active:
            self._told_of_passing = True
            self._events.append(Output(
                f"[inferior {thread.pid} ran past its breakpoint at {pc:#x}: the debugger resumed "
                "others only; `set schedule-multiple on` makes gdb resume all]\n"
            ))  # fmt: skip
        return None

    def _in_range(self, cpu: Processor, thread: ThreadId) -> Stop | None:
        """A stop, if the instruction at RIP lies in a range."""
        pc = cpu.state.linear_rip
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
        caught = self._caught()
        if self._exit_stop is not None:
            stop, self._exit_stop, self._entering = self._exit_stop, None, False
            return stop if caught is None else replace(stop, text=f"{stop.text}; {caught.text}")
        if caught is not None:
            return caught
        if self.history.stopped_for and self._client_waits:
            text, self.history.stopped_for = self.history.stopped_for, ""
            return Stop(self._reported(self.inferiors.thread_on(cpu)), text=f"[{text}]")
        if event == Event.BREAKPOINT:
            point = self._hit(cpu)
            if point is not None:
                self.breakpoints.hit(point, LiveContext(cpu))
                return Stop(self.inferiors.thread_on(cpu), reason=_REASONS[point.kind], text=point.text)
            stepping = self._steppings.get(self.inferiors.thread_on(cpu))
            if stepping is not None and stepping.back == self._place(LiveContext(cpu)):
                return None
            thread = self.inferiors.thread_on(cpu)
            entered = self._in_range(cpu, thread)
            if entered is not None:
                return entered
            in_range = self.breakpoints.range_at(cpu.state.linear_rip, thread.pid) is not None
            if not in_range and (self._acts(thread) or self._told_of_passing):
                self.agents.teach(cpu, thread, self.breakpoints)
            return self._happened(self._step_and_collect(cpu, thread))
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

    def _caught(self) -> Stop | None:
        """The stop of a catchpoint, if one was hit."""
        caught = self.catchpoints.take()
        return Stop(self._reported(caught.thread), text=caught.text) if caught is not None else None

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
        self._stepped(cpu, thread, event)
        stepping = self._steppings.get(thread)
        if stepping is not None:
            stepping.executed |= thread.pid == HOST or self.inferiors.thread_on(cpu) == thread
        stop = self._fired(thread, fired, pc)
        return stop or (self._happened(event) if event != Event.WATCHED else None)

    def _fired(self, thread: ThreadId, fired: Sequence[Fired], pc: int | None) -> StubEvent | None:
        """A stop for the first watchpoint whose inferior was told to run; `thread` executed the instruction at `pc`."""
        for point, how, by in fired:
            def waits(t: ThreadId, point: Watchpoint = point) -> bool:
                return (t.pid == point.pid or point.space == Space.SPA) and self._acts(t)

            where = thread if waits(thread) else next(filter(waits, self._acting_threads()), None)
            if where is None:
                continue
            point.hits += 1
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
        guests = self.history.guests.items()
        alive = {number: {v.thread for v in guest.vcpus.values()} for number, guest in guests if not guest.gone}
        for number in sorted(self._known.keys() - alive.keys()):
            self.breakpoints.forget(number)
            self.watchpoints.forget(number)
            self.let_go(number)
            self._events.append(Exited(number))
        for number, threads in sorted(alive.items()):
            known = self._known.get(number)
            if known is None:
                parent = ThreadId(HOST, self.machine.cpu.index + 1)
                self._events.append(Created(self.inferiors.first_thread(number), parent))
                if self.catchpoints.started(number) and (stop := self._caught()) is not None:
                    self._events.append(stop)
                continue
            self._events += [ThreadStarted(ThreadId(number, tid)) for tid in sorted(threads - known)]
            self._events += [ThreadEnded(ThreadId(number, tid)) for tid in sorted(known - threads)]
        self._known = alive
