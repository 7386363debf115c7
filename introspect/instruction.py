"""One instruction in words: capstone on bytes that somebody has kept or read."""

from __future__ import annotations

from functools import cache
from typing import Any

from capstone import CS_ARCH_X86, CS_MODE_16, CS_MODE_32, CS_MODE_64, Cs

__all__ = ["instruction"]

_MODES = {16: CS_MODE_16, 32: CS_MODE_32, 64: CS_MODE_64}


@cache
def _decoder(bits: int) -> Any:
    return Cs(CS_ARCH_X86, _MODES[bits])


def instruction(code: bytes, address: int, bits: int) -> tuple[str, int] | None:
    """The instruction that bytes begin with, and its length; None if they are none, or not all of one."""
    for _, size, mnemonic, operands in _decoder(bits).disasm_lite(code, address, 1):
        return f"{mnemonic} {operands}".rstrip(), size
    return None
