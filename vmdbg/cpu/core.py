"""One logical processor: its engine state, and what it holds pending."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from enum import IntEnum, StrEnum
from typing import TYPE_CHECKING, NamedTuple, Protocol

from vmdbg.engine.engine import Engine, Stop
from vmdbg.engine.physical import WATCH_WRITE
from vmdbg.engine.state import TR
from vmdbg.platform.cpuid import MONITOR_LINE
from vmdbg.platform.msrs import (
    DEBUGCTL,
    DEBUGCTL_BTF,
    DEBUGCTL_LBR,
    LAST_BRANCH_FROM,
    LAST_BRANCH_TO,
    LAST_EXCEPTION_FROM,
    LAST_EXCEPTION_TO,
    TSC_RATIO,
)
from vmdbg.svm.ring import Crossing

from .accesses import Accesses
from .bits import CR0_NE, CR4_OSXSAVE, CR4_SUPPORTED, DR6_BS, DR6_RESET, DR7_RESET, MASK64, RFLAGS_RF, RFLAGS_TF
from .faults import DB, Event, Kind

if TYPE_CHECKING:
    from introspect.decode import Instruction
    from vmdbg.platform.bus import Bus
    from vmdbg.platform.cpuid import CpuidConfig
    from vmdbg.platform.lapic import Lapic
    from vmdbg.platform.msrs import MsrFile
    from vmdbg.svm.guest import Guest
    from vmdbg.svm.skinit import Platform
    from vmdbg.svm.switch import Switcher
    from vmdbg.svm.tlb import Tlb
    from vmdbg.svm.vmcbcache import VmcbCache

    from .debug import DebugRegisters
    from .smm import Interrupted, PortAccess

class ExtInt(Protocol):
    """The interrupt controller behind LINT0."""

    def acknowledge(self) -> int: ...


class Hold(IntEnum):
    """Whether a debugger has the thread that a processor is in stand still (non-stop mode)."""

    NO = 0
    WAITS = 1
    """In a guest: nothing is executed, and only events are taken that leave the guest."""
    STANDS = 2
    """In the hypervisor, or in a guest whose hypervisor is held, too: nothing is taken either."""


class Notice(StrEnum):
    """Things that are worth stopping for."""

    VMRUN_FAIL = "vmrun-fail"
    """VMRUN has refused a VMCB."""
    SHUTDOWN = "shutdown"
    """A guest has shut down: a triple fault."""
    STALE = "stale"
    """A strict mode has used something old that the hypervisor forgot to flush."""


class Observer(Protocol):
    """Who is told of world switches: the machine's history and the debugger."""

    @property
    def attentive(self) -> bool:
        """Whether it must be told of each world switch at once; else those that run in C are told of afterwards."""

    def vmrun(self, cpu: Cpu, guest: Guest, host_cr4: int, host_efer: int) -> None: ...

    def vmexit(self, cpu: Cpu, guest: Guest, code: int, info1: int, info2: int, intinfo: int, rip: int) -> None: ...

    def left(self, cpu: Cpu, guest: Guest, rip: int) -> None:
        """The exit that `vmexit` told of has been written to the VMCB."""

    def notice(self, cpu: Cpu, what: Notice, guest: Guest | None, text: str) -> None:
        """Something is worth to be told, of a guest or of the host; `text` says what, which rule, and the remedy."""

    def switched(self, cpu: Cpu, before: Guest | None, now: Guest | None) -> None:
        """World switches in C have led from one guest to another, None being the host."""

    def memory_of(self, vmcb: int) -> tuple[int, int, int | None]:
        """Addresses of the 128 bytes of general registers, of the exit ring and of the images of VMCBs, if those are kept:
        where C is to leave those of a VMCB."""


class Catches(Protocol):
    """Who waits for what a processor does (vmdbg/catchpoints.py).  Each is asked before it happens, and True postpones it."""

    def instruction(self, cpu: Cpu, code: int) -> bool:
        """The instruction that the engine stopped before, with this exit code: VMRUN, or one of MSRs or control registers."""

    def port(self, cpu: Cpu, insn: Instruction, port: int, size: int) -> bool:
        """An access that is permitted, before a hypervisor may intercept it."""

    def exception(self, cpu: Cpu, event: Event) -> bool:
        """Before a hypervisor may intercept it."""

    def triple_fault(self, cpu: Cpu) -> bool:
        """Before a hypervisor may intercept it."""

    def exited(self, cpu: Cpu, guest: Guest, code: int, info1: int, info2: int) -> None:
        """A guest has left: its VMCB says so, and the host is about to go on."""


class Recorder(Protocol):
    """Who is told of what a processor has to do with the rest of the machine (vmdbg/fingerprint.py)."""

    def port(self, cpu: Cpu, port: int, size: int, write: bool, value: int) -> None:
        """IN, OUT, INS or OUTS has been executed, or one iteration of it."""

    def executed(self, cpu: Cpu, length: int) -> None:
        """The instruction at RIP is executed by us, which else the engine does: it counts in both."""

    def taken(self, cpu: Cpu, event: Event, source: int) -> None:
        """An interrupt or exception has come to its handler, from the instruction at RIP `source`."""


class Line(NamedTuple):
    """A line of memory under MONITOR: where, and what it held.  One that still holds that has not been stored to."""

    spa: int
    data: bytes


class Cpu(Accesses):
    """A processor that is either in host mode (`guest` None) or runs a guest.

    Implements `CpuSignals` for its local APIC; what arrives is kept here until the boundary where it may be taken.
    """

    def __init__(self, index: int, engine: Engine, bus: Bus, cpuid_config: CpuidConfig, observer: Observer) -> None:
        super().__init__(index, engine, cpuid_config.physical_bits)
        self.bus = bus
        self.cpuid_config = cpuid_config
        self.cr4_valid = CR4_SUPPORTED | (CR4_OSXSAVE if "XSAVE" in cpuid_config.features else 0)
        self.observer = observer
        self.guest: Guest | None = None
        self.lapic: Lapic
        self.msrs: MsrFile
        self.platform: Platform
        """What SKINIT has outside the processor."""
        self.on_vm_cr: Callable[[], object] = lambda: None
        """VM_CR has another value."""
        self.tsc_offset = 0
        self.offsets = {"mperf": 0, "aperf": 0}
        """By which MPERF and APERF are ahead of guest time."""
        self.lost_hsave = bytearray(4096)
        """Where host state goes if VM_HSAVE_PA is no memory."""
        self.last_fault = ""
        """In words, why the processor last refused something: for people."""
        self.nmi_pending = False
        self.smi_pending = False
        self.init_pending = False
        self.sipi_vector: int | None = None
        self.extint_level = False
        self.wait_for_sipi = index != 0
        self.halted = False
        self.shutdown = False
        self.monitored: Line | None = None
        """What MONITOR has armed, for MWAIT."""
        self.awaited: Line | None = None
        """What MWAIT, while `halted`, waits for a store to."""
        self.pause = False
        """Set by whoever wants the CPU to return at the next instruction boundary, as observers of world switches do."""
        self.catches: Catches | None = None
        """Who waits for its events: None while nobody does."""
        self.recorder: Recorder | None = None
        self.postponed: Callable[[], Stop | None] | None = None
        """What `catches` has had wait: the CPU has paused amid an instruction or event, and goes on with this, which gives a stop
        of the engine that followed."""
        self.port_seen = False
        """`catches` has seen the port access that is about to be made: a watchpoint has stopped it once more."""
        self.hold = Hold.NO
        self.vmcb_cache: VmcbCache | None = None
        """What it remembers of VMCBs, if clean bits are to be taken at their word."""
        self.executor: Engine | Tlb = engine
        """What runs the state: the engine, or in front of it the strict TLB."""
        self.debug: DebugRegisters
        self.due = 0
        """Bits of DR6 for the #DB that is due behind the present instruction: BS if RFLAGS.TF was set when it began."""
        self.branched = False
        """The last instruction was a branch that was taken; known while DebugCtl asks for it."""
        self.switcher: Switcher | None = None
        """The common world switches in C; None with the Python runtime."""
        self.crossing = Crossing()
        """Its last world switches.  Where switches are made in C, they have it."""
        self.dr = (ctypes.c_uint64 * 8)(0, 0, 0, 0, 0, 0, DR6_RESET, DR7_RESET)
        self.accepted: dict[int, tuple[object, tuple[int, ...]]] = {}
        """VMCBs that passed the consistency checks: with which fields, on which processor."""
        self.task_guard: int | None = None
        """The page of the TSS, while task switches are intercepted: see `guard_tasks`."""
        self.smm: Interrupted | None = None
        """What SMM interrupted, in it (see smm.py)."""
        self.port_access: PortAccess | None = None
        """The last port access."""
        self.ne_is_ours = False
        """CR0.NE is set in the engine, not in the guest: see `guard_ferr`."""

    # CpuSignals

    def nmi(self) -> None:
        self.nmi_pending = True

    def smi(self) -> None:
        self.smi_pending = True

    def init(self) -> None:
        # A processor that waits for its SIPI is as INIT leaves it; taken later, INIT would undo the SIPI behind it.
        if not self.wait_for_sipi:
            self.init_pending = True

    def sipi(self, vector: int) -> None:
        if self.wait_for_sipi or (self.init_pending and self.index):
            self.sipi_vector = vector

    def extint(self, level: bool) -> None:
        self.extint_level = level

    def doorbell(self) -> None:
        """Somebody has put an interrupt into a backing page: in a guest it is looked for, in the host VMRUN will."""
        if self.guest is not None and self.guest.avic is not None:
            self.guest.avic.evaluate()

    def changed(self) -> None:
        """Pending state is read at each boundary: nothing to remember."""

    # MSRs that the engine holds (vmdbg.platform.msrs.Cpu)

    @property
    def tsc(self) -> int:
        """The time stamp counter as software sees it: guest time, the CPU's own offset; TSC ratio and TSC_OFFSET for a guest.

        APM2 15.30.5, 15.34.
        """
        value: int = self.engine.clock.now + self.tsc_offset
        if self.guest is not None:
            value = ((value & MASK64) * self.msrs.values[TSC_RATIO] >> 32) + self.guest.tsc_offset
        return value & MASK64

    def performance(self, field: str) -> int:
        """The counter `mperf` or `aperf`: guest time, with the TSC ratio for a guest that reads MPERF (APM2 15.30.5).

        They count in HLT, too: only the ratio of the two means something (APM2 17.3), and the clock has one frequency.
        """
        value = self.engine.clock.now + self.offsets[field] & MASK64
        if field == "mperf" and self.guest is not None:
            value = value * self.msrs.values[TSC_RATIO] >> 32
        return value & MASK64

    def get(self, field: str) -> int:
        if field == "tsc":
            return self.tsc
        if field in self.offsets:
            return self.performance(field)
        if field == "cr0":
            return self.cr0
        return self.state.field(field)

    def set(self, field: str, value: int) -> None:
        if field == "tsc":
            self.tsc_offset = value - self.engine.clock.now
            return
        if field in self.offsets:
            self.offsets[field] = value - self.engine.clock.now
            return
        self.state.set_field(field, value)
        if field == "efer":
            self.state.refresh()
            self.forget_translations()

    # Branches (APM2 13.1.6)

    @property
    def looks_for_branches(self) -> bool:
        """DebugCtl asks to record branches, or to trap behind them."""
        return bool(self.msrs.values[DEBUGCTL] & (DEBUGCTL_LBR | DEBUGCTL_BTF))

    def branch(self, source: int, target: int) -> None:
        """A control transfer from the instruction at RIP `source` has been made."""
        self.branched = True
        values = self.msrs.values
        if values[DEBUGCTL] & DEBUGCTL_LBR:
            values[LAST_BRANCH_FROM], values[LAST_BRANCH_TO] = source, target

    def event_taken(self, event: Event, source: int) -> None:
        """An interrupt or exception has come to its handler.  #DB ends the recording, and stays out of it."""
        self.monitored = None  # a far control transfer (APM3 MONITOR)
        if self.recorder is not None:
            self.recorder.taken(self, event, source)
        values = self.msrs.values
        if not values[DEBUGCTL]:
            return
        if event.vector == DB and event.kind == Kind.EXCEPTION:
            values[DEBUGCTL] &= ~(DEBUGCTL_LBR | DEBUGCTL_BTF)
        elif values[DEBUGCTL] & DEBUGCTL_LBR:
            values[LAST_EXCEPTION_FROM], values[LAST_EXCEPTION_TO] = values[LAST_BRANCH_FROM], values[LAST_BRANCH_TO]
            self.branch(source, self.state.rip)

    # Mode

    @property
    def gif(self) -> bool:
        return self.state.gif

    @gif.setter
    def gif(self, value: bool) -> None:
        self.state.gif = value

    def stored_to(self, line: Line | None) -> bool:
        """Whether there is such a line, and it has been stored to."""
        return line is not None and self.ram.read(line.spa, MONITOR_LINE) != line.data

    def guard_tasks(self) -> None:
        """Have the engine stop at stores to the present TSS if the guest's hypervisor intercepts task switches.

        Under a strict TLB always, since the CR3 of a task is none for the engine.  The engine switches tasks itself on far
        JMP, CALL and IRET; before anything else it stores to the TSS it leaves.
        """
        page = None
        guest, s = self.guest, self.state
        wanted = self.tlb is not None or (guest is not None and guest.intercepts_task_switch)
        if wanted and self.protected and not s.is_long:
            spa = self.translate_quietly(s.base(TR))
            if spa is not None and self.ram.contains(spa):
                page = spa >> 12
        if page != self.task_guard:
            self.task_guard = page
            self.engine.physical.guard(self.index, {} if page is None else {page: WATCH_WRITE})

    def guard_ferr(self) -> None:
        """Have x87 errors raise #MF for a guest with CR0.NE clear whose hypervisor intercepts FERR_FREEZE.

        The engine has no FERR: with NE clear it would go on.  The guest still reads NE as clear.
        """
        guest, s = self.guest, self.state
        self.ne_is_ours = guest is not None and guest.intercepts_ferr and not s.cr(0) & CR0_NE
        if self.ne_is_ours:
            s.set_cr(0, s.cr(0) | CR0_NE)

    @property
    def cr0(self) -> int:
        """CR0 as software sees it."""
        value = self.state.cr(0)
        return value & ~CR0_NE if self.ne_is_ours else value

    def advance(self, length: int) -> None:
        """An instruction that we executed retires: RIP, time and the interrupt shadow move on.  0: an iteration of it."""
        s = self.state
        s.skip(length)
        flags = s.rflags
        if flags & (RFLAGS_TF | RFLAGS_RF):
            if length:
                s.rflags = flags & ~RFLAGS_RF
            if flags & RFLAGS_TF:
                self.due |= DR6_BS
        if length:
            self.engine.retire(length)

    def flush(self) -> None:
        """Without a strict TLB, nothing outlives this."""
        self.debug.moved = True
        self.engine.forget()

    @property
    def asid(self) -> int:
        """The address space that its translations belong to: the host's is 0 (APM2 15.16)."""
        return 0 if self.guest is None else self.guest.asid

    def forget_translations(self, *, keep_global: bool = False) -> None:
        """What a write of a control register makes the processor forget of its own address space (APM2 5.5.2)."""
        self.flush()
        if self.tlb is not None:
            self.tlb.forget(self.asid, keep_global=keep_global)

    def forget_all_translations(self) -> None:
        """What an SMI, RSM, and a write of an MTRR or IORR makes the processor forget: all, of every ASID (APM2 15.16.1)."""
        self.flush()
        if self.tlb is not None:
            self.tlb.forget_all()

    def forget_page(self, address: int, asid: int) -> None:
        """INVLPG and INVLPGA: the translation of one linear address, in an address space."""
        self.flush()
        if self.tlb is not None:
            self.tlb.forget_page(address, asid)
