"""Instructions as text: capstone's decoding of bytes that somebody has kept or read, and what they name."""

from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import capstone
from capstone import x86

from introspect.operands import disassembler

__all__ = ["MAX_INSTRUCTION", "Instruction", "instruction_text", "instructions"]

MAX_INSTRUCTION = 15
"""Bytes: no instruction is longer (APM3 1.1)."""

_NEW = {
    b"\x0f\x01\xfd": "rdpru", b"\x0f\x01\xfe": "invlpgb", b"\x0f\x01\xff": "tlbsync", b"\xf3\x0f\x01\xfa": "mcommit",
}  # fmt: skip
"""Instructions without operands that capstone 5 does not know."""
_MODES = {16: capstone.CS_MODE_16, 32: capstone.CS_MODE_32, 64: capstone.CS_MODE_64}


class Instruction(NamedTuple):
    """One instruction, or a byte that begins none (`mnemonic` is then ".byte")."""

    address: int
    code: bytes
    mnemonic: str
    operands: str
    target: int | None
    """Where it branches to, if it says so."""
    memory: int | None
    """The linear address of its memory operand, where that does not depend on registers but RIP."""

    @property
    def text(self) -> str:
        return f"{self.mnemonic} {self.operands}".rstrip()


@cache
def _plain(bits: int) -> Any:
    """Without details of operands, which cost more than the rest."""
    return capstone.Cs(capstone.CS_ARCH_X86, _MODES[bits])


def instruction_text(code: bytes, address: int, bits: int) -> tuple[str, int] | None:
    """The instruction that bytes begin with, and its length; None if they are none, or not all of one."""
    for _, size, mnemonic, operands in _plain(bits).disasm_lite(code, address, 1):
        return f"{mnemonic} {operands}".rstrip(), size
    return None


def instructions(code: bytes, address: int, bits: int, count: int, base: int = 0) -> Iterator[Instruction]:
    """At most `count` instructions of `code`, which is at a linear address, in a segment of `bits` bits that begins at `base`.

    A byte that begins none is one of its own. Ends where the code ends, also amid an instruction.
    """
    engine, at, mask = disassembler(bits), 0, (1 << 64 if bits == 64 else 1 << 32) - 1
    base = 0 if bits == 64 else base
    for _ in range(count):
        if at >= len(code):
            return
        here = address - base + at & mask
        window = code[at : at + MAX_INSTRUCTION]
        name = next((name for start, name in _NEW.items() if window.startswith(start)), None)
        if name is not None:
            size = 4 if window[0] == 0xF3 else 3
            yield Instruction(here + base & mask, window[:size], name, "", None, None)
            at += size
            continue
        found = next(engine.disasm(window, here, 1), None)
        if found is None:
            if len(window) < MAX_INSTRUCTION and _could_go_on(engine, window, here):
                return
            yield Instruction(here + base & mask, window[:1], ".byte", f"{window[0]:#04x}", None, None)
            at += 1
            continue
        yield _instruction(found, bits, base)
        at += found.size


def _could_go_on(engine: Any, window: bytes, address: int) -> bool:
    """Whether it is the end that is missing: with more bytes behind it is an instruction longer than what is here."""
    longer = next(engine.disasm(window + bytes(MAX_INSTRUCTION), address, 1), None)
    return longer is not None and longer.size > len(window)


def _instruction(found: Any, bits: int, base: int) -> Instruction:
    target = memory = None
    mask = (1 << 64 if bits == 64 else 1 << 32) - 1
    branch = found.group(x86.X86_GRP_JUMP) or found.group(x86.X86_GRP_CALL) or found.group(x86.X86_GRP_BRANCH_RELATIVE)
    for operand in found.operands:
        if operand.type == x86.X86_OP_IMM and branch:
            target = (operand.imm & (0xFFFF if bits == 16 else mask)) + base & mask
        elif operand.type == x86.X86_OP_MEM and not operand.mem.index and bits != 16:
            if operand.mem.base in (x86.X86_REG_RIP, x86.X86_REG_EIP):
                memory = found.address + found.size + operand.mem.disp & mask
            elif not operand.mem.base and operand.mem.segment in (0, x86.X86_REG_CS, x86.X86_REG_DS, x86.X86_REG_SS):
                memory = operand.mem.disp & mask
    return Instruction(
        found.address + base & mask, bytes(found.bytes), found.mnemonic, found.op_str, target, memory
    )
