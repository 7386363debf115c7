"""Colours: the text stays, and what is what is found."""

from __future__ import annotations

import io
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmdbg.console.output import TerminalOutput, clean
from vmdbg.console.paint import PALETTE, ansi, fragments, may_colour

_ESCAPES = re.compile(r"\x1b\[[0-9;]*m")


@given(st.text(alphabet=st.characters(blacklist_categories=("Cc", "Cs"), whitelist_characters="\n")))
def test_the_text_stays(text: str) -> None:
    assert "".join(piece for _, piece in fragments(text)) == text
    assert _ESCAPES.sub("", ansi(text)) == text


@pytest.mark.parametrize(
    ("text", "kind", "piece"),
    [
        ("── code at work ────", "title.name", "code at work"),
        ("=>  0x1000  <work+0x4>  mov rbp, rsp", "mnemonic", "mov"),
        ("=>  0x1000  <work+0x4>  mov rbp, rsp", "arrow", "=>  "),
        ("*rip 0x10  rax 0x20", "changed", "*rip 0x10"),
        ("*rip 0x10  rax 0x20", "register", "rax"),
        (" cr0 0x80000011 [PE ET PG]", "flags", "[PE ET PG]"),
        ("  PTE  0x10  <-- not present", "bad", "<-- not present"),
        ("-> gpa 0x109000 -> spa 0x10f6000", "good", "-> gpa 0x109000 -> spa 0x10f6000"),
        ("#VMEXIT NPF (nested page fault)", "event", "#VMEXIT NPF"),
        ("=>    52      for (int i = 0; i < N; i++) /* all */", "mnemonic", "for"),
        ("=>    52      for (int i = 0; i < N; i++) /* all */", "address", "/* all */"),
        ("=>    52      for (int i = 0; i < N; i++) /* all */", "arrow", "=>"),
        ("0x10  0x20  <main+0x47>", "symbol", "<main+0x47>"),
    ],
)
def test_what_is_what(text: str, kind: str, piece: str) -> None:
    assert (kind, piece) in list(fragments(text))


def test_operands_are_no_flags() -> None:
    assert not [kind for kind, _ in fragments("    0x10  <f>  mov rax, [RBP - 8]") if kind == "flags"]


def test_every_kind_has_a_colour() -> None:
    text = "── a ──\n=>  0x1  <a>  nop\n*rax 0x1 [PE] #PF <-- x"
    assert {kind for kind, _ in fragments(text) if kind} <= set(PALETTE)


def test_colours_are_for_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert may_colour(Terminal())
    assert not may_colour(io.StringIO())
    monkeypatch.setenv("NO_COLOR", "1")
    assert not may_colour(Terminal())
    output = TerminalOutput(out := Terminal())
    output.pager = False
    output.show("*rip 0x10")
    assert out.getvalue() == "*rip 0x10\n"


def test_a_guests_text_does_not_command_the_terminal() -> None:
    out = io.StringIO()
    TerminalOutput(out).show("\x1b[2J\x07 cleared?\x9b1m", "serial")
    assert out.getvalue() == "\\x1b[2J\\x07 cleared?\\x9b1m\n"
    assert clean("a\tb") == "a\tb"
