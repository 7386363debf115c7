# SPDX-License-Identifier: GPL-2.0-or-later
"""Addresses as scripts give them: numbers, or text of the command language.  What is wrong with one is a CommandError."""

from __future__ import annotations

from introspect.commands import CommandError, Context, GuestView, HostView
from introspect.commands.parameters import AddressWord, Located, remedy_of, unknown_line
from introspect.expression import ExpressionError, Space, parse_address
from introspect.source_lines import SourceLines, is_line
from vmdbg.history import HOST

__all__ = ["check_to_come", "located", "worded"]


def _linear(address: int) -> int:
    if not 0 <= address < 1 << 64:
        raise CommandError(f"{address:#x}", "addresses are 0 to 2**64 - 1", "give one of these")
    return address


def worded(address: int | str, owner: int | None = None) -> str:
    """As text, which says whose it is if `owner` is given and it does not say so itself."""
    text = f"{_linear(address):#x}" if isinstance(address, int) else address
    named = text.partition(":")[0] if ":" in text else ""
    if owner is None or named == "host" or named.isdecimal():
        return text
    return f"{'host' if owner == HOST else owner}:{text}"


def located(context: Context, address: int | str, number: int) -> Located:
    """Where an address of an inferior is."""
    guest: GuestView | None = next((guest for guest in context.guests if guest.number == number), None)
    owner: GuestView | HostView = context.host if guest is None else guest
    if isinstance(address, int):
        return Located(owner, Space.GVA, _linear(address))
    return AddressWord(address, Space.GVA).locate(context, owner)


def check_to_come(context: Context, location: str) -> None:
    """CommandError for a location in a guest to come that no symbols are known of: it would be waited for in vain."""
    owner, _, rest = location.partition(":")
    if not owner.isdecimal() or int(owner) in (HOST, *(guest.number for guest in context.guests)):
        return
    symbols, line = context.symbols(int(owner)), is_line(rest)
    try:
        if line is None:
            parse_address(rest, context.names(int(owner)))
            return
    except ExpressionError as error:
        raise CommandError(error.value, error.rule, remedy_of(context, error, int(owner))) from None
    if symbols is None or SourceLines.of(symbols).address(line[1], line[2]) is None:
        raise unknown_line(context, location, int(owner))
