"""Completion and hints while typing: the registry's candidates, found by any of their letters in order."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.formatted_text import StyleAndTextTuples

from introspect.commands import Command
from introspect.commands.parameters import Candidate, Flag, Parameter

if TYPE_CHECKING:
    from vmdbg.console.shell import Shell

__all__ = ["ConsoleCompleter", "fuzzy", "signature"]

MOST = 400
"""Candidates that a menu has at most."""


def fuzzy(prefix: str, candidates: Iterable[Candidate]) -> list[tuple[Candidate, tuple[int, ...]]]:
    """Those that have the letters of the prefix in order, best first, with where these are.

    Best is what begins with it, then what has it in one piece, then what has its letters closest together.
    """
    if not prefix:
        return [(candidate, ()) for candidate in islice(candidates, MOST)]
    pattern = re.compile("(?=(" + ".*?".join(map(re.escape, prefix)) + "))", re.IGNORECASE)
    found: list[tuple[tuple[bool, int, int, int], Candidate, tuple[int, ...]]] = []
    for order, candidate in enumerate(candidates):
        best = min(((len(hit[1]), hit.start()) for hit in pattern.finditer(candidate.text)), default=None)
        if best is not None:
            rank = (not candidate.text.startswith(prefix), best[0], best[1], order)
            found.append((rank, candidate, _places(prefix, candidate.text, best[1])))
    found.sort(key=lambda one: one[0])
    return [(candidate, places) for _, candidate, places in found[:MOST]]


def _places(prefix: str, text: str, start: int) -> tuple[int, ...]:
    places, at = [], start
    for char in prefix:
        at = text.lower().find(char.lower(), at)
        places.append(at)
        at += 1
    return tuple(places)


def _display(text: str, places: tuple[int, ...]) -> StyleAndTextTuples:
    marked = set(places)
    return [("class:match" if at in marked else "", char) for at, char in enumerate(text)]


class ConsoleCompleter(Completer):
    """Of what stands before the cursor; behind a pipe, programs."""

    def __init__(self, shell: Shell) -> None:
        self.shell = shell

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterator[Completion]:
        text = document.text_before_cursor
        if not complete_event.completion_requested and not text.strip():
            return  # nobody has typed anything yet
        try:
            start, candidates = self.candidates(text)
        except Exception:  # a menu that fails must not take the prompt with it
            return
        prefix = text[start:]
        for candidate, places in fuzzy(prefix, candidates):
            if candidate.text != prefix or candidate.meaning:
                yield Completion(
                    candidate.text, start - len(text), display=_display(candidate.text, places), display_meta=candidate.meaning
                )

    def candidates(self, text: str) -> tuple[int, list[Candidate]]:
        """Where the word begins that is completed, and what it may become."""
        shell = self.shell
        self.shell.user.refresh()
        line = text.lstrip()
        piped = re.search(r"\s\|\s*(\S*)$", text)
        if piped is not None:
            return piped.start(1), [Candidate(name, path) for name in _PROGRAMS if (path := shutil.which(name))]
        if line.startswith("py "):
            return self._python(text)
        if line.startswith("!"):
            return len(text), []
        if " if " in text:  # an expression: names of the inferior's
            start = len(text) - len(text.rsplit(None, 1)[-1]) if not text[-1].isspace() else len(text)
            return start, list(shell.source.addresses(text[start:]))
        if " " not in line:
            found = shell.source.complete(text)
            aliases = [Candidate(name, f"= {words}") for name, words in shell.aliases.items() if " " not in name]
            return found.start, [*found.candidates, *aliases]
        expanded = shell.expanded(text)  # it may be longer or shorter before the word that is completed
        found = shell.source.complete(expanded)
        return max(found.start - len(expanded) + len(text), 0), found.candidates

    def _python(self, text: str) -> tuple[int, list[Candidate]]:
        word = re.search(r"[\w.]*$", text)
        assert word is not None
        owner, dot, _ = word[0].rpartition(".")
        if not dot:
            return word.start(), list(self.shell.python.names())
        value = self.shell.python.space.get(owner)
        names = [name for name in dir(value) if not name.startswith("_")] if value is not None else []
        return word.start(), [Candidate(f"{owner}.{name}", "") for name in names]


_PROGRAMS = ("grep", "less", "head", "tail", "sort", "uniq", "wc", "awk", "sed", "jq", "cut", "tee", "cat")


def signature(command: Command, words: list[str]) -> StyleAndTextTuples:
    """A command's synopsis with the parameter that is being typed, and what that is."""
    hint: StyleAndTextTuples = [("class:hint-name", command.name)]
    if command.usage:
        return [*hint, ("class:hint", command.usage.removeprefix(command.name) + "   "), ("class:hint-help", command.summary)]
    current = _current(command, words)
    for parameter in command.parameters:
        hint += [("class:hint", " "), ("class:hint-current" if parameter is current else "class:hint", parameter.synopsis)]
    said = command.summary if current is None else f"{current.name}: {current.help or current.kind.noun}"
    return [*hint, ("class:hint", "   "), ("class:hint-help", said)]


def _current(command: Command, words: list[str]) -> Parameter[Any] | None:
    """The parameter that the last of the words behind the name is for. `words` has "" for one that is about to begin."""
    if not words:
        return None
    options, taken = command.options, 0
    skip = False
    for at, word in enumerate(words):
        last = at == len(words) - 1
        if skip:
            skip = False
            if last:
                return options[words[at - 1]]
        elif word.startswith("--"):
            option = options.get(word.partition("=")[0])
            if last:
                return option
            skip = option is not None and not isinstance(option.kind, Flag) and "=" not in word
        elif last:
            positional = command.positional
            return positional[min(taken, len(positional) - 1)] if positional else None
        else:
            taken += 1
    return None
