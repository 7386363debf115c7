"""System instructions that the engine stops before, executed by us (APM3 chapter 4, by instruction).

Each function executes the instruction at RIP for a CPU and leaves RIP behind it, or raises `CpuFault`.  Whether a
hypervisor intercepts it has been decided before (vmdbg/svm).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from vmdbg.engine.state import CS, DS, ES, RAX, RBX, RCX, RDI, RDX, RSI, RSP, SS, TR
from vmdbg.platform.clock import TICKS_PER_SECOND
from vmdbg.platform.cpuid import MAX_RDPRU, MONITOR_LINE, Dynamic, cpuid
from vmdbg.platform.faults import MsrFault
from vmdbg.platform.msrs import HWCR, HWCR_MON_MWAIT_DIS, HWCR_MON_MWAIT_USER_EN
from vmdbg.svm import world

from .core import (
    CR0_PE,
    CR0_PG,
    CR4_OSXSAVE,
    DR6_BS,
    RFLAGS_DF,
    RFLAGS_IF,
    RFLAGS_IOPL,
    RFLAGS_NT,
    RFLAGS_RF,
    RFLAGS_TF,
    RFLAGS_VM,
    Cpu,
    Line,
    dr6_value,
    dr7_value,
)
from .debug import CR4_DE, DR6_BD, DR7_GD
from .decode import Instruction, effective_address
from .delivery import TASK_GATE
from .descriptors import fetch
from .events import raise_event
from .faults import DB, GP, UD, CpuFault, Event, Kind, NestedPageFault
from .smm import PortAccess
from .tasks import AVAILABLE_16, AVAILABLE_32, Source, TaskSwitchExit, switch

CR0_ET, CR0_TS, CR0_NW, CR0_CD = 1 << 4, 1 << 3, 1 << 29, 1 << 30
CR0_DEFINED = 0xE005003F
CR4_TSD, CR4_PSE, CR4_PAE, CR4_MCE, CR4_PGE, CR4_PCE = (1 << bit for bit in (2, 4, 5, 6, 7, 8))
EFER_LME, EFER_LMA, EFER_SCE, EFER_NXE, EFER_SVME = 1 << 8, 1 << 10, 1 << 0, 1 << 11, 1 << 12
XCR0_X87, XCR0_SSE = 1, 2
CODE64, CODE32, DATA32 = 0xA9B, 0xC9B, 0xC93
MASK64, MASK32 = 0xFFFFFFFFFFFFFFFF, 0xFFFFFFFF


_FIXED = {
    **dict.fromkeys((0xA2, 0x30, 0x31, 0x32, 0x33, 0x06, 0x08, 0x09), 2), **dict.fromkeys((0x20, 0x21, 0x22, 0x23), 3)
}  # fmt: skip


def length(cpu: Cpu) -> int:
    """The length of the instruction at RIP; the common system instructions without prefixes need no decoding."""
    engine = cpu.engine
    if engine.rt.code_size > 3:
        code = engine.last_code
        first = code[0]
        if first == 0x0F:
            second = code[1]
            fixed = _FIXED.get(second, 0) if second != 0x01 else 3 if code[2] >= 0xC8 else 0
            if fixed:
                return fixed
        elif first == 0xF4:
            return 1
    return cpu.instruction().length


def _general(cpu: Cpu, number: int, value: int) -> None:
    cpu.state.set_reg(number, value)


# Control registers


def cr0_value(value: int) -> int:
    """What CR0 holds after `value` is written to it: the bits that exist, with ET always set."""
    return value & CR0_DEFINED | CR0_ET


def check_cr0(cpu: Cpu, value: int) -> None:
    """Rules of MOV CR0 (APM2 3.1.1, 14.6)."""
    s = cpu.state
    if value >> 32 or (value & CR0_NW and not value & CR0_CD) or (value & CR0_PG and not value & CR0_PE):
        raise CpuFault(GP, 0)
    turned = (value ^ cpu.cr0) & CR0_PG
    if turned & value and s.efer & EFER_LME and (not s.cr(4) & CR4_PAE or s.attrib(CS) & 0x200):
        raise CpuFault(GP, 0)
    if turned and not value & CR0_PG and s.is_code64:
        raise CpuFault(GP, 0)


def write_cr0(cpu: Cpu, value: int) -> None:
    """With EFER.LMA, which follows CR0.PG."""
    s = cpu.state
    value = cr0_value(value)
    changed, efer = value ^ cpu.cr0, s.efer
    pae = value & CR0_PG and s.cr(4) & CR4_PAE and not efer & EFER_LME
    loads = bool(pae and changed & (CR0_PG | CR0_CD | CR0_NW))
    if loads:
        _check_pdptes(cpu, s.cr(3))
    if changed & CR0_PG:
        s.efer = efer | EFER_LMA if value & CR0_PG and efer & EFER_LME else efer & ~EFER_LMA
    s.set_cr(0, value)
    cpu.hold_pdptes(loads)
    cpu.guard_ferr()
    s.refresh()
    if changed & CR0_PG:
        cpu.forget_translations()
    cpu.flush()


def _check_pdptes(cpu: Cpu, cr3: int) -> None:
    """Loading CR3 in PAE mode reads four PDPTEs; a present one with reserved bits raises #GP (APM2 5.3.2)."""
    if cpu.nested is None and cpu.bad_pdptes(cr3):  # under nested paging they are judged at each walk (APM2 15.25.10)
        raise CpuFault(GP, 0)


def check_cr3(cpu: Cpu, value: int) -> None:
    if cpu.state.is_long and value >> cpu.physical_bits:
        raise CpuFault(GP, 0)


def write_cr3(cpu: Cpu, value: int) -> None:
    s = cpu.state
    if s.cr(0) & CR0_PG and s.cr(4) & CR4_PAE and not s.is_long:
        _check_pdptes(cpu, value)
    s.set_cr(3, value)
    cpu.hold_pdptes()
    cpu.forget_translations(keep_global=True)


def check_cr4(cpu: Cpu, value: int) -> None:
    if value & ~cpu.cr4_valid or (cpu.state.is_long and not value & CR4_PAE):
        raise CpuFault(GP, 0)


def write_cr4(cpu: Cpu, value: int) -> None:
    s = cpu.state
    loads = bool(s.cr(0) & CR0_PG and not s.is_long and value & CR4_PAE and (value ^ s.cr(4)) & (CR4_PAE | CR4_PGE | CR4_PSE))
    if loads:
        _check_pdptes(cpu, s.cr(3))
    changed = value ^ s.cr(4)
    s.set_cr(4, value)
    cpu.hold_pdptes(loads)
    s.refresh()
    cpu.debug.update()
    if changed & (CR4_PAE | CR4_PGE | CR4_PSE):
        cpu.forget_translations()
    cpu.flush()


def read_tpr(cpu: Cpu) -> int:
    """CR8: V_TPR for a guest with V_INTR_MASKING or AVIC, else the local APIC's (APM2 15.21.1, 15.29.4.1)."""
    guest = cpu.guest
    virtual = guest is not None and (guest.v_intr_masking or guest.avic is not None)
    return guest.v_tpr & 0xF if guest is not None and virtual else cpu.lapic.cr8


def check_tpr(cpu: Cpu, value: int) -> None:
    if value >> 4:
        raise CpuFault(GP, 0)


def write_tpr(cpu: Cpu, value: int) -> None:
    guest = cpu.guest
    if guest is not None:
        if guest.avic is not None:
            guest.avic.write_cr8(value)
            return
        guest.v_tpr = value
        if guest.v_intr_masking:
            return
    cpu.lapic.cr8 = value


_CHECK_CR: dict[int, Callable[[Cpu, int], None]] = {0: check_cr0, 3: check_cr3, 4: check_cr4, 8: check_tpr}
_WRITE_CR: dict[int, Callable[[Cpu, int], None]] = {0: write_cr0, 3: write_cr3, 4: write_cr4, 8: write_tpr}


def moved(cpu: Cpu, insn: Instruction) -> int:
    """The general register that a MOV to CR or DR reads."""
    value = cpu.state.reg(insn.rm)
    return value if cpu.bits == 64 else value & MASK32


def check_cr_write(cpu: Cpu, number: int) -> None:
    """What MOV to CR refuses before anything else; LMSW and CLTS cannot ask for it."""
    insn = cpu.instruction()
    if insn.opcode == 0x0F22 and number in _CHECK_CR:
        _CHECK_CR[number](cpu, moved(cpu, insn))


def cr_access(cpu: Cpu, number: int, write: bool) -> None:
    """MOV to and from CR, LMSW, SMSW and CLTS, which the engine reports as accesses to CR0."""
    s = cpu.state
    insn = cpu.instruction()
    if insn.opcode == 0x0F06:  # CLTS
        s.set_cr(0, s.cr(0) & ~CR0_TS)
        s.refresh()
    elif insn.opcode == 0x0F01 and insn.modrm >> 3 & 7 == 6:  # LMSW
        source = s.reg(insn.rm) if not insn.memory else cpu.read(_operand_address(cpu, insn, 2), 2, user=s.cpl == 3)
        # It can set PE but not clear it, and reaches PE MP EM TS only.
        write_cr0(cpu, cpu.cr0 & ~0xE | source & 0xF)
    elif insn.opcode == 0x0F01:  # SMSW
        _store(cpu, insn, cpu.cr0, insn.operand if not insn.memory else 16)
    elif write:
        value = moved(cpu, insn)
        if number == 2:
            s.set_cr(2, value)
        elif number in _WRITE_CR:
            _CHECK_CR[number](cpu, value)
            _WRITE_CR[number](cpu, value)
        else:
            raise CpuFault(UD)
    else:
        if number not in (0, 2, 3, 4, 8):
            raise CpuFault(UD)
        value = read_tpr(cpu) if number == 8 else cpu.cr0 if number == 0 else s.cr(number)
        s.set_reg(insn.rm, value if cpu.bits == 64 else value & MASK32)
    cpu.advance(insn.length)


def _operand_address(cpu: Cpu, insn: Instruction, size: int) -> int:
    regs = [cpu.state.reg(number) for number in range(16)]
    segment, offset = effective_address(insn, regs, cpu.state.rip + insn.length, cpu.bits)
    return cpu.segment_address(segment, offset, size)


def operand_linear(cpu: Cpu, insn: Instruction) -> int:
    """Linear address of a memory operand, unchecked: what INVLPG reports."""
    regs = [cpu.state.reg(number) for number in range(16)]
    segment, offset = effective_address(insn, regs, cpu.state.rip + insn.length, cpu.bits)
    if cpu.bits == 64:
        return (offset + (cpu.state.base(segment) if segment >= 4 else 0)) & MASK64
    return (offset + cpu.state.base(segment)) & MASK32


def _store(cpu: Cpu, insn: Instruction, value: int, bits: int) -> None:
    s = cpu.state
    if insn.memory:
        address = _operand_address(cpu, insn, bits // 8)
        cpu.write(address, bits // 8, value & ((1 << bits) - 1), user=s.cpl == 3)
        cpu.due |= cpu.debug.data_bits(address, bits // 8, reads=False, writes=True)
    elif bits == 16:
        s.set_reg(insn.rm, s.reg(insn.rm) & ~0xFFFF | value & 0xFFFF)
    else:
        s.set_reg(insn.rm, value & ((1 << bits) - 1))


def check_dr(cpu: Cpu) -> None:
    """What MOV to and from DR refuses (APM2 13.1.1): all of it, before an intercept (table 15-7)."""
    insn = cpu.instruction()
    number = insn.reg
    if number > 7 or (number in (4, 5) and cpu.state.cr(4) & CR4_DE):
        raise CpuFault(UD)
    if cpu.dr[7] & DR7_GD:
        cpu.debug.report(DR6_BD)
        raise CpuFault(DB)
    if insn.opcode == 0x0F23 and number & ~2 in (4, 5) and moved(cpu, insn) >> 32:
        raise CpuFault(GP, 0)


def dr_access(cpu: Cpu, write: bool) -> None:
    """MOV to and from DR."""
    check_dr(cpu)
    s = cpu.state
    insn = cpu.instruction()
    number = insn.reg + 2 if insn.reg in (4, 5) else insn.reg
    if write:
        value = moved(cpu, insn)
        cpu.dr[number] = dr6_value(value) if number == 6 else dr7_value(value) if number == 7 else value
        cpu.debug.update()
    else:
        s.set_reg(insn.rm, cpu.dr[number] if cpu.bits == 64 else cpu.dr[number] & MASK32)
    cpu.advance(insn.length)


# Time, identity, model-specific registers


def is_rdtscp(cpu: Cpu) -> bool:
    """The engine reports both as RDTSC."""
    return cpu.engine.code()[:2] != b"\x0f\x31" and cpu.instruction().opcode == 0x0F01


def rdtsc(cpu: Cpu) -> None:
    s = cpu.state
    value = cpu.tsc
    size = length(cpu)
    s.set_reg(RAX, value & MASK32)
    s.set_reg(RDX, value >> 32)
    if is_rdtscp(cpu):
        s.set_reg(RCX, s.field("tsc_aux") & MASK32)
    cpu.advance(size)


def check_rdpmc(cpu: Cpu) -> None:
    """The privilege, at which the engine has not looked, and the counter's number."""
    s = cpu.state
    if (s.cpl and not s.cr(4) & CR4_PCE) or s.reg(RCX) & MASK32 > 3:
        raise CpuFault(GP, 0)


def rdpmc(cpu: Cpu) -> None:
    """Four counters that never count (no event is modelled)."""
    check_rdpmc(cpu)
    s = cpu.state
    value = cpu.msrs.read(0xC0010004 + (s.reg(RCX) & MASK32), cpu)
    s.set_reg(RAX, value & MASK32)
    s.set_reg(RDX, value >> 32 & 0xFFFF)
    cpu.advance(length(cpu))


def check_rdpru(cpu: Cpu) -> None:
    """Time is not for everybody (APM3 RDPRU)."""
    s = cpu.state
    if s.cpl and s.cr(4) & CR4_TSD:
        raise CpuFault(GP, 0)


def rdpru(cpu: Cpu) -> None:
    """MPERF or APERF; registers that it does not have read as zero."""
    check_rdpru(cpu)
    s = cpu.state
    size = length(cpu)
    number = s.reg(RCX) & MASK32
    value = cpu.performance(("mperf", "aperf")[number]) if number <= MAX_RDPRU else 0
    s.set_reg(RAX, value & MASK32)
    s.set_reg(RDX, value >> 32)
    cpu.advance(size)


def check_xsetbv(cpu: Cpu) -> None:
    """Only this comes before the intercept, not the privilege."""
    if not cpu.state.cr(4) & CR4_OSXSAVE:
        raise CpuFault(UD)


def xsetbv(cpu: Cpu) -> None:
    """XCR0, with x87 always and SSE or not (APM3 XSETBV).  VMRUN and #VMEXIT leave it alone."""
    check_xsetbv(cpu)
    s = cpu.state
    value = s.reg(RDX) << 32 & 0xFFFFFFFF00000000 | s.reg(RAX) & MASK32
    if s.cpl or s.reg(RCX) & MASK32 or value not in (XCR0_X87, XCR0_X87 | XCR0_SSE):
        raise CpuFault(GP, 0)
    s.xcr0 = value
    cpu.advance(length(cpu))


def cpuid_instruction(cpu: Cpu) -> None:
    s = cpu.state
    dynamic = Dynamic(osxsave=bool(s.cr(4) & CR4_OSXSAVE), apic=cpu.lapic.enabled)
    found = cpuid(cpu.cpuid_config, cpu.index, s.reg(RAX) & MASK32, s.reg(RCX) & MASK32, dynamic)
    s.set_reg(RAX, found.eax)
    s.set_reg(RBX, found.ebx)
    s.set_reg(RCX, found.ecx)
    s.set_reg(RDX, found.edx)
    cpu.advance(length(cpu))


def msr(cpu: Cpu) -> None:
    """RDMSR and WRMSR."""
    s = cpu.state
    insn = cpu.instruction()
    number = s.reg(RCX) & MASK32
    try:
        if insn.opcode == 0x0F30:
            value = s.reg(RDX) << 32 & 0xFFFFFFFF00000000 | s.reg(RAX) & MASK32
            cpu.msrs.write(number, value, cpu)
        else:
            value = cpu.msrs.read(number, cpu)
            s.set_reg(RAX, value & MASK32)
            s.set_reg(RDX, value >> 32)
    except MsrFault as fault:
        cpu.last_fault = str(fault)
        raise CpuFault(GP, 0) from None
    cpu.advance(insn.length)


def hlt(cpu: Cpu) -> None:
    cpu.advance(length(cpu))
    cpu.halted, cpu.awaited = True, None


def check_monitor(cpu: Cpu) -> None:
    """What MONITOR and MWAIT refuse before they are intercepted: privilege, and extensions, of which there are none."""
    s, hwcr = cpu.state, cpu.msrs.values[HWCR]
    if hwcr & HWCR_MON_MWAIT_DIS or (s.cpl and not hwcr & HWCR_MON_MWAIT_USER_EN):
        raise CpuFault(UD)
    if s.reg(RCX) & MASK32:
        raise CpuFault(GP, 0)


def monitor(cpu: Cpu) -> None:
    """Arm the line at DS:rAX; what is not memory is not monitored."""
    check_monitor(cpu)
    s, insn = cpu.state, cpu.instruction()
    segment = DS if insn.segment is None else insn.segment
    address = cpu.segment_address(segment, s.reg(RAX) & (1 << insn.address) - 1, 1)
    spa = cpu.translate(address, user=s.cpl == 3) & -MONITOR_LINE
    cpu.monitored = Line(spa, cpu.ram.read(spa, MONITOR_LINE)) if cpu.ram.contains(spa, MONITOR_LINE) else None
    cpu.advance(insn.length)


def mwait(cpu: Cpu) -> None:
    """Wait as HLT does, or for a store to the line; not at all where none is armed or there was one (APM3 MWAIT)."""
    check_monitor(cpu)
    line, cpu.monitored = cpu.monitored, None
    cpu.advance(length(cpu))
    if line is not None and not cpu.stored_to(line):
        cpu.halted, cpu.awaited = True, line


def nothing(cpu: Cpu) -> None:
    """INVD, WBINVD, PAUSE: there is no cache to write back."""
    cpu.advance(length(cpu))


def invlpg(cpu: Cpu) -> None:
    """The engine forgets more than the page, which is allowed (APM2 5.5.2)."""
    insn = cpu.instruction()
    cpu.forget_page(operand_linear(cpu, insn), cpu.asid)
    cpu.advance(insn.length)


def invlpga(cpu: Cpu) -> None:
    """The page at rAX, of the ASID in ECX (APM2 15.16.2)."""
    insn = cpu.instruction()
    cpu.forget_page(cpu.state.reg(RAX) & (1 << insn.address) - 1, cpu.state.reg(RCX) & MASK32)
    cpu.advance(insn.length)


def check_privilege(cpu: Cpu) -> None:
    if cpu.state.cpl:
        raise CpuFault(GP, 0)


def undefined(cpu: Cpu) -> None:
    raise CpuFault(UD)


# Software interrupts


def software_interrupt(cpu: Cpu) -> tuple[int, int, int]:
    """(vector, length, opcode) of the INT n, INT3 or INTO at RIP."""
    insn = cpu.instruction()
    vector = {0xCC: 3, 0xCE: 4}.get(insn.opcode, insn.immediate)
    return vector, insn.length, insn.opcode


def interrupt(cpu: Cpu, vector: int, size: int, opcode: int) -> None:
    s = cpu.state
    s.rip = s.rip + size if s.is_code64 else (s.rip + size) & MASK32
    cpu.engine.clock.now += size
    # INT3 and INTO are exceptions, to intercepts and to EXITINTINFO.
    raise_event(cpu, Event(vector, Kind.SOFTWARE if opcode == 0xCD else Kind.EXCEPTION, length=size, trap=True))


def icebp(cpu: Cpu) -> None:
    s = cpu.state
    size = length(cpu)
    s.rip += size
    cpu.engine.clock.now += size
    raise_event(cpu, Event(DB, Kind.EXCEPTION, length=size, trap=True), intercepted=False)  # APM2 15.12.2


def task_switch(cpu: Cpu) -> TaskSwitchExit | None:
    """The task switch that the far JMP, far CALL or IRET at RIP is about to make; None if it makes none."""
    s = cpu.state
    insn = cpu.instruction()
    if insn.opcode == 0xCF:
        if not s.rflags & RFLAGS_NT:
            return None
        return TaskSwitchExit(cpu.read(s.base(TR), 2, implicit=True), Source.IRET, None)
    indirect = insn.opcode == 0xFF and insn.memory and insn.modrm >> 3 & 7 in (3, 5)
    if insn.opcode in (0x9A, 0xEA):
        selector = insn.immediate >> insn.operand
    elif indirect:
        size = insn.operand // 8
        selector = cpu.read(_operand_address(cpu, insn, size + 2) + size, 2, user=s.cpl == 3)
    else:
        return None
    target = fetch(cpu, selector, GP, 0)
    if target.is_segment or target.type not in (AVAILABLE_16, AVAILABLE_32, TASK_GATE):
        return None
    if target.type == TASK_GATE:
        selector = target.raw >> 16 & 0xFFFF
    jump = insn.opcode == 0xEA or (indirect and insn.modrm >> 3 & 7 == 5)
    return TaskSwitchExit(selector, Source.JUMP if jump else Source.CALL, None)


def switch_tasks(cpu: Cpu, selector: int, source: Source) -> None:
    """The task switch of the far JMP, far CALL or IRET at RIP, whose rights the engine has checked."""
    s = cpu.state
    rip, size = s.rip, length(cpu)
    s.skip(size)
    try:
        switch(cpu, selector, source, None)
    except (CpuFault, NestedPageFault) as fault:
        if isinstance(fault, NestedPageFault) or not fault.committed:
            s.rip = rip
        raise
    cpu.engine.clock.now += size


# SYSCALL and SYSENTER: the engine has counted the instruction and RIP is behind it.


def syscall(cpu: Cpu) -> None:
    """APM3 SYSCALL."""
    s = cpu.state
    if not s.efer & EFER_SCE or not s.cr(0) & CR0_PE:
        _take_back(cpu)
        raise CpuFault(UD)
    source = s.rip - 2
    star = s.field("star")
    selector = star >> 32 & 0xFFFC
    if s.is_long:
        flags = s.rflags
        s.set_reg(RCX, s.rip)
        s.set_reg(11, flags & ~RFLAGS_RF)
        s.rip = s.field("lstar") if s.is_code64 else s.field("cstar")
        s.rflags = flags & ~s.field("sfmask") & ~RFLAGS_RF
        code = CODE64
    else:
        s.set_reg(RCX, s.rip & MASK32)
        s.rip = star & MASK32
        s.rflags &= ~(RFLAGS_VM | RFLAGS_IF | RFLAGS_RF)
        code = CODE32
    s.set_segment(CS, selector, 0, MASK32, code)
    s.set_segment(SS, selector + 8, 0, MASK32, DATA32)
    s.refresh(0)
    cpu.branch(source, s.rip)
    if s.rflags & RFLAGS_TF:
        cpu.due |= DR6_BS


def sysenter(cpu: Cpu) -> None:
    """APM3 SYSENTER: legacy mode only on AMD processors."""
    s = cpu.state
    selector = s.field("sysenter_cs") & 0xFFFC
    if s.is_long or not s.cr(0) & CR0_PE:
        _take_back(cpu)
        raise CpuFault(UD if s.is_long else GP, None if s.is_long else 0)
    if not selector:
        _take_back(cpu)
        raise CpuFault(GP, 0)
    source = s.rip - 2
    s.set_segment(CS, selector, 0, MASK32, CODE32)
    s.set_segment(SS, selector + 8, 0, MASK32, DATA32)
    s.set_reg(RSP, s.field("sysenter_esp") & MASK32)
    s.rip = s.field("sysenter_eip") & MASK32
    s.rflags &= ~(RFLAGS_VM | RFLAGS_IF | RFLAGS_RF)
    s.refresh(0)
    cpu.branch(source, s.rip)
    if s.rflags & RFLAGS_TF:
        cpu.due |= DR6_BS


def _take_back(cpu: Cpu) -> None:
    cpu.state.rip -= 2
    cpu.engine.clock.now -= 2


# Ports


def io_permitted(cpu: Cpu, port: int, size: int) -> None:
    """IOPL, and beyond it the TSS's permission map (APM2 12.2.5).  Raises #GP(0)."""
    s = cpu.state
    if not s.cr(0) & CR0_PE:
        return
    flags = s.rflags
    if s.cpl <= (flags & RFLAGS_IOPL) >> 12 and not flags & RFLAGS_VM:
        return
    if not s.attrib(TR) & 8 or s.limit(TR) < 103:
        raise CpuFault(GP, 0)
    base = cpu.read(s.base(TR) + 102, 2, implicit=True)
    if base + port // 8 + 1 > s.limit(TR):
        raise CpuFault(GP, 0)
    word = cpu.read(s.base(TR) + base + port // 8, 2, implicit=True)
    if word >> (port & 7) & ((1 << size) - 1):
        raise CpuFault(GP, 0)


STRING_IO = frozenset((0x6C, 0x6D, 0x6E, 0x6F))
"""Opcodes of INS and OUTS."""
PORT_TICKS = TICKS_PER_SECOND // 1_000_000
"""Guest time that an access to a port takes besides the instruction: a microsecond, as on the ISA bus.  Software that
waits for a device by reading a port counts on it, and would wait long if it were the two bytes of the instruction."""


def io(cpu: Cpu, insn: Instruction, port: int, size: int) -> None:
    """Execute IN, OUT, INS or OUTS; one iteration of a repeated one."""
    s = cpu.state
    low = insn.opcode & 0xFF
    before = s.rip, s.reg(RCX), s.reg(RSI), s.reg(RDI)
    if low in STRING_IO:
        _string_io(cpu, insn, port, size)
    else:
        _register_io(cpu, insn, port, size)
    cpu.port_access = PortAccess(cpu.engine.clock.now, insn, port, size, *before)


def _register_io(cpu: Cpu, insn: Instruction, port: int, size: int) -> None:
    s = cpu.state
    cpu.engine.clock.now += PORT_TICKS
    cpu.debug.port(port, size)
    if insn.opcode & 2:
        cpu.bus.write_port(port, size, s.reg(RAX) & ((1 << 8 * size) - 1))
    else:
        value = cpu.bus.read_port(port, size)
        s.set_reg(RAX, value if size == 4 else s.reg(RAX) & ~((1 << 8 * size) - 1) | value)
    cpu.advance(insn.length)


def _string_io(cpu: Cpu, insn: Instruction, port: int, size: int) -> None:
    s = cpu.state
    out = bool(insn.opcode & 2)
    pointer = RSI if out else RDI
    mask = (1 << insn.address) - 1
    offset = s.reg(pointer) & mask
    segment = (insn.segment if insn.segment is not None else 3) if out else ES
    address = cpu.segment_address(segment, offset, size)
    pieces = cpu.pieces(address, size, write=not out, user=s.cpl == 3)
    cpu.stop_if_watched(pieces, write=not out)
    data = cpu.load(pieces) if out else b""
    cpu.engine.clock.now += PORT_TICKS
    cpu.debug.port(port, size)
    cpu.due |= cpu.debug.data_bits(address, size, reads=out, writes=not out)
    if out:
        cpu.bus.write_port(port, size, int.from_bytes(data, "little"))
    else:
        cpu.commit([(pieces, cpu.bus.read_port(port, size).to_bytes(size, "little"))])
    step = -size if s.rflags & RFLAGS_DF else size
    _set_masked(cpu, pointer, offset + step, insn.address)
    if not insn.rep:
        cpu.advance(insn.length)
        return
    _set_masked(cpu, RCX, s.reg(RCX) - 1, insn.address)
    # RIP stays: the engine runs the instruction once more with a count of zero, as it does for every REP.
    cpu.advance(0)
    cpu.engine.clock.now += insn.length


def _set_masked(cpu: Cpu, register: int, value: int, bits: int) -> None:
    s = cpu.state
    mask = (1 << bits) - 1
    keep = s.reg(register) & ~mask if bits == 16 else 0
    s.set_reg(register, keep | value & mask)


CHECK: dict[int, Callable[[Cpu], object]] = {
    **{0x10 + number: partial(check_cr_write, number=number) for number in _CHECK_CR},
    **dict.fromkeys(range(0x20, 0x40), check_dr),
    0x6F: check_rdpmc,
    **{0x80 + number: partial(world.operand, what=what) for number, what in ((0, "VMRUN"), (2, "VMLOAD"), (3, "VMSAVE"))},
    0x86: check_privilege,
    0x8A: check_monitor,
    0x8B: check_monitor,
    0x8D: check_xsetbv,
    0x8E: check_rdpru,
}
"""Exit code to the exceptions that come before the intercept, as far as the engine has not raised them (APM2 table 15-7)."""

EMULATE: dict[int, Callable[[Cpu], None]] = {
    **{number: partial(cr_access, number=number, write=False) for number in range(16)},
    **{0x10 + number: partial(cr_access, number=number, write=True) for number in range(16)},
    **dict.fromkeys(range(0x20, 0x30), partial(dr_access, write=False)),
    **dict.fromkeys(range(0x30, 0x40), partial(dr_access, write=True)),
    0x6E: rdtsc,
    0x6F: rdpmc,
    0x72: cpuid_instruction,
    0x76: nothing,
    0x77: nothing,
    0x78: hlt,
    0x79: invlpg,
    0x7A: invlpga,
    0x7C: msr,
    0x81: undefined,  # VMMCALL that nobody intercepts
    0x86: undefined,  # SKINIT is not claimed
    0x87: rdtsc,
    0x88: icebp,
    0x89: nothing,
    0x8A: monitor,
    0x8B: mwait,
    0x8D: xsetbv,
    0x8E: rdpru,
}
"""Exit code to what the instruction does when no hypervisor intercepts it."""
