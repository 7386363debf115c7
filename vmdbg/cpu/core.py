"""One logical processor: its engine state, what it holds pending, and its own accesses to memory."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from enum import IntEnum, StrEnum
from typing import TYPE_CHECKING, NamedTuple, Protocol

from introspect.address import Gpa
from introspect.paging import Access, Fault, Nested, NestedFault, PagingState, pdpte_reserved, translate
from vmdbg.engine.engine import Engine, Stop
from vmdbg.engine.physical import WATCH_WRITE, Npt, Shadow
from vmdbg.engine.state import SS, TR, CpuState
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

from .decode import Instruction, Undecodable, decode
from .faults import DB, GP, PF, UD, CpuFault, Event, Kind, NestedPageFault, WatchedAccess
from .faults import SS as STACK_FAULT

if TYPE_CHECKING:
    from vmdbg.platform.bus import Bus
    from vmdbg.platform.cpuid import CpuidConfig
    from vmdbg.platform.lapic import Lapic
    from vmdbg.platform.msrs import MsrFile
    from vmdbg.svm.guest import Guest
    from vmdbg.svm.switch import Switcher
    from vmdbg.svm.tlb import Tlb
    from vmdbg.svm.vmcbcache import VmcbCache

    from .debug import DebugRegisters
    from .smm import Interrupted, PortAccess

CR0_PE, CR0_TS, CR0_NE, CR0_WP, CR0_PG = 1 << 0, 1 << 3, 1 << 5, 1 << 16, 1 << 31
CR4_PAE, EFER_LMA = 1 << 5, 1 << 10
CR4_SUPPORTED = 0b111_1111_1100 | 1 << 16 | 1 << 20 | 1 << 21
"""TSD DE PSE PAE MCE PGE PCE OSFXSR OSXMMEXCPT, FSGSBASE, SMEP, SMAP; VME, PVI, UMIP, PCIDE and others are not
claimed in CPUID."""
CR4_OSXSAVE = 1 << 18
RFLAGS_TF, RFLAGS_IF, RFLAGS_DF, RFLAGS_NT, RFLAGS_RF, RFLAGS_VM, RFLAGS_AC = (
    1 << 8, 1 << 9, 1 << 10, 1 << 14, 1 << 16, 1 << 17, 1 << 18,
)  # fmt: skip
RFLAGS_IOPL = 3 << 12
MASK64 = (1 << 64) - 1
DR6_RESET, DR7_RESET = 0xFFFF0FF0, 0x400
DR6_BS, DR6_BT = 1 << 14, 1 << 15

_ACCESS = {
    (write, execute, user, implicit): Access(write, execute, user, implicit)
    for write in (False, True) for execute in (False, True) for user in (False, True) for implicit in (False, True)
}  # fmt: skip


def dr6_value(value: int) -> int:
    """What DR6 holds after `value` is written to it (APM2 13.1.1.3)."""
    return value & 0xE00F | DR6_RESET


def dr7_value(value: int) -> int:
    return value & 0xFFFF23FF | DR7_RESET


def canonical(address: int) -> bool:
    """Whether a 64-bit address repeats bit 47 upward (APM2 5.3.1)."""
    return (address >> 47) in (0, 0x1FFFF)


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

    def notice(self, cpu: Cpu, what: Notice, guest: Guest | None, text: str) -> None:
        """Something is worth to be told, of a guest or of the host; `text` says what, which rule, and the remedy."""

    def switched(self, cpu: Cpu, before: Guest | None, now: Guest | None) -> None:
        """World switches in C have led from one guest to another, None being the host."""

    def memory_of(self, vmcb: int) -> tuple[int, int]:
        """Addresses of the 128 bytes of general registers and of the exit ring, where C is to leave those of a VMCB."""


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


class Line(NamedTuple):
    """A line of memory under MONITOR: where, and what it held.  One that still holds that has not been stored to."""

    spa: int
    data: bytes


class Cpu:
    """A processor that is either in host mode (`guest` None) or runs a guest.

    Implements `CpuSignals` for its local APIC; what arrives is kept here until the boundary where it may be taken.
    """

    def __init__(self, index: int, engine: Engine, bus: Bus, cpuid_config: CpuidConfig, observer: Observer) -> None:
        self.index = index
        self.engine = engine
        self.bus = bus
        self.cpuid_config = cpuid_config
        self.physical_bits = cpuid_config.physical_bits
        self.cr4_valid = CR4_SUPPORTED | (CR4_OSXSAVE if "XSAVE" in cpuid_config.features else 0)
        self.observer = observer
        self.ram = engine.ram
        self.state: CpuState = engine.state()
        self.npt: Npt = engine.physical.host
        self.guest: Guest | None = None
        self.lapic: Lapic
        self.msrs: MsrFile
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
        self.postponed: Callable[[], Stop | None] | None = None
        """What `catches` has had wait: the CPU has paused amid an instruction or event, and goes on with this, which gives a stop
        of the engine that followed."""
        self.port_seen = False
        """`catches` has seen the port access that is about to be made: a watchpoint has stopped it once more."""
        self.hold = Hold.NO
        self.vmcb_cache: VmcbCache | None = None
        """What it remembers of VMCBs, if clean bits are to be taken at their word."""
        self.tlb: Tlb | None = None
        """Translations that are kept until they must be forgotten, if a forgotten flush is to be found."""
        self.executor: Engine | Tlb = engine
        """What runs the state: the engine, or in front of it the strict TLB."""
        self.debug: DebugRegisters
        self.due = 0
        """Bits of DR6 for the #DB that is due behind the present instruction: BS if RFLAGS.TF was set when it began."""
        self.branched = False
        """The last instruction was a branch that was taken; known while DebugCtl asks for it."""
        self.switcher: Switcher | None = None
        """The common world switches in C; None with the Python runtime."""
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
        self._pdptes: tuple[int, ...] = ()
        self._paging_key: tuple[object, ...] | None = None
        self._paging: PagingState | None = None

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
    def bits(self) -> int:
        """16, 32 or 64: the default size of the code segment."""
        flags = self.state.hflags
        return 64 if flags & (1 << 15) else 32 if flags & (1 << 4) else 16

    @property
    def gif(self) -> bool:
        return self.state.gif

    @gif.setter
    def gif(self, value: bool) -> None:
        self.state.gif = value

    @property
    def protected(self) -> bool:
        """Protected mode proper: neither real nor virtual-8086."""
        return bool(self.state.cr(0) & CR0_PE) and not self.state.rflags & RFLAGS_VM

    @property
    def nested(self) -> Nested | None:
        npt = self.npt
        return npt.nested if isinstance(npt, Shadow) else None

    @property
    def paging(self) -> PagingState:
        s = self.state
        key = s.paging()
        pdptes = None if s.root is None else self._pdptes
        if (key, pdptes) != self._paging_key:
            self._paging_key = key, pdptes
            self._paging = PagingState(*key, self.physical_bits, pdptes)
        assert self._paging is not None
        return self._paging

    def stored_to(self, line: Line | None) -> bool:
        """Whether there is such a line, and it has been stored to."""
        return line is not None and self.ram.read(line.spa, MONITOR_LINE) != line.data

    def hold_pdptes(self, loads: bool = True) -> None:
        """Where paging is in PAE mode and not nested, keep the PDPTEs at CR3 from now on (APM2 5.3.2); if not `loads`, those
        that are kept stay.  In other modes there are none."""
        s = self.state
        if s.efer & EFER_LMA or not s.cr(4) & CR4_PAE or not s.cr(0) & CR0_PG or self.nested is not None:
            s.root = None
        elif loads:
            self._pdptes = tuple(self.pdpte(s.cr(3), index) for index in range(4))
            s.root = self.engine.physical.hold_pdptes(self.index, self._pdptes)

    def pdpte(self, cr3: int, index: int) -> int:
        at = (cr3 & 0xFFFFFFE0) + 8 * index & self.engine.physical.a20
        return self.ram.read_u64(at) if self.ram.contains(at, 8) else 0xFFFFFFFFFFFFFFFF

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

    def bad_pdptes(self, cr3: int) -> bool:
        """Whether one of the four PDPEs that CR3 names in PAE mode is present and has reserved bits set (APM2 5.2.3)."""
        entries = (self.pdpte(cr3, index) for index in range(4))
        return any(entry & 1 and entry & pdpte_reserved(self.physical_bits) for entry in entries)

    # Memory, as the processor itself accesses it: translated, checked, with accessed and dirty bits.

    def translate(
        self, address: int, *, write: bool = False, execute: bool = False, user: bool = False, implicit: bool = False
    ) -> int:
        """System-physical address of a linear one.  Raises `CpuFault` (#PF, #GP) or `NestedPageFault`."""
        found = self._locate(address, _ACCESS[write, execute, user, implicit], set_ad=True)
        if isinstance(found, Fault):
            if found.kind == "PF":
                raise CpuFault(PF, found.code, found.address)
            if found.kind == "NPF":
                raise NestedPageFault(NestedFault(found.code, Gpa(found.address)))
            raise CpuFault(GP, 0)
        return found

    def _locate(self, address: int, access: Access, *, set_ad: bool) -> int | Fault:
        """Where an access of the processor's own goes; without `set_ad` nothing changes by it."""
        if self.tlb is not None:
            return self.tlb.locate(address, access, set_ad=set_ad)
        found = translate(self.ram, self.paging, address, access, self.nested, set_ad=set_ad)
        return found if isinstance(found, Fault) else found.spa & self.engine.physical.a20

    def guest_physical(self, address: int, access: Access) -> int | Fault:
        """Guest-physical address of an access of the instruction at RIP; no side effects."""
        if self.tlb is not None:
            return self.tlb.guest_physical(address, access)
        found = translate(self.ram, self.paging, address, access, self.nested, set_ad=False)
        return found if isinstance(found, Fault) else found.gpa

    def permits(self, address: int, *, write: bool, user: bool) -> bool:
        """Whether an access would be permitted; no side effects."""
        return not isinstance(self._locate(address, _ACCESS[write, False, user, False], set_ad=False), Fault)

    def pieces(
        self, address: int, size: int, *, write: bool, user: bool = False, implicit: bool = False
    ) -> list[tuple[int, int]]:
        """(spa, length) of each page a linear range touches; faults before anything is accessed."""
        pieces = []
        mask = 0xFFFFFFFFFFFFFFFF if self.state.is_long else 0xFFFFFFFF
        while size:
            address &= mask
            length = min(size, 4096 - (address & 4095))
            pieces.append((self.translate(address, write=write, user=user, implicit=implicit), length))
            address += length
            size -= length
        return pieces

    def read(self, address: int, size: int, *, user: bool = False, implicit: bool = False) -> int:
        """Little-endian value at a linear address."""
        return int.from_bytes(self.load(self.pieces(address, size, write=False, user=user, implicit=implicit)), "little")

    def load(self, pieces: list[tuple[int, int]]) -> bytes:
        """Data whose pages `pieces` has checked."""
        data = bytearray()
        for spa, length in pieces:
            if self.ram.contains(spa, length):
                data += self.ram.view[spa : spa + length]
                self.engine.physical.seen(spa, length, False)
            else:
                assert self.engine.devices is not None
                value = self.engine.devices.read_mmio(spa, length)
                data += (value & ((1 << 8 * length) - 1)).to_bytes(length, "little")
        return bytes(data)

    def write(self, address: int, size: int, value: int, *, user: bool = False, implicit: bool = False) -> None:
        self.commit([(self.pieces(address, size, write=True, user=user, implicit=implicit), value.to_bytes(size, "little"))])

    def commit(self, writes: list[tuple[list[tuple[int, int]], bytes]]) -> None:
        """Store data whose pages `pieces` has checked."""
        for pieces, data in writes:
            at = 0
            for spa, length in pieces:
                if self.ram.contains(spa, length):
                    self.ram.write(spa, data[at : at + length])
                else:
                    assert self.engine.devices is not None
                    self.engine.devices.write_mmio(spa, length, int.from_bytes(data[at : at + length], "little"))
                at += length

    def plan(self, address: int, size: int, value: int, *, user: bool = False, implicit: bool = False) -> tuple[
        list[tuple[int, int]], bytes
    ]:
        """A store that has been checked but not made: for `commit`."""
        masked = value & ((1 << 8 * size) - 1)
        return self.pieces(address, size, write=True, user=user, implicit=implicit), masked.to_bytes(size, "little")

    def stop_if_watched(self, pieces: list[tuple[int, int]], *, write: bool) -> None:
        """Raise `WatchedAccess` for the first of them that lies in a page watched for such accesses."""
        for spa, _ in pieces:
            if self.ram.contains(spa) and self.engine.physical.watches(spa >> 12, write):
                raise WatchedAccess(spa, write)

    def segment_address(self, segment: int, offset: int, size: int) -> int:
        """Linear address of segment:offset after the limit or canonical check (APM2 4.5.3, 4.12)."""
        s = self.state
        fault = STACK_FAULT if segment == SS else GP
        if s.is_code64:
            linear = (offset + (s.base(segment) if segment >= 4 else 0)) & 0xFFFFFFFFFFFFFFFF
            if not (canonical(linear) and canonical(linear + size - 1)):
                raise CpuFault(fault, 0)
            return linear
        limit, attrib = s.limit(segment), s.attrib(segment)
        if attrib & 0x1C == 0x14:  # data, expand down
            top = 0xFFFFFFFF if attrib & 0x400 else 0xFFFF
            bad = offset <= limit or offset + size - 1 > top
        else:
            bad = offset + size - 1 > limit
        if bad:
            raise CpuFault(fault, 0)
        return (s.base(segment) + offset) & 0xFFFFFFFF

    # Instructions

    def code(self) -> bytes:
        """The bytes at RIP, at least one whole instruction as far as they can be read."""
        code = self.engine.code()
        return code if len(code) == 15 else self.fetch()

    def instruction(self) -> Instruction:
        """The instruction at RIP, decoded.  #UD if it is longer than 15 bytes."""
        code = self.engine.code()
        try:
            if code:
                return decode(code, self.bits)
        except Undecodable:
            pass
        code = self.fetch()
        try:
            return decode(code, self.bits)
        except Undecodable:
            raise CpuFault(GP if len(code) == 15 else UD, 0 if len(code) == 15 else None) from None

    def fetch(self, size: int = 15) -> bytes:
        """Up to `size` bytes at RIP, without side effects, as far as they can be read."""
        data = bytearray()
        address = self.state.linear_rip
        while len(data) < size:
            length = min(size - len(data), 4096 - (address & 4095))
            found = self._locate(address, _ACCESS[False, True, self.state.cpl == 3, False], set_ad=False)
            if isinstance(found, Fault) or not self.ram.contains(found, length):
                break
            data += self.ram.view[found : found + length]
            address += length
        return bytes(data)

    def translate_quietly(self, address: int) -> int | None:
        """System-physical address of a linear one whatever its rights, without side effects; None if unmapped."""
        if self.tlb is not None:
            held = self.tlb.locate(address, _ACCESS[False, False, False, True], set_ad=False)
            return None if isinstance(held, Fault) else held
        found = self.ram.memo.find(self.paging, address, self.nested)
        return None if found is None else found.spa & self.engine.physical.a20

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
        self.engine.clock.now += length

    def flush(self) -> None:
        self.debug.moved = True
        self.engine.flush()

    @property
    def asid(self) -> int:
        """The address space that its translations belong to: the host's is 0 (APM2 15.16)."""
        return 0 if self.guest is None else self.guest.asid

    def forget_translations(self, *, keep_global: bool = False) -> None:
        """What a write of a control register makes the processor forget of its own address space (APM2 5.5.2)."""
        self.flush()
        if self.tlb is not None:
            self.tlb.forget(self.asid, keep_global=keep_global)

    def forget_page(self, address: int, asid: int) -> None:
        """INVLPG and INVLPGA: the translation of one linear address, in an address space."""
        self.flush()
        if self.tlb is not None:
            self.tlb.forget_page(address, asid)
