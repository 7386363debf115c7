"""The line that is being typed, in colours: commands, options, addresses, symbols, numbers, pipes."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from prompt_toolkit.document import Document
from prompt_toolkit.formatted_text import StyleAndTextTuples
from prompt_toolkit.lexers import Lexer

if TYPE_CHECKING:
    from vmdbg.console.shell import Shell

__all__ = ["ConsoleLexer"]

_WORDS = re.compile(
    r"(?P<comment>(?:^|(?<=\s))\#.*)|(?P<string>\"[^\"]*\"?|'[^']*'?)|(?P<pipe>(?:^|(?<=\s))(?:\|(?!\|)|>>?))|(?P<option>(?:^|(?<=\s))--[\w-]*)"
    r"|(?P<owner>\b(?:host|\d+)(?=:))|(?P<space>\b(?:gva|gpa|spa|iova)(?=:))|(?P<number>\b0x[0-9a-fA-F_]*\b|\b\d[\d_]*\b)"
    r"|(?P<register>\$\w+)|(?P<name>[A-Za-z_.][\w.-]*)|(?P<operator>[-+*/&|^~<>=!?:,()\[\]]+)"
)


class ConsoleLexer(Lexer):
    """Of one console."""

    def __init__(self, shell: Shell) -> None:
        self.shell = shell

    def lex_document(self, document: Document) -> Callable[[int], StyleAndTextTuples]:
        lines = document.lines
        return lambda number: self.line(lines[number]) if number < len(lines) else []

    def line(self, text: str) -> StyleAndTextTuples:
        """A line's pieces with their classes; joined they are the line."""
        shell = self.shell
        name = self._command(text)
        pieces: StyleAndTextTuples = []
        at = len(text) - len(text.lstrip())
        if at:
            pieces.append(("", text[:at]))
        if name:
            pieces.append(("class:command", text[at : at + len(name)]))
            at += len(name)
        elif text.strip() and not text.lstrip().startswith("!"):
            word = text.split()[0]
            begun = any(known.startswith(word) for known in (*shell.registry.names, *shell.aliases))
            pieces.append(("class:command-begun" if begun else "class:command-unknown", word))
            at += len(word)
        if name in ("py", "shell") or text.lstrip().startswith("!"):
            return [*pieces, ("class:foreign", text[at:])]
        return [*pieces, *self._rest(text[at:])]

    def _command(self, text: str) -> str:
        """The words of a line that are the name of a command, or an alias."""
        words = text.split(None, 2)
        for count in (2, 1):
            name = " ".join(words[:count])
            if len(words) >= count and (name in self.shell.registry.names or name in self.shell.aliases):
                return name if text.lstrip().startswith(name) else words[0]
        return ""

    def _rest(self, text: str) -> StyleAndTextTuples:
        pieces: StyleAndTextTuples = []
        at, owner = 0, ""
        for found in _WORDS.finditer(text):
            if found.start() > at:
                pieces.append(("", text[at : found.start()]))
                owner = "" if text[at : found.start()].isspace() else owner
            kind = found.lastgroup or ""
            if kind == "pipe" and found[0] == "|":
                pieces += [("class:pipe", "|"), ("class:foreign", text[found.end() :])]
                return pieces
            if kind == "owner":
                owner = found[0]
            pieces.append((f"class:{self._named(found[0], owner) if kind == 'name' else kind}", found[0]))
            at = found.end()
        if at < len(text):
            pieces.append(("", text[at:]))
        return pieces

    def _named(self, name: str, owner: str) -> str:
        """What a name is: a symbol of who is meant, or a register, or just a word."""
        source = self.shell.source
        try:
            context = source.context
            selected = context.selected or context.host
            number = selected.number if not owner else context.host.number if owner == "host" else int(owner)
            symbols = context.symbols(number)
            if symbols is not None and symbols.get(name) is not None:
                return "symbol"
            if context.names(number).variable(name.lower()):
                return "register"
        except Exception:  # a colour must not take the prompt with it: guests go, stubs do
            return "word"
        return "keyword" if name in ("if", "host", "guest") else "word"
