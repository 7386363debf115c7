"""Which memory an instruction accesses, as capstone has it: its operands, and what it pushes or pops."""

from collections.abc import Callable, Iterator
from functools import cache, lru_cache
from typing import Any, NamedTuple

import capstone
from capstone import x86 as cs

from introspect.decode import CS, DS, ES, FS, GS, SS

__all__ = ["Accessing", "Operand", "accessing", "disassembler", "operands"]

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
@cache
def disassembler(bits: int) -> Any:
    """A capstone disassembler with operand details for 16-, 32- or 64-bit code."""
    mode = {16: capstone.CS_MODE_16, 32: capstone.CS_MODE_32, 64: capstone.CS_MODE_64}[bits]
    engine = capstone.Cs(capstone.CS_ARCH_X86, mode)
    engine.detail = True
    return engine


_WRITES, _BOTH = 2, 3
_SSE_STORES = frozenset((0x11, 0x13, 0x17, 0x29, 0x2B, 0x7E, 0x7F, 0xC3, 0xD6, 0xE7))
"""Opcodes behind 0F; 7E behind F3 loads."""
_BY_REG = {0xD9: (2, 3, 6, 7), 0xDB: (1, 2, 3, 7), 0xDD: (1, 2, 3, 6, 7), 0xDF: (1, 2, 3, 6, 7)}
"""Stores of x87, by opcode and ModRM.reg."""
_STATE = (0, 3, 4, 6)
"""FXSAVE, STMXCSR, XSAVE, XSAVEOPT: ModRM.reg of 0F AE."""


def _mistaken(insn: Any) -> int:
    """What an instruction does to its memory operand where capstone takes it for a read alone; else 0."""
    first, second, *_ = insn.opcode
    reg = insn.modrm >> 3 & 7
    if first != 0x0F:
        return _WRITES if reg in _BY_REG.get(first, ()) else 0
    if second in (0xB0, 0xB1) or (second == 0xC7 and reg == 1):  # CMPXCHG and CMPXCHG8B write in any case
        return _BOTH
    stores = (second in _SSE_STORES and not (second == 0x7E and insn.prefix[0] == 0xF3)) or (second == 0xAE and reg in _STATE)
    return _WRITES if stores else 0


class Operand(NamedTuple):
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

    def at(self, register: Callable[[int], int], following: int) -> int:
        """Its offset in the segment: `register` gives general registers by number, `following` is the next instruction's."""
        offset = self.offset + (following if self.from_rip else 0)
        for number, width, scale in self.registers:
            offset += (register(number) & width) * scale
        return offset & self.mask


class Accessing(NamedTuple):
    """What an instruction accesses."""

    length: int
    operands: tuple[Operand, ...]
    stack: int
    """How it accesses the stack: 0 not, 1 pops, 2 pushes."""
    stack_size: int


def operands(insn: Any) -> Iterator[Operand]:
    """The memory operands of an instruction of a `disassembler`."""
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
        access = _mistaken(insn) or _PORT_STRINGS.get(insn.id, operand.access)
        yield Operand(
            tuple(registers), memory.disp, from_rip, (1 << insn.addr_size * 8) - 1, segment, operand.size,
            bool(access & 1), bool(access & 2),
        )  # fmt: skip


@lru_cache(4096)
def accessing(code: bytes, bits: int) -> Accessing | None:
    """Of the instruction that the bytes begin with; None if they are none."""
    insn = next(disassembler(bits).disasm(code, 0, 1), None)
    if insn is None:
        return None
    pushes = insn.group(cs.X86_GRP_CALL) or insn.mnemonic.startswith(("push", "enter"))
    pops = insn.group(cs.X86_GRP_RET) or insn.mnemonic.startswith(("pop", "leave", "iret"))
    size = 8 if bits == 64 else insn.operands[0].size if len(insn.operands) else bits // 8
    return Accessing(insn.size, tuple(operands(insn)), 2 if pushes else 1 if pops else 0, size)
