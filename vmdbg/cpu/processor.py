"""The processor's cycle: take what is pending where it may be taken, run the engine, decide what its stop means."""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum, auto
from functools import partial

from introspect.exits import ExitCode
from vmdbg.engine.engine import VMEXIT, Engine, Stop
from vmdbg.engine.runtime import Reason
from vmdbg.engine.state import HF_LET, SS, TR
from vmdbg.platform.bus import Bus
from vmdbg.platform.cpuid import CpuidConfig
from vmdbg.svm import avic, world
from vmdbg.svm.switch import Switcher
from vmdbg.svm.tlb import Tlb

from . import attention, exits, smm, steps, transfers
from .core import ExtInt, Observer
from .debug import DebugRegisters
from .events import raise_event
from .faults import CpuFault, NestedPageFault, WatchedAccess
from .pending import Pending

_EXIT, _UNDEFINED = int(Reason.EXIT), VMEXIT + int(ExitCode.EXCP_UD)
_POSTPONED = Stop(-1)
"""In place of a stop of the engine: the processor goes on with what was postponed."""


class Outcome(IntEnum):
    """Why `Processor.run` returned."""

    DEADLINE = auto()
    """Guest time has reached the deadline, or a device was touched and the deadline may be another one now."""
    HALTED = auto()
    """Nothing to execute until an interrupt comes."""
    SHUTDOWN = auto()
    """A triple fault."""
    BREAKPOINT = auto()
    """Before the instruction at an armed address."""
    STEPPED = auto()
    """One instruction is done, or with `step` an exception in its place."""
    INTERRUPTED = auto()
    """With `step`: the processor took an event instead of executing an instruction."""
    WATCHED = auto()
    """An instruction is about to access a watched page at `watched` (a system-physical address)."""
    PAUSED = auto()
    """At a boundary where `pause` was found set, or where there was input for the debugger; or amid an instruction or event:
    `postponed`."""


class Processor(Pending):
    """A whole logical processor."""

    def __init__(
        self, index: int, engine: Engine, bus: Bus, cpuid_config: CpuidConfig, extint: ExtInt, observer: Observer
    ) -> None:
        super().__init__(index, engine, bus, cpuid_config, extint, observer)
        self.debug = DebugRegisters(self)
        self.watched: Stop | None = None
        world.set_intercepts(self.state, None)

    def use_switcher(self, switcher: Switcher) -> None:
        """Have common world switches made in C."""
        self.switcher = switcher
        switcher.state.dr[:] = self.dr[:]
        self.dr = switcher.state.dr
        self.crossing = switcher.state.crossing

    def use_tlb(self, tlb: Tlb) -> None:
        """Keep translations until they must be forgotten."""
        self.tlb = self.executor = tlb
        self.state.strict = True
        world.set_intercepts(self.state, self.guest)

    def set(self, field: str, value: int) -> None:
        if field == "smm_ctl":
            smm.control(self, value)
        elif field == "vm_cr":
            self.on_vm_cr()
        else:
            super().set(field, value)

    def host_save_area(self) -> memoryview:
        """Where the host's state is while a guest runs, in the VMCB's layout: the page at VM_HSAVE_PA."""
        return world.hsave(self)

    @property
    def where(self) -> str:
        """In words, where it executes."""
        who = f"a guest (VMCB {self.guest.vmcb:#x})" if self.guest is not None else "the hypervisor"
        if self.smm is not None:
            who += ", in SMM,"
        return f"RIP {self.state.rip:#x} of {who} on CPU {self.index}"

    def run(self, deadline: int, *, breakpoints: bool = False, step: bool = False) -> Outcome:
        """Execute until guest time `deadline`; with `step`, one instruction or event."""
        clock = self.engine.clock
        changes = clock.changes
        while True:
            if self.shutdown:
                return Outcome.SHUTDOWN
            if self.pause:
                self.pause = False
                return Outcome.PAUSED
            if self.postponed is not None and not self.hold:
                outcome = self._stopped(_POSTPONED)
                if step or outcome is not None:
                    return outcome or (Outcome.SHUTDOWN if self.shutdown else Outcome.STEPPED)
                if clock.changes != changes:
                    return Outcome.DEADLINE
                continue
            quiet = self.quiet()
            if not quiet and self.take_event():
                steps.trap(self)
                if self.postponed is not None:
                    return Outcome.PAUSED
                if step:
                    return Outcome.INTERRUPTED
                if clock.now >= deadline:
                    return Outcome.DEADLINE
                continue
            if self.hold or self.wait_for_sipi or (self.halted and not self.stored_to(self.awaited)):
                return Outcome.HALTED
            self.halted = False
            if clock.now >= deadline and not step:
                return Outcome.DEADLINE
            window = nmi = False
            if not quiet:
                window, nmi = self.waits_for_window(), self.waits_for_nmi()
                if not self.gif:
                    world.stop_at(self.state, ExitCode.STGI)
                if nmi and self.state.nmi_blocked:
                    world.stop_at(self.state, ExitCode.IRET)
            held = (window or nmi or self.smi_pending) and self.state.shadow
            if self.debug.active:
                found = steps.run_debugged(self, deadline, window, held, breakpoints, step)
                if found is None:
                    continue
                stop = found
            elif step or self.looks_for_branches or held:
                if breakpoints and self.state.linear_rip in self.engine.armed:
                    return Outcome.BREAKPOINT
                stop = steps.step(self)
            elif quiet and self._switches_in_c():
                switcher = self.switcher
                assert switcher is not None
                address = switcher.prepare(self.guest, deadline, self.tsc_offset)
                judge = self._judge() if breakpoints else 0
                stop = self.engine.run(
                    self.state, self.npt, deadline, breakpoints=breakpoints, switcher=address, judge=judge
                )
                if switcher.has_switched():
                    self._follow(switcher)
            else:
                judge = self._judge() if breakpoints else 0
                stop = self.executor.run(
                    self.state, self.npt, deadline, window=window, breakpoints=breakpoints, judge=judge
                )
            outcome = self._stopped(stop)
            if outcome is not None and (step or outcome != Outcome.STEPPED):
                return outcome
            if step:
                return Outcome.SHUTDOWN if self.shutdown else Outcome.STEPPED
            if clock.changes != changes:
                return Outcome.DEADLINE

    def _judge(self) -> int:
        """What breakpoints are dealt with by in C; 0 where each is Python's."""
        return self.engine.judge.prepare(self) if self.engine.judge is not None else 0

    def _switches_in_c(self) -> bool:
        """Nothing is pending: may world switches go by unseen?"""
        return (
            self.switcher is not None and not self.observer.attentive and self.task_guard is None and not self.ne_is_ours
            and self.state.root is None
        )

    def _follow(self, switcher: Switcher) -> None:
        """Switches were made in C: come to where the CPU is now."""
        before, found = self.guest, switcher.where()
        self.monitored = None
        self.guest, self.npt = (None, self.engine.physical.host) if found is None else found
        self.observer.switched(self, before, self.guest)

    def _stopped(self, stop: Stop) -> Outcome | None:
        """Act on a stop of the engine; None to go on."""
        reason = stop.reason
        try:
            if reason == _EXIT:
                if stop.watched is not None:
                    physical, page = self.engine.physical, stop.watched >> 12
                    if physical.guards_against(page, stop.write) and not physical.watches(page, stop.write):
                        return self._on_guarded(stop)
                    self.watched = stop
                    return Outcome.WATCHED
                if stop.apic is not None:
                    return self._on_apic_access(stop.apic)
                if stop.code == _UNDEFINED and attention.wanted(self):
                    return self._attend()
                following = exits.act(self, stop)
                if following is not None:
                    return self._stopped(following)
            elif reason == Reason.IO:
                exits.port_access(self)
            elif reason == Reason.SYSCALL:
                self.debug.moved = True
                transfers.syscall(self)
            elif reason == Reason.SYSENTER:
                self.debug.moved = True
                transfers.sysenter(self)
            elif reason == Reason.BUDGET:
                return Outcome.DEADLINE
            elif reason == Reason.BREAK:
                return Outcome.BREAKPOINT
            elif reason == Reason.ASKED:
                return Outcome.PAUSED
            elif stop is _POSTPONED:
                following = self._let_go()
                if following is not None:
                    return self._stopped(following)
            elif reason == Reason.STEPPED and not self.due and self.postponed is None:
                return Outcome.STEPPED
        except CpuFault as fault:
            raise_event(self, fault.event())
        except NestedPageFault as nested:
            world.nested_fault_exit(self, nested.fault, None)
        except WatchedAccess as access:
            self.watched = Stop(reason, stop.code, watched=access.spa, write=access.write)
            self.port_seen = stop is _POSTPONED
            return Outcome.WATCHED
        steps.trap(self)
        return None if self.postponed is None else Outcome.PAUSED

    def _let_go(self) -> Stop | None:
        """Do what was postponed."""
        action, self.postponed = self.postponed, None
        return action() if action is not None else None

    def _attend(self) -> Outcome | None:
        """Look at the instruction at RIP, then have it executed after all."""
        state = self.state
        flags = attention.check(self)
        state.hflags |= HF_LET
        try:
            outcome = self._stopped(steps.step(self))
        finally:
            state.heed()
        if outcome != Outcome.WATCHED:
            state.mxcsr |= flags
        return None if outcome == Outcome.STEPPED else outcome

    def _on_guarded(self, stop: Stop) -> Outcome | None:
        """An access to a page with data breakpoints or, if a store, the page of a TSS: the beginning of a task switch."""
        intercepted = self.guest is not None and self.guest.intercepts_task_switch
        if stop.write and (intercepted or self.tlb is not None):
            switch = transfers.task_switch(self)
            if switch is not None:
                if intercepted:
                    world.task_switch_exit(self, switch, None)
                else:
                    transfers.switch_tasks(self, switch.selector, switch.source)
                return None
        debug = self.debug
        bits, before, delays = debug.touches(stop.write), debug.values(), debug.data and self._loads_ss()
        task = self.state.base(TR)
        with self.engine.physical.unguarded():
            stepped = steps.step(self)
        if steps.retired(stepped):
            bits |= debug.changes(before)
            if self.state.base(TR) != task:
                debug.task_switch()
            if delays:
                debug.held |= bits
            else:
                self.due |= bits
        outcome = self._stopped(stepped)
        return None if outcome == Outcome.STEPPED else outcome

    def _loads_ss(self) -> bool:
        """Whether the instruction at RIP is MOV SS or POP SS."""
        insn = self.instruction()
        return insn.opcode == 0x17 or (insn.opcode == 0x8E and insn.modrm >> 3 & 7 == SS)

    def _on_apic_access(self, gpa: int) -> Outcome | None:
        """An access of the guest to its virtual APIC: an exit comes before it, behind it, or not at all."""
        guest = self.guest
        assert guest is not None
        assert guest.avic is not None
        refused = avic.refused(self, guest.avic)
        if refused is not None:
            world.vmexit(self, *refused)
            return None
        stop = self.executor.access_apic(self.state, self.npt, gpa)
        due, outcome = guest.avic.exit, None
        # A single-step trap is delivered before the exit; one that is intercepted would be a second exit, and is not made.
        if due is None or not guest.intercepts(ExitCode.EXCP_DB):
            outcome = self._stopped(stop)
        if due is not None and self.guest is guest:
            if self.postponed is not None:
                self.postponed = partial(self._exit_behind, self.postponed, due)
            else:
                world.vmexit(self, *due)
        return outcome

    def _exit_behind(self, action: Callable[[], Stop | None], due: tuple[int, int, int]) -> None:
        action()
        world.vmexit(self, *due)
