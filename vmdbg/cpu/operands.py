"""What the instruction at RIP is about: its length, its operands, the linear addresses it accesses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from introspect.decode import Instruction, effective_address
from introspect.operands import accessing, disassembler, operands
from vmdbg.engine.state import FS, RSP, SS

from .core import Cpu

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
    insn = accessing(_code(cpu), bits)
    if insn is None:
        return []
    found = []
    mask = 0xFFFFFFFFFFFFFFFF if bits == 64 else 0xFFFFFFFF
    for operand in insn.operands:
        base = s.base(operand.segment) if bits != 64 or operand.segment >= FS else 0
        found.append((operand.at(s.reg, s.rip + insn.length) + base & mask, operand.size, operand.reads, operand.writes))
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
    s = cpu.state
    for operand in operands(insn):
        yield operand.size, operand.segment, operand.at(s.reg, s.rip + insn.size)
