"""The line below the prompt: state, inferior, mode, CPL, ASID, CR3, nCR3, RIP, last exit, time."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from prompt_toolkit.formatted_text import StyleAndTextTuples, fragment_list_len

from gdbstub.target import TargetError
from introspect.commands import CommandError
from vmdbg.console.completion import signature

if TYPE_CHECKING:
    from introspect.commands.situation import Where
    from vmdbg.console.shell import Shell

__all__ = ["Toolbar"]

FRESH = 0.1
"""Seconds between two looks at a machine that runs."""


class Toolbar:
    """Of one console."""

    def __init__(self, shell: Shell) -> None:
        self.shell = shell
        self._looked = -1.0
        self._where: Where | None = None

    def forget(self) -> None:
        """Something may have changed: look anew."""
        self._looked = -1.0

    def where(self) -> Where | None:
        now = time.monotonic()
        if now - self._looked >= FRESH:
            try:
                self._where = self.shell.source.where()
            except (CommandError, TargetError):
                self._where = None
            self._looked = now
        return self._where

    def state(self) -> tuple[str, str]:
        """(class, word)"""
        control = self.shell.source.control
        if control is None:
            return "class:state-dump", " dump "
        if control.driver.holder:
            return "class:state-held", f" {control.driver.holder} holds it "
        if control.running:
            return "class:state-running", " running "
        return ("class:state-ended", " ended ") if control.driver.ended else ("class:state-stopped", " stopped ")

    def prompt(self) -> StyleAndTextTuples:
        """What stands before the line: who is selected."""
        where = self.where()
        name = "nobody" if where is None else "host" if where.number == 1 or where.asid is None else where.name.partition(" (")[0]
        return [("class:prompt", name), ("class:prompt-mark", "> ")]

    def status(self, width: int) -> StyleAndTextTuples:
        where = self.where()
        line: StyleAndTextTuples = [self.state(), ("", " ")]
        if where is None:
            return line
        paging = where.paging.replace(" over ", "/")
        parts: list[StyleAndTextTuples] = [[("class:status-name", where.name)], [("", f"{where.mode} {paging}".strip())]]
        if where.cpl is not None:
            parts.append([("", f"CPL {where.cpl}")])
        if where.pc is not None:
            parts.append([("class:status-symbol", where.symbol or f"RIP {where.pc:#x}")])
        if where.line:
            parts.append([("", where.line)])
        if where.last_exit:
            parts.append([("class:status-exit", where.last_exit)])
        if where.asid is not None:
            parts.append([("", f"ASID {where.asid}")])
        parts += [[("", f"{name} {value:#x}")] for name, value in (("CR3", where.cr3), ("nCR3", where.ncr3)) if value is not None]
        if where.time is not None:
            parts.append([("", f"{where.time:,} ticks".replace(",", " "))])
        used = fragment_list_len(line)
        for number, part in enumerate(parts):
            used += fragment_list_len(part) + 3
            if used > width:
                break
            line += ([("class:status-bar", " │ ")] if number else []) + part
        return line

    def hint(self, text: str) -> StyleAndTextTuples:
        """The signature of the command that is being typed; nothing while there is none."""
        shell = self.shell
        expanded = shell.expanded(text)
        words = expanded.split()
        if not words or (
            len(words) == 1 and not text[-1:].isspace() and words[0] not in shell.registry.names and words[0] not in shell.aliases
        ):
            return []
        command = shell.command_of(expanded)
        if command is None:
            return []
        rest = words[len(command.name.split()) :]
        if expanded[-1:].isspace() or (text[-1:].isspace() and not expanded[-1:].isspace()):
            rest = [*rest, ""]
        return signature(command, rest)

    def bottom(self, text: str, width: int) -> StyleAndTextTuples:
        """Hint and status."""
        hint = self.hint(text)
        return [*hint, ("", "\n"), *self.status(width)] if hint else self.status(width)
