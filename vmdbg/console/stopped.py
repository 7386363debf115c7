# SPDX-License-Identifier: GPL-2.0-or-later
"""A stop as the result of the command that ran the machine."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from enum import StrEnum

from introspect.commands.situation import Where
from vmdbg.results import Text

__all__ = ["MOST", "Asked", "Kind", "Started", "Stopped"]

MOST = 1 << 16
"""Lines that are kept of what a guest prints."""


class Kind(StrEnum):
    """Who has said a line while the machine ran."""

    NOTE = "note"
    SERIAL = "serial"


class Started(Text):
    """The machine runs now, or had to be stopped: the result follows, when it stands."""


@dataclass(slots=True)
class Asked:
    """A command that runs the machine, whose result is due when that stops."""

    command: str
    json: bool = False
    """The result is to be shown as JSON."""
    kept: bool = False
    """It goes somewhere else, or to Python: nothing of it is shown."""
    said: deque[tuple[Kind, str]] = field(default_factory=lambda: deque(maxlen=MOST))
    """The last lines until then."""


@dataclass(frozen=True, slots=True)
class Stopped:
    """Why the machine stands and where, with what was said while it ran."""

    why: str
    where: Where
    thread: int
    """Number of the selected thread, which has stopped."""
    breakpoints: tuple[int, ...]
    """Numbers of those that stopped it."""
    ended: str
    """Why there is nothing to run any more; empty while there is."""
    said: tuple[tuple[Kind, str], ...] = ()

    def text(self) -> str:
        return "\n".join([*(text for _, text in self.said), *([self.why] if self.why else []), self.where.short()])

    def json(self) -> dict[str, object]:
        where = self.where
        return {
            "text": self.why.strip("[]\n"), "inferior": where.number, "thread": self.thread, "pc": where.pc,
            "symbol": where.symbol, "line": where.line, "mode": where.mode, "cpl": where.cpl, "time": where.time,
            "breakpoints": list(self.breakpoints), "ended": self.ended,
            "notes": [text for kind, text in self.said if kind == Kind.NOTE],
            "serial": [text for kind, text in self.said if kind == Kind.SERIAL],
        }  # fmt: skip
