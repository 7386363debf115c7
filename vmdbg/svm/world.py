"""The world switch: VMRUN, #VMEXIT, VMLOAD and VMSAVE, from the manual (APM2 15.5 to 15.8)."""

from __future__ import annotations

import struct
from dataclasses import replace
from typing import TYPE_CHECKING

from introspect.exits import EVENT, IOIO, NPF_INFO, ExitCode
from introspect.paging import Access, Fault, NestedFault, translate
from introspect.permissions import iopm_intercepts, msrpm_intercepts
from introspect.registers import CR4, EFER
from introspect.rules import SVM_FEATURES, Processor, first_violation
from introspect.vmcb import INT_STATE, V_INTR, VMCB
from vmdbg.cpu.core import CR4_SUPPORTED, RFLAGS_VM, Cpu
from vmdbg.cpu.faults import GP, PF, CpuFault, Event, Kind
from vmdbg.cpu.operands import accesses
from vmdbg.engine import layout
from vmdbg.engine.engine import PHYSICAL_BITS
from vmdbg.engine.state import CS, DS, ES, FS, GDTR, GS, IDTR, LDTR, RAX, RSP, SS, TR, CpuState

from vmdbg.platform.msrs import EFER as MSR_EFER

from .guest import Guest

if TYPE_CHECKING:
    from vmdbg.cpu.decode import Instruction
    from vmdbg.cpu.tasks import TaskSwitchExit

PAGE = 4096

FEATURES = SVM_FEATURES.NP | SVM_FEATURES.NRIPS | SVM_FEATURES.FlushByAsid | SVM_FEATURES.DecodeAssists
"""What CPUID 8000_000A EDX claims."""
ASIDS = 32768

# What the engine intercepts for us whatever a hypervisor asks (see cpu/instructions.py).
_L0_CR_READ, _L0_CR_WRITE, _L0_DR = 1 << 8, 0xFFFF, 0xFFFF
_L0_WORD3 = sum(1 << bit for bit in (14, 15, 18, 19, 21, 22, 24, 26, 28, 31))
"""RDTSC RDPMC CPUID RSM INTn INVD HLT INVLPGA MSR SHUTDOWN."""
_L0_WORD4 = sum(1 << bit for bit in range(12))
"""VMRUN VMMCALL VMLOAD VMSAVE STGI CLGI SKINIT RDTSCP ICEBP WBINVD MONITOR MWAIT; INVD is reported as WBINVD."""
_GUEST_WORD3 = sum(1 << bit for bit in (6, 7, 8, 9, 10, 11, 12, 13, 16, 17, 20, 23, 25))
"""Descriptor tables, PUSHF POPF IRET PAUSE INVLPG: the engine stops before them where a guest's hypervisor asks."""

_H_CR_READ = layout.INTERCEPT_CR_READ // 2
_I_EXCEPTIONS = layout.INTERCEPT_EXCEPTIONS // 4
_Q_INTERCEPT = layout.INTERCEPT // 8

_SEGMENT = struct.Struct("<HHIQ")
_SEGMENTS = struct.Struct("<" + "HHIQ" * 4)
_TABLE = struct.Struct("<IQ")
_Q = struct.Struct("<Q")
_CONTROLS = struct.Struct("<7Q")
"""CR4 CR3 CR0 DR7 DR6 RFLAGS RIP."""
_EXIT = struct.Struct("<4Q")
"""EXITCODE EXITINFO1 EXITINFO2 EXITINTINFO."""

_at = VMCB.offset_of
_ES, _GDTR, _IDTR, _CPL, _EFER, _CR4, _RSP, _RAX, _CR2 = (
    _at("es.selector"), _at("gdtr.limit"), _at("idtr.limit"), _at("cpl"), _at("efer"), _at("cr4"), _at("rsp"), _at("rax"),
    _at("cr2"),
)  # fmt: skip
_EXITCODE, _V_INTR, _INT_STATE, _EVENTINJ, _NRIP, _INSN_LEN = (
    _at("exitcode"), _at("v_intr"), _at("int_state"), _at("eventinj"), _at("nrip"), _at("insn_len"),
)  # fmt: skip
_G_PAT = _at("g_pat")
_DIRECT = ((FS, _at("fs.selector")), (GS, _at("gs.selector")), (LDTR, _at("ldtr.selector")), (TR, _at("tr.selector")))
_MSRS = tuple(
    (name, _at(name))
    for name in ("star", "lstar", "cstar", "sfmask", "kernel_gs_base", "sysenter_cs", "sysenter_esp", "sysenter_eip")
)

_SHADOW_CR4 = CR4.PAE | CR4.PSE | CR4.LA57
_SHADOW_EFER = EFER.LME | EFER.LMA | EFER.NXE


def set_intercepts(state: CpuState, guest: Guest | None) -> None:
    """Tell the engine where to stop: the union of our needs and those of the guest's hypervisor."""
    cr_read, cr_write, dr_read, dr_write = _L0_CR_READ, _L0_CR_WRITE, _L0_DR, _L0_DR
    word3, word4 = _L0_WORD3, _L0_WORD4
    if guest is not None:
        words = guest.words
        cr_read |= words[0] & 0xFFFF
        word3 |= words[3] & _GUEST_WORD3
        if words[3] & 1 << 5:  # selective CR0 writes: LMSW and MOV CR0 are seen anyhow
            cr_write |= 1
    h = state.h
    h[_H_CR_READ], h[_H_CR_READ + 1], h[_H_CR_READ + 2], h[_H_CR_READ + 3] = cr_read, cr_write, dr_read, dr_write
    state.i[_I_EXCEPTIONS] = 0xFFFFFFFF
    state.q[_Q_INTERCEPT] = word3 | word4 << 32


def _store_state(cpu: Cpu, view: memoryview) -> None:
    """Write what VMRUN and #VMEXIT switch into the save area at `view`."""
    s = cpu.state
    _SEGMENTS.pack_into(
        view, _ES,
        s.selector(ES), s.attrib(ES), s.limit(ES), s.base(ES), s.selector(CS), s.attrib(CS), s.limit(CS), s.base(CS),
        s.selector(SS), s.attrib(SS), s.limit(SS), s.base(SS), s.selector(DS), s.attrib(DS), s.limit(DS), s.base(DS),
    )  # fmt: skip
    _TABLE.pack_into(view, _GDTR, s.limit(GDTR), s.base(GDTR))
    _TABLE.pack_into(view, _IDTR, s.limit(IDTR), s.base(IDTR))
    view[_CPL] = s.cpl
    _Q.pack_into(view, _EFER, s.efer)
    _CONTROLS.pack_into(view, _CR4, s.cr(4), s.cr(3), s.cr(0), cpu.dr[7], cpu.dr[6], s.rflags, s.rip)
    _Q.pack_into(view, _RSP, s.reg(RSP))
    _Q.pack_into(view, _RAX, s.reg(RAX))


def _load_state(cpu: Cpu, view: memoryview) -> tuple[int, int]:
    """Load it back; the caller sets CPL, DR6 and DR7 (returned) and refreshes the mode."""
    s = cpu.state
    v = _SEGMENTS.unpack_from(view, _ES)
    s.set_segment(ES, v[0], v[3], v[2], v[1])
    s.set_segment(CS, v[4], v[7], v[6], v[5])
    s.set_segment(SS, v[8], v[11], v[10], v[9])
    s.set_segment(DS, v[12], v[15], v[14], v[13])
    limit, base = _TABLE.unpack_from(view, _GDTR)
    s.set_table(GDTR, base, limit & 0xFFFF)
    limit, base = _TABLE.unpack_from(view, _IDTR)
    s.set_table(IDTR, base, limit & 0xFFFF)
    s.efer = _Q.unpack_from(view, _EFER)[0]
    cr4, cr3, cr0, dr7, dr6, rflags, rip = _CONTROLS.unpack_from(view, _CR4)
    s.set_cr(4, cr4)
    s.set_cr(3, cr3)
    s.set_cr(0, cr0)
    s.rflags = rflags
    s.rip = rip
    s.set_reg(RSP, _Q.unpack_from(view, _RSP)[0])
    s.set_reg(RAX, _Q.unpack_from(view, _RAX)[0])
    return dr6, dr7


def _page(cpu: Cpu, what: str) -> int:
    """The page that rAX names, for VMRUN, VMLOAD and VMSAVE; #GP if it is not one (APM2 15.5.1)."""
    address = cpu.state.reg(RAX)
    bits = cpu.bits
    if bits != 64:
        address &= 0xFFFFFFFF if bits == 32 else 0xFFFF
    if address & (PAGE - 1) or address >> PHYSICAL_BITS or not cpu.ram.contains(address, PAGE):
        cpu.last_fault = (
            f"{what} with rAX {address:#x}: the VMCB must be a 4 KiB-aligned page of memory below {PHYSICAL_BITS} bits "
            "(APM2 15.5.1)"
        )
        raise CpuFault(GP, 0)
    return address


def vmrun(cpu: Cpu, size: int) -> Event | None:
    """VMRUN (APM2 15.5.1).  Returns the event that EVENTINJ asks to inject, for the caller to raise.

    A VMCB that breaks a consistency rule ends in #VMEXIT with EXITCODE -1 at once.
    """
    s = cpu.state
    vmcb = _page(cpu, "VMRUN")
    cpu.advance(size)
    host_if = bool(s.rflags & 0x200)
    _store_state(cpu, _hsave(cpu))
    view = cpu.ram.view[vmcb : vmcb + PAGE]
    guest = Guest(vmcb, view, host_if)
    host_cr4, host_efer = s.cr(4), s.efer
    processor = Processor(
        PHYSICAL_BITS, FEATURES, s.cr(0), host_cr4, host_efer, cr4_valid=CR4_SUPPORTED, efer_valid=cpu.msrs.table[MSR_EFER].writable
    )
    violation = first_violation(view, processor, cpu.ram)
    cpu.guest = guest
    cpu.observer.vmrun(cpu, guest, host_cr4, host_efer)
    if violation is not None:
        cpu.last_fault = violation.text
        _leave(cpu, guest, 0xFFFFFFFFFFFFFFFF, 0, 0, 0)
        return None
    _, dr7 = _load_state(cpu, view)
    dr6 = _CONTROLS.unpack_from(view, _CR4)[4]
    cpu.dr[6], cpu.dr[7] = dr6 | 0xFFFF0FF0, dr7 | 0x400
    s.set_cr(2, _Q.unpack_from(view, _CR2)[0])
    cpl = view[_CPL]
    cr0 = s.cr(0)
    # Real mode runs at 0, virtual-8086 mode at 3, whatever the VMCB says; LMA follows LME and PG (APM2 15.5.1).
    cpl = 0 if not cr0 & 1 else 3 if s.rflags & RFLAGS_VM else cpl & 3
    efer = s.efer
    s.efer = efer | 0x400 if efer & 0x100 and cr0 >> 31 else efer & ~0x400
    s.refresh(cpl)
    s.shadow = guest.shadow
    if guest.np:
        cpu.npt = cpu.engine.physical.shadow(guest.n_cr3, host_cr4 & _SHADOW_CR4, host_efer & _SHADOW_EFER)
        s.set_field("pat", _Q.unpack_from(view, _G_PAT)[0])
    set_intercepts(s, guest)
    cpu.gif = True
    cpu.flush()
    event = guest.eventinj
    if not event & EVENT.v:
        return None
    kind = Kind(EVENT.get(event, "type"))
    vector = event & 0xFF
    injected = Event(
        vector, kind, event >> 32 if event & EVENT.ev else None,
        s.cr(2) if kind == Kind.EXCEPTION and vector == PF else None,
    )  # fmt: skip
    if injected.software:
        # nRIP is where their handlers return to; without a delivery RIP stays at the instruction (APM2 15.20).
        following = _Q.unpack_from(view, _NRIP)[0]
        injected = replace(injected, length=following - s.rip)
        s.rip = following
    return injected


def _hsave(cpu: Cpu) -> memoryview:
    address = cpu.state.field("vm_hsave") & ~(PAGE - 1)
    if not cpu.ram.contains(address, PAGE):
        return memoryview(cpu.lost_hsave)
    return cpu.ram.view[address : address + PAGE]


def _leave(cpu: Cpu, guest: Guest, code: int, info1: int, info2: int, intinfo: int) -> None:
    """Second half of #VMEXIT: the exit's fields, and the host's state back from VM_HSAVE_PA (APM2 15.6)."""
    s = cpu.state
    view = guest.view
    rip = s.rip
    cpu.observer.vmexit(cpu, guest, code, info1, info2, intinfo, rip)
    _EXIT.pack_into(view, _EXITCODE, code, info1, info2, intinfo)
    _load_state(cpu, _hsave(cpu))
    s.set_cr(0, s.cr(0) | 1)
    s.rflags &= ~RFLAGS_VM
    cpu.dr[7] = 0x400
    cpu.guest = None
    cpu.npt = cpu.engine.physical.host
    s.refresh(0)
    s.shadow = False
    set_intercepts(s, None)
    cpu.gif = False
    cpu.halted = False
    cpu.engine.physical.written(guest.vmcb, PAGE)
    cpu.flush()


def vmexit(cpu: Cpu, code: int, info1: int = 0, info2: int = 0, *, intinfo: int = 0, nrip: int = 0, insn: bytes = b"") -> None:
    """#VMEXIT from the running guest (APM2 15.6): its state into the VMCB, the exit's reason, the host's state back."""
    guest = cpu.guest
    assert guest is not None
    s = cpu.state
    view = guest.view
    _store_state(cpu, view)
    _Q.pack_into(view, _CR2, s.cr(2))
    if guest.np:
        _Q.pack_into(view, _G_PAT, s.field("pat"))
    _Q.pack_into(view, _V_INTR, guest.v_intr & ~0xFF | guest.v_tpr & 0xFF)
    state = _Q.unpack_from(view, _INT_STATE)[0] & ~INT_STATE.interrupt_shadow
    _Q.pack_into(view, _INT_STATE, state | INT_STATE.interrupt_shadow if s.shadow else state)
    _Q.pack_into(view, _EVENTINJ, guest.eventinj & ~EVENT.v)
    _Q.pack_into(view, _NRIP, nrip)
    view[_INSN_LEN] = len(insn)
    view[_INSN_LEN + 1 : _INSN_LEN + 1 + len(insn)] = insn
    _leave(cpu, guest, code, info1, info2, intinfo)


def vmload(cpu: Cpu, size: int) -> None:
    """VMLOAD (APM2 15.5.2): FS, GS, TR, LDTR and the MSRs of system calls, from a VMCB; bases are made canonical."""
    s = cpu.state
    address = _page(cpu, "VMLOAD")
    view = cpu.ram.view[address : address + PAGE]
    for segment, at in _DIRECT:
        selector, attrib, limit, base = _SEGMENT.unpack_from(view, at)
        s.set_segment(segment, selector, _canonical(base), limit, attrib)
    for name, at in _MSRS:
        value = _Q.unpack_from(view, at)[0]
        s.set_field(name, _canonical(value) if name == "kernel_gs_base" else value)
    cpu.advance(size)


def _canonical(address: int) -> int:
    return (address & 0xFFFFFFFFFFFF) | (0xFFFF000000000000 if address >> 47 & 1 else 0)


def vmsave(cpu: Cpu, size: int) -> None:
    """VMSAVE (APM2 15.5.2)."""
    s = cpu.state
    address = _page(cpu, "VMSAVE")
    view = cpu.ram.view[address : address + PAGE]
    for segment, at in _DIRECT:
        _SEGMENT.pack_into(view, at, s.selector(segment), s.attrib(segment), s.limit(segment), s.base(segment))
    for name, at in _MSRS:
        _Q.pack_into(view, at, s.field(name))
    cpu.engine.physical.written(address, PAGE)
    cpu.advance(size)


# Exits with information of their own (APM2 15.7.2 to 15.12, VMCB appendix C)


def exception_exit(cpu: Cpu, event: Event, origin: Event | None, *, nrip: int = 0) -> None:
    """An intercepted exception; `origin` is the event whose delivery raised it, `nrip` is behind INT3 or INTO."""
    is_fault = event.vector == PF
    vmexit(
        cpu, 0x40 + event.vector, event.error or 0, (event.address or 0) if is_fault else 0,
        intinfo=origin.encode() if origin else 0, nrip=nrip,
        insn=cpu.fetch() if is_fault and not (event.error or 0) & 0x10 and origin is None else b"",
    )  # fmt: skip


def nested_fault_exit(cpu: Cpu, fault: NestedFault, origin: Event | None) -> None:
    """A nested page fault; instruction bytes for data accesses (APM2 15.8.4)."""
    data = not fault.exitinfo1 & NPF_INFO.ID and origin is None
    vmexit(
        cpu, ExitCode.NPF, fault.exitinfo1, fault.gpa, intinfo=origin.encode() if origin else 0,
        insn=cpu.fetch() if data else b"",
    )  # fmt: skip


def classify_write_fault(cpu: Cpu, fault: NestedFault) -> NestedFault:
    """A refused write at a gpa: by the instruction itself (bit 32), or by the walk of the guest's tables (bit 33)?"""
    user = cpu.state.cpl == 3
    linear = cpu.state.linear_rip
    candidates = [(linear, False, True), (linear + 14, False, True)]
    candidates += [(address, writes, False) for address, _, _, writes in accesses(cpu)]
    candidates += [(address + size - 1, writes, False) for address, size, _, writes in accesses(cpu)]
    for address, write, execute in candidates:
        found = translate(cpu.ram, cpu.paging, address, Access(write, execute, user), cpu.nested, set_ad=False)
        if isinstance(found, Fault) and found.kind == "NPF" and found.code & NPF_INFO.TABLE and found.address == fault.gpa:
            return NestedFault(found.code, fault.gpa)
    return fault


def task_switch_exit(cpu: Cpu, switch: TaskSwitchExit, origin: Event | None) -> None:
    """APM2 15.14.1."""
    info2 = 0
    event = switch.event
    if event is not None and event.error is not None:
        info2 |= event.error | 1 << 44
    if switch.source == 2:
        info2 |= 1 << 36
    elif switch.source == 0:
        info2 |= 1 << 38
    if cpu.state.rflags & 1 << 16:
        info2 |= 1 << 48
    vmexit(cpu, ExitCode.TASK_SWITCH, switch.selector, info2, intinfo=origin.encode() if origin else 0)


def msr_intercepted(cpu: Cpu, number: int, write: bool) -> bool:
    guest = cpu.guest
    return (
        guest is not None and guest.intercepts(ExitCode.MSR) and msrpm_intercepts(cpu.ram, guest.msrpm, number, write)
    )


def io_intercepted(cpu: Cpu, port: int, size: int) -> bool:
    guest = cpu.guest
    return guest is not None and guest.intercepts(ExitCode.IOIO) and iopm_intercepts(cpu.ram, guest.iopm, port, size)


def io_exit(cpu: Cpu, insn: Instruction, port: int, size: int) -> None:
    """EXITINFO1 of IN, OUT, INS and OUTS (APM2 15.10.2); EXITINFO2 is the next RIP."""
    low = insn.opcode & 0xFF
    string = low in (0x6C, 0x6D, 0x6E, 0x6F)
    info = port << 16 | {1: IOIO.SZ8, 2: IOIO.SZ16, 4: IOIO.SZ32}[size]
    info |= {16: IOIO.A16, 32: IOIO.A32, 64: IOIO.A64}[insn.address]
    if not low & 2:
        info |= IOIO.IN
    segment = DS
    if string:
        info |= IOIO.STR
        if insn.rep:
            info |= IOIO.REP
        segment = ES if not low & 2 else insn.segment if insn.segment is not None else DS
    info |= segment << 10
    following = cpu.state.rip + insn.length
    vmexit(cpu, ExitCode.IOIO, info, following, nrip=following)


def take_virtual_interrupt(cpu: Cpu) -> int:
    """V_IRQ is taken: returns its vector and clears the request (APM2 15.21.4)."""
    guest = cpu.guest
    assert guest is not None
    vector = guest.v_intr_vector
    guest.v_intr &= ~V_INTR.v_irq
    return vector
