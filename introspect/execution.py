"""In which mode a processor executes, from its registers (APM2 1.3, 2.1)."""

from collections.abc import Mapping
from typing import NamedTuple

from introspect.registers import ATTRIB, CR0, EFER, RFLAGS

__all__ = ["Mode", "execution_mode", "linear_pc", "linear_sp"]


class Mode(NamedTuple):
    """`code_bits` and `stack_bits`: 16, 32 or 64."""

    name: str
    code_bits: int
    stack_bits: int
    cpl: int
    real: bool
    """Selectors are paragraphs: in real and virtual-8086 mode."""
    long: bool
    """Descriptor tables are those of long mode."""


def execution_mode(registers: Mapping[str, int]) -> Mode:
    """From `registers` by the names of the VMCB's fields. Where CS is not known, long mode counts as 64-bit mode and protected
    mode as 32-bit code."""
    cpl = registers.get("cpl", registers.get("cs.selector", 0) & 3)
    if not registers.get("cr0", 0) & CR0.PE:
        return Mode("real mode", 16, 16, 0, True, False)
    long = bool(registers.get("efer", 0) & EFER.LMA)
    if registers.get("rflags", 0) & RFLAGS.VM and not long:
        return Mode("virtual-8086 mode", 16, 16, 3, True, False)
    code = registers.get("cs.attrib", ATTRIB.L if long else ATTRIB.DB)
    if long and code & ATTRIB.L:
        return Mode("64-bit mode", 64, 64, cpl, False, True)
    code_bits = 32 if code & ATTRIB.DB else 16
    stack_bits = 32 if registers.get("ss.attrib", ATTRIB.DB) & ATTRIB.DB else 16
    kind = "compatibility mode" if long else "protected mode"
    return Mode(f"{kind}, {code_bits}-bit", code_bits, stack_bits, cpl, False, long)


def linear_pc(registers: Mapping[str, int]) -> int | None:
    """Linear address of the next instruction; None if rIP is not known."""
    return _linear(registers, "cs", registers.get("rip"), 64)


def linear_sp(registers: Mapping[str, int]) -> int | None:
    """Linear address of the top of the stack; None if rSP is not known."""
    mode = execution_mode(registers)
    return _linear(registers, "ss", registers.get("rsp"), mode.stack_bits)


def _linear(registers: Mapping[str, int], segment: str, offset: int | None, width: int) -> int | None:
    if offset is None:
        return None
    if execution_mode(registers).code_bits == 64:
        return offset
    offset &= (1 << width) - 1
    return registers.get(f"{segment}.base", 0) + offset & 0xFFFFFFFF
