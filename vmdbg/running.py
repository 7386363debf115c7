"""How the machine runs under a debugger: which threads act, where they stop, what a step of one of them takes."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from gdbstub.target import (
    Action,
    Created,
    Exited,
    Output,
    Reason,
    Signal,
    Stop,
    Target,
    ThreadId,
)  # fmt: skip
from gdbstub.target import Event as StubEvent
from gdbstub.trace import Trace
from introspect.exits import EVENT, ExitCode, exit_name
from vmdbg.agents import Agents
from vmdbg.arrivals import Arrivals
from vmdbg.breakpoints import Breakpoints
from vmdbg.catchpoints import Catchpoints
from vmdbg.contexts import Context, LiveContext, SavedContext
from vmdbg.cpu.faults import Kind
from vmdbg.cpu.processor import Processor
from vmdbg.history import HOST
from vmdbg.hits import REASONS, Hits
from vmdbg.holds import Holds
from vmdbg.inferiors import Inferiors
from vmdbg.machine import Event, Machine
from vmdbg.resumed import Resumed
from vmdbg.stepping import Place, Stepping
from vmdbg.stops import Why, WorldStop
from vmdbg.watchpoints import Watchpoints

if TYPE_CHECKING:
    from vmdbg.cpu.core import Cpu
    from vmdbg.svm.guest import Guest

LEAST_TICKS, MOST_TICKS = 2_000, 2_000_000
SLICE_SECONDS = 0.001
LOOKS = 32
"""How often in a slice the client's requests are looked for."""

_INTERRUPTS = frozenset((ExitCode.INTR, ExitCode.NMI, ExitCode.SMI, ExitCode.INIT, ExitCode.VINTR))
"""Exits that no instruction of the guest has caused."""

_NOT_YET = frozenset((Event.WATCHED, Event.PAUSED))
"""What comes of a step whose instruction is still to be executed."""


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
        self.agents = Agents(target, machine, trace, self._say)
        self.history = machine.history
        self.inferiors = inferiors
        self.arrivals = Arrivals(machine, inferiors)
        self.breakpoints = breakpoints
        self.watchpoints = watchpoints
        self.catchpoints = catchpoints
        self.into_guest = False
        """Stop at the first instruction of a guest behind the next VMRUN."""
        self.wanted_guest: int | None = None
        """The guest that is meant; None: any."""
        self.on_resume: Callable[[], None] = lambda: None
        """Called before the client's threads go on."""
        self.last_stop: Stop | None = None
        self.ended = False
        """The machine is at its end, and the client has been told or needs not be."""
        self._steppings: dict[ThreadId, Stepping] = {}
        self.holds = Holds(machine, inferiors, lambda: self._steppings.keys())
        self.resumed = Resumed(inferiors, self.holds)
        self._events: deque[StubEvent] = deque()
        self._ticks = LEAST_TICKS
        self._exit_stop: Stop | None = None
        self.input = -1
        """A file descriptor to look at while the machine runs; -1 for none."""
        self.deadline: int | None = None
        """Guest time at which it stops at the latest."""
        self._entering = False
        """VMRUN has begun to enter the guest to stop in: it may refuse yet."""
        self.hits = Hits(machine.clock, inferiors, breakpoints, self.agents, self.resumed, self._say)
        machine.history.on_switch = self._on_switch

    def _say(self, text: str) -> None:
        self._events.append(Output(text))

    def restored(self) -> None:
        """The machine is as it was at another time: nothing of what was to happen does."""
        self._steppings = {}
        self._events.clear()
        self.last_stop = self._exit_stop = self.deadline = None
        self._entering = self.ended = False
        self.hits.resumed_at = self.machine.clock.now
        self.agents.forget()
        self.watchpoints.renew()

    # Stopping together

    def resume(self, actions: Mapping[ThreadId, Action]) -> None:
        self.holds.end()
        self.resumed.set(actions)
        self._steppings = {}
        self._start(actions)

    def _start(self, actions: Mapping[ThreadId, Action]) -> None:
        self.on_resume()
        for thread, action in actions.items():
            if action.step:
                self._steppings[thread] = Stepping(thread, action, self._place(self.inferiors.context(thread)))
        if not self._steppings:
            self.breakpoints.forget_removed()
            self.watchpoints.forget_removed()
        self.hits.resumed_at = self.machine.clock.now
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
        thread = self.resumed.reported(self.inferiors.thread_on(self.machine.cpu))
        self.holds.end()
        self._steppings = {}
        self._events = deque(event for event in self._events if not isinstance(event, Stop))
        return thread

    # Stopping one by one

    def hold(self, threads: Collection[ThreadId]) -> None:
        if not self.holds.active:
            self.resumed.set({})
            self._steppings = {}
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
        self.resumed.attached.discard(pid)
        self.holds.forget(pid)

    @staticmethod
    def _place(context: Context) -> Place:
        return Place(context.read("rip") or 0, context.read("rsp") or 0)

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
            if self.arrivals.pending:
                self._notice_guests()
            if event is not None:
                self._events.append(event)
            elif self.machine.engine.asked or time.perf_counter() >= until:
                return None
        event = self._events.popleft()
        if isinstance(event, Stop):
            if self.resumed.awaited and not (event.thread in self._steppings or self.resumed.acts(event.thread)):
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
        self.holds.note()
        for thread in [thread for thread in self._steppings if not self.inferiors.alive(thread.pid)]:
            del self._steppings[thread]
        if self.deadline is not None and self.machine.clock.now >= self.deadline and self.resumed.awaited:
            return self._at_deadline()
        if self.machine.instructions_left == 0 and self.resumed.awaited:
            return self._at_limit()
        self.catchpoints.live = self.resumed.awaited
        collecting = any(thread not in self.holds for thread in self.trace.stepping)
        self.history.watching = bool(
            self._steppings or collecting or self.watchpoints or self.holds or self.into_guest
        )
        self.agents.judge.enabled = not (self._steppings or collecting)
        if self._steppings:
            return self._advance_steps()
        return self._advance_collecting() if collecting else self._run(bool(self.breakpoints))

    def _at_deadline(self) -> Stop:
        text, self.deadline = f"[guest time {self.deadline} is reached]", None
        return WorldStop(self.resumed.reported(self.inferiors.thread_on(self.machine.cpu)), text=text, why=Why.DEADLINE)

    def _at_limit(self) -> Stop:
        self.machine.limit_instructions(None)
        told = self.resumed.reported(self.inferiors.thread_on(self.machine.cpu))
        return WorldStop(told, text="[the instructions are used up]", why=Why.DEADLINE)

    def _run(self, breakpoints: bool, watch: Collection[Processor] = ()) -> StubEvent | None:
        """Run for about `SLICE_SECONDS`: what that is in guest time, world switches and devices decide."""
        self.machine.engine.look_at(self.input, self._ticks // LOOKS)
        started = time.perf_counter()
        ticks = self._ticks if self.deadline is None else max(1, min(self._ticks, self.deadline - self.machine.clock.now))
        event = self.machine.run(ticks, breakpoints=breakpoints, watch=watch)
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
        if self.hits.at(cpu):
            return self._happened(Event.BREAKPOINT)
        stepping.start = here
        started = cpu.wait_for_sipi
        outcome = machine.step(cpu)
        stays = self.inferiors.thread_on(cpu) == thread
        if outcome == Event.INTERRUPTED and not started:
            # A guest that left by a #VMEXIT is met again at its next VMRUN.
            if stays and self.resumed.manner.into_handlers:
                return Stop(thread)
            stepping.back = here if stays else None
            if stays:
                self._arm()
        elif outcome not in _NOT_YET:
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
        if self.hits.at(cpu):
            return self._happened(Event.BREAKPOINT)
        return self._happened(self._step_and_collect(cpu, thread))

    def _step_and_collect(self, cpu: Processor, thread: ThreadId) -> Event:
        outcome = self.machine.step(cpu)
        self._stepped(cpu, thread, outcome)
        return outcome

    def _stepped(self, cpu: Processor, thread: ThreadId, outcome: Event) -> None:
        """Collect if a thread that does at each step has executed an instruction; one that its hypervisor executes is none."""
        done = outcome != Event.INTERRUPTED and outcome not in _NOT_YET
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
        vcpu, host = self.history.by_vmcb[guest.vmcb][1], ThreadId(HOST, cpu.index + 1)
        if self.arrivals.pending or self.holds.stops(thread) or thread in self.trace.stepping:
            cpu.pause = True
            cpu.hold = self.holds.of(cpu)
        stepping = self._steppings.get(thread)
        if stepping is not None:
            event = guest.eventinj
            injected = Kind(EVENT.get(event, "type")) if event & EVENT.v else None
            here = self._place(SavedContext(cpu, guest.view, vcpu))
            stepping.entered(here, injected, into_handlers=self.resumed.manner.into_handlers)
            self._arm()
            cpu.pause = True
        if self.into_guest and self.resumed.awaited and self.wanted_guest in (None, thread.pid):
            self.into_guest = False
            self._stop_in_guest(cpu, thread)
        elif self.holds.stops(thread):
            # A step into it is done: gdb holds all other threads while it steps one off a breakpoint, and would wait for ever.
            above = set(self.inferiors.above(thread.pid))
            self._events += [Stop(t) for t in self._steppings if t == host or t.pid in above - {HOST}]

    def _stop_in_guest(self, cpu: Processor, thread: ThreadId) -> None:
        """Stop at a guest's first instruction: its thread, or where that does not run for the client, its hypervisor's."""
        host, number = ThreadId(HOST, cpu.index + 1), thread.pid
        told, text = self.resumed.reported(thread), ""
        if not self.holds.active:
            self._steppings.pop(host, None)
        if not self.resumed.acts(thread):
            told = self.resumed.reported(host)
            text = ", which stands still" if thread in self.holds else (
                f": it does not run for gdb. `attach {number}` in a new inferior, or resume it, too (schedule-multiple)"
            )  # fmt: skip
        self._exit_stop = WorldStop(told, text=f"[VMRUN has entered guest {number}{text}]", why=Why.WORLD_SWITCH)
        self._entering = cpu.pause = True

    def _on_exit(self, cpu: Processor, thread: ThreadId, code: int) -> None:
        owner, host = self.history.guests[thread.pid], ThreadId(HOST, cpu.index + 1)
        if self.watchpoints:
            self.watchpoints.remap(owner.number)
        if host in self._steppings or self.holds.stops(host):
            cpu.pause = True
        if not self.resumed.awaited:
            return
        if self._entering:
            refused = f"VMRUN has not entered {owner.name}: {cpu.last_fault}"
            left = f"VMRUN has entered {owner.name}, which left at once by #VMEXIT {exit_name(code)}"
            self._stop_behind_exit(cpu, host, f"[{refused if code == ExitCode.INVALID else left}]")
        elif self._follows(thread, code):
            told = host
            if self.holds.active:  # one by one, the step is over for its thread, too: for that alone if the host is not let run
                told = host if self.resumed.acts(host) else thread
                self._events += [Stop(thread)] if told == host else []
            self._stop_behind_exit(cpu, told, f"[the step has left {owner.name} by #VMEXIT {exit_name(code)}]")

    def _follows(self, thread: ThreadId, code: int) -> bool:
        """Whether a step that leaves its guest so is to end in the hypervisor."""
        stepping = self._steppings.get(thread)
        wanted = code not in _INTERRUPTS or self.resumed.manner.into_handlers
        return self.resumed.manner.follow_host and wanted and stepping is not None and stepping.back is None

    def _stop_behind_exit(self, cpu: Processor, thread: ThreadId, text: str) -> None:
        """Stop at the hypervisor's first instruction behind VMRUN, and say so of this thread."""
        self._exit_stop = WorldStop(self.resumed.reported(thread), text=text, why=Why.WORLD_SWITCH)
        cpu.pause = True

    def _happened(self, event: Event) -> StubEvent | None:
        machine = self.machine
        cpu = machine.cpu
        caught = self._caught()
        if self._exit_stop is not None:
            stop, self._exit_stop, self._entering = self._exit_stop, None, False
            return stop if caught is None else replace(stop, text=f"{stop.text}; {caught.text}")
        if caught is not None:
            return caught
        if self.history.stopped_for and self.resumed.awaited:
            text, self.history.stopped_for = self.history.stopped_for, ""
            return WorldStop(self.resumed.reported(self.inferiors.thread_on(cpu)), text=f"[{text}]", why=Why.NOTICE)
        if event == Event.BREAKPOINT:
            point = self.hits.at(cpu)
            if point is not None:
                self.breakpoints.hit(point, LiveContext(cpu))
                return Stop(self.inferiors.thread_on(cpu), reason=REASONS[point.kind], text=point.text)
            stepping = self._steppings.get(self.inferiors.thread_on(cpu))
            if stepping is not None and stepping.back == self._place(LiveContext(cpu)):
                return None
            thread = self.inferiors.thread_on(cpu)
            entered = self.hits.in_range(cpu, thread)
            if entered is not None:
                return entered
            in_range = self.breakpoints.range_at(cpu.state.linear_rip, thread.pid) is not None
            if not in_range and (self.resumed.acts(thread) or self.hits.told_of_passing):
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
            return self.hits.fired(self.inferiors.thread_on(cpu), self.watchpoints.due(), None)
        return None

    def _caught(self) -> Stop | None:
        """The stop of a catchpoint, if one was hit."""
        caught = self.catchpoints.take()
        if caught is None:
            return None
        told = self.resumed.reported(caught.thread)
        return WorldStop(told, text=caught.text, why=Why.CATCHPOINT, points=caught.points, about=caught.thread)

    def _machine_ended(self) -> StubEvent | None:
        machine = self.machine
        if any(cpu.shutdown for cpu in machine.cpus):
            thread = self.resumed.reported(self.inferiors.thread_on(machine.cpu))
            return WorldStop(thread, Signal.SEGV, text=machine.ended, why=Why.SHUTDOWN)
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
        stop = self.hits.fired(thread, fired, pc)
        return stop or (self._happened(event) if event != Event.WATCHED else None)

    def _notice_guests(self) -> None:
        """Tell of guests that appeared and went since the last look."""
        for event in self.arrivals.take():
            if isinstance(event, Exited):
                self.breakpoints.forget(event.pid)
                self.watchpoints.forget(event.pid)
                self.let_go(event.pid)
            self._events.append(event)
            if isinstance(event, Created) and self.catchpoints.started(event.thread.pid) and (stop := self._caught()) is not None:
                self._events.append(stop)
