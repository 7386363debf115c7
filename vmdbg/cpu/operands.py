"""What the instruction at RIP is about: its length, its operands, the linear addresses it accesses."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, lru_cache
from typing import Any, NamedTuple

import capstone
from capstone import x86 as cs

from introspect.decode import Instruction, effective_address
from vmdbg.engine.state import CS, DS, ES, FS, GS, RSP, SS

from .core import Cpu

_REGISTERS = {
    getattr(cs, f"X86_REG_{prefix}{name}"): (number, bits)
    for number, name in enumerate(("AX", "CX", "DX", "BX", "SP", "BP", "SI", "DI"))
    for prefix, bits in (("R", 64), ("E", 32), ("", 16))
} | {
    getattr(cs, f"X86_REG_R{number}{suffix}"): (number, bits)
    for number in range(8, 16) for suffix, bits in (("", 64), ("D", 32), ("W", 16))
}  # fmt: skip
_SEGMENTS = {
    cs.X86_REG_ES: ES, cs.X86_REG_CS: CS, cs.X86_REG_SS: SS, cs.X86_REG_DS: DS, cs.X86_REG_FS: FS, cs.X86_REG_GS: GS,
}  # fmt: skip
_BASED_ON_STACK = (cs.X86_REG_RSP, cs.X86_REG_ESP, cs.X86_REG_RBP, cs.X86_REG_EBP, cs.X86_REG_BP)
_PORT_STRINGS = {
    **dict.fromkeys((cs.X86_INS_INSB, cs.X86_INS_INSW, cs.X86_INS_INSD), 2),
    **dict.fromkeys((cs.X86_INS_OUTSB, cs.X86_INS_OUTSW, cs.X86_INS_OUTSD), 1),
}
"""How INS and OUTS access memory, of which capstone says nothing: 1 reads, 2 writes."""
_STRING_TO_EDI = frozenset((cs.X86_REG_RDI, cs.X86_REG_EDI, cs.X86_REG_DI))
_FIXED = {
    **dict.fromkeys((0xA2, 0x30, 0x31, 0x32, 0x33, 0x06, 0x08, 0x09), 2), **dict.fromkeys((0x20, 0x21, 0x22, 0x23), 3)
}  # fmt: skip
"""Lengths of `0F xx`, where it takes no prefix."""


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


@cache
def disassembler(bits: int) -> Any:
    """A capstone disassembler with operand details for 16-, 32- or 64-bit code."""
    mode = {16: capstone.CS_MODE_16, 32: capstone.CS_MODE_32, 64: capstone.CS_MODE_64}[bits]
    engine = capstone.Cs(capstone.CS_ARCH_X86, mode)
    engine.detail = True
    return engine


class _Operand(NamedTuple):
    """A memory operand: where it is, as sums of registers, and what is done to it."""

    registers: tuple[tuple[int, int, int], ...]
    """(number, mask, scale)"""
    offset: int
    from_rip: bool
    """The offset counts from the end of the instruction."""
    mask: int
    """Of the address size."""
    segment: int
    size: int
    reads: bool
    writes: bool


class _Decoded(NamedTuple):
    length: int
    operands: tuple[_Operand, ...]
    stack: int
    """How it accesses the stack: 0 not, 1 pops, 2 pushes."""
    stack_size: int


def _memory(insn: Any) -> Iterator[_Operand]:
    for operand in insn.operands:
        if operand.type != cs.X86_OP_MEM or insn.id in (cs.X86_INS_LEA, cs.X86_INS_NOP):
            continue
        memory = operand.mem
        registers, from_rip = [], False
        for register, scale in ((memory.base, 1), (memory.index, memory.scale)):
            from_rip |= register in (cs.X86_REG_RIP, cs.X86_REG_EIP)
            if register in _REGISTERS:
                number, width = _REGISTERS[register]
                registers.append((number, (1 << width) - 1, scale))
        segment = _SEGMENTS.get(memory.segment)
        if segment is None:
            string = insn.mnemonic.split()[-1][:4] in ("stos", "scas", "movs", "cmps", "insb", "insw", "insd")
            segment = ES if string and memory.base in _STRING_TO_EDI else SS if memory.base in _BASED_ON_STACK else DS
        access = _PORT_STRINGS.get(insn.id, operand.access)
        yield _Operand(
            tuple(registers), memory.disp, from_rip, (1 << insn.addr_size * 8) - 1, segment, operand.size,
            bool(access & 1), bool(access & 2),
        )  # fmt: skip


def _offset(cpu: Cpu, operand: _Operand, length: int) -> int:
    """In its segment, for the instruction of `length` bytes at RIP."""
    s = cpu.state
    offset = operand.offset + (s.rip + length if operand.from_rip else 0)
    for number, width, scale in operand.registers:
        offset += (s.reg(number) & width) * scale
    return offset & operand.mask


@lru_cache(4096)
def _decode(code: bytes, bits: int) -> _Decoded | None:
    insn = next(disassembler(bits).disasm(code, 0, 1), None)
    if insn is None:
        return None
    pushes = insn.group(cs.X86_GRP_CALL) or insn.mnemonic.startswith(("push", "enter"))
    pops = insn.group(cs.X86_GRP_RET) or insn.mnemonic.startswith(("pop", "leave", "iret"))
    size = 8 if bits == 64 else insn.operands[0].size if len(insn.operands) else bits // 8
    return _Decoded(insn.size, tuple(_memory(insn)), 2 if pushes else 1 if pops else 0, size)


def _code(cpu: Cpu) -> bytes:
    """The bytes at RIP, which has been fetched from before: so its rights are not looked at again."""
    rip = cpu.state.linear_rip
    found = cpu.ram.memo.find(cpu.paging, rip, cpu.nested) if cpu.tlb is None and rip & 0xFFF <= 0xFF1 else None
    spa = None if found is None else found.spa & cpu.engine.physical.a20
    if spa is None or not cpu.ram.contains(spa, 15):
        return cpu.fetch()
    return bytes(cpu.ram.view[spa : spa + 15])


def accesses(cpu: Cpu) -> list[tuple[int, int, bool, bool]]:
    """(linear address, bytes, reads, writes) of each memory access of the instruction at RIP, as far as it says so.

    Accesses to descriptor tables, the TSS and the like are not among them.
    """
    s, bits = cpu.state, cpu.bits
    insn = _decode(_code(cpu), bits)
    if insn is None:
        return []
    found = []
    mask = 0xFFFFFFFFFFFFFFFF if bits == 64 else 0xFFFFFFFF
    for operand in insn.operands:
        base = s.base(operand.segment) if bits != 64 or operand.segment >= FS else 0
        found.append((_offset(cpu, operand, insn.length) + base & mask, operand.size, operand.reads, operand.writes))
    if insn.stack:
        size, pushes = insn.stack_size, insn.stack == 2
        stack_mask = mask if bits == 64 or s.attrib(SS) & 0x400 else 0xFFFF
        stack_base = 0 if bits == 64 else s.base(SS)
        top = s.reg(RSP) - size if pushes else s.reg(RSP)
        found.append((stack_base + (top & stack_mask) & mask, size, not pushes, pushes))
    return found


def moved(cpu: Cpu, insn: Instruction) -> int:
    """The general register that a MOV to CR or DR reads."""
    value = cpu.state.reg(insn.rm)
    return value if cpu.bits == 64 else value & 0xFFFFFFFF


def operand_address(cpu: Cpu, insn: Instruction, size: int) -> int:
    regs = [cpu.state.reg(number) for number in range(16)]
    segment, offset = effective_address(insn, regs, cpu.state.rip + insn.length, cpu.bits)
    return cpu.segment_address(segment, offset, size)


def operand_linear(cpu: Cpu, insn: Instruction) -> int:
    """Linear address of a memory operand, unchecked: what INVLPG reports."""
    regs = [cpu.state.reg(number) for number in range(16)]
    segment, offset = effective_address(insn, regs, cpu.state.rip + insn.length, cpu.bits)
    if cpu.bits == 64:
        return (offset + (cpu.state.base(segment) if segment >= 4 else 0)) & 0xFFFFFFFFFFFFFFFF
    return (offset + cpu.state.base(segment)) & 0xFFFFFFFF


def disassemble(cpu: Cpu) -> Any:
    """The instruction at RIP, by capstone; None if it is none."""
    return next(disassembler(cpu.bits).disasm(cpu.fetch(), cpu.state.rip, 1), None)


def memory_operands(cpu: Cpu, insn: Any) -> Iterator[tuple[int, int, int]]:
    """(bytes, segment, offset) of each explicit access to memory of the instruction at RIP."""
    for operand in _memory(insn):
        yield operand.size, operand.segment, _offset(cpu, operand, insn.size)
