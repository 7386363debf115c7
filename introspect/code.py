"""Instructions as text, and what a debugger must know of one to step over it: by capstone, in the mode of the code."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import capstone
from capstone import x86_const

from introspect.registers import CR0, EFER, RFLAGS

__all__ = ["LONGEST", "Instruction", "bits_of", "instructions"]

LONGEST = 15
"""Bytes of an instruction (APM3 1.2)."""
_MODES = {16: capstone.CS_MODE_16, 32: capstone.CS_MODE_32, 64: capstone.CS_MODE_64}
_LONG, _DEFAULT = 0x200, 0x400
"""CS.L and CS.D as a VMCB has them."""


@dataclass(frozen=True, slots=True)
class Instruction:
    """`target` is where a direct jump or call leads, or what a RIP-relative operand names."""

    address: int
    length: int
    text: str
    target: int | None = None
    call: bool = False
    repeats: bool = False
    """A string instruction with a REP prefix, which a step over executes to its end."""


def bits_of(registers: Mapping[str, int]) -> int:
    """16, 32 or 64: the size of the code that an inferior with these registers executes."""
    attributes = registers.get("cs.attrib", _LONG if registers.get("efer", 0) & EFER.LMA else 0)
    if registers.get("efer", 0) & EFER.LMA and attributes & _LONG:
        return 64
    if not registers.get("cr0", 0) & CR0.PE or registers.get("rflags", 0) & RFLAGS.VM:
        return 16
    return 32 if attributes & _DEFAULT else 16


@cache
def _decoder(bits: int) -> Any:
    decoder = capstone.Cs(capstone.CS_ARCH_X86, _MODES[bits])
    decoder.detail = True
    return decoder


def instructions(code: bytes, address: int, bits: int, count: int = 0) -> Iterator[Instruction]:
    """Those of a range, at most `count` unless that is 0; what is none is one byte "(bad)"."""
    at = found = 0
    while at < len(code) and (not count or found < count):
        decoded = next(_decoder(bits).disasm(code[at : at + LONGEST], address + at, 1), None)
        if decoded is None:
            if len(code) - at < LONGEST:  # it may only have been cut off
                return
            yield Instruction(address + at, 1, "(bad)")
            at += 1
        else:
            yield _instruction(decoded)
            at += decoded.size
        found += 1


def _instruction(decoded: Any) -> Instruction:
    target = None
    for operand in decoded.operands:
        if operand.type == x86_const.X86_OP_IMM and decoded.group(x86_const.X86_GRP_BRANCH_RELATIVE):
            target = operand.imm & (1 << 64) - 1
        elif operand.type == x86_const.X86_OP_MEM and operand.mem.base == x86_const.X86_REG_RIP:
            target = decoded.address + decoded.size + operand.mem.disp & (1 << 64) - 1
    return Instruction(
        decoded.address, decoded.size, f"{decoded.mnemonic} {decoded.op_str}".strip(), target,
        decoded.group(x86_const.X86_GRP_CALL), decoded.mnemonic.startswith("rep"),
    )  # fmt: skip
