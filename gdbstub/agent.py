"""Agent expressions: the bytecode that GDB sends for conditions, dynamic prints and tracepoints (GDB manual, appendix F).

`parse` checks a program once: every opcode known, every jump to an instruction, the stack never too short or too long and
of one height wherever it is reached from.  So each stack item has a place that is known beforehand, and a program becomes a
few Python functions over a list of places.  What is left to run time are the inferior's memory, divisions by zero, and
loops, of which GDB makes none: they end with an error.

Values are unsigned integers of 64 bits.  Shifts by 64 and more leave zeros, or the sign.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple, Protocol

from gdbstub.printf import Format
from gdbstub.target import TargetError

__all__ = ["BUDGET", "DEEPEST", "LONGEST", "AgentError", "Environment", "Instruction", "Program", "parse"]

LONGEST = 0x4000
"""Bytes of a program."""
DEEPEST = 100
"""Items on its stack."""
BUDGET = 1 << 16
"""Instructions that an evaluation may execute."""

_M = (1 << 64) - 1
_SIGN = 1 << 63


class AgentError(TargetError):
    """A program that is not right, or cannot be evaluated where it is."""


class Environment(Protocol):
    """What a program sees of the thread it is evaluated for.  Any method may raise `AgentError`."""

    def register(self, number: int) -> int:
        """Its low 64 bits."""

    def memory(self, address: int, length: int) -> bytes:
        """The longest readable prefix."""

    def variable(self, number: int) -> int:
        """A trace state variable."""

    def set_variable(self, number: int, value: int) -> None: ...

    def trace(self, address: int, length: int) -> None:
        """Collect memory into the trace frame."""

    def trace_string(self, address: int, length: int) -> None:
        """Collect memory up to and with its first zero byte."""

    def trace_variable(self, number: int) -> None:
        """Collect a trace state variable."""

    def print(self, text: str) -> None:
        """Show it on the client's console."""


class _Op(NamedTuple):
    name: str
    operand: int
    """Its bytes behind the opcode."""
    pops: int
    pushes: int
    source: str
    """A statement: {a}, {b} are the items below and on the top before, {r} is the top behind, {n} the operand."""


_BINARY = "{r} = {a} %s {b} & _M"

OPS: dict[int, _Op] = {
    0x02: _Op("add", 0, 2, 1, _BINARY % "+"),
    0x03: _Op("sub", 0, 2, 1, _BINARY % "-"),
    0x04: _Op("mul", 0, 2, 1, _BINARY % "*"),
    0x05: _Op("div_signed", 0, 2, 1, "{r} = _divide(_signed({a}), _signed({b})) & _M"),
    0x06: _Op("div_unsigned", 0, 2, 1, "{r} = _divide({a}, {b})"),
    0x07: _Op("rem_signed", 0, 2, 1, "{r} = _remainder(_signed({a}), _signed({b})) & _M"),
    0x08: _Op("rem_unsigned", 0, 2, 1, "{r} = _remainder({a}, {b})"),
    0x09: _Op("lsh", 0, 2, 1, "{r} = {a} << {b} & _M if {b} < 64 else 0"),
    0x0A: _Op("rsh_signed", 0, 2, 1, "{r} = _signed({a}) >> min({b}, 63) & _M"),
    0x0B: _Op("rsh_unsigned", 0, 2, 1, "{r} = {a} >> min({b}, 64)"),
    0x0C: _Op("trace", 0, 2, 0, "e.trace({a}, {b})"),
    0x0D: _Op("trace_quick", 1, 1, 1, "e.trace({b}, {n})"),
    0x0E: _Op("log_not", 0, 1, 1, "{r} = 0 if {b} else 1"),
    0x0F: _Op("bit_and", 0, 2, 1, "{r} = {a} & {b}"),
    0x10: _Op("bit_or", 0, 2, 1, "{r} = {a} | {b}"),
    0x11: _Op("bit_xor", 0, 2, 1, "{r} = {a} ^ {b}"),
    0x12: _Op("bit_not", 0, 1, 1, "{r} = {b} ^ _M"),
    0x13: _Op("equal", 0, 2, 1, "{r} = 1 if {a} == {b} else 0"),
    0x14: _Op("less_signed", 0, 2, 1, "{r} = 1 if {a} ^ _SIGN < {b} ^ _SIGN else 0"),
    0x15: _Op("less_unsigned", 0, 2, 1, "{r} = 1 if {a} < {b} else 0"),
    0x16: _Op("ext", 1, 1, 1, "{r} = _extend({b}, {n})"),
    0x17: _Op("ref8", 0, 1, 1, "{r} = _load(e, {b}, 1)"),
    0x18: _Op("ref16", 0, 1, 1, "{r} = _load(e, {b}, 2)"),
    0x19: _Op("ref32", 0, 1, 1, "{r} = _load(e, {b}, 4)"),
    0x1A: _Op("ref64", 0, 1, 1, "{r} = _load(e, {b}, 8)"),
    0x20: _Op("if_goto", 2, 1, 0, "return {n} if {b} else {next}"),
    0x21: _Op("goto", 2, 0, 0, "return {n}"),
    0x22: _Op("const8", 1, 0, 1, "{r} = {n}"),
    0x23: _Op("const16", 2, 0, 1, "{r} = {n}"),
    0x24: _Op("const32", 4, 0, 1, "{r} = {n}"),
    0x25: _Op("const64", 8, 0, 1, "{r} = {n}"),
    0x26: _Op("reg", 2, 0, 1, "{r} = e.register({n})"),
    0x27: _Op("end", 0, 0, 0, "return -1"),
    0x28: _Op("dup", 0, 1, 2, "{r} = {b}"),
    0x29: _Op("pop", 0, 1, 0, "pass"),
    0x2A: _Op("zero_ext", 1, 1, 1, "{r} = {b} & (1 << {n}) - 1"),
    0x2B: _Op("swap", 0, 2, 2, "{a}, {b} = {b}, {a}"),
    0x2C: _Op("getv", 2, 0, 1, "{r} = e.variable({n})"),
    0x2D: _Op("setv", 2, 1, 1, "e.set_variable({n}, {b})"),
    # The manual lets it push the value.  GDB has pushed it already (getv) where it emits one, and expects no second.
    0x2E: _Op("tracev", 2, 0, 0, "e.trace_variable({n})"),
    0x2F: _Op("tracenz", 0, 2, 0, "e.trace_string({a}, {b})"),
    0x30: _Op("trace16", 2, 1, 1, "e.trace({b}, {n})"),
    0x32: _Op("pick", 1, 0, 1, "{r} = {picked}"),
    0x33: _Op("rot", 0, 3, 3, "{c}, {a}, {b} = {b}, {c}, {a}"),
    0x34: _Op("printf", 0, 0, 0, "e.print(formats[{n}]({arguments}, e.memory))"),
}
"""The opcodes that are offered; of GDB's documented ones those of floating point are not, which it never emits."""

IF_GOTO, GOTO, CONST64, REG, END, PICK, PRINTF = 0x20, 0x21, 0x25, 0x26, 0x27, 0x32, 0x34
_FLOATING = frozenset((0x01, 0x1B, 0x1C, 0x1D, 0x1E, 0x1F))
_LEAVES = frozenset((IF_GOTO, GOTO, END))


class Instruction(NamedTuple):
    """`operand` of a jump is the index of the instruction it goes to; of printf that of its format in `Program.formats`."""

    op: int
    operand: int
    offset: int
    """In the bytecode."""

    @property
    def name(self) -> str:
        return OPS[self.op].name


_Block = Callable[[Environment, list[int]], int]


@dataclass(frozen=True)
class Program:
    """Bytecode that is right.  Called with an environment it is evaluated: the top of its stack at its end, or 0."""

    code: bytes
    instructions: tuple[Instruction, ...] = field(repr=False, compare=False)
    formats: tuple[Format, ...] = field(repr=False, compare=False)
    depth: int = field(repr=False, compare=False)
    """Stack items that it needs."""
    _blocks: dict[int, tuple[_Block, int]] = field(repr=False, compare=False)
    """By the index of their first instruction; with the number of instructions."""
    _ends: dict[int, int] = field(repr=False, compare=False)
    """Index of a block that ends the program, to the height of the stack there."""

    def __call__(self, environment: Environment) -> int:
        stack = [0] * self.depth
        left, at = BUDGET, 0
        while True:
            block, length = self._blocks[at]
            left -= length
            if left < 0:
                raise AgentError(f"the expression loops: it was given up after {BUDGET} instructions")
            following = block(environment, stack)
            if following < 0:
                height = self._ends[at]
                return stack[height - 1] if height else 0
            at = following


@lru_cache(1024)
def parse(code: bytes) -> Program:
    """Check bytecode and make a program of it.  Raises `AgentError` that names the offset and what is wrong there."""
    if len(code) > LONGEST:
        raise AgentError(f"the expression has {len(code)} bytes: use at most {LONGEST}")
    instructions, formats, arguments = _decode(code)
    heights = _heights(instructions, arguments)
    blocks, ends = _compile(instructions, formats, arguments, heights)
    return Program(code, instructions, formats, max(heights.values()), blocks, ends)


def _decode(code: bytes) -> tuple[tuple[Instruction, ...], tuple[Format, ...], dict[int, int]]:
    """The instructions, the formats of printf, and the number of arguments of each printf by its index."""
    raw: list[Instruction] = []
    formats: list[Format] = []
    arguments: dict[int, int] = {}
    at = 0
    while at < len(code):
        start, opcode = at, code[at]
        op = OPS.get(opcode)
        if op is None:
            what = "floating point, which is not offered" if opcode in _FLOATING else "no opcode"
            raise AgentError(f"{opcode:#04x} at offset {start} of the expression is {what}")
        at += 1 + op.operand
        operand = int.from_bytes(code[start + 1 : at], "big")
        if opcode == PRINTF:
            size = int.from_bytes(code[at + 1 : at + 3], "big")
            text, end = code[at + 3 : at + 3 + size], at + 3 + size
            if not size or len(text) != size or text[-1]:
                raise AgentError(f"the format of printf at offset {start} of the expression has no end")
            formats.append(Format(text[:-1].decode("utf-8", "replace")))
            operand, arguments[len(raw)] = len(formats) - 1, code[at]
            if formats[-1].count != code[at]:
                raise AgentError(f"printf at offset {start} of the expression has {code[at]} arguments for another format")
            at = end
        if at > len(code):
            raise AgentError(f"{op.name} at offset {start} is cut off at the end of the expression")
        raw.append(Instruction(opcode, operand, start))
    where = {instruction.offset: index for index, instruction in enumerate(raw)}
    for index, (opcode, operand, offset) in enumerate(raw):
        if opcode in (IF_GOTO, GOTO):
            if operand not in where:
                raise AgentError(f"the jump at offset {offset} of the expression goes to {operand}, where no instruction is")
            raw[index] = Instruction(opcode, where[operand], offset)
    return tuple(raw), tuple(formats), arguments


def _effect(instruction: Instruction, arguments: int) -> tuple[int, int]:
    """Items that it needs on the stack, and by how many that grows."""
    op = OPS[instruction.op]
    if instruction.op == PICK:
        return instruction.operand + 1, 1
    if instruction.op == PRINTF:
        return arguments + 2, -arguments - 2  # besides the arguments a function and a channel
    return op.pops, op.pushes - op.pops


def _heights(instructions: tuple[Instruction, ...], arguments: dict[int, int]) -> dict[int, int]:
    """The height of the stack before each instruction that can be reached."""
    heights = {0: 0}
    todo = [0]
    while todo:
        index = todo.pop()
        if index == len(instructions):
            raise AgentError("the expression runs past its last byte: it must come to an end instruction")
        instruction, height = instructions[index], heights[index]
        needs, grows = _effect(instruction, arguments.get(index, 0))
        after = height + grows
        if height < needs:
            raise AgentError(f"{instruction.name} at offset {instruction.offset} takes {needs} items from a stack of {height}")
        if after > DEEPEST:
            raise AgentError(f"the stack is higher than {DEEPEST} behind offset {instruction.offset}: use a simpler expression")
        following = [] if instruction.op in (GOTO, END) else [index + 1]
        if instruction.op in (IF_GOTO, GOTO):
            following.append(instruction.operand)
        for target in following:
            if target not in heights:
                heights[target] = after
                todo.append(target)
            elif heights[target] != after:
                raise AgentError(
                    f"offset {instructions[target].offset} is reached with a stack of {heights[target]} items and of {after}"
                )
    return heights


def _compile(
    instructions: tuple[Instruction, ...], formats: tuple[Format, ...], arguments: dict[int, int], heights: dict[int, int]
) -> tuple[dict[int, tuple[_Block, int]], dict[int, int]]:
    """A function for each stretch without jumps: it gives the index of the next one, or -1."""
    starts = {0}
    for index in heights:
        opcode, operand, _ = instructions[index]
        if opcode in (IF_GOTO, GOTO):
            starts |= {operand, index + 1} & heights.keys()
    names = {
        "_M": _M, "_SIGN": _SIGN, "_signed": _signed, "_divide": _divide, "_remainder": _remainder, "_extend": _extend,
        "_load": _load, "formats": formats,
    }  # fmt: skip
    blocks: dict[int, tuple[_Block, int]] = {}
    ends: dict[int, int] = {}
    for start in starts:
        index, lines = start, [f"def block(e, s):  # {start}"]
        while True:
            lines.append(_statement(instructions[index], index, heights[index], arguments.get(index, 0)))
            if instructions[index].op in _LEAVES:
                break
            index += 1
            if index in starts:
                lines.append(f"return {index}")
                break
        if instructions[index].op == END:
            ends[start] = heights[index]
        found: dict[str, _Block] = {}
        exec("\n    ".join(lines), names, found)  # statements of OPS with integers in them
        blocks[start] = found["block"], len(lines) - 1
    return blocks, ends


def _statement(instruction: Instruction, index: int, height: int, arguments: int) -> str:
    op, operand = OPS[instruction.op], instruction.operand
    if instruction.op == PRINTF:  # the first argument is the highest, below two items that are GDB's concern
        places = "".join(f"s[{height - 3 - n}], " for n in range(arguments))
        return op.source.format(n=operand, arguments=f"({places})")
    after = height + op.pushes - op.pops
    return op.source.format(
        a=f"s[{height - 2}]", b=f"s[{height - 1}]", c=f"s[{height - 3}]", r=f"s[{after - 1}]", n=operand,
        next=index + 1, picked=f"s[{height - 1 - operand}]",
    )  # fmt: skip


def _signed(value: int) -> int:
    return value - (1 << 64) if value & _SIGN else value


def _divide(a: int, b: int) -> int:
    """As C does: towards zero."""
    if not b:
        raise AgentError("the expression divides by zero")
    quotient = abs(a) // abs(b)
    return quotient if (a < 0) == (b < 0) else -quotient


def _remainder(a: int, b: int) -> int:
    return a - _divide(a, b) * b


def _extend(value: int, bits: int) -> int:
    if not 0 < bits < 64:
        return value if bits else 0
    sign = 1 << bits - 1
    return ((value & (sign << 1) - 1) ^ sign) - sign & _M


def _load(environment: Environment, address: int, size: int) -> int:
    data = environment.memory(address, size)
    if len(data) != size:
        raise AgentError(f"no memory is readable at {address + len(data):#x}")
    return int.from_bytes(data, "little")
