"""`sym`: symbols by name, by a part of it, or by address."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import translate as glob
from itertools import islice

from introspect.commands.context import CommandError, Context, GuestView, HostView
from introspect.commands.inferior_state import OWNER, InferiorState
from introspect.commands.parameters import AddressWord, Parameter, Symbol
from introspect.commands.registry import Arguments, Command
from introspect.commands.render import columns, members
from introspect.expression import Space
from introspect.symbols import Symbol as Entry
from introspect.symbols import Symbols

__all__ = ["COMMANDS"]

_MOST = 200


@dataclass(frozen=True, slots=True)
class SymbolView:
    """`offset`: how far behind its start the address is that was asked for."""

    owner: str
    name: str
    address: int
    size: int
    offset: int


@dataclass(frozen=True, slots=True)
class Found:
    what: str
    symbols: tuple[SymbolView, ...]
    more: bool

    def text(self) -> str:
        rows = [
            (f"{one.owner}{one.address:#x}", f"{one.name}+{one.offset:#x}" if one.offset else one.name,
             f"{one.size} bytes" if one.size else "", f"begins at {one.address - one.offset:#x}" if one.offset else "")
            for one in self.symbols
        ]  # fmt: skip
        return "\n".join([*columns(rows), *([f"there are more than {_MOST}: ask more precisely"] if self.more else [])])

    def json(self) -> object:
        return members(self)


_WHAT = Parameter("NAME|PATTERN|ADDRESS", Symbol(), help="a name, a pattern with * and ?, a part of a name, or an address")
_ADDRESS = re.compile(r"[0-9$]|.*[:+\[(]")
"""How addresses begin or what they have that names have not."""


def _matching(symbols: Symbols, what: str) -> Iterator[Entry]:
    """The one of this name, else those that match as a pattern, or have it in their names."""
    exact = symbols.get(what)
    if exact is not None:
        yield exact
        return
    if any(mark in what for mark in "*?"):
        fits = re.compile(glob(what), re.IGNORECASE).match
        yield from (symbol for symbol in symbols if fits(symbol.name))
    else:
        yield from symbols.matching(what)


def _views(subject: InferiorState, what: str) -> Iterator[SymbolView]:
    if subject.symbols is not None:
        for one in _matching(subject.symbols, what):
            yield SymbolView(subject.prefix, one.name, one.address, one.size, 0)


def _sym(context: Context, arguments: Arguments) -> Found:
    what, named = arguments[_WHAT], arguments.get(OWNER)
    if _ADDRESS.match(what):
        return _at(context, what, named)
    owners = [named] if named is not None else [context.selected or context.host, context.host, *context.guests]
    known = [InferiorState(context, owner) for owner in {owner.number: owner for owner in owners}.values()]
    if not any(subject.symbols is not None and len(subject.symbols) for subject in known):
        raise CommandError(what, "nobody here has symbols", "assign a file: `symbols PID FILE`, or --symbols")
    found = list(islice((view for subject in known for view in _views(subject, what)), _MOST + 1))
    if not found:
        who = ", ".join(subject.title for subject in known if subject.symbols is not None)
        raise CommandError(what, f"no symbol of {who} has this in its name", "try a shorter part of it")
    return Found(what, tuple(found[:_MOST]), len(found) > _MOST)


def _at(context: Context, what: str, named: GuestView | HostView | None) -> Found:
    where = AddressWord(what, Space.GVA).locate(context, named)
    subject = InferiorState(context, where.owner)
    if where.space != Space.GVA:
        raise CommandError(str(where), "symbols are at linear addresses", "leave out the space")
    found = subject.symbols.at(where.offset) if subject.symbols is not None else None
    if found is None:
        why = "it belongs to no symbol" if subject.symbols is not None else f"{subject.title} has no symbols"
        raise CommandError(str(where), why, "`sym` with a part of a name lists what there is")
    symbol, offset = found
    return Found(what, (SymbolView(subject.prefix, symbol.name, where.offset, symbol.size, offset),), False)


COMMANDS = (
    Command(
        "sym", _sym, "Look up symbols: by name, pattern or part of a name, or the one that an address belongs to.",
        (_WHAT, OWNER),
        "Names are looked for in the selected inferior first, then in all others that have symbols; an address begins with a\n"
        "digit or has a colon or a + in it, and belongs to who is selected unless it says so.",
        ("sym *page_fault*", "sym 2:0xffffffff8010027f"),
    ),
)  # fmt: skip
