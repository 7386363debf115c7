"""Control and debug registers: MOV to and from them, LMSW, SMSW and CLTS, and the values they take (APM2 3.1, 13.1.1)."""

from __future__ import annotations

from collections.abc import Callable

from introspect.decode import Instruction
from vmdbg.engine.state import CS

from .bits import CR0_PE, CR0_PG, dr6_value, dr7_value
from .core import Cpu
from .debug import CR4_DE, DR6_BD, DR7_GD
from .faults import DB, GP, UD, CpuFault
from .operands import moved, operand_address

CR0_ET, CR0_TS, CR0_NW, CR0_CD = 1 << 4, 1 << 3, 1 << 29, 1 << 30
CR0_DEFINED = 0xE005003F
CR4_TSD, CR4_PSE, CR4_PAE, CR4_MCE, CR4_PGE, CR4_PCE = (1 << bit for bit in (2, 4, 5, 6, 7, 8))
EFER_LME, EFER_LMA, EFER_SCE, EFER_NXE, EFER_SVME = 1 << 8, 1 << 10, 1 << 0, 1 << 11, 1 << 12


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


CHECK_CR: dict[int, Callable[[Cpu, int], None]] = {0: check_cr0, 3: check_cr3, 4: check_cr4, 8: check_tpr}
_WRITE_CR: dict[int, Callable[[Cpu, int], None]] = {0: write_cr0, 3: write_cr3, 4: write_cr4, 8: write_tpr}


def check_cr_write(cpu: Cpu, number: int) -> None:
    """What MOV to CR refuses before anything else; LMSW and CLTS cannot ask for it."""
    insn = cpu.instruction()
    if insn.opcode == 0x0F22 and number in CHECK_CR:
        CHECK_CR[number](cpu, moved(cpu, insn))


def cr_access(cpu: Cpu, number: int, write: bool) -> None:
    """MOV to and from CR, LMSW, SMSW and CLTS, which the engine reports as accesses to CR0."""
    s = cpu.state
    insn = cpu.instruction()
    if insn.opcode == 0x0F06:  # CLTS
        s.set_cr(0, s.cr(0) & ~CR0_TS)
        s.refresh()
    elif insn.opcode == 0x0F01 and insn.modrm >> 3 & 7 == 6:  # LMSW
        source = s.reg(insn.rm) if not insn.memory else cpu.read(operand_address(cpu, insn, 2), 2, user=s.cpl == 3)
        # It can set PE but not clear it, and reaches PE MP EM TS only.
        write_cr0(cpu, cpu.cr0 & ~0xE | source & 0xF)
    elif insn.opcode == 0x0F01:  # SMSW
        _store(cpu, insn, cpu.cr0, insn.operand if not insn.memory else 16)
        _executed(cpu, insn.length)
    elif write:
        value = moved(cpu, insn)
        if number == 2:
            s.set_cr(2, value)
        elif number in _WRITE_CR:
            CHECK_CR[number](cpu, value)
            _WRITE_CR[number](cpu, value)
        else:
            raise CpuFault(UD)
    else:
        if number not in (0, 2, 3, 4, 8):
            raise CpuFault(UD)
        value = read_tpr(cpu) if number == 8 else cpu.cr0 if number == 0 else s.cr(number)
        s.set_reg(insn.rm, value if cpu.bits == 64 else value & 0xFFFFFFFF)
        _executed(cpu, insn.length)
    cpu.advance(insn.length)


def _executed(cpu: Cpu, length: int) -> None:
    """The engine executes this where nobody waits for it."""
    if cpu.recorder is not None:
        cpu.recorder.executed(cpu, length)


def _store(cpu: Cpu, insn: Instruction, value: int, bits: int) -> None:
    s = cpu.state
    if insn.memory:
        address = operand_address(cpu, insn, bits // 8)
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
        s.set_reg(insn.rm, cpu.dr[number] if cpu.bits == 64 else cpu.dr[number] & 0xFFFFFFFF)
    cpu.advance(insn.length)
