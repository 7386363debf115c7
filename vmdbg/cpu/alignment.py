"""Alignment checking (APM2 8.2.18): what the memory operands of the instruction at RIP must be aligned to.

A processor looks at the address before it translates it: #GP and #SS of the segment come before #AC, #PF behind it.
Descriptor tables and the TSS are not checked.  What the manual leaves open is as processors of AMD's do it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from capstone import x86 as cs

from vmdbg.engine.state import RBP, RCX, RDI, RSP, SS

from .bits import RFLAGS_AC
from .core import Cpu
from .faults import AC, GP, CpuFault
from .operands import disassemble, memory_operands

CR0_AM = 1 << 18


def _ids(names: str) -> frozenset[int]:
    return frozenset(getattr(cs, f"X86_INS_{name}") for name in names.split())


_UNCHECKED = _ids(
    "PREFETCH PREFETCHW PREFETCHNTA PREFETCHT0 PREFETCHT1 PREFETCHT2 CLFLUSH INVLPG XSAVE XSAVE64 XSAVEOPT XSAVEOPT64 XRSTOR "
    "XRSTOR64 CMPXCHG16B"
)
"""They access nothing, or demand an alignment of their own, which the engine knows."""
_FAR = _ids("LDS LES LFS LGS LSS SGDT SIDT")
_X87_STATE = _ids("FLDENV FNSTENV FNSAVE FRSTOR")
_FXSAVE = _ids("FXSAVE FXSAVE64 FXRSTOR FXRSTOR64")
"""On their way to a #GP for less than 16."""
_MASKED = _ids("MASKMOVDQU MASKMOVQ")
_UNALIGNED = _ids("MOVUPS MOVUPD MOVDQU LDDQU PCMPESTRI PCMPESTRM PCMPISTRI PCMPISTRM")
"""With an operand of 16 bytes that others of SSE must have aligned, else #GP (APM1 4.3.2)."""
_PUSHES = _ids("PUSH PUSHF PUSHFD PUSHFQ PUSHAW PUSHAL CALL LCALL ENTER")
_POPS = _ids("POP POPF POPFD POPFQ POPAW POPAL RET RETF RETFQ IRET IRETD IRETQ")
_FAR_STACK = _ids("LCALL RETF RETFQ IRET IRETD IRETQ")
"""Of the size that the prefixes say also in 64-bit code, where it is 8 bytes for others."""


_WRONG = {cs.X86_INS_COMISD: 8}
"""Bytes of operands that the disassembler takes for others."""


def checked(cpu: Cpu) -> bool:
    """Whether alignment is checked: CR0.AM, RFLAGS.AC, and CPL 3."""
    s = cpu.state
    return s.cpl == 3 and bool(s.rflags & RFLAGS_AC and s.cr(0) & CR0_AM)


def check(cpu: Cpu) -> None:
    """Raise #AC for the instruction at RIP, or the #GP or #SS that comes before it, if one of its operands is not aligned."""
    insn = disassemble(cpu)
    if insn is None:
        return
    for segment, offset, size, alignment in _accesses(cpu, insn):
        address = cpu.segment_address(segment, offset, size)
        if address & alignment - 1:
            raise CpuFault(GP if size == 16 and insn.id not in _UNALIGNED else AC, 0)


def _operand_size(cpu: Cpu, insn: Any) -> int:
    """By the prefixes, in bytes."""
    if cpu.bits == 64:
        return 8 if insn.rex & 8 else 2 if 0x66 in insn.prefix else 4
    return 2 if (cpu.bits == 16) != (0x66 in insn.prefix) else 4


def _accesses(cpu: Cpu, insn: Any) -> Iterator[tuple[int, int, int, int]]:
    """(segment, offset, bytes, alignment) of each access to memory."""
    s = cpu.state
    operand_size = _operand_size(cpu, insn)
    width = (1 << 8 * insn.addr_size) - 1
    if insn.id in _UNCHECKED or (insn.prefix[0] in (0xF2, 0xF3) and _is_string(insn) and not s.reg(RCX) & width):
        return
    for found, segment, offset in memory_operands(cpu, insn):
        size = _WRONG.get(insn.id, found)
        yield segment, offset, size, _alignment(insn, size, operand_size)
    if insn.id in _MASKED:
        segment = {0x26: 0, 0x2E: 1, 0x36: 2, 0x64: 4, 0x65: 5}.get(insn.prefix[1], 3)
        yield segment, s.reg(RDI) & width, 8, 8
    yield from _stack(cpu, insn, operand_size)


def _is_string(insn: Any) -> bool:
    return insn.mnemonic.split()[-1][:4] in ("stos", "scas", "movs", "cmps", "lods", "insb", "insw", "insd", "outs")


def _alignment(insn: Any, size: int, operand_size: int) -> int:
    """APM2 table 8-8."""
    far_transfer = insn.opcode[0] == 0xFF and insn.modrm >> 3 & 7 in (3, 5)
    if far_transfer or insn.id in _FAR or insn.id in _X87_STATE:
        return 2 if operand_size == 2 else 4
    if insn.id in _FXSAVE:
        return 4
    if insn.id == cs.X86_INS_BOUND:
        return operand_size
    return 8 if size == 10 else size


def _stack(cpu: Cpu, insn: Any, operand_size: int) -> Iterator[tuple[int, int, int, int]]:
    s = cpu.state
    wide = cpu.bits == 64
    size = operand_size if not wide or insn.id in _FAR_STACK else 2 if operand_size == 2 else 8
    mask = 0xFFFFFFFFFFFFFFFF if wide else 0xFFFFFFFF if s.attrib(SS) & 0x400 else 0xFFFF
    if insn.id in _PUSHES:
        yield SS, s.reg(RSP) - size & mask, size, size
    elif insn.id in _POPS:
        yield SS, s.reg(RSP) & mask, size, size
    if insn.id == cs.X86_INS_LEAVE or (insn.id == cs.X86_INS_ENTER and insn.operands[1].imm & 31 > 1):
        yield SS, s.reg(RBP) & mask, size, size
