"""The table of docs/gdb.md is true: every packet is in it and is answered, and the tests it names exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from gdbstub.commands import COMMANDS
from gdbstub.commands.files import _OPERATIONS
from gdbstub.commands.transfer import _OBJECTS
from gdbstub.example import Example
from tests.gdbstub.client import Client
from tests.gdbstub.rows import SECTIONS, document

ROOT = Path(__file__).parents[2]
ROWS = [row for rows in SECTIONS.values() for row in rows]
EXAMPLES = [(name, example) for row in ROWS for name, example in row.packets.items() if example]
REMEDY = "; a row belongs into tests/gdbstub/rows.py"


def test_the_document_is_the_tables() -> None:
    assert (ROOT / "docs/gdb.md").read_text() == document(), "run python -m tests.gdbstub.rows > docs/gdb.md"


def test_every_packet_has_a_row() -> None:
    known = {name.decode() for name in COMMANDS} - {"vFile", "qXfer"}
    known |= {f"vFile:{name.decode()}" for name in _OPERATIONS} | {f"qXfer:{name.decode()}" for name in _OBJECTS}
    assert known == {name for row in ROWS for name in row.packets}, REMEDY


def test_every_test_exists() -> None:
    for row in ROWS:
        assert row.tests, row.what
        for test in row.tests:
            path, _, name = test.partition("::")
            tree = ast.parse((ROOT / "tests" / path).read_text())
            assert any(isinstance(node, ast.FunctionDef) and node.name == name for node in ast.walk(tree)), test


@pytest.mark.parametrize(("name", "example"), EXAMPLES)
def test_every_packet_is_answered(name: str, example: str) -> None:
    target = Example()
    target.image = "/example/program"
    client = Client(target)
    if name == "G":
        example = "G" + client.ask(b"g").decode()
    *before, last = (packet.encode("latin-1") for packet in example.split(" "))
    for packet in before:
        assert client.send(packet) or client.wait()
    replies = client.send(last) or client.wait()
    assert replies
    assert replies[-1] != b""
    assert not re.match(rb"E(\.|[0-9a-f]{2}(;|$))", replies[-1]), replies
