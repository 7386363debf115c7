"""Colours: what in a command's text is what. Only for terminals; the text itself never changes."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import TextIO

from pygments.lexers.c_cpp import CLexer
from pygments.token import Token

__all__ = ["PALETTE", "STYLES", "ansi", "fragments", "may_colour", "tinted"]

PALETTE: Mapping[str, tuple[str, str]] = {
    "title": ("ansibrightblack", "90"),
    "title.name": ("bold", "1"),
    "current": ("bold", "1"),
    "arrow": ("ansigreen bold", "32;1"),
    "changed": ("ansiyellow bold", "33;1"),
    "register": ("ansicyan", "36"),
    "number": ("", ""),
    "address": ("ansibrightblack", "90"),
    "symbol": ("ansigreen", "32"),
    "mnemonic": ("ansiblue bold", "34;1"),
    "flags": ("ansimagenta", "35"),
    "event": ("ansiyellow", "33"),
    "bad": ("ansired bold", "31;1"),
    "good": ("ansigreen", "32"),
    "heading": ("ansibrightblack underline", "90;4"),
    "serial": ("ansicyan", "36"),
    "note": ("ansiyellow bold", "33;1"),
    "error": ("ansired", "31"),
    "hint": ("ansibrightblack", "90"),
}
"""By kind: the style for prompt_toolkit, and the codes of SGR. The sixteen colours are the user's own."""
STYLES = {kind.replace(".", "-"): style for kind, (style, _) in PALETTE.items()}

_C = CLexer(stripnl=False, ensurenl=False)
_TITLE = re.compile(r"^(--|──) (.*?) ?([-─]*)$")
_CODE = re.compile(r"^(?P<arrow>=>|  )\s+(?P<at>0x[0-9a-f]+)\s+(?P<name><[^>]*>)?\s*(?P<op>[a-z(][\w)]*)(?P<rest>.*)$")
_SOURCE = re.compile(r"^(?P<arrow>=>|  )(?P<number> +\d+  )(?P<text>.*)$")
_WRITTEN = (
    (Token.Comment, "address"),
    (Token.Keyword, "mnemonic"),
    (Token.Literal.String, "symbol"),
    (Token.Name.Function, "title.name"),
)
"""What stands out in a line of C, and as what."""
_TOKENS = re.compile(
    r"(?P<changed>\*[a-z][\w.]* *0x[0-9a-f]+)"
    r"|(?P<bad><-- .*$|(?<![\w])! .*$|\b(?:refuses|violated|not present|not mapped|error:)[^,;]*)"
    r"|(?P<good>^(?:-> .*))"
    r"|(?P<symbol><[A-Za-z_.$][^<> ]*>)"
    r"|(?P<event>\#(?:VMEXIT [A-Z0-9_]+|VMEXIT|[A-Z]{2})\b|\b(?:NPF|VMMCALL|IOIO|CPUID|HLT|INTR|VINTR|SHUTDOWN|INVALID|MSR)\b)"
    r"|(?P<flags>\[(?:[A-Z]|v_)[A-Za-z0-9_=. -]*\])"
    r"|(?P<register>(?<![\w.*])(?:r[a-ds][xip]|r[sb]p|r\d{1,2}|e[a-ds][xip]|e[sb]p|rip|flags|[c-gs]s|[fg]s\.base|cr[02348]|efer"
    r"|n_cr3|guest_asid|v_intr|eventinj|exitintinfo|int_state|tlb_control|vmcb_clean)(?= +0x))"
)
_HEADING = re.compile(r"^ *(?:#|[a-z][\w-]*)(?:  +[A-Za-z#][\w# -]*?)+ *$")


def may_colour(stream: TextIO) -> bool:
    """Whether a stream is a terminal that is to have colours (https://no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM", "dumb") != "dumb"


def fragments(text: str) -> Iterator[tuple[str, str]]:
    """(kind, piece) of a text; the kind is "" for the rest. The pieces joined are the text."""
    first = True
    for number, line in enumerate(text.split("\n")):
        if not first:
            yield "", "\n"
        first = False
        yield from _line(line, number == 0)


def _line(line: str, top: bool) -> Iterator[tuple[str, str]]:
    title = _TITLE.match(line)
    if title is not None:
        yield "title", title[1] + " "
        yield "title.name", title[2]
        yield "title", line[title.end(2) :]
        return
    code = _CODE.match(line)
    if code is not None:
        yield ("arrow" if code["arrow"] == "=>" else ""), line[: code.start("at")]
        yield "address", line[code.start("at") : code.end("at")]
        yield "symbol", line[code.end("at") : code.start("op")]
        yield "mnemonic", code["op"]
        yield from _operands(code["rest"], "current" if code["arrow"] == "=>" else "")
        return
    source = _SOURCE.match(line)
    if source is not None:
        yield ("arrow" if source["arrow"] == "=>" else ""), source["arrow"]
        yield "address", source["number"]
        yield from _written(source["text"])
        return
    if top and _HEADING.match(line):
        yield "heading", line
        return
    yield from _tokens(line, "")


@lru_cache(maxsize=1000)
def _written(text: str) -> tuple[tuple[str, str], ...]:
    """A line of a source file. It is taken for C, which assembly and C++ resemble enough."""
    if text.lstrip().startswith(("*", "/*")):
        return (("address", text),)
    pieces = [(next((name for token, name in _WRITTEN if kind in token), ""), piece) for kind, piece in _C.get_tokens(text)]
    joined = "".join(piece for _, piece in pieces)
    return tuple(pieces) if joined == text else (("", text),)


def _operands(text: str, rest: str) -> Iterator[tuple[str, str]]:
    """Of an instruction: only the symbols stand out."""
    at = 0
    for found in re.finditer(r"<[^<>]+>", text):
        yield rest, text[at : found.start()]
        yield "symbol", found[0]
        at = found.end()
    yield rest, text[at:]


def _tokens(line: str, rest: str) -> Iterator[tuple[str, str]]:
    at = 0
    for found in _TOKENS.finditer(line):
        if found.start() > at:
            yield rest, line[at : found.start()]
        yield found.lastgroup or rest, found[0]
        at = found.end()
    if at < len(line):
        yield rest, line[at:]


def tinted(text: str, kind: str) -> str:
    """All of a text in one colour."""
    codes = PALETTE[kind][1]
    return "\n".join(f"\x1b[{codes}m{line}\x1b[0m" if line and codes else line for line in text.split("\n"))


def ansi(text: str) -> str:
    """A text with the colours as escape sequences."""
    parts = []
    for kind, piece in fragments(text):
        codes = PALETTE[kind][1] if kind else ""
        parts.append(f"\x1b[{codes}m{piece}\x1b[0m" if codes else piece)
    return "".join(parts)
