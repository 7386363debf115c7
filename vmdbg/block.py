"""The register block of a thread that is on a processor, at once: what `g` asks for after nearly every stop.

Most registers lie in the engine's context as the block has them, so most of the block is slices of one copy of that.
`LiveContext.read` gives the others, and the same values one by one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from gdbstub.description import Description, Register
from vmdbg.contexts import NUMBERS, SEGMENTS, LiveContext
from vmdbg.engine import layout

_X87 = frozenset((
    *(f"st{number}" for number in range(8)), "fctrl", "fstat", "ftag", "fiseg", "fioff", "foseg", "fooff", "fop",
))  # fmt: skip
_AT = (
    {name: layout.REGS + 8 * number for name, number in NUMBERS.items()}
    | {f"cr{number}": layout.CR + 8 * number for number in (2, 3, 4)}
    | {f"{name}_base": layout.SEGMENTS + 24 * SEGMENTS[name] + 8 for name in ("fs", "gs")}
    | {f"xmm{number}": layout.XMM + 64 * number for number in range(16)}
    | {"k_gs_base": layout.KERNEL_GS_BASE, "efer": layout.EFER, "mxcsr": layout.MXCSR}
)
"""Offsets of what is in the context with all its bits."""
_END = max(_AT.values()) + 16
_FPU = slice(layout.FPU, layout.MXCSR)
"""Where everything of the x87 is."""

_Part = slice | bytes | Callable[[LiveContext, bytes], bytes]


def _read(name: str, size: int, context: LiveContext, raw: bytes) -> bytes:
    return ((context.read(name) or 0) & ((1 << 8 * size) - 1)).to_bytes(size, "little")


class _X87Part:
    """The x87's registers, which few stops find changed."""

    def __init__(self, registers: list[Register]) -> None:
        self.registers = registers
        self._raw = self._made = b""

    def __call__(self, context: LiveContext, raw: bytes) -> bytes:
        state = raw[_FPU]
        if state != self._raw:
            self._made = b"".join([_read(each.name, each.bits // 8, context, raw) for each in self.registers])
            self._raw = state
        return self._made


def _parts(register: Register) -> list[_Part]:
    name, size = register.name, register.bits // 8
    if name in _AT:
        return [slice(_AT[name], _AT[name] + size)]
    if name in SEGMENTS:
        at = layout.SEGMENTS + 24 * SEGMENTS[name]
        return [slice(at, at + 2), bytes(size - 2)]
    if name in _X87:
        return [_X87Part([register])]
    return [partial(_read, name, size)]


def _plan(registers: tuple[Register, ...]) -> tuple[_Part, ...]:
    """What the block is put together from; neighbours in the context are taken together."""
    plan: list[_Part] = []
    for part in (part for register in registers for part in _parts(register)):
        last = plan[-1] if plan else None
        if isinstance(part, slice) and isinstance(last, slice) and last.stop == part.start:
            plan[-1] = slice(last.start, part.stop)
        elif isinstance(part, _X87Part) and isinstance(last, _X87Part):
            last.registers += part.registers
        else:
            plan.append(part)
    return tuple(plan)


class Block:
    """The block of one description."""

    def __init__(self, description: Description) -> None:
        self._plan = _plan(description.registers[: description.block_count])

    def read(self, context: LiveContext) -> bytes:
        raw = bytes(context.cpu.state.bytes[:_END])
        return b"".join(
            raw[part] if isinstance(part, slice) else part if isinstance(part, bytes) else part(context, raw)
            for part in self._plan
        )
