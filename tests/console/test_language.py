"""Lines: comments, pipes, redirects, and operators that are none of these."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from introspect.commands import CommandError
from vmdbg.console.language import Line, split


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("guests", Line("guests")),
        ("  guests   # who is there", Line("guests")),
        ("# nothing", Line("")),
        ("echo a#b", Line("echo a#b")),
        ("echo '# no comment'", Line("echo '# no comment'")),
        ("exits | grep NPF", Line("exits", pipe="grep NPF")),
        ("exits | grep npf > f", Line("exits", pipe="grep npf > f")),
        ("exits > f", Line("exits", file="f")),
        ("exits >f", Line("exits", file="f")),
        ("exits >> 'a b'", Line("exits", file="a b", append=True)),
        ("walk 'a | b'", Line("walk 'a | b'")),
        ("break main if rax > 5", Line("break main if rax > 5")),
        ("catch vmexit npf if gpa >= 0x1000 && gpa < 0x2000", Line("catch vmexit npf if gpa >= 0x1000 && gpa < 0x2000")),
        ("walk a>>1", Line("walk a>>1")),
        ("(break main if rax > 5) > f", Line("break main if rax > 5", file="f")),
        ("(a | b) | cat", Line("a | b", pipe="cat")),
        ("(1 + 2) * 3", Line("(1 + 2) * 3")),
    ],
)
def test_lines(text: str, line: Line) -> None:
    assert split(text) == line


def test_operators_belong_to_expressions() -> None:
    assert split("print a | b > c", operators=True) == Line("print a | b > c")
    assert split("(print a | b) > c", operators=True) == Line("print a | b", file="c")


@pytest.mark.parametrize("text", ["exits |", "exits > ", "exits > a b", "exits > 'a"])
def test_what_leads_nowhere(text: str) -> None:
    with pytest.raises(CommandError):
        split(text)


@given(st.text())
def test_any_text_is_a_line_or_an_error(text: str) -> None:
    try:
        line = split(text)
    except CommandError:
        return
    assert not (line.pipe and line.file)
