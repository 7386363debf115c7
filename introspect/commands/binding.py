# SPDX-License-Identifier: GPL-2.0-or-later
"""A command of the registry as a Python function: what its parameters are called there, and how values become its arguments.

`vmdbg/api/commands.py` is made by these rules (`python -m tests.reference`), and calls come back through them.
"""

from __future__ import annotations

import keyword
import os
import re
from collections.abc import Iterable, Mapping
from enum import Enum
from typing import Any, NamedTuple, Protocol, runtime_checkable

from introspect.commands import Arguments, Command, CommandError, Context
from introspect.commands.parameters import Choice, Flag, Guest, Number, Owner, Parameter, Rest

__all__ = ["Binding", "Numbered", "arguments", "bindings", "identifier", "method_name", "shown"]

_NAMES = {"r|w": "access", "on|off": "switch", "if EXPR": "condition", "/FMT": "format", "N|NAME": "msr"}
"""Parameters whose own names say little to a program."""

_SHOWN = 60
"""Characters of a value in an error."""


@runtime_checkable
class Numbered(Protocol):
    """An inferior, as commands are given one."""

    number: int


class Binding(NamedTuple):
    """A parameter as Python has it, or several of one name, which take a sequence. `annotation` is source text; `keyword`: it is
    given by name only."""

    name: str
    parameters: tuple[Parameter[Any], ...]
    annotation: str
    keyword: bool

    @property
    def parameter(self) -> Parameter[Any]:
        return self.parameters[0]

    @property
    def optional(self) -> bool:
        return self.keyword or self.parameter.optional


def identifier(words: str) -> str:
    """ "audit isolation" as a name."""
    name = re.sub(r"\W+", "_", words).strip("_").lower()
    return name + "_" if keyword.iskeyword(name) else name


def method_name(command: str) -> str:
    return identifier(command)


def _annotation(parameter: Parameter[Any]) -> str:
    match parameter.kind:
        case Flag():
            return "bool"
        case Number():
            return "int"
        case Choice(choices):
            return f"Literal[{', '.join(map(repr, choices))}]"
        case Guest() | Owner():
            return "Who"
        case kind:
            return {"File": "str | PathLike[str]", "Format": "str", "Expression": "str", "_Condition": "str", "_Who": "Who",
                    "_Which": "Who", "_HostOrWhich": "Who"}.get(type(kind).__name__, "int | str")  # fmt: skip


def _literal(parameter: Parameter[Any]) -> str | None:
    """The word, if it is one that belongs to the grammar of a line only."""
    choices = parameter.kind.choices if isinstance(parameter.kind, Choice) and not parameter.optional else ()
    return choices[0] if len(choices) == 1 else None


def bindings(command: Command) -> list[Binding]:
    """Those that are required first, then what may be left out, then what is given by name only."""
    found: dict[str, Binding] = {}
    for parameter in command.parameters:
        if isinstance(parameter.kind, Rest) or _literal(parameter) is not None:
            continue
        words = _NAMES.get(parameter.name) or parameter.option or re.split(r"\W", parameter.name)[0] or parameter.name
        name, annotation = identifier(words), _annotation(parameter)
        if name in found:
            several = (*found[name].parameters, parameter)
            found[name] = found[name]._replace(parameters=several, annotation=f"Sequence[{annotation}]")
            continue
        found[name] = Binding(name, (parameter,), annotation, parameter.only_option or isinstance(parameter.kind, Flag))
    return sorted(found.values(), key=lambda one: (one.keyword, one.parameter.optional))


def _word(value: object) -> str:
    """CommandError for what is neither text nor number, nor names a file or an inferior."""
    match value:
        case Enum():
            return value.name
        case Numbered():
            return "host" if value.number == 1 else str(value.number)
        case os.PathLike():
            return str(os.fspath(value))
        case str() | int() | float():
            return str(value)
    raise CommandError(shown(value), f"it is of the type {type(value).__name__}", "give text or a number")


def shown(value: object) -> str:
    """A value in an error, which has one line."""
    text = " ".join(repr(value).split())
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def arguments(context: Context, command: Command, values: Mapping[str, object], words: Iterable[object]) -> Arguments:
    """What a command was given from Python: `values` by the names of its bindings, None for what was left out, and
    `words` for one with a grammar of its own.  CommandError for what does not fit.
    """
    if command.own_grammar:
        return Arguments(context, command, [part for word in words for part in _word(word).split()])
    found = Arguments.none(context, command)
    for parameter in command.parameters:
        if (word := _literal(parameter)) is not None:
            found.give(parameter, [word])
    for one in bindings(command):
        value = values.get(one.name)
        if value is None or value is False:
            if not one.optional:
                raise found.error(one.parameter.name, "missing", f"give {one.parameter.kind.noun}")
            continue
        given = list(value) if len(one.parameters) > 1 and not isinstance(value, str) and isinstance(value, Iterable) else [value]
        if len(given) > len(one.parameters):
            raise found.error(_word(given[len(one.parameters)]), f"{one.name} takes {len(one.parameters)} at most")
        for parameter, word in zip(one.parameters, map(_word, given), strict=False):
            found.give(parameter, ["if", word] if parameter.name.startswith("if ") else [word])
    return found
