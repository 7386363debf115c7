"""Who may import whom: the arrows between the packages, read from the source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parents[1]

# A package, and what it may not import.  `except_in` lists packages below it where it may.
ARROWS = [
    ("gdbstub", ("vmdbg", "introspect", "unicorn"), ()),
    ("introspect", ("vmdbg", "gdbstub", "unicorn"), ()),
    ("vmdbg", ("unicorn",), ("vmdbg/engine",)),
    ("vmdbg/platform", ("vmdbg.engine", "vmdbg.svm", "vmdbg.cpu", "vmdbg.machine", "vmdbg.debugger", "gdbstub"), ()),
    ("vmdbg/boot", ("vmdbg.engine", "vmdbg.svm", "vmdbg.cpu", "vmdbg.machine", "vmdbg.debugger", "gdbstub"), ()),
    ("vmdbg/engine", ("vmdbg.svm", "vmdbg.cpu", "vmdbg.machine", "vmdbg.debugger", "vmdbg.platform", "gdbstub"), ()),
    ("vmdbg/cpu", ("vmdbg.machine", "vmdbg.debugger", "gdbstub"), ()),
    ("vmdbg/svm", ("vmdbg.machine", "vmdbg.debugger", "gdbstub"), ()),
]


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of every import in a file, in functions and under TYPE_CHECKING too."""
    package = list(path.relative_to(TOP).parent.parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield node.lineno, f"{module}.{alias.name}"


@pytest.mark.parametrize(("package", "forbidden", "except_in"), ARROWS, ids=[arrow[0] for arrow in ARROWS])
def test_arrow(package: str, forbidden: tuple[str, ...], except_in: tuple[str, ...]) -> None:
    files = sorted((TOP / package).rglob("*.py"))
    assert files, f"{package} has no modules"
    wrong = [
        f"{path.relative_to(TOP)}:{line} imports {name}"
        for path in files
        if not any((TOP / allowed) in path.parents for allowed in except_in)
        for line, name in imports(path)
        if any(name == module or name.startswith(module + ".") for module in forbidden)
    ]
    assert not wrong, "\n".join(wrong)
