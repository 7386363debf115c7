"""`x`, `xp`, `stack` and `print`: memory in gdb's formats, and values of expressions."""

import struct
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from introspect.commands.context import CommandError, Context, GuestView
from introspect.commands.devices import DeviceView
from introspect.commands.inferior_state import OWNER, InferiorState, find_inferior, unreadable
from introspect.commands.parameters import Address, AddressWord, Expression, Format, Layout, Located, Number, Parameter, Physical
from introspect.commands.registry import Arguments, Command
from introspect.commands.render import columns, members
from introspect.disassembly import MAX_INSTRUCTION, instructions
from introspect.expression import Space

__all__ = ["COMMANDS"]

_SIZES = {"b": 1, "h": 2, "w": 4, "g": 8}
_PER_LINE = {1: 8, 2: 8, 4: 4, 8: 2}
_STRING = 200
"""Characters of a string that are shown; the rest is the next one, as in gdb."""
_ESCAPES = {7: "\\a", 8: "\\b", 9: "\\t", 10: "\\n", 11: "\\v", 12: "\\f", 13: "\\r", 27: "\\033", 34: '\\"', 92: "\\\\"}


def _signed(value: int, size: int) -> int:
    return value - (1 << 8 * size) if value >> 8 * size - 1 else value


def _character(byte: int) -> str:
    quoted = "\\'" if byte == 39 else '"' if byte == 34 else _escaped(byte)
    return f"{_signed(byte, 1)} '{quoted}'"


def _escaped(byte: int) -> str:
    return _ESCAPES.get(byte) or (chr(byte) if 32 <= byte < 127 else f"\\{byte:03o}")


def _float(value: int, size: int) -> str:
    """As short as tells it from its neighbours; what is no number with its bits."""
    code, digits, fraction = ("<d", 17, 52) if size == 8 else ("<f", 9, 23)
    (number,) = struct.unpack(code, value.to_bytes(size, "little"))
    if number != number:
        return f"{'-' * (value >> 8 * size - 1)}nan({value & (1 << fraction) - 1:#x})"
    return f"{number:.{digits}g}"


_WRITTEN: dict[str, Callable[[int, int], str]] = {
    "x": lambda value, size: f"{value:#0{2 * size + 2}x}",
    "z": lambda value, size: f"{value:#0{2 * size + 2}x}",
    "o": lambda value, size: f"0{value:o}" if value else "0",
    "t": lambda value, size: f"{value:0{8 * size}b}",
    "d": lambda value, size: str(_signed(value, size)),
    "u": lambda value, size: str(value),
    "c": lambda value, size: _character(value & 0xFF),
    "f": _float,
}
"""How a value of some bytes is written, as gdb's x does; a needs symbols, s and i are no numbers."""


@dataclass(frozen=True, slots=True)
class Item:
    """One unit of memory: a number (`value`), a string or an instruction."""

    address: int
    symbol: str
    text: str
    value: int | None = None


@dataclass(frozen=True, slots=True)
class Examined:
    """Memory from an address on; `end` says why it is not all that was asked for."""

    where: str
    letter: str
    size: int
    items: tuple[Item, ...]
    end: str
    space: str
    prefix: str = field(default="", repr=False)
    """What stands before each address: "2:gpa:", or nothing."""
    here: int | None = field(default=None, repr=False)
    """Address of the current instruction."""

    def text(self) -> str:
        per_line = 1 if self.letter in "si" else _PER_LINE[self.size]
        lines = []
        for at in range(0, len(self.items), per_line):
            row = self.items[at : at + per_line]
            mark = ("=> " if row[0].address == self.here else "   ") if self.letter == "i" else ""
            place = f"{self.prefix}{row[0].address:#x}"
            symbol = f" <{row[0].symbol}>" if row[0].symbol else ""
            lines.append([f"{mark}{place}{symbol}:", *(item.text for item in row)])
        return "\n".join([*columns(lines), *([self.end] if self.end else [])])

    def json(self) -> object:
        return members(self)


def _numbers(subject: InferiorState, where: Located, layout: Layout, size: int) -> tuple[list[Item], str]:
    data = subject.read(where.space, where.offset, layout.repeat * size)
    items = []
    for at in range(0, len(data) // size * size, size):
        value = int.from_bytes(data[at : at + size], "little")
        text = subject.named(value) if layout.letter == "a" else _WRITTEN[layout.letter](value, size)
        items.append(Item(_at(where, at), _symbol(subject, where, at), text, value))
    return items, _end(subject, where, len(data)) if len(data) < layout.repeat * size else ""


def _strings(subject: InferiorState, where: Located, count: int) -> tuple[list[Item], str]:
    items: list[Item] = []
    at = 0
    while len(items) < count:
        data = subject.read(where.space, _at(where, at), _STRING)
        content, nul, _ = data.partition(b"\0")
        if not data:
            return items, _end(subject, where, at)
        cut = "..." if not nul and len(data) == _STRING else ""
        text = "".join(map(_escaped, content))
        items.append(Item(_at(where, at), _symbol(subject, where, at), f'"{text}"{cut}'))
        at += len(content) + len(nul)
        if not nul and len(data) < _STRING and len(items) < count:
            return items, _end(subject, where, at)
    return items, ""


def _code(subject: InferiorState, where: Located, count: int) -> tuple[list[Item], str]:
    data = subject.read(where.space, where.offset, count * MAX_INSTRUCTION)
    base = subject.registers.get("cs.base", 0) if where.space == Space.GVA else 0
    items = []
    for one in instructions(data, where.offset, subject.mode.code_bits, count, base):
        text = one.text if one.target is None else f"{one.mnemonic} {subject.named(one.target)}"
        items.append(Item(one.address, _symbol(subject, where, one.address - where.offset), text))
    return items, _end(subject, where, len(data)) if len(items) < count else ""


def _at(where: Located, offset: int) -> int:
    return where.offset + offset & (1 << 64) - 1


def _symbol(subject: InferiorState, where: Located, offset: int) -> str:
    return subject.symbol(_at(where, offset)) if where.space == Space.GVA else ""


def _end(subject: InferiorState, where: Located, offset: int) -> str:
    there = where._replace(offset=_at(where, offset))
    return f"{there}: {unreadable(subject.context, there) or 'what is there is shorter than one of these'}"


_FORMAT = Parameter("/FMT", Format("xduotzcafsi"), optional=True, default=Layout(),
                    help="count, letter (x d u o t z c a f s i) and size (b h w g), as gdb's x")  # fmt: skip
_WHERE = Parameter("ADDRESS", Address(), optional=True, help="an address; with i the current instruction's if it is left out")
_PHYSICAL = Parameter("ADDRESS", Physical(), help="a system-physical address; one with a guest's number is guest-physical")


def _prefix(context: Context, where: Located, typed: str) -> str:
    """Owner and space of an address, so that it can be typed again: none for a linear one of who is selected."""
    selected = (context.selected or context.host).number
    space = "" if where.space == Space.GVA else f"{where.space}:"
    if where.space == Space.SPA:  # it is everybody's
        return space
    if isinstance(where.owner, DeviceView):
        return f"{where.owner.device}:{space}"
    owner = InferiorState(context, where.owner).prefix
    return owner + space if where.owner.number != selected or (space and typed.startswith(owner)) else space


def _examine(subject: InferiorState, where: Located, layout: Layout, typed: str = "") -> Examined:
    letter = layout.letter or "x"
    size = _SIZES[layout.size or {"a": "g" if subject.mode.code_bits == 64 else "w", "c": "b", "f": "g"}.get(letter, "w")]
    if letter == "f" and size < 4:
        raise CommandError(f"/{layout.size}f", "floating-point numbers have 4 or 8 bytes", "write /wf or /gf")
    if letter == "s" and layout.size not in ("", "b"):
        raise CommandError(f"/{layout.size}s", "strings are shown of bytes only", "write /s")
    if letter == "s":
        items, end = _strings(subject, where, layout.repeat)
    elif letter == "i":
        items, end = _code(subject, where, layout.repeat)
    else:
        items, end = _numbers(subject, where, layout._replace(letter=letter), size)
    if not items:
        raise CommandError(str(where), end.partition(": ")[2], "choose an address that memory is at")
    here = subject.pc if letter == "i" and where.space == Space.GVA and "rip" in subject.registers else None
    return Examined(str(where), letter, size, tuple(items), end, str(where.space), _prefix(subject.context, where, typed), here)


def _x(context: Context, arguments: Arguments) -> Examined:
    layout, word, named = arguments[_FORMAT], arguments.get(_WHERE), arguments.get(OWNER)
    if word is None and layout.letter != "i":
        raise arguments.error("ADDRESS", "missing", "give an address")
    subject = find_inferior(context, arguments)
    where = Located(subject.owner, Space.GVA, subject.pc) if word is None else word.locate(context, named)
    return _examine(InferiorState(context, where.owner), where, layout, word.text if word is not None else "")


def _xp(context: Context, arguments: Arguments) -> Examined:
    word = arguments[_PHYSICAL]
    where = word.locate(context, context.host)
    if isinstance(where.owner, GuestView) and where.space == Space.SPA and str(Space.SPA) not in word.text.split(":"):
        where = where._replace(space=Space.GPA)
    return _examine(InferiorState(context, where.owner), where, arguments[_FORMAT], word.text)


@dataclass(frozen=True, slots=True)
class Slot:
    """One word of a stack. `marks`: the registers that point at it."""

    address: int
    value: int
    symbol: str
    marks: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Stack:
    who: str
    width: int
    """Bytes of a word."""
    slots: tuple[Slot, ...]
    end: str

    def text(self) -> str:
        rows = [
            (f"{slot.address:#x}", f"{slot.value:#0{2 * self.width + 2}x}", slot.symbol and f"<{slot.symbol}>",
             " ".join(f"<-- {name}" for name in slot.marks))
            for slot in self.slots
        ]  # fmt: skip
        return "\n".join([*columns(rows), *([self.end] if self.end else [])])

    def json(self) -> object:
        return members(self)


_WORDS = Parameter("N", Number(1, 4096), optional=True, option="--words", default=16, help="how many words (16)")
_POINTERS = ("rsp", "rbp", "rax", "rbx", "rcx", "rdx", "rsi", "rdi", *(f"r{n}" for n in range(8, 16)))


def _stack(context: Context, arguments: Arguments) -> Stack:
    subject, count = find_inferior(context, arguments), arguments[_WORDS]
    width = subject.mode.stack_bits // 8
    where = Located(subject.owner, Space.GVA, subject.sp)
    data = subject.linear(where.offset, count * width)
    base = where.offset - subject.registers["rsp"] if subject.mode.code_bits != 64 else 0
    pointers = {name: subject.registers[name] + base for name in _POINTERS if name in subject.registers}
    slots = []
    for at in range(0, len(data) // width * width, width):
        value, address = int.from_bytes(data[at : at + width], "little"), _at(where, at)
        marks = tuple(name for name, pointer in pointers.items() if pointer == address)
        slots.append(Slot(address, value, subject.symbol(value) if value else "", marks))
    end = _end(subject, where, len(data)) if len(data) < count * width else ""
    if not slots:
        raise CommandError(str(where), end.partition(": ")[2], "the stack pointer may not be set up yet; `regs` shows it")
    return Stack(subject.title, width, tuple(slots), end)


@dataclass(frozen=True, slots=True)
class Value:
    """What an expression gives; `shown` in the format that was asked for."""

    expression: str
    value: int
    symbol: str
    shown: str

    def text(self) -> str:
        if self.shown:
            return self.shown
        signed = f" ({_signed(self.value, 8)})" if self.value >> 63 else ""
        return f"{self.value}{signed} = {self.value:#x}{f' <{self.symbol}>' if self.symbol else ''}"

    def json(self) -> object:
        return members(self)


_PRINT = Parameter("/FMT", Format("xduotzca", sizes=False), optional=True, help="one of x d u o t z c a, as gdb's print")
_EXPRESSION = Parameter("EXPRESSION", Expression())


def _print(context: Context, arguments: Arguments) -> Value:
    layout, word = arguments.get(_PRINT), arguments[_EXPRESSION]
    subject = InferiorState(context, context.selected or context.host)
    value = word.value(context, subject.owner)
    with suppress(CommandError):  # `2:work` is an address in the symbols of guest 2
        subject = InferiorState(context, AddressWord(word.text, Space.GVA).locate(context, subject.owner).owner)
    return Value(word.text, value, subject.symbol(value), _printed(subject, layout.letter, value) if layout else "")


def _printed(subject: InferiorState, letter: str, value: int) -> str:
    """As print does: without the zeros that x has."""
    plain = {"": hex, "x": hex, "t": lambda v: f"{v:b}", "a": subject.named}
    return plain[letter](value) if letter in plain else _WRITTEN[letter](value, 8)


COMMANDS = (
    Command(
        "x", _x, "Examine memory in gdb's formats, at an address of any space.", (_FORMAT, _WHERE, OWNER),
        "The format is a count, a letter and a size: x/8gx; without, one word in hexadecimal. Letters: x d u o t z c a f as in\n"
        "gdb, s a string, i instructions in the inferior's mode. Sizes: b 1, h 2, w 4, g 8 bytes. Devices are not read.",
        ("x/4gx 2:counter", "x/3i 2:rip"),
    ),
    Command(
        "xp", _xp, "Examine physical memory in gdb's formats.", (_FORMAT, _PHYSICAL),
        "Addresses are system-physical; those with a guest's number, as 2:0x1000, are that guest's guest-physical ones.",
        ("xp/4wx 0x100000", "xp/2gx 2:0x102000"),
    ),
    Command(
        "stack", _stack, "Show the words at the top of the stack, with symbols.", (_WORDS, OWNER),
        "The word's size is that of the stack's mode. A first number is N; name a guest behind it, or with --guest.",
        ("stack 6 2", "stack --words 4 --guest host"),
    ),
    Command(
        "print", _print, "Evaluate an expression: decimal, hexadecimal, and the symbol that an address belongs to.",
        (_PRINT, _EXPRESSION),
        "Names are registers, VMCB fields (vmcb.rip), exit codes and symbols, whose value is their address; u8 to u64[...] read\n"
        "memory; host: and 2: before a name mean another inferior's.",
        ("print u64[2:gva:0xffffffff80108fa0]", "print/x host:main + 0x10"), aliases=("p",),
    ),
)  # fmt: skip
