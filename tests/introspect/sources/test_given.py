"""Registers as people write them."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from introspect.sources import SourceError
from introspect.sources.given import parse_registers


def test_registers_in_a_line_and_in_a_file(tmp_path: Path) -> None:
    wanted = {"cr3": 0x1000, "efer": 0xD00, "gs.base": 7, "rflags": 2, "cs.selector": 8}
    assert parse_registers("cr3=0x1000, efer=0xd00,$gs_base=7,eflags=0b10,cs=8") == wanted
    path = tmp_path / "registers"
    path.write_text("# the host's\ncr3 = 0x1000\n\nEFER: 0xd00  # long mode\ngs.base=7\nrflags=2\ncs.selector=8")
    assert parse_registers(str(path)) == wanted


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("cr3=", "'cr3=': no register and value"),
        ("exitcode=3", "there is no such register"),
        ("efre=1", "did you mean efer"),
        ("cr3=0x10000000000000000", "no value for cr3"),
        ("cr3=-1", "no value for cr3"),
        ("/none", "No such file"),
        ("\0", "no text"),
    ],
)  # fmt: skip
def test_what_is_wrong(text: str, said: str) -> None:
    with pytest.raises(SourceError, match=said):
        parse_registers(text)


@given(st.text(alphabet="cr3=0x,\n#$:. \0é9", max_size=40) | st.text(max_size=40))
def test_anything_else_is_refused_in_words(text: str) -> None:
    with suppress(SourceError):
        assert all(0 <= value < 1 << 64 for value in parse_registers(text).values())
