# SPDX-License-Identifier: GPL-2.0-or-later
"""Stops that say more than the protocol can: what kind of event it was, and whose catchpoints and watchpoints have seen it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from gdbstub.target import Stop, ThreadId

if TYPE_CHECKING:
    from vmdbg.catchpoints import Catchpoint
    from vmdbg.watchpoints import Watchpoint

__all__ = ["Why", "WorldStop"]


class Why(StrEnum):
    """What has stopped a thread, where `Reason` has no word for it."""

    CATCHPOINT = "catchpoint"
    WATCHPOINT = "watchpoint"
    RANGE = "range"
    """An instruction of a range was reached."""
    WORLD_SWITCH = "world-switch"
    """A step has entered a guest, or left one."""
    NOTICE = "notice"
    """Something that `stop-on` waits for."""
    DEADLINE = "deadline"
    SHUTDOWN = "shutdown"


@dataclass(frozen=True, slots=True)
class WorldStop(Stop):
    """A stop for the stub, with its cause for who is in the same process."""

    why: Why = Why.NOTICE
    points: tuple[Catchpoint | Watchpoint, ...] = ()
    about: ThreadId | None = None
    """Whose event it was, where the client is told of another thread because it has not resumed this one."""
