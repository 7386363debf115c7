# SPDX-License-Identifier: GPL-2.0-or-later
"""Results of commands that only the API has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vmdbg.api.stop import Stop

__all__ = ["Stopped"]


@dataclass(frozen=True, slots=True)
class Stopped:
    """A stop as the result of a command."""

    stop: Stop

    def text(self) -> str:
        return str(self.stop)

    def json(self) -> object:
        stop = self.stop
        return {
            "reason": str(stop.reason), "text": stop.text, "inferior": stop.inferior.number, "thread": stop.thread,
            "time": stop.time, "pc": stop.pc, "symbol": stop.symbol, "exit_status": stop.exit_status, "notes": list(stop.notes),
        }  # fmt: skip
