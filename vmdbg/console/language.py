"""The console's lines: comments, and what is led through the shell's pipes and into files."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass

from introspect.commands import CommandError

__all__ = ["Line", "split"]


@dataclass(frozen=True, slots=True)
class Line:
    """`command`, and where its text goes: through a shell's command line, or to the end of a file."""

    command: str
    pipe: str = ""
    file: str = ""
    append: bool = False


def split(text: str, *, operators: bool = False) -> Line:
    """Take a line apart.  CommandError for one that leads nowhere.

    `operators`: | and > belong to the command's expression, as they do behind the word `if`. A command in parentheses is
    led elsewhere all the same: `(print a | b) | cat`.
    """
    text = _without_comment(text).strip()
    if text.startswith("("):
        end = _closing(text)
        if end is not None and (end + 1 == len(text) or text[end + 1 :].lstrip()[:1] in ("|", ">")):
            return _led(text[1:end].strip(), text[end + 1 :].strip())
    quote, at = "", 0
    while at < len(text):
        char = text[at]
        if quote:
            quote = "" if char == quote else quote
        elif char in "\"'":
            quote = char
        elif at and text[at - 1].isspace():
            operators = operators or text[at:].split(None, 1)[0] == "if"
            if not operators and (char == ">" or (char == "|" and text[at + 1 : at + 2].strip() == "")):
                return _led(text[:at].strip(), text[at:])
        at += 1
    return Line(text)


def _led(command: str, rest: str) -> Line:
    if not rest:
        return Line(command)
    if rest[0] == "|":
        pipe = rest[1:].strip()
        if not pipe:
            raise CommandError("|", "nothing follows it", "name a program of the shell: exits | grep NPF")
        return Line(command, pipe=pipe)
    append = rest.startswith(">>")
    try:
        words = shlex.split(rest[1 + append :])
    except ValueError as error:
        raise CommandError(rest, str(error).lower(), "close the quotation") from None
    if len(words) != 1:
        raise CommandError(rest, "one file is wanted behind it", "write guests > file, or quote a name with spaces")
    return Line(command, file=os.path.expanduser(words[0]), append=append)


def _without_comment(text: str) -> str:
    """Without what follows a # that begins a word."""
    quote = ""
    for at, char in enumerate(text):
        if quote:
            quote = "" if char == quote else quote
        elif char in "\"'":
            quote = char
        elif char == "#" and (not at or text[at - 1].isspace()):
            return text[:at]
    return text


def _closing(text: str) -> int | None:
    """Where the parenthesis that the text begins with is closed."""
    depth, quote = 0, ""
    for at, char in enumerate(text):
        if quote:
            quote = "" if char == quote else quote
        elif char in "\"'":
            quote = char
        elif char in "()":
            depth += 1 if char == "(" else -1
            if not depth:
                return at
    return None
