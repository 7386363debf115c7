"""`search`: bytes, text and numbers in a range of memory."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

from introspect.commands.context import CommandError, Context
from introspect.commands.inferior_state import OWNER, InferiorState
from introspect.commands.parameters import (
    Address,
    AddressWord,
    Candidate,
    Choice,
    Located,
    Misfit,
    Number,
    Parameter,
    parse_number,
)
from introspect.commands.parameters import ExpressionWord as Value
from introspect.commands.registry import Arguments, Command
from introspect.commands.render import amount_text, columns, members
from introspect.expression import Space
from introspect.search import (
    MAX_PATTERN,
    Pattern,
    Piece,
    hex_pattern,
    linear_pieces,
    nested_pieces,
    pattern,
    physical_pieces,
    scan,
)

__all__ = ["COMMANDS"]

_SIZES = {"u8": 1, "u16": 2, "u32": 4, "u64": 8}
_KINDS = {
    "u8": "a number of 1 byte", "u16": "of 2 bytes", "u32": "of 4 bytes", "u64": "of 8 bytes", "str": "text",
    "utf16": "text in UTF-16", "hex": "digits, ? for any",
}  # fmt: skip
_MAX_PIECES = 1 << 21
"""Pages and holes that one search visits at most."""


@dataclass(frozen=True)
class What:
    """What to look for, as it was written; a value in it means the one of who owns the range."""

    text: str

    def compile(self, context: Context, subject: InferiorState) -> Pattern:
        """CommandError for an expression that has no value."""
        kind, colon, rest = self.text.partition(":")
        if colon and kind in _SIZES:
            return self._number(Value(rest).value(context, subject.owner), _SIZES[kind])
        if colon and kind in ("str", "utf16", "hex"):
            found = hex_pattern(rest) if kind == "hex" else pattern(rest.encode("utf-8" if kind == "str" else "utf-16-le"))
            if found is None:
                raise CommandError(self.text, "hex takes pairs of digits, ? for any", "write it as hex:48??90")
            return found
        number = parse_number(self.text)
        if number is not None:
            return self._number(number, 4 if 0 <= number < 1 << 32 else 8)
        return (hex_pattern(self.text) if " " in self.text.strip() else None) or pattern(self.text.encode())

    def _number(self, value: int, size: int) -> Pattern:
        if not 0 <= value < 1 << 8 * size:
            raise CommandError(f"{value:#x}", f"it does not fit {size} bytes", "write u64:VALUE")
        return pattern(value.to_bytes(size, "little"))


@dataclass(frozen=True)
class _WhatKind:
    """Bytes, text or a number."""

    noun: str = "text, bytes or a number to look for"

    def take(self, context: Context, words: list[str]) -> What:
        if not words[0] or len(words[0]) > MAX_PATTERN:
            raise Misfit(f"it must have 1 to {MAX_PATTERN} characters")
        return What(words.pop(0))

    def complete(self, context: Context, prefix: str) -> Iterable[Candidate]:
        return (Candidate(f"{kind}:", meaning) for kind, meaning in _KINDS.items())


@dataclass(frozen=True)
class _EndKind:
    """The end of a range, or its length."""

    noun: str = "the address behind the end, or +LENGTH"

    def take(self, context: Context, words: list[str]) -> AddressWord:
        return AddressWord(words.pop(0), Space.GVA)

    def complete(self, context: Context, prefix: str) -> Iterable[Candidate]:
        return (Candidate("+4k", "a page"), Candidate("+1m", "1 MiB"))


@dataclass(frozen=True, slots=True)
class Match:
    address: int
    symbol: str
    bytes: str
    """The 16 from there on."""


@dataclass(frozen=True, slots=True)
class Matches:
    what: str
    first: str
    """Where the search began."""
    last: int
    matches: tuple[Match, ...]
    complete: bool
    note: str

    def text(self) -> str:
        rows = [(f"{one.address:#x}", one.symbol and f"<{one.symbol}>", one.bytes, _text(one.bytes)) for one in self.matches]
        count = f"{len(self.matches)} match{'es' * (len(self.matches) != 1)} of {self.what!r} from {self.first} to {self.last:#x}"
        return "\n".join([*columns(rows), count, *([self.note] if self.note else [])])

    def json(self) -> object:
        return members(self)


def _text(digits: str) -> str:
    return "".join(chr(byte) if 32 <= byte < 127 else "." for byte in bytes.fromhex(digits))


_WHAT = Parameter("WHAT", _WhatKind(), help=f"text, a number, bytes (\"48 8b ?? 90\"), or what {': '.join(_KINDS)}: say")
_IN = Parameter("in", Choice(("in",)), help="the word in")
_FROM = Parameter("ADDRESS", Address(), help="where to begin: an address of any space")
_END = Parameter("END|+LENGTH", _EndKind(), optional=True, help="else all of the symbol that ADDRESS names")
_MOST = Parameter("N", Number(1, 1 << 16), option="--max", only_option=True, default=100, help="matches at most (100)")
_ALIGN = Parameter("BYTES", Number(1, 1 << 20), option="--align", only_option=True, default=1, help="at its multiples only (1)")


def _range(context: Context, arguments: Arguments) -> tuple[Located, int]:
    """Where to begin, and the address behind the end."""
    where = arguments[_FROM].locate(context, arguments.get(OWNER))
    word = arguments.get(_END)
    if word is None:
        symbols = context.symbols(where.owner.number)
        found = symbols.at(where.offset) if symbols is not None and where.space == Space.GVA else None
        if found is None or found[1] or not found[0].size:
            raise arguments.error("END", f"missing, and {where} is no symbol with a size", "give +LENGTH, as +64k")
        return where, where.offset + found[0].size
    if word.text.startswith("+"):
        end = where.offset + Value(word.text[1:]).value(context, where.owner)
    else:
        end = word.locate(context, where.owner).offset
    if end <= where.offset:
        raise CommandError(word.text, f"the range from {where} is empty", "give an end behind it, or +LENGTH")
    return where, min(end, 1 << 64)


def _pieces(context: Context, where: Located, end: int, wanted: Pattern) -> Iterator[Piece]:
    memory, owner = context.memory, where.owner
    if where.space == Space.GVA:
        return linear_pieces(memory, owner.paging, owner.nested, where.offset, end)
    if where.space == Space.GPA and owner.nested is not None:
        return nested_pieces(memory, owner.nested, where.offset, end)
    if where.space == Space.IOVA:
        raise CommandError(str(where), "a device's addresses cannot be searched", "`iommu map` says where they lead: search spa")
    zeros = None if wanted.regex.fullmatch(bytes(wanted.size)) else wanted.size
    return physical_pieces(memory, where.offset, end, zeros)


def _search(context: Context, arguments: Arguments) -> Matches:
    where, end = _range(context, arguments)
    subject = InferiorState(context, where.owner)
    wanted = arguments[_WHAT].compile(context, subject)
    total, bytes_read, holes = end - where.offset, 0, 0
    used = 0

    def counted() -> Iterator[Piece]:
        nonlocal bytes_read, holes, used
        for piece in islice(_pieces(context, where, end, wanted), _MAX_PIECES):
            used = piece.address + piece.size
            if piece.spa is None:
                holes += piece.size
            else:
                bytes_read += piece.size
            yield piece

    def progress(address: int) -> None:
        context.progress((address - where.offset) / total, f"searching {where.space}")

    most = arguments[_MOST]
    found = list(islice(scan(context.memory, counted(), wanted, arguments[_ALIGN], progress), most + 1))
    linear = where.space == Space.GVA
    matches = tuple(
        Match(at, subject.symbol(at) if linear else "", subject.read(where.space, at, 16).hex()) for at in found[:most]
    )
    notes = [f"{amount_text(holes)} of it is not mapped, or no memory"] if holes else []
    complete = len(found) <= most and used >= end
    if len(found) > most:
        notes.append("there are more: --max shows them")
    elif used < end:
        notes.append(f"the search ends at {used:#x}, after {_MAX_PIECES} pages and holes: go on from there")
    return Matches(arguments[_WHAT].text, str(where), end, matches, complete, "; ".join(notes))


COMMANDS = (
    Command(
        "search", _search, "Search memory for text, bytes with wildcards, or numbers.",
        (_WHAT, _IN, _FROM, _END, OWNER, _MOST, _ALIGN),
        "Text is searched as it is, a number as 4 bytes, or 8 where it needs them, bytes as \"48 8b ?? 90\". u8: u16: u32: u64:\n"
        "before an expression, str: utf16: hex: before text say which is meant. In linear, guest-physical or system-physical\n"
        "addresses; what is not mapped is passed over, and said.",
        ("search guest in 2:gpa:0x100000 +1m --max 3", "search u64:0xffffffff801003d5 in 2:gva:0xffffffff80100000 +64k"),
    ),
)  # fmt: skip
