# SPDX-License-Identifier: GPL-2.0-or-later
"""`expect`: a line of a script that fails where something is not so."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from introspect.commands.context import CommandError, Context
from introspect.commands.parameters import Expression, ExpressionWord, Parameter
from introspect.commands.registry import Arguments, Command

__all__ = ["COMMANDS", "Held"]

_EXPRESSION = Parameter("EXPRESSION", Expression())
_BRACKETS = {"(": 1, "[": 1, ")": -1, "]": -1}
_LOOSER = re.compile(r"&&|\|\||[?&|^](?!=)")
"""Operators behind which a comparison is a part."""
_COMPARISON = re.compile(r"==|!=|<=|>=|<(?!<)|>(?!>)")


@dataclass(frozen=True, slots=True)
class Held:
    """It is as expected."""

    expression: str
    value: int

    def text(self) -> str:
        return f"as expected: {self.expression}"

    def json(self) -> object:
        return {"expression": self.expression, "value": self.value}


def _plain(text: str) -> str:
    """What lies in brackets made blank, so that what is left stands where it was; and shifts."""
    depth, found = 0, []
    for character in text:
        depth += max(_BRACKETS.get(character, 0), 0)
        found.append(" " if depth else character)
        depth += min(_BRACKETS.get(character, 0), 0)
    return re.sub(r"<<|>>", "  ", "".join(found))


def _sides(text: str) -> tuple[str, ...]:
    """The sides of the comparison that an expression is; nothing if it is another."""
    plain = _plain(text)
    found = list(_COMPARISON.finditer(plain))
    if len(found) != 1 or _LOOSER.search(plain):
        return ()
    return text[: found[0].start()].strip(), text[found[0].end() :].strip()


def _told(context: Context, sides: tuple[str, ...]) -> Iterator[str]:
    for side in sides:
        if not re.fullmatch(r"0[xX][0-9a-fA-F]+|\d+", side):
            value = ExpressionWord(side).value(context)
            yield f"{side} is {value}" + (f" ({value:#x})" if value > 9 else "")


def _expect(context: Context, arguments: Arguments) -> Held:
    word = arguments[_EXPRESSION]
    value = word.value(context)
    if not value:
        told = ", ".join(_told(context, _sides(word.text)))
        raise CommandError(word.text, "it does not hold", told or "its value is 0")
    return Held(word.text, value)


COMMANDS = (
    Command(
        "expect", _expect, "Fail if an expression is 0: what a script expects.", (_EXPRESSION,),
        "Expressions are those of `print`. A script of `vmdbg test` ends there, gdb's has an error, `vmdbg console -x` a status.",
        ("expect rip != 0", "expect 2:vmcb.guest_asid == 1"),
    ),
)  # fmt: skip
