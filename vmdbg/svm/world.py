"""The world switch: VMRUN, #VMEXIT, VMLOAD and VMSAVE, from the manual (APM2 15.5 to 15.8)."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING

from introspect.exits import EVENT, NPF_INFO, PF_ERROR, ExitCode, port_info
from introspect.paging import Access, Fault, NestedFault, nested_translate, translate
from introspect.permissions import iopm_intercepts, msrpm_intercepts
from introspect.registers import CR0, CR4, EFER, RFLAGS
from introspect.rules import RULES, SVM_FEATURES, Processor, Violation, first_violation, host_violation
from introspect.sources import BytesMemory
from introspect.vmcb import INT_STATE, V_INTR, VMCB
from vmdbg.cpu.bits import DR6_BS, RFLAGS_VM, dr6_value, dr7_value
from vmdbg.cpu.core import Cpu, Notice
from vmdbg.cpu.faults import GP, NMI, PF, CpuFault, Event, Kind, NestedPageFault
from vmdbg.cpu.operands import accesses
from vmdbg.engine import layout
from vmdbg.engine.state import CODE_BASE_KEPT, CS, GDTR, HF_CS64, IDTR, RSP, CpuState
from vmdbg.platform.msrs import (
    DEBUGCTL,
    DEBUGCTL_BITS,
    LAST_BRANCH_FROM,
    LAST_BRANCH_TO,
    LAST_EXCEPTION_FROM,
    LAST_EXCEPTION_TO,
)
from vmdbg.platform.msrs import EFER as MSR_EFER

from . import avic
from .guest import Guest

if TYPE_CHECKING:
    from introspect.decode import Instruction
    from vmdbg.cpu.tasks import TaskSwitchExit

PAGE = 4096

FEATURES = SVM_FEATURES.make(
    NP=1, LBRV=1, SVML=1, NRIPS=1, TscRateMsr=1, VmcbClean=1, FlushByAsid=1, DecodeAssists=1, PauseFilter=1,
    PauseFilterThreshold=1, AVIC=1, V_VMSAVE_VMLOAD=1, vGIF=1, GMET=1, VNMI=1,
)  # fmt: skip
"""What CPUID 8000_000A EDX claims."""
ASIDS = 32768

# What the engine intercepts for us whatever a hypervisor asks (see cpu/exits.py).
_L0_CR_READ, _L0_CR_WRITE, _L0_DR = 1 << 8, 0xFFFF, 0xFFFF
_L0_WORD3 = sum(1 << bit for bit in (14, 15, 18, 19, 21, 22, 24, 26, 28, 31))
"""RDTSC RDPMC CPUID RSM INTn INVD HLT INVLPGA MSR SHUTDOWN."""
_L0_WORD4 = sum(1 << bit for bit in (0, 1, 2, 3, 6, 7, 8, 9, 10, 11))
"""VMRUN VMMCALL VMLOAD VMSAVE SKINIT RDTSCP ICEBP WBINVD MONITOR MWAIT; INVD is reported as WBINVD."""
_GUEST_WORD3 = sum(1 << bit for bit in (6, 7, 8, 9, 10, 11, 12, 13, 16, 17, 20, 23, 25))
"""Descriptor tables, PUSHF POPF IRET PAUSE INVLPG: the engine stops before them where a guest's hypervisor asks."""
_TASK_SWITCH, _FERR_FREEZE, _LTR = 1 << 29, 1 << 30, 1 << 13
_STRICT_WORD3, _STRICT_CR_READ = 1 << 25 | _LTR, 1 << 0 | 1 << 3 | 1 << 4
"""A strict TLB hears of INVLPG and of the task register, and hides the control registers that are its own (see tlb.py)."""
_GUEST_WORD4 = 1 << 4 | 1 << 5
"""STGI CLGI."""

_INTERCEPTS = struct.Struct("<Q4HI")
"""The engine's intercept fields, from `layout.INTERCEPT` on."""
_INTERCEPTED = slice(layout.INTERCEPT, layout.INTERCEPT + _INTERCEPTS.size)

_SEGMENT = struct.Struct("<HHIQ")
_HIDDEN = struct.Struct("<I4xQII")
"""A segment register in the engine: selector, base, limit, flags."""
_TABLE = struct.Struct("<IQ")
_CONTROLS = struct.Struct("<7Q")
"""CR4 CR3 CR0 DR7 DR6 RFLAGS RIP."""
_EXIT = struct.Struct("<4Q")
"""EXITCODE EXITINFO1 EXITINFO2 EXITINTINFO."""
_MSRS = struct.Struct("<8Q")
"""STAR LSTAR CSTAR SFMASK KERNEL_GS_BASE SYSENTER_CS SYSENTER_ESP SYSENTER_EIP."""
_FOUR = struct.Struct("<4Q")
_BRANCHES = struct.Struct("<5Q")
_BRANCH_MSRS = DEBUGCTL, LAST_BRANCH_FROM, LAST_BRANCH_TO, LAST_EXCEPTION_FROM, LAST_EXCEPTION_TO
"""In the order of the save area."""

_at = VMCB.offset_of
_ES, _FS, _LDTR, _TR = (_at(f"{name}.selector") for name in ("es", "fs", "ldtr", "tr"))
_GDTR, _IDTR, _CPL, _CR4, _STAR = _at("gdtr.limit"), _at("idtr.limit"), _at("cpl"), _at("cr4"), _at("star")
_EXITCODE, _INSN_LEN, _DBGCTL = _at("exitcode"), _at("insn_len"), _at("dbgctl")
_CS_BASE, _EFER, _RSP, _RAX, _CR2, _G_PAT, _V_INTR, _INT_STATE, _EVENTINJ, _NRIP = (
    _at(name) // 8 for name in ("cs.base", "efer", "rsp", "rax", "cr2", "g_pat", "v_intr", "int_state", "eventinj", "nrip")
)
"""Fields of 8 bytes, as indices."""
_SAVED_FS_GS, _SAVED_LDTR, _SAVED_TR = slice(_FS, _FS + 32), slice(_LDTR, _LDTR + 16), slice(_TR, _TR + 16)
_SAVED_MSRS = slice(_STAR, _STAR + _MSRS.size)
_FLAT, _DIRECT = slice(_ES, _ES + 64), slice(_FS, _TR + 16)
"""ES CS SS DS, switched by VMRUN and #VMEXIT; FS GS LDTR TR, moved by VMLOAD and VMSAVE, with GDTR and IDTR between."""
_HIDDEN_FLAT = slice(layout.SEGMENTS, layout.SEGMENTS + 96)
_HIDDEN_DIRECT = slice(layout.SEGMENTS + 96, layout.SEGMENTS + 192)
_GDTR_BASE, _IDTR_BASE = ((layout.SEGMENTS + 24 * table + 8) // 8 for table in (GDTR, IDTR))
_GDTR_LIMIT, _IDTR_LIMIT = ((layout.SEGMENTS + 24 * table + 16) // 4 for table in (GDTR, IDTR))
_Q_RAX, _Q_RSP, _Q_RIP, _Q_RFLAGS, _Q_EFER = (
    at // 8 for at in (layout.REGS, layout.REGS + 8 * RSP, layout.EIP, layout.EFLAGS, layout.EFER)
)
_Q_CR0, _Q_CR2, _Q_CR3, _Q_CR4 = (layout.CR // 8 + number for number in (0, 2, 3, 4))
_Q_PAT, _Q_HSAVE, _I_HFLAGS = layout.PAT // 8, layout.VM_HSAVE // 8, layout.HFLAGS // 4
_I_CS_FLAGS = (layout.SEGMENTS + 24 * CS + 20) // 4
_SYSENTER = slice(layout.SYSENTER_CS, layout.SYSENTER_CS + 32)
_SYSCALL = slice(layout.LSTAR, layout.LSTAR + 32)
"""SYSENTER_CS SYSENTER_ESP SYSENTER_EIP STAR; LSTAR CSTAR SFMASK KERNEL_GS_BASE."""
_SHADOW, _VALID = INT_STATE.interrupt_shadow, EVENT.v
_HOST_FIELDS = "cs.attrib", "efer", "cr4", "cr3", "cr0"
_HOST = VMCB.codec(*_HOST_FIELDS).unpack
"""What the consistency rules look at in a host save area."""
_JUDGED = VMCB.codec(*sorted({name for rule in RULES for name in rule.fields}, key=VMCB.offset_of)).unpack

_SHADOW_CR4 = CR4.PAE | CR4.PSE | CR4.LA57
_SHADOW_EFER = EFER.LME | EFER.LMA | EFER.NXE


@lru_cache(maxsize=256)
def _intercepts(words: tuple[int, ...], strict: bool = False, v_gif: bool = False, cr_reads: int = 0) -> bytes:
    """The engine's intercept fields for a guest with these intercept words; `strict`: under a strict TLB; with `v_gif`, its
    GIF is not the processor's; `cr_reads`: of these control registers, whoever asks for it."""
    word3, word4 = _L0_WORD3 | words[3] & _GUEST_WORD3, _L0_WORD4 | (_GUEST_WORD4 if v_gif else words[4] & _GUEST_WORD4)
    if words[3] & _TASK_SWITCH:
        word3 |= _LTR
    cr_read = _L0_CR_READ | cr_reads | words[0] & 0xFFFF | (1 if words[3] & _FERR_FREEZE else 0)
    if strict:
        word3, cr_read = word3 | _STRICT_WORD3, cr_read | _STRICT_CR_READ
    return _INTERCEPTS.pack(
        word3 | word4 << 32, cr_read, _L0_CR_WRITE, _L0_DR, _L0_DR, 0xFFFFFFFF
    )


_NOBODY = (0, 0, 0, 0, 0, 0)
NO_GUEST = _intercepts(_NOBODY)
"""The engine's intercept fields while the host runs."""


def set_intercepts(state: CpuState, guest: Guest | None) -> None:
    """Tell the engine where to stop: the union of our needs and those of the guest's hypervisor."""
    if guest is None:
        state.bytes[_INTERCEPTED] = host_intercepts(state)
    else:
        state.bytes[_INTERCEPTED] = _intercepts(guest.words, state.strict, guest.v_gif_enabled, state.cr_reads)


def host_intercepts(state: CpuState) -> bytes:
    """The engine's intercept fields for the host."""
    plain = not state.strict and not state.cr_reads
    return NO_GUEST if plain else _intercepts(_NOBODY, state.strict, False, state.cr_reads)


def let_through(state: CpuState, code: int) -> None:
    """Do not stop at an exit code of words 3 and 4, until the next `set_intercepts`."""
    state.q[layout.INTERCEPT // 8] &= ~(1 << code - ExitCode.INTR)


def stop_at(state: CpuState, *codes: int) -> None:
    """Stop at these exit codes of words 3 and 4, until the next `set_intercepts`."""
    for code in codes:
        state.q[layout.INTERCEPT // 8] |= 1 << code - ExitCode.INTR


# Segments change rarely from one switch to the next: their two forms are remembered.


@lru_cache(maxsize=1024)
def _to_vmcb(hidden: bytes) -> bytes:
    """Four segment registers of the engine in the VMCB's form: descriptor bits 47:40 and 55:52 packed (APM2 15.5.1)."""
    return b"".join(
        _SEGMENT.pack(selector & 0xFFFF, flags >> 8 & 0xFF | flags >> 12 & 0xF00, limit, base)
        for selector, base, limit, flags in _HIDDEN.iter_unpack(hidden)
    )


@lru_cache(maxsize=1024)
def _from_vmcb(records: bytes, wide: bool = False) -> bytes:
    """The reverse.  Of ES, CS, SS and DS bases have 32 bits (APM2 table B-2); others, `wide`, are made canonical."""
    return b"".join(
        _HIDDEN.pack(
            selector, _canonical(base) if wide else base & 0xFFFFFFFF, limit, (attrib & 0xFF) << 8 | (attrib & 0xF00) << 12
        )
        for selector, attrib, limit, base in _SEGMENT.iter_unpack(records)
    )


@lru_cache(maxsize=1024)
def _direct_from_vmcb(records: bytes, msrs: bytes) -> tuple[bytes, bytes, bytes]:
    """VMLOAD: FS to TR and the MSRs of a VMCB, as the engine has them (`_HIDDEN_DIRECT`, `_SYSENTER`, `_SYSCALL`)."""
    segments = records[:32] + records[48:64] + records[80:]
    star, lstar, cstar, sfmask, kernel_gs_base, cs, esp, eip = _MSRS.unpack(msrs)
    return (
        _from_vmcb(segments, True),
        _FOUR.pack(cs & 0xFFFFFFFF, esp, eip, star),
        _FOUR.pack(lstar, cstar, sfmask, _canonical(kernel_gs_base)),
    )


@lru_cache(maxsize=1024)
def _direct_to_vmcb(hidden: bytes, sysenter: bytes, syscall: bytes) -> tuple[bytes, bytes, bytes, bytes]:
    """VMSAVE: FS and GS, LDTR, TR, and the MSRs."""
    records = _to_vmcb(hidden)
    cs, esp, eip, star = _FOUR.unpack(sysenter)
    msrs = _MSRS.pack(star, *_FOUR.unpack(syscall), cs & 0xFFFFFFFF, esp, eip)
    return records[:32], records[32:48], records[48:], msrs


def _store_state(cpu: Cpu, view: memoryview) -> None:
    """Write what VMRUN and #VMEXIT switch into the save area at `view`."""
    s = cpu.state
    q, i, to = s.q, s.i, view.cast("Q")
    view[_FLAT] = _to_vmcb(bytes(s.bytes[_HIDDEN_FLAT]))
    if i[_I_CS_FLAGS] & CODE_BASE_KEPT:
        to[_CS_BASE] = s.base(CS)
    _TABLE.pack_into(view, _GDTR, i[_GDTR_LIMIT], q[_GDTR_BASE])
    _TABLE.pack_into(view, _IDTR, i[_IDTR_LIMIT], q[_IDTR_BASE])
    view[_CPL] = i[_I_HFLAGS] & 3
    to[_EFER] = q[_Q_EFER]
    dr = cpu.dr
    _CONTROLS.pack_into(view, _CR4, q[_Q_CR4], q[_Q_CR3], q[_Q_CR0], dr[7], dr[6], q[_Q_RFLAGS] | 2, q[_Q_RIP])
    to[_RSP] = q[_Q_RSP]
    to[_RAX] = q[_Q_RAX]


def _load_state(cpu: Cpu, view: memoryview) -> tuple[int, int]:
    """Load it back; the caller sets CPL, DR6 and DR7 (returned) and refreshes the mode.

    Bits that the registers do not have are lost; bases are made canonical (APM2 15.5.1).
    """
    s = cpu.state
    q, i, of = s.q, s.i, view.cast("Q")
    s.bytes[_HIDDEN_FLAT] = _from_vmcb(bytes(view[_FLAT]))
    limit, base = _TABLE.unpack_from(view, _GDTR)
    i[_GDTR_LIMIT], q[_GDTR_BASE] = limit & 0xFFFF, _canonical(base)
    limit, base = _TABLE.unpack_from(view, _IDTR)
    i[_IDTR_LIMIT], q[_IDTR_BASE] = limit & 0xFFFF, _canonical(base)
    q[_Q_EFER] = efer = of[_EFER]
    q[_Q_CR4], cr3, cr0, dr7, dr6, rflags, q[_Q_RIP] = _CONTROLS.unpack_from(view, _CR4)
    q[_Q_CR0] = cr0 & CR0.defined | CR0.ET
    q[_Q_CR3] = cr3 if efer & EFER.LME and cr0 & CR0.PG else cr3 & 0xFFFFFFFF
    q[_Q_RFLAGS] = rflags & RFLAGS.defined | 2
    q[_Q_RSP] = of[_RSP]
    q[_Q_RAX] = of[_RAX]
    return dr6, dr7


def _store_branches(cpu: Cpu, view: memoryview) -> None:
    """Write DebugCtl and the branch records into the save area at `view` (APM2 15.23)."""
    _BRANCHES.pack_into(view, _DBGCTL, *(cpu.msrs.values[number] for number in _BRANCH_MSRS))


def _load_branches(cpu: Cpu, view: memoryview) -> None:
    dbgctl, *records = _BRANCHES.unpack_from(view, _DBGCTL)
    cpu.msrs.values.update(zip(_BRANCH_MSRS, (dbgctl & DEBUGCTL_BITS, *records), strict=True))


def operand(cpu: Cpu, what: str) -> int:
    """The page that rAX names, for VMRUN, VMLOAD and VMSAVE; #GP if it is not one (APM2 15.5.1).

    A guest with virtual VMLOAD and VMSAVE gives a guest-physical address: `NestedPageFault` if that is not mapped.
    """
    address = cpu.state.q[_Q_RAX]
    if not cpu.state.i[_I_HFLAGS] & HF_CS64:
        address &= 0xFFFFFFFF if cpu.bits == 32 else 0xFFFF
    bad = address & (PAGE - 1) or address >> cpu.physical_bits
    if not bad and cpu.guest is not None and cpu.guest.virtual_vmload and cpu.nested is not None:
        found = nested_translate(cpu.ram, cpu.nested, address, what == "VMSAVE", False, set_ad=True)
        if isinstance(found, NestedFault):
            raise NestedPageFault(found)
        address = found.spa
    if bad or not cpu.ram.contains(address, PAGE):
        cpu.last_fault = (
            f"{what} with rAX {address:#x}: the VMCB must be a 4 KiB-aligned page of memory below {cpu.physical_bits} bits "
            "(APM2 15.5.1)"
        )
        raise CpuFault(GP, 0)
    return address


def vmrun(cpu: Cpu, size: int) -> Event | None:
    """VMRUN (APM2 15.5.1).  Returns the event that EVENTINJ asks to inject, for the caller to raise.

    A VMCB that breaks a consistency rule ends in #VMEXIT with EXITCODE -1 at once.
    """
    s = cpu.state
    vmcb = operand(cpu, "VMRUN")
    rip = s.rip
    cpu.advance(size)
    cpu.crossing.enter(rip, cpu.engine.clock.now)
    cpu.monitored = None
    cpu.due = 0  # the host's single-step trap comes behind #VMEXIT
    host_if = bool(s.rflags & 0x200)
    _store_state(cpu, hsave(cpu))
    memory = view = cpu.ram.view[vmcb : vmcb + PAGE]
    stale: list[str] = []
    if cpu.vmcb_cache is not None:
        view, stale = cpu.vmcb_cache.load(vmcb, memory)
    guest = Guest(vmcb, memory, host_if, view, s.is_code64)
    host_cr4, host_efer = s.cr(4), s.efer
    efer_valid = cpu.msrs.table[MSR_EFER].writable
    violation = _violation(
        cpu, guest, view, _processor(cpu.physical_bits, s.cr(0), host_cr4, host_efer, cpu.cr4_valid, efer_valid)
    )
    cpu.guest = guest
    cpu.observer.vmrun(cpu, guest, host_cr4, host_efer)
    if stale:
        cpu.observer.notice(cpu, Notice.STALE, guest, _stale_text(guest, memory, view, stale))
    if violation is not None:
        cpu.last_fault = violation.text
        _leave(cpu, guest, ExitCode.INVALID, 0, 0, 0)
        if cpu.vmcb_cache is not None:
            cpu.vmcb_cache.forget(vmcb)
        cpu.observer.notice(cpu, Notice.VMRUN_FAIL, guest, f"VMRUN of the VMCB at {vmcb:#x} failed: {violation.text}")
        return None
    host = s.cr(0), host_cr4, host_efer
    dr6, dr7 = _load_state(cpu, view)
    cpu.dr[6], cpu.dr[7] = dr6_value(dr6), dr7_value(dr7)
    cpu.debug.update()
    q = s.q
    of = view.cast("Q")
    q[_Q_CR2] = of[_CR2]
    cpl = view[_CPL]
    cr0 = q[_Q_CR0]
    # Real mode runs at 0, virtual-8086 mode at 3, whatever the VMCB says; LMA follows LME and PG (APM2 15.5.1).
    cpl = 0 if not cr0 & 1 else 3 if q[_Q_RFLAGS] & RFLAGS_VM else cpl & 3
    efer = q[_Q_EFER]
    q[_Q_EFER] = efer | 0x400 if efer & 0x100 and cr0 >> 31 else efer & ~0x400
    s.refresh(cpl)
    s.shadow = guest.shadow
    apic = None
    if avic.enabled(guest):
        guest.avic = avic.Avic(cpu, guest, view)
        guest.avic.evaluate()
        apic = guest.avic.base, guest.avic.page.spa
    if guest.np:
        cpu.npt = cpu.engine.physical.shadow(
            guest.n_cr3, host_cr4 & _SHADOW_CR4, host_efer & _SHADOW_EFER, apic, guest.gmet and cpu.engine.has_gmet
        )
        guest.host_pat, q[_Q_PAT] = q[_Q_PAT], of[_G_PAT]
    cpu.hold_pdptes()
    if cpu.tlb is not None:
        cpu.tlb.control(guest)
    set_intercepts(s, guest)
    cpu.guard_ferr()
    if guest.lbr_virtual:
        _store_branches(cpu, hsave(cpu))
        _load_branches(cpu, view)
    guest.host_nmi_blocked = s.nmi_blocked
    if guest.v_nmi_enabled:
        s.nmi_blocked = bool(guest.v_intr & V_INTR.v_nmi_mask)
    s.gif = True
    cpu.flush()
    if cpu.switcher is not None:
        cpu.switcher.entered(cpu, guest, host, bytes(s.bytes[_INTERCEPTED]))
    event = guest.eventinj
    if not event & EVENT.v:
        return None
    kind = Kind(EVENT.get(event, "type"))
    vector = NMI if kind == Kind.NMI else event & 0xFF  # of an NMI it is ignored (APM2 15.20)
    injected = Event(
        vector, kind, event >> 32 if event & EVENT.ev else None,
        s.cr(2) if kind == Kind.EXCEPTION and vector == PF else None,
    )  # fmt: skip
    if injected.software:
        # nRIP is where their handlers return to; without a delivery RIP stays at the instruction (APM2 15.20).
        following = guest.q[_NRIP]
        injected = replace(injected, length=following - s.rip)
        s.rip = following
    if kind == Kind.NMI and guest.v_nmi_enabled:
        s.nmi_blocked = True  # physical NMIs are not masked by an injected one (APM2 15.21.10)
    return injected


@lru_cache(maxsize=64)
def _processor(physical_bits: int, cr0: int, cr4: int, efer: int, cr4_valid: int, efer_valid: int) -> Processor:
    return Processor(physical_bits, FEATURES, cr0, cr4, efer, cr4_valid=cr4_valid, efer_valid=efer_valid)


def _stale_text(guest: Guest, memory: memoryview, loaded: memoryview, stale: list[str]) -> str:
    """In words, what the VMCB cache hides from VMRUN."""
    fields = ", ".join(f"{name} ({VMCB.read(loaded, name):#x}, in memory {VMCB.read(memory, name):#x})" for name in stale)
    bits = sorted({bit for name in stale if (bit := VMCB[name].clean) is not None})
    return (
        f"VMRUN of the VMCB at {guest.vmcb:#x} used what the processor remembers of {fields}: "
        f"VMCB_CLEAN ({VMCB.read(memory, 'vmcb_clean'):#x}) says that nothing changed (APM2 15.15). "
        f"Clear bit {' and '.join(map(str, bits))} when changing these fields"
    )


def _violation(cpu: Cpu, guest: Guest, view: memoryview, processor: Processor) -> Violation | None:
    """The consistency rule that the VMCB breaks.  One that passed passes again while all the rules read is the same.

    Without nested paging a rule reads memory as well, so nothing is remembered.
    """
    judged = (processor, _JUDGED(view, 0))
    if cpu.accepted.get(guest.vmcb) == judged:
        return None
    violation = first_violation(view, processor, cpu.ram)
    if violation is None and guest.np:
        if len(cpu.accepted) >= 256:
            cpu.accepted.clear()
        cpu.accepted[guest.vmcb] = judged
    return violation


def _host_violation(cpu: Cpu, values: tuple[int, ...]) -> Violation | None:
    """The consistency rule that the host state to be reloaded breaks."""
    return _judge_host(values, cpu.physical_bits, cpu.cr4_valid, cpu.msrs.table[MSR_EFER].writable)


@lru_cache(maxsize=256)
def _judge_host(values: tuple[int, ...], physical_bits: int, cr4_valid: int, efer_valid: int) -> Violation | None:
    area = VMCB.encode(dict(zip(_HOST_FIELDS, values, strict=True)))
    processor = Processor(physical_bits, FEATURES, cr4_valid=cr4_valid, efer_valid=efer_valid)
    return host_violation(area, processor, BytesMemory(0))


def hsave(cpu: Cpu) -> memoryview:
    address = cpu.state.q[_Q_HSAVE] & ~(PAGE - 1)
    if not cpu.ram.contains(address, PAGE):
        return memoryview(cpu.lost_hsave)
    return cpu.ram.view[address : address + PAGE]


def _leave(
    cpu: Cpu, guest: Guest, code: int, info1: int, info2: int, intinfo: int, nrip: int = 0, insn: bytes = b""
) -> None:
    """Second half of #VMEXIT: the exit's fields, and the host's state back from VM_HSAVE_PA (APM2 15.6)."""
    s = cpu.state
    view = guest.view
    rip = s.rip
    cpu.observer.vmexit(cpu, guest, code, info1, info2, intinfo, rip)
    _EXIT.pack_into(view, _EXITCODE, code, info1, info2, intinfo)
    guest.q[_NRIP] = nrip
    view[_INSN_LEN] = len(insn)
    view[_INSN_LEN + 1 : _INSN_LEN + 1 + len(insn)] = insn
    cpu.observer.left(cpu, guest, rip)
    saved = hsave(cpu)
    broken = _host_violation(cpu, _HOST(saved, 0))
    _load_state(cpu, saved)
    q = s.q
    q[_Q_CR0] |= 1
    q[_Q_RFLAGS] &= ~RFLAGS_VM
    cpu.due, cpu.debug.held = DR6_BS if q[_Q_RFLAGS] & RFLAGS.TF else 0, 0
    cpu.dr[7] = 0x400
    cpu.debug.update()
    cpu.guest = None
    if cpu.switcher is not None:
        cpu.switcher.left()
    cpu.npt = cpu.engine.physical.host
    cpu.hold_pdptes()
    s.refresh(0)
    if cpu.task_guard is not None:
        cpu.guard_tasks()
    s.shadow = False
    set_intercepts(s, None)
    s.gif = False
    cpu.halted, cpu.monitored = False, None
    if q[_Q_CR4] & CR4.PAE and q[_Q_CR0] & CR0.PG and not s.is_long and cpu.bad_pdptes(q[_Q_CR3]):
        cpu.shutdown = True
        cpu.last_fault = f"#VMEXIT to a host in PAE mode: a PDPE at CR3 {q[_Q_CR3]:#x} has reserved bits set (APM2 15.6)"
    if broken is not None:
        cpu.shutdown = True
        cpu.last_fault = (
            f"#VMEXIT reloads the host's state from VM_HSAVE_PA {q[_Q_HSAVE]:#x}, and {broken.rule.text} (APM2 15.6): "
            "something has written to that page. Keep it for the processor alone"
        )
    cpu.engine.physical.written(guest.vmcb, PAGE)
    cpu.flush()
    if cpu.catches is not None:
        cpu.catches.exited(cpu, guest, code, info1, info2)


def vmexit(cpu: Cpu, code: int, info1: int = 0, info2: int = 0, *, intinfo: int = 0, nrip: int = 0, insn: bytes = b"") -> None:
    """#VMEXIT from the running guest (APM2 15.6): its state into the VMCB, the exit's reason, the host's state back."""
    guest = cpu.guest
    assert guest is not None
    s = cpu.state
    view = guest.view
    if cpu.ne_is_ours:
        s.set_cr(0, cpu.cr0)
        cpu.ne_is_ours = False
    _store_state(cpu, view)
    if guest.lbr_virtual:
        _store_branches(cpu, view)
        _load_branches(cpu, hsave(cpu))
    q = guest.q
    q[_CR2] = s.q[_Q_CR2]
    if guest.np:
        q[_G_PAT], s.q[_Q_PAT] = s.q[_Q_PAT], guest.host_pat
    q[_V_INTR] = _v_intr_at_exit(cpu, guest, intinfo)
    state = q[_INT_STATE] & ~_SHADOW
    q[_INT_STATE] = state | _SHADOW if s.shadow else state
    q[_EVENTINJ] = guest.eventinj & ~_VALID
    if cpu.vmcb_cache is not None:
        cpu.vmcb_cache.store(guest.vmcb, view)
    _leave(cpu, guest, code, info1, info2, intinfo, nrip, insn)
    if code == ExitCode.SHUTDOWN:
        cpu.observer.notice(cpu, Notice.SHUTDOWN, guest, f"the guest of the VMCB at {guest.vmcb:#x} shut down at "
                            f"{VMCB.read(view, 'cs.selector'):#x}:{VMCB.read(view, 'rip'):#x} (APM2 15.14.3): an exception "
                            "could not be delivered, nor the double fault for it")  # fmt: skip


def _v_intr_at_exit(cpu: Cpu, guest: Guest, intinfo: int) -> int:
    """What #VMEXIT writes back of virtual interrupts; the processor's NMI mask is the host's again."""
    word: int = guest.v_intr & ~0xFF | guest.v_tpr & 0xFF
    if not guest.v_nmi_enabled:
        return word
    s = cpu.state
    delivering = intinfo & EVENT.v and EVENT.get(intinfo, "type") == Kind.NMI
    blocked = s.nmi_blocked and not delivering  # an NMI that was not delivered has not masked others (APM2 15.21.10)
    s.nmi_blocked = guest.host_nmi_blocked
    return word | V_INTR.v_nmi_mask if blocked else word & ~V_INTR.v_nmi_mask


def vmload(cpu: Cpu, size: int) -> None:
    """VMLOAD (APM2 15.5.2): FS, GS, TR, LDTR and the MSRs of system calls, from a VMCB; bases are made canonical."""
    s = cpu.state
    address = operand(cpu, "VMLOAD")
    view = cpu.ram.view[address : address + PAGE]
    to = s.bytes
    to[_HIDDEN_DIRECT], to[_SYSENTER], to[_SYSCALL] = _direct_from_vmcb(bytes(view[_DIRECT]), bytes(view[_SAVED_MSRS]))
    cpu.advance(size)


def _canonical(address: int) -> int:
    return (address & 0xFFFFFFFFFFFF) | (0xFFFF000000000000 if address >> 47 & 1 else 0)


def vmsave(cpu: Cpu, size: int) -> None:
    """VMSAVE (APM2 15.5.2)."""
    s = cpu.state
    address = operand(cpu, "VMSAVE")
    view = cpu.ram.view[address : address + PAGE]
    of = s.bytes
    view[_SAVED_FS_GS], view[_SAVED_LDTR], view[_SAVED_TR], view[_SAVED_MSRS] = _direct_to_vmcb(
        bytes(of[_HIDDEN_DIRECT]), bytes(of[_SYSENTER]), bytes(of[_SYSCALL])
    )
    cpu.engine.physical.written(address, PAGE)
    cpu.advance(size)


# Exits with information of their own (APM2 15.7.2 to 15.12, VMCB appendix C)


def _instruction_bytes(cpu: Cpu) -> bytes:
    """The 15 bytes from RIP on, as many as can be fetched: up to a page that is not there, and to CS's limit (APM2 15.8.4)."""
    code, s = cpu.code(), cpu.state
    return code if s.is_code64 else code[: max(s.limit(CS) + 1 - s.rip, 0)]


def exception_exit(cpu: Cpu, event: Event, origin: Event | None, *, nrip: int = 0) -> None:
    """An intercepted exception; `origin` is the event whose delivery raised it, `nrip` is behind INT3 or INTO."""
    is_fault = event.vector == PF
    vmexit(
        cpu, 0x40 + event.vector, event.error or 0, (event.address or 0) if is_fault else 0,
        intinfo=origin.encode() if origin else 0, nrip=nrip,
        insn=_instruction_bytes(cpu) if is_fault and not (event.error or 0) & 0x10 and origin is None else b"",
    )  # fmt: skip


def nested_fault_exit(cpu: Cpu, fault: NestedFault, origin: Event | None) -> None:
    """A nested page fault; instruction bytes for data accesses (APM2 15.8.4)."""
    data = not fault.exitinfo1 & NPF_INFO.ID and origin is None
    vmexit(
        cpu, ExitCode.NPF, fault.exitinfo1, fault.gpa, intinfo=origin.encode() if origin else 0,
        insn=_instruction_bytes(cpu) if data else b"",
    )  # fmt: skip


def classify_write_fault(cpu: Cpu, fault: NestedFault) -> NestedFault:
    """A refused write at a gpa: by the instruction itself (bit 32), or by the walk of the guest's tables (bit 33)?"""
    for found in _faults(cpu):
        if found.kind == "NPF" and found.code & NPF_INFO.TABLE and found.address == fault.gpa:
            return NestedFault(found.code, fault.gpa)
    return fault


def reserved_bit_fault(cpu: Cpu) -> CpuFault:
    """The #PF of the instruction at RIP, whose walk met an address beyond MAXPHYADDR."""
    for found in _faults(cpu):
        if found.kind == "PF" and found.code & PF_ERROR.RSV:
            return CpuFault(PF, found.code, found.address)
    return CpuFault(PF, PF_ERROR.P | PF_ERROR.RSV, cpu.state.linear_rip)


def _faults(cpu: Cpu) -> Iterator[Fault]:
    """What the accesses of the instruction at RIP fault with, its fetch included."""
    user = cpu.state.cpl == 3
    linear = cpu.state.linear_rip
    candidates = [(linear, False, True), (linear + 14, False, True)]
    candidates += [(address, writes, False) for address, _, _, writes in accesses(cpu)]
    candidates += [(address + size - 1, writes, False) for address, size, _, writes in accesses(cpu)]
    for address, write, execute in candidates:
        found = translate(cpu.ram, cpu.paging, address, Access(write, execute, user), cpu.nested, set_ad=False)
        if isinstance(found, Fault):
            yield found


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
    if cpu.state.rflags & RFLAGS.RF or (event is not None and event.restarts):
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
    """EXITINFO2 is the next RIP."""
    following = cpu.state.rip + insn.length
    vmexit(cpu, ExitCode.IOIO, port_info(insn, port, size), following, nrip=following)


def take_virtual_interrupt(cpu: Cpu) -> int:
    """V_IRQ is taken: returns its vector and clears the request (APM2 15.21.4); or one of the virtual APIC."""
    guest = cpu.guest
    assert guest is not None
    if guest.avic is not None:
        return guest.avic.take()
    vector = guest.v_intr_vector
    guest.v_intr &= ~V_INTR.v_irq
    return vector
