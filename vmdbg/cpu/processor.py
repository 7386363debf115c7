"""The processor's cycle: take what is pending where it may be taken, run the engine, decide what its stop means."""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum, auto

from introspect.exits import PF_ERROR, ExitCode
from introspect.paging import NestedFault
from introspect.registers import CR4
from introspect.vmcb import V_INTR
from vmdbg.engine.engine import EXCEPTION, VMEXIT, Engine, Stop
from vmdbg.engine.runtime import Reason
from vmdbg.engine.state import CS, DS, ES, FS, GS, HF_SMAP, IDTR, RCX, RDX, SS, TR
from vmdbg.platform.bus import Bus
from vmdbg.platform.cpuid import CpuidConfig
from vmdbg.platform.msrs import DEBUGCTL, DEBUGCTL_BTF, VM_CR, VM_CR_R_INIT
from vmdbg.svm import avic, world
from vmdbg.svm.guest import Guest
from vmdbg.svm.switch import Switcher
from vmdbg.svm.tlb import Tlb

from . import instructions, smm
from .core import DR6_BS, DR6_RESET, DR7_RESET, RFLAGS_IF, RFLAGS_RF, RFLAGS_VM, Cpu, ExtInt, Observer
from .debug import DebugRegisters
from .decode import Instruction, Undecodable, decode, has_branched
from .events import DELIVERY, raise_event, shut_down
from .faults import DB, GP, MF, NM, NMI, PF, SX, UD, CpuFault, Event, Kind, NestedPageFault, WatchedAccess

_WRITE_TRAPS = 0xFFFF8000
"""In intercept word 4: EFER and CR0 to CR15, after the write."""


_PREFIXES = b"\x26\x2e\x36\x3e\x64\x65\x66\x67\xf2\xf3"
"""All but LOCK, which makes an undefined instruction of those that `_undefined` looks for."""
_PREFIXES_64 = _PREFIXES + bytes(range(0x40, 0x50))
_PLAIN = b"\x26\x2e\x36\x3e\x64\x65\x67"
_PLAIN_64 = _PLAIN + bytes(range(0x40, 0x50))

_UNDEFINED = {b"\xc8": ExitCode.MONITOR, b"\xc9": ExitCode.MWAIT, b"\xfd": ExitCode.RDPRU}
"""Instructions of opcode 0F 01 that the engine takes for undefined ones, the first two outside CPL 0, by their third byte."""
_EXIT, _SWINT, _V_PENDING = int(Reason.EXIT), int(ExitCode.SWINT), V_INTR.v_irq | V_INTR.v_nmi
SX_INIT = 1
"""#SX's error code for a redirected INIT (APM2 8.4.3, 15.28)."""
_PARTICULAR = frozenset(
    (*range(0x40), ExitCode.MSR, ExitCode.RDTSC, ExitCode.INVLPG, ExitCode.WBINVD, ExitCode.PAUSE, ExitCode.MWAIT)
)
"""Exits that more than one intercept bit decides, or with an EXITINFO1."""


def _retired(stop: Stop) -> bool:
    """Whether a stepped instruction is done."""
    return stop.reason in (0, Reason.STEPPED) or (stop.reason == _EXIT and stop.code == VMEXIT + EXCEPTION + DB)


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
    """At a boundary where `pause` was found set."""


class Processor(Cpu):
    """A whole logical processor."""

    def __init__(
        self, index: int, engine: Engine, bus: Bus, cpuid_config: CpuidConfig, extint: ExtInt, observer: Observer
    ) -> None:
        super().__init__(index, engine, bus, cpuid_config, observer)
        self.debug = DebugRegisters(self)
        self.interrupt_controller = extint
        self.watched: Stop | None = None
        world.set_intercepts(self.state, None)

    def use_switcher(self, switcher: Switcher) -> None:
        """Have common world switches made in C."""
        self.switcher = switcher
        switcher.state.dr[:] = self.dr[:]
        self.dr = switcher.state.dr

    def use_tlb(self, tlb: Tlb) -> None:
        """Keep translations until they must be forgotten."""
        self.tlb = self.executor = tlb
        self.state.strict = True
        world.set_intercepts(self.state, self.guest)

    def reset(self) -> None:
        """Power-on (APM2 14.1.3); the boot code sets what differs."""
        self.nmi_pending = self.smi_pending = self.init_pending = False
        self.sipi_vector = None
        self.init_state()
        self.state.xcr0 = instructions.XCR0_X87
        self.msrs.reset(self)
        self.lapic.reset()
        self.gif = True
        self.smm, self.smi_pending = None, False

    def set(self, field: str, value: int) -> None:
        if field == "smm_ctl":
            smm.control(self, value)
        else:
            super().set(field, value)

    def init_state(self) -> None:
        """The registers as INIT leaves them (APM2 14.1.3); the MSRs, FPU and cache control stay."""
        s = self.state
        self.guest = None
        if self.switcher is not None:
            self.switcher.left()
        self.npt = self.engine.physical.host
        for number in range(16):
            s.set_reg(number, 0)
        s.set_reg(RDX, 0x00830F10)
        s.set_cr(0, 0x60000010)
        for number in (2, 3, 4):
            s.set_cr(number, 0)
        s.efer = 0
        s.rflags = 2
        for segment in (ES, SS, DS, FS, GS):
            s.set_segment(segment, 0, 0, 0xFFFF, 0x93)
        s.set_segment(CS, 0xF000, 0xFFFF0000, 0xFFFF, 0x9B)
        s.set_segment(6, 0, 0, 0xFFFF, 0x82)
        s.set_segment(7, 0, 0, 0xFFFF, 0x8B)
        s.set_table(8, 0, 0xFFFF)
        s.set_table(IDTR, 0, 0xFFFF)
        s.rip = 0xFFF0
        self.dr[:] = [0, 0, 0, 0, 0, 0, DR6_RESET, DR7_RESET]
        self.debug.update()
        self.due = self.debug.held = 0
        s.nmi_blocked = False
        s.shadow = False
        self.halted = self.shutdown = False
        self.monitored = None
        s.refresh(0)
        self.hold_pdptes()
        self.guard_tasks()
        self.guard_ferr()
        world.set_intercepts(s, None)
        if self.tlb is not None:
            self.tlb.forget_all()
        self.flush()

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

    @property
    def runnable(self) -> bool:
        """Whether the processor has something to do now: code to execute or an event to take."""
        if self.shutdown:
            return False
        if self.wait_for_sipi:
            return self.sipi_vector is not None
        return not self.halted or self._wakes()

    def _wakes(self) -> bool:
        """An event ends HLT and MWAIT, whether the guest's hypervisor sees it or the processor takes it; a store MWAIT only."""
        if self.stored_to(self.awaited):
            return True
        outside = self.smm is None and (self.init_pending or self.smi_pending)
        if self.gif and (outside or (self.nmi_pending and not self._nmi_masked)):
            return True  # HLT has ended any shadow
        return self.gif and (
            self._interrupt_allowed(self._physical_if()) or self._virtual_allowed() or self._virtual_nmi_allowed()
        )

    def _physical_pending(self) -> bool:
        return self.extint_level or self.lapic.pending() is not None

    def _physical_if(self) -> bool:
        """The IF that gates physical interrupts: the host's while a guest runs with V_INTR_MASKING (APM2 15.21.1)."""
        guest = self.guest
        if guest is not None and guest.v_intr_masking:
            return guest.host_if
        return bool(self.state.rflags & RFLAGS_IF)

    @property
    def _nmi_masked(self) -> bool:
        """Whether physical NMIs are masked: a guest with virtual ones has a mask of its own in their place."""
        guest = self.guest
        return guest.host_nmi_blocked if guest is not None and guest.v_nmi_enabled else self.state.nmi_blocked

    def _virtual_nmi_allowed(self) -> bool:
        guest, s = self.guest, self.state
        return guest is not None and guest.v_nmi_pending and not s.nmi_blocked and not s.shadow

    def _interrupt_allowed(self, enabled: bool) -> bool:
        return enabled and not self.state.shadow and self._physical_pending()

    def _virtual_allowed(self) -> bool:
        guest = self.guest
        return (
            guest is not None and guest.v_intr_deliverable and bool(self.state.rflags & RFLAGS_IF) and not self.state.shadow
        )

    def _take_event(self) -> bool:
        """Take the most urgent event that this instruction boundary allows (APM2 8.5, 15.21).  True if one was."""
        if self.wait_for_sipi:
            vector = self.sipi_vector
            if vector is None:
                return False
            self.sipi_vector = None
            self.wait_for_sipi = False
            s = self.state
            s.set_segment(CS, vector << 8, vector << 12, 0xFFFF, 0x9B)
            s.rip = 0
            s.refresh(0)
            return True
        if not self.gif:
            return False
        guest = self.guest
        if self.init_pending and self.smm is None:
            if guest is not None and guest.intercepts(ExitCode.INIT):  # stays pending for the host (APM2 15.13.4)
                self._exit(ExitCode.INIT)
                return True
            self.init_pending = False
            if self.msrs.values[VM_CR] & VM_CR_R_INIT:
                raise_event(self, Event(SX, Kind.EXCEPTION, SX_INIT, trap=True))
                return True
            self.init_state()
            self.lapic.init()
            self.wait_for_sipi = self.index != 0
            return True
        if self.smi_pending and self.smm is None and not self.state.shadow:
            if guest is not None and guest.intercepts(ExitCode.SMI) and not self.msrs.smm_locked:
                info1, info2 = smm.exit_info(self)
                self.halted = False
                world.vmexit(self, ExitCode.SMI, info1, info2)
                return True
            self.smi_pending = False
            smm.enter(self)
            self.engine.clock.now += DELIVERY
            return True
        if self.nmi_pending and not self._nmi_masked and not self.state.shadow:
            if guest is not None and guest.intercepts(ExitCode.NMI):
                self._exit(ExitCode.NMI)
                return True
            self.nmi_pending = False
            self.halted = False
            self.state.nmi_blocked = True
            raise_event(self, Event(NMI, Kind.NMI))
            return True
        if self._physical_pending() and not self.state.shadow and self._physical_if():
            if guest is not None and guest.intercepts(ExitCode.INTR):
                self._exit(ExitCode.INTR)
                return True
            self.halted = False
            vector = self.lapic.pending()
            if vector is not None:
                vector = self.lapic.acknowledge()
            else:
                vector = self.interrupt_controller.acknowledge()
                self.lapic.extint_taken()
            raise_event(self, Event(vector, Kind.INTR))
            return True
        if guest is not None and self._virtual_nmi_allowed():
            self.halted = False
            guest.v_intr &= ~V_INTR.v_nmi
            self.state.nmi_blocked = True
            raise_event(self, Event(NMI, Kind.NMI))
            return True
        if guest is not None and self._virtual_allowed():
            if guest.intercepts(ExitCode.VINTR):
                self._exit(ExitCode.VINTR)
                return True
            self.halted = False
            raise_event(self, Event(world.take_virtual_interrupt(self), Kind.INTR))
            return True
        return False

    def _exit(self, code: int) -> None:
        """A #VMEXIT that interrupts the guest between instructions."""
        self.halted = False
        world.vmexit(self, code)

    def _waiting_for_window(self) -> bool:
        """Something is pending that only RFLAGS.IF holds back."""
        if not self.gif:
            return False
        guest = self.guest
        flags = self.state.rflags
        if flags & RFLAGS_IF and not self.state.shadow:
            return False
        if self._physical_pending() and (guest is None or not guest.v_intr_masking):
            return True
        return guest is not None and guest.v_intr_deliverable

    def _waiting_nmi(self) -> bool:
        """An NMI is pending, the processor's or a virtual one."""
        return self.nmi_pending or (self.guest is not None and self.guest.v_nmi_pending)

    def _quiet(self) -> bool:
        """Nothing is pending at all: the common case, found out with few questions."""
        guest = self.guest
        return not (
            self.extint_level or self.nmi_pending or self.init_pending or self.smi_pending or self.wait_for_sipi
            or (guest is not None and (guest.v_intr & _V_PENDING or (guest.avic is not None and guest.avic.request)))
            or self.lapic.pending() is not None
        )  # fmt: skip

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
            quiet = self._quiet()
            if not quiet and self._take_event():
                self._trap()
                if step:
                    return Outcome.INTERRUPTED
                if clock.now >= deadline:
                    return Outcome.DEADLINE
                continue
            if self.wait_for_sipi or (self.halted and not self.stored_to(self.awaited)):
                return Outcome.HALTED
            self.halted = False
            if clock.now >= deadline and not step:
                return Outcome.DEADLINE
            window = nmi = False
            if not quiet:
                window, nmi = self._waiting_for_window(), self._waiting_nmi()
                if not self.gif:
                    world.stop_at(self.state, ExitCode.STGI)
                if nmi and self.state.nmi_blocked:
                    world.stop_at(self.state, ExitCode.IRET)
            held = (window or nmi or self.smi_pending) and self.state.shadow
            if self.debug.active:
                found = self._run_debugged(deadline, window, held, breakpoints, step)
                if found is None:
                    continue
                stop = found
            elif step or self.looks_for_branches or held:
                if breakpoints and self.state.linear_rip in self.engine.armed:
                    return Outcome.BREAKPOINT
                stop = self._step()
            elif quiet and self._switches_in_c():
                switcher = self.switcher
                assert switcher is not None
                address = switcher.prepare(self.guest, deadline, self.tsc_offset)
                stop = self.engine.run(self.state, self.npt, deadline, breakpoints=breakpoints, switcher=address)
                if switcher.has_switched():
                    self._follow(switcher)
            else:
                stop = self.executor.run(self.state, self.npt, deadline, window=window, breakpoints=breakpoints)
            outcome = self._stopped(stop)
            if outcome is not None and (step or outcome != Outcome.STEPPED):
                return outcome
            if step:
                return Outcome.SHUTDOWN if self.shutdown else Outcome.STEPPED
            if clock.changes != changes:
                return Outcome.DEADLINE

    def _run_debugged(self, deadline: int, window: bool, held: bool, breakpoints: bool, step: bool) -> Stop | None:
        """Run the engine, or step it, with debug registers enabled; None to look again where it is."""
        state, engine, debug = self.state, self.engine, self.debug
        debug.prepare()
        at_hook = state.linear_rip in engine.armed
        if at_hook and breakpoints and not step:
            return Stop(Reason.BREAK)  # the debugger's come first: it steps if it has none here
        bits = debug.instruction()
        if bits:
            debug.report(bits)
            raise_event(self, Event(DB, Kind.EXCEPTION))
            return Stop(Reason.STEPPED)
        if debug.held:
            stop = self._step()
            self.due |= debug.held
            debug.held = 0
            return stop
        if step or held or at_hook or self.looks_for_branches or state.rflags & RFLAGS_RF:
            return self._step()
        stop = self.executor.run(state, self.npt, deadline, window=window, breakpoints=breakpoints or bool(debug.instructions))
        return None if stop.reason == Reason.BREAK and not breakpoints else stop

    def _step(self) -> Stop:
        """A step of the engine.  RFLAGS.RF is clear behind the instruction, not before, and not amid a repeated one.

        Where DebugCtl asks for it, see whether the instruction is a branch that is taken.
        """
        state, looks = self.state, self.looks_for_branches
        if looks:
            self.branched = False
            code, bits = self.fetch(), self.bits
        resumes, rip = state.rflags & RFLAGS_RF, state.rip
        state.rflags &= ~RFLAGS_RF
        stop = self.executor.step(state, self.npt)
        if looks and _retired(stop):
            try:
                if has_branched(decode(code, bits), rip, state.rip, bits):
                    self.branch(rip, state.rip)
            except Undecodable:
                pass
        if resumes and state.rip == rip and (not _retired(stop) or self.engine.rt.rep):
            state.rflags |= RFLAGS_RF
        return stop

    def _trap(self) -> None:
        """Raise the #DB that is due behind an instruction, if one is."""
        if self.due:
            bits, self.due = self.due, 0
            if bits & DR6_BS and self.msrs.values[DEBUGCTL] & DEBUGCTL_BTF and not self.branched:
                bits &= ~DR6_BS  # it traps behind branches only (APM2 13.1.4)
                if not bits:
                    return
            self.debug.report(bits)
            raise_event(self, Event(DB, Kind.EXCEPTION, trap=True))

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
                self._on_exit(stop)
            elif reason == Reason.IO:
                self._on_io()
            elif reason == Reason.SYSCALL:
                self.debug.moved = True
                instructions.syscall(self)
            elif reason == Reason.SYSENTER:
                self.debug.moved = True
                instructions.sysenter(self)
            elif reason == Reason.BUDGET:
                return Outcome.DEADLINE
            elif reason == Reason.BREAK:
                return Outcome.BREAKPOINT
            elif reason == Reason.STEPPED and not self.due:
                return Outcome.STEPPED
        except CpuFault as fault:
            raise_event(self, fault.event())
        except NestedPageFault as nested:
            world.nested_fault_exit(self, nested.fault, None)
        except WatchedAccess as access:
            self.watched = Stop(reason, stop.code, watched=access.spa, write=access.write)
            return Outcome.WATCHED
        self._trap()
        return None

    def _on_guarded(self, stop: Stop) -> Outcome | None:
        """An access to a page with data breakpoints or, if a store, the page of a TSS: the beginning of a task switch."""
        intercepted = self.guest is not None and self.guest.intercepts_task_switch
        if stop.write and (intercepted or self.tlb is not None):
            switch = instructions.task_switch(self)
            if switch is not None:
                if intercepted:
                    world.task_switch_exit(self, switch, None)
                else:
                    instructions.switch_tasks(self, switch.selector, switch.source)
                return None
        debug = self.debug
        bits, before, delays = debug.touches(stop.write), debug.values(), debug.data and self._loads_ss()
        task = self.state.base(TR)
        with self.engine.physical.unguarded():
            stepped = self._step()
        if _retired(stepped):
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

    def iret(self) -> None:
        """IRET that an NMI waits for, which the engine then masks no more, or with breakpoints enabled: the RF that it loads is
        for one instruction, which the engine forgets."""
        self.debug.moved = True
        self._in_the_engine(ExitCode.IRET)

    def _on_apic_access(self, gpa: int) -> Outcome | None:
        """An access of the guest to its virtual APIC: an exit comes before it, behind it, or not at all."""
        guest = self.guest
        assert guest is not None
        assert guest.avic is not None
        refused = avic.refused(self, guest.avic)
        if refused is not None:
            world.vmexit(self, *refused)
            return None
        stop = self.engine.access_apic(self.state, self.npt, gpa)
        due, outcome = guest.avic.exit, None
        # A single-step trap is delivered before the exit; one that is intercepted would be a second exit, and is not made.
        if due is None or not guest.intercepts(ExitCode.EXCP_DB):
            outcome = self._stopped(stop)
        if due is not None and self.guest is guest:
            world.vmexit(self, *due)
        return outcome

    def load_task_register(self) -> None:
        """LTR in a guest whose task switches are intercepted: executed by the engine, then the new TSS is looked after."""
        self._in_the_engine(ExitCode.TR_WRITE)

    def _in_the_engine(self, code: int) -> None:
        """Execute the instruction at RIP that the engine stopped before because of `code`."""
        world.let_through(self.state, code)
        stop = self._step()
        world.set_intercepts(self.state, self.guest)
        self._stopped(stop)

    def _on_exit(self, stop: Stop) -> None:
        if stop.npf is not None:
            if stop.npf.gpa >> self.physical_bits:
                raise world.reserved_bit_fault(self)
            world.nested_fault_exit(self, self._classify(stop), None)
            return
        code = stop.code - VMEXIT
        if 0x40 <= code < 0x60:
            if code == EXCEPTION + UD:
                self._undefined()
            else:
                self._on_exception(code - EXCEPTION)
            return
        guest = self.guest
        if code == _SWINT:
            vector, size, opcode = instructions.software_interrupt(self)
            if opcode == 0xCD and guest is not None and guest.intercepts(ExitCode.SWINT):
                world.vmexit(self, ExitCode.SWINT, vector, nrip=self.state.rip + size)
            else:
                instructions.interrupt(self, vector, size, opcode)
            return
        if guest is not None and self._intercepted(guest, code):
            return
        handler = instructions.EMULATE.get(code)
        if handler is not None:
            trapped = guest if guest is not None and guest.words[4] & _WRITE_TRAPS else None
            wrmsr = trapped is not None and code == ExitCode.MSR and self.instruction().opcode == 0x0F30
            handler(self)
            if trapped is not None:
                self._write_trap(trapped, code, wrmsr)
            if guest is not None and guest.intercepts_task_switch:
                self.guard_tasks()
            return
        action = _SVM.get(code)
        if action is None:
            raise AssertionError(f"the engine stopped for exit code {code:#x}, which nobody asked for")
        action(self)
        if self.guest is not None and self.guest.intercepts_task_switch:
            self.guard_tasks()

    def vmrun(self) -> None:
        event = world.vmrun(self, instructions.length(self))
        if event is not None:
            raise_event(self, event, injected=True)

    def vmload(self) -> None:
        world.vmload(self, instructions.length(self))

    def vmsave(self) -> None:
        world.vmsave(self, instructions.length(self))

    def rsm(self) -> None:
        """RSM (APM2 10.3.8).  A guest of the SMM handler has none of its own."""
        if self.smm is None or self.guest is not None:
            raise CpuFault(UD)
        self.engine.clock.now += instructions.length(self)
        if not smm.leave(self):
            shut_down(self)

    def stgi(self) -> None:
        self.advance(instructions.length(self))
        self._set_gif(True)
        world.set_intercepts(self.state, self.guest)

    def clgi(self) -> None:
        self.advance(instructions.length(self))
        self._set_gif(False)

    def _set_gif(self, value: bool) -> None:
        """STGI and CLGI: of a guest with a virtual GIF, that (APM2 15.33.2)."""
        guest = self.guest
        if guest is None or not guest.v_gif_enabled:
            self.gif = value
        elif value:
            guest.v_intr |= V_INTR.v_gif
        else:
            guest.v_intr &= ~V_INTR.v_gif

    def _write_trap(self, guest: Guest, code: int, wrmsr: bool) -> None:
        """Traps after a write of CRn or EFER: EXITINFO1 is the new value (APM2 15.35.6)."""
        s = self.state
        if ExitCode.CR0_WRITE <= code < ExitCode.CR0_WRITE + 16:
            number = code - ExitCode.CR0_WRITE
            trap = ExitCode.CR0_WRITE_TRAP + number
            value = {0: self.cr0, 8: instructions.read_tpr(self)}.get(number, s.cr(number))
        elif wrmsr and s.reg(1) & 0xFFFFFFFF == 0xC0000080:
            trap, value = int(ExitCode.EFER_WRITE_TRAP), s.efer
        else:
            return
        if guest.intercepts(trap):
            world.vmexit(self, trap, value, nrip=s.rip)

    def _intercepted(self, guest: Guest, code: int) -> bool:
        """Leave the guest if its hypervisor intercepts the instruction at RIP; True if it does.

        Raises `CpuFault` for exceptions that come before the intercept.
        """
        check = instructions.CHECK.get(code)
        if check is not None:
            check(self)
        info1 = 0
        if code not in _PARTICULAR:
            if not guest.intercepts(code):
                return False
        elif code == ExitCode.MSR:
            insn = self.instruction()
            write = insn.opcode == 0x0F30
            if not world.msr_intercepted(self, self.state.reg(1) & 0xFFFFFFFF, write):
                return False
            info1 = int(write)
        elif code == 0x10:
            found = self._cr0_write(guest)
            if found is None:
                return False
            code, info1 = found
        elif code < 0x40:
            code, info1, wanted = self._register_access(guest, code)
            if not wanted:
                return False
        elif code == ExitCode.RDTSC and instructions.is_rdtscp(self):
            code = ExitCode.RDTSCP
            if not guest.intercepts(code):
                return False
        elif code == ExitCode.WBINVD and self.instruction().opcode == 0x0F08:
            code = ExitCode.INVD
            if not guest.intercepts(code):
                return False
        elif code == ExitCode.MWAIT:
            if not guest.intercepts(code):
                code = ExitCode.MWAIT_COND
                if self.monitored is None or self.stored_to(self.monitored) or not guest.intercepts(code):
                    return False
        elif not guest.intercepts(code):
            return False
        elif code == ExitCode.PAUSE:
            if not guest.pause(self.engine.clock.now):
                return False
        elif code == ExitCode.INVLPG:
            info1 = instructions.operand_linear(self, self.instruction())
        world.vmexit(self, code, info1, nrip=self.state.rip + instructions.length(self))
        return True

    def _register_access(self, guest: Guest, code: int) -> tuple[int, int, bool]:
        """MOV of CR and DR: exit code, EXITINFO1 with the general register, and whether it is intercepted."""
        insn = self.instruction()
        if code < 0x20:
            move = insn.opcode in (0x0F20, 0x0F22)
            return code, (1 << 63 | insn.rm) if move else 0, guest.intercepts(code)
        code = (code & ~0xF) | insn.reg
        return code, insn.rm, guest.intercepts(code)

    def _cr0_write(self, guest: Guest) -> tuple[int, int] | None:
        """Exit code and EXITINFO1 of MOV to CR0, LMSW and CLTS, if one of two intercepts wants them (APM2 15.8.1, table 15-7).

        The selective one sees changes of bits other than TS and MP, and any LMSW.
        """
        insn = self.instruction()
        move = insn.opcode == 0x0F22
        info1 = 1 << 63 | insn.rm if move else 0
        if guest.intercepts(ExitCode.CR0_WRITE):
            return ExitCode.CR0_WRITE, info1
        if not guest.intercepts(ExitCode.CR0_SEL_WRITE) or insn.opcode == 0x0F06:
            return None
        if move and not (self.cr0 ^ instructions.cr0_value(instructions.moved(self, insn))) & ~0xA:
            return None
        return ExitCode.CR0_SEL_WRITE, info1

    def _on_exception(self, vector: int) -> None:
        state = self.state
        if vector == MF and self.ne_is_ours:
            world.vmexit(self, ExitCode.FERR_FREEZE)
            return
        if vector == PF:
            error, address = state.error_code, self.engine.fault_address()
            if state.cpl == 3 and not error & PF_ERROR.U and self._far_transfer_stack(address):
                # The engine makes the stack accesses of far transfers with supervisor rights, which SMAP then refuses.
                if error == PF_ERROR.P | error & PF_ERROR.W and state.cr(4) & CR4.SMAP:
                    found = self.permits(address, write=bool(error & PF_ERROR.W), user=True)
                    if found:
                        self._without_smap()
                        return
                error |= PF_ERROR.U
            event = Event(PF, Kind.EXCEPTION, error, address)
        elif vector == GP and state.rflags & RFLAGS_VM and self._before_virtual_privilege():
            return
        elif vector == GP and self._at_user_rdpmc():
            self._missed(ExitCode.RDPMC)  # the engine has the sense of CR4.PCE the wrong way round
            return
        elif vector == GP and self._plain_code()[:3] == b"\x0f\x01\xd1":
            self._missed(ExitCode.XSETBV)  # the engine refuses them all
            return
        elif vector == DB:
            self.due |= DR6_BS
            return
        else:
            event = CpuFault(vector, state.error_code if vector in (8, 10, 11, 12, GP, 17) else None).event()
        raise_event(self, event)

    def _far_transfer_stack(self, address: int) -> bool:
        """Whether a fault at `address` is the stack access of the far CALL, far RET or IRET at RIP."""
        state = self.state
        insn = self.instruction()
        far_call = insn.opcode == 0x9A or (insn.opcode == 0xFF and insn.modrm >> 3 & 7 == 3)
        if not far_call and insn.opcode not in (0xCA, 0xCB, 0xCF):
            return False
        mask = 0xFFFFFFFFFFFFFFFF if self.bits == 64 else 0xFFFFFFFF if state.attrib(SS) & 0x400 else 0xFFFF
        sp = (state.reg(4) & mask) + (0 if self.bits == 64 else state.base(SS))
        return sp - 16 <= address < sp if far_call else sp <= address < sp + 40 + insn.immediate

    def _without_smap(self) -> None:
        """Execute the instruction at RIP as if SMAP were off."""
        state = self.state
        state.hflags &= ~HF_SMAP
        self.flush()
        stop = self._step()
        state.refresh()
        self.flush()
        self._stopped(stop)

    def _missed(self, code: int) -> None:
        """An instruction that the engine took for a fault."""
        if self.guest is None or not self._intercepted(self.guest, code):
            instructions.EMULATE[code](self)

    def _at_user_rdpmc(self) -> bool:
        state = self.state
        return bool(state.cpl and state.cr(4) & instructions.CR4_PCE) and self.code()[:2] == b"\x0f\x33"

    def _before_virtual_privilege(self) -> bool:
        """In virtual-8086 mode the engine looks at privilege too early for some instructions; True if RIP was at one."""
        guest, insn = self.guest, self.instruction()
        if insn.opcode == 0xCD and guest is not None and guest.intercepts(ExitCode.SWINT):
            world.vmexit(self, ExitCode.SWINT, insn.immediate, nrip=self.state.rip + insn.length)
            return True
        if insn.opcode == 0x0F01 and insn.modrm in range(0xD8, 0xE0):  # those of SVM are undefined outside protected mode
            raise_event(self, Event(UD, Kind.EXCEPTION))
            return True
        return False

    def _plain_code(self) -> bytes:
        """The code at RIP behind prefixes for segment, address size and REX."""
        return self.code().lstrip(_PLAIN_64 if self.bits == 64 else _PLAIN)

    def _undefined(self) -> None:
        """An instruction that the engine does not know: INT1, INS, OUTS, RDPRU, a user's MONITOR or MWAIT, or none."""
        code = self.code().lstrip(_PREFIXES_64 if self.bits == 64 else _PREFIXES)
        if code[:1] == b"\xf1":
            self._missed(ExitCode.ICEBP)
        elif code and code[0] in instructions.STRING_IO:
            self._on_string_io()
        elif code[:2] == b"\x0f\x01" and code[2:3] in _UNDEFINED:
            self._missed(_UNDEFINED[code[2:3]])
        else:
            self._on_exception(NM if self._at_xsave_with_ts() else UD)

    def _at_xsave_with_ts(self) -> bool:
        """XSAVE, XSAVEOPT and XRSTOR, which are undefined to the engine with CR0.TS (see repair.py)."""
        s, code = self.state, self._plain_code()
        memory = code[:2] == b"\x0f\xae" and len(code) > 2 and code[2] < 0xC0 and code[2] >> 3 & 7 in (4, 5, 6)
        return memory and bool(s.cr(0) & instructions.CR0_TS and s.cr(4) & CR4.OSXSAVE)

    def _on_io(self) -> None:
        """IN or OUT, or where the engine has them INS or OUTS (see repair.py)."""
        rt = self.engine.rt
        self._io(self.instruction(), rt.io_port & 0xFFFF, rt.io_size)

    def _on_string_io(self) -> None:
        insn, s = self.instruction(), self.state
        if insn.rep and not s.reg(RCX) & (1 << insn.address) - 1:
            self.advance(insn.length)
        else:
            self._io(insn, s.reg(RDX) & 0xFFFF, min(insn.operand, 32) // 8 if insn.opcode & 1 else 1)

    def _io(self, insn: Instruction, port: int, size: int) -> None:
        """The order is that of APM2 15.10.2: permission of the port, intercept, and only then what the access may raise."""
        instructions.io_permitted(self, port, size)
        if world.io_intercepted(self, port, size):
            world.io_exit(self, insn, port, size)
        else:
            instructions.io(self, insn, port, size)

    def _classify(self, stop: Stop) -> NestedFault:
        """Bit 32 or 33 of EXITINFO1: was it the access itself, or the walk of the guest's page tables?

        The engine does not tell, but its walk of guest tables always asks to write (APM2 15.25.6), so only writes are in
        doubt.  They are settled by walking again for the addresses the instruction accesses.
        """
        fault = stop.npf
        assert fault is not None
        if not stop.write or self.paging.format is None:
            return fault
        return world.classify_write_fault(self, fault)


_SVM: dict[int, Callable[[Processor], None]] = {
    ExitCode.VMRUN: Processor.vmrun,
    ExitCode.VMLOAD: Processor.vmload,
    ExitCode.VMSAVE: Processor.vmsave,
    ExitCode.RSM: Processor.rsm,
    ExitCode.STGI: Processor.stgi,
    ExitCode.CLGI: Processor.clgi,
    ExitCode.TR_WRITE: Processor.load_task_register,
    ExitCode.IRET: Processor.iret,
}
"""Exit code to what the instruction does when no hypervisor intercepts it: those that take more than a function."""
