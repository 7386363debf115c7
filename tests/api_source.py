# SPDX-License-Identifier: GPL-2.0-or-later
"""Modules of `vmdbg.api` that are made from tables: commands as methods, fields of the VMCB as properties.

`python -m tests.reference` writes them, and tests/api compares.
"""

from __future__ import annotations

import argparse
import ast
import keyword
import textwrap
import typing
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from pathlib import Path

from introspect.commands import Command, Registry, Result
from introspect.commands.binding import bindings, method_name
from introspect.vmcb import VMCB
from vmdbg.api.options import ELSEWHERE, actions
from vmdbg.api.results import Stopped
from vmdbg.console.stopped import Started

API = Path(__file__).resolve().parents[1] / "vmdbg/api"
COMMANDS, FIELDS, KEYWORDS = API / "commands.py", API / "fields.py", API / "keywords.py"
WIDTH = 130
_MADE = "Made by `python -m tests.reference`: change"
_BASES = {"Inferior": "InferiorCommands", "Machine": "MachineCommands"}
"""Classes of the API that have commands as methods, but for those whose names they use themselves."""


def own_names(name: str) -> set[str]:
    """What a class of the API, and those that inherit from it, define themselves."""
    tree = ast.parse((API / f"{name.lower()}.py").read_text(encoding="utf-8"))
    found: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and (
            node.name == name or any(isinstance(base, ast.Name) and base.id == name for base in node.bases)
        ):
            for inner in ast.walk(node):
                if isinstance(inner, ast.FunctionDef):
                    found.add(inner.name)
                elif isinstance(inner, ast.Attribute) and isinstance(inner.value, ast.Name) and inner.value.id == "self":
                    found.add(inner.attr)
    return found


def results(command: Command) -> tuple[type, ...]:
    """The types of what a command gives."""
    found = typing.get_type_hints(command.run).get("return", Result)
    return tuple(Stopped if one is Started else one for one in typing.get_args(found) or (found,))


def names_of(commands: Iterable[Command]) -> dict[type, str]:
    """What each type of a result is called in the module: two of one name have that of their module before it."""
    kinds = dict.fromkeys(kind for command in commands for kind in results(command))
    counts = Counter(kind.__name__ for kind in kinds)
    return {
        kind: kind.__name__ if counts[kind.__name__] == 1 else kind.__module__.rpartition(".")[2].title() + kind.__name__
        for kind in kinds
    }


def _imports(module: str, names: Iterable[str]) -> Iterator[str]:
    """As ruff sorts them: what has another name here stands in a line of its own."""
    for renamed, held in groupby(sorted(names), key=lambda name: name if " as " in name else ""):
        yield f"from {module} import {renamed or ', '.join(held)}"


def _docstring(command: Command) -> Iterator[str]:
    text = command.summary + ("\n\n" + command.details if command.details else "")
    shown = [*text.split("\n")]
    if command.own_grammar:
        shown += ["", f"Words as in the command language: `{command.synopsis}`."]
    given = [one for one in bindings(command) if one.parameter.help]
    if given:
        shown += ["", *(f"{one.name}: {one.parameter.help}" for one in given)]
    if len(shown) == 1:
        yield f'        """{shown[0]}"""'
        return
    yield f'        """{shown[0]}'
    for line in shown[1:]:
        yield f"        {line}".rstrip().replace("\\", "\\\\")
    yield '        """'


def _method(command: Command, types: Mapping[type, str]) -> Iterator[str]:
    own = bindings(command)
    parts = ["self"]
    for one in own:
        if one.keyword and "*" not in parts:
            parts.append("*")
        default = " = False" if one.annotation == "bool" else " | None = None"
        parts.append(f"{one.name}: {one.annotation}{default * one.optional}")
    if command.own_grammar:
        parts.append("*words: object")
    kinds = results(command)
    kind = " | ".join(types[one] for one in kinds)
    line = f"    def {method_name(command.name)}({', '.join(parts)}) -> {kind}:"
    if len(line) <= WIDTH:
        yield line
    else:
        yield f"    def {method_name(command.name)}("
        yield from (f"        {part}," for part in parts)
        yield f"    ) -> {kind}:"
    yield from _docstring(command)
    values = ", ".join(f'"{one.name}": {one.name}' for one in own)
    rest = "words" if command.own_grammar else "()"
    call = [f'self._call("{command.name}", {{{values}}}, {rest})']
    if len(call[0]) > WIDTH - 16:
        call = ["self._call(", f'    "{command.name}",', f"    {{{values}}},", f"    {rest},", ")"]
        if len(values) > WIDTH - 16:
            call[2:3] = ["    {", *(f'        "{one.name}": {one.name},' for one in own), "    },"]
    before = "return" if kinds == (Result,) else "found ="
    yield f"        {before} {call[0]}"
    yield from (f"        {line}" for line in call[1:])
    if kinds != (Result,):
        yield f"        assert isinstance(found, {kind})"
        yield "        return found"
    yield ""


def commands_module(commands: Iterable[Command]) -> str:
    """vmdbg/api/commands.py."""
    listed = sorted(commands, key=lambda command: method_name(command.name))
    types = names_of(listed)
    imports: dict[str, set[str]] = {"introspect.commands": {"Result"}, "introspect.commands.binding": {"Numbered"}}
    for kind, name in types.items():
        if kind is not Result:
            imports.setdefault(kind.__module__, set()).add(kind.__name__ + f" as {name}" * (name != kind.__name__))
    lines = [
        "# SPDX-License-Identifier: GPL-2.0-or-later",
        "# ruff: noqa: E501",
        '"""Every command of the registry as a method, with its parameters and the type of its result.',
        "",
        f"{_MADE} the commands, not this.",
        '"""',
        "",
        "from __future__ import annotations",
        "",
        "from abc import ABC, abstractmethod",
        "from collections.abc import Mapping, Sequence",
        "from os import PathLike",
        "from typing import Literal",
        "",
        *(line for module, names in sorted(imports.items()) for line in _imports(module, names)),
        "",
        '__all__ = ["RESULTS", "Commands", "InferiorCommands", "MachineCommands"]',
        "",
        "Who = int | str | Numbered",
        '"""An inferior: its number, its name, or the object."""',
        "",
        "",
        "class _Called(ABC):",
        "    @abstractmethod",
        "    def _call(self, name: str, values: Mapping[str, object], words: tuple[object, ...]) -> Result: ...",
        "",
    ]
    taken = {base: own_names(name) for name, base in _BASES.items()}
    groups: dict[frozenset[str], list[Command]] = {}
    for command in listed:
        where = frozenset(base for base, names in taken.items() if method_name(command.name) not in names)
        groups.setdefault(where, []).append(command)
    names = {frozenset(taken): "_Everywhere", frozenset(): "_Nowhere"}
    for where, held in groups.items():
        names.setdefault(where, f"_{''.join(sorted(where))}")
        lines += ["", f"class {names[where]}(_Called):", '    """Some of the commands."""', ""]
        for command in held:
            lines += _method(command, types)
    for base in sorted(taken):
        parents = ", ".join(names[where] for where in groups if base in where)
        lines += ["", f"class {base}({parents}):", '    """Those commands whose names have no other use here."""', ""]
    lines += ["", f"class Commands({', '.join(names[where] for where in groups)}):", '    """All commands."""', "", ""]
    lines += ["RESULTS: tuple[type, ...] = (", *(f"    {name}," for kind, name in types.items() if kind is not Result), ")"]
    lines += ['"""What they give."""']
    return "\n".join(lines) + "\n"


def write(registry: Registry) -> None:
    """Both modules."""
    COMMANDS.write_text(commands_module(registry.commands.values()), encoding="utf-8")
    FIELDS.write_text(fields_module(), encoding="utf-8")
    KEYWORDS.write_text(keywords_module(), encoding="utf-8")


def fields_module() -> str:
    """vmdbg/api/fields.py."""
    lines = [
        "# SPDX-License-Identifier: GPL-2.0-or-later",
        '"""Fields of the VMCB (APM2 appendix B) as properties.',
        "",
        f"{_MADE} introspect/vmcb.py, not this.",
        '"""',
        "",
        "from __future__ import annotations",
        "",
        "from introspect.exits import ExitCode",
        "from vmdbg.api.flags import Fields, Value",
        "",
        '__all__ = ["VmcbFields"]',
        "",
        "",
        "class VmcbFields(Fields):",
        '    """Names with a dot, as cs.base, are written with _ here; items have both: `vmcb["cs.base"]`."""',
        "",
        "    __slots__ = ()",
    ]
    for field in VMCB:
        name = field.name.replace(".", "_")
        assert not keyword.iskeyword(name)
        words = f"{field.size} byte{'s' * (field.size > 1)} at {field.offset:#x}"
        bits = f": {', '.join(list(field.bits.fields)[:12])}" if field.bits is not None else ""
        kind = "ExitCode | int" if name == "exitcode" else "Value"
        getter = "self._code" if name == "exitcode" else "self._get"
        doc = f"{words}{bits}."
        lines += [
            "",
            "    @property",
            f"    def {name}(self) -> {kind}:",
            f'        """{doc}"""' if len(doc) < 110 else f'        """{words}."""',
            f'        return {getter}("{field.name}")',
            "",
            f"    @{name}.setter",
            f"    def {name}(self, value: int) -> None:",
            f'        self.write("{field.name}", value)',
        ]
    return "\n".join(lines) + "\n"


_FILES = ("initrd", "trace_exits")
_TYPES = {
    "size": "int | str", "number": "int | str", "cpus": "int", "physical_bits": "int", "exit_ring": "int", "iommus": "int",
    "notices": "str | Iterable[str]", "device": "str", "reserved_memory": "str",
    "symbol_file": "Symbols",
}  # fmt: skip
"""By the function that reads a value on the command line."""


def _keyword(name: str, action: argparse.Action) -> str:
    if action.nargs == 0:
        return "bool"
    if action.choices is not None:
        found = f"Literal[{', '.join(map(repr, action.choices))}]"
    elif name in _FILES:
        found = "File"
    else:
        found = _TYPES.get(getattr(action.type, "__name__", ""), "str")
    if action.nargs == "?":
        found += " | bool"
    if isinstance(action.default, list):
        return f"{found} | Sequence[str]" if found == "Symbols" else f"Sequence[{found}]"
    return found


def keywords_module() -> str:
    """vmdbg/api/keywords.py."""
    lines = [
        "# SPDX-License-Identifier: GPL-2.0-or-later",
        '"""The keyword arguments of a machine.',
        "",
        f"{_MADE} vmdbg/run.py, not this.",
        '"""',
        "",
        "from __future__ import annotations",
        "",
        "from collections.abc import Iterable, Mapping, Sequence",
        "from os import PathLike",
        "from typing import Literal, TypedDict",
        "",
        '__all__ = ["MachineOptions"]',
        "",
        "File = str | PathLike[str]",
        "Symbols = Mapping[int, File] | Mapping[str, File] | Mapping[int | str, File]",
        '"""Files with symbols by whose they are: 2, "guest2", "host"."""',
        "",
        "",
        "class MachineOptions(TypedDict, total=False):",
        '    """Options of `vmdbg run`, with _ for -."""',
    ]
    for name, action in ((name, action) for name, action in actions().items() if name not in ELSEWHERE):
        lines += ["", f"    {name}: {_keyword(name, action)}"]
        help = (action.help or "").replace("\\", "\\\\")
        own = f'"""{help[:1].upper()}{help[1:]}."""'
        lines += [f"    {own}" if len(own) < WIDTH - 4 else f'    """{_wrapped(help)}"""']
    return "\n".join(lines) + "\n"


def _wrapped(text: str) -> str:
    return "\n    ".join(textwrap.wrap(text[:1].upper() + text[1:] + ".", WIDTH - 12))
