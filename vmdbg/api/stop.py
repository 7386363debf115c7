# SPDX-License-Identifier: GPL-2.0-or-later
"""Why a run ended."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from vmdbg.api.display import definitions

if TYPE_CHECKING:
    from vmdbg.api.inferior import Inferior
    from vmdbg.api.points import Breakpoint, Catchpoint, Watchpoint

__all__ = ["Reason", "Stop"]


class Reason(StrEnum):
    """What a run has ended with."""

    BREAKPOINT = "breakpoint"
    WATCHPOINT = "watchpoint"
    CATCHPOINT = "catchpoint"
    RANGE = "range"
    """An instruction of a range (`break_range`) was reached."""
    STEP = "step"
    """The steps that were asked for are made."""
    WORLD_SWITCH = "world-switch"
    """A step has entered a guest, or left one."""
    CONDITION = "condition"
    """The function given as `until` has said so."""
    NOTICE = "notice"
    """Something that `stop_on` waits for: VMRUN was refused, a guest shut down, a stale translation was used."""
    LIMIT = "limit"
    """`instructions`, `ticks` or `wall` is used up; the machine can go on."""
    IDLE = "idle"
    """Every processor waits for something that only the script could bring, as `send` does."""
    INTERRUPTED = "interrupted"
    SHUTDOWN = "shutdown"
    """A triple fault: the machine is at its end, and can still be looked at."""
    ENDED = "ended"
    """The machine is at its end: power-off, debug-exit, reset, or `max_time`."""


@dataclass(frozen=True)
class Stop:
    """Where and why the machine stands.

    `reached` says whether it is what `until` asked for; where that was nothing, whether no limit, idling or ^C ended the run.
    `points` are the breakpoints, watchpoints and catchpoints that stopped it, `notes` what was said while it ran, such as that a
    guest has appeared. `time` is guest time in ticks, `pc` the linear address of the thread's next instruction.
    """

    reason: Reason
    text: str
    """In words."""
    inferior: Inferior
    """Whose thread it is: the hypervisor's or a guest's."""
    thread: int
    """Number of that thread: a CPU of the hypervisor, a vCPU of a guest, from 1."""
    time: int
    pc: int | None = None
    symbol: str = ""
    """Of `pc`: "tick+0x10"; empty if it has none."""
    exit_status: int | None = None
    """As that of `vmdbg run`, once the machine has ended: 124 for a limit or a triple fault."""
    reached: bool = True
    points: tuple[Breakpoint | Watchpoint | Catchpoint, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def ended(self) -> bool:
        """Whether the machine is at its end."""
        return self.exit_status is not None

    def __str__(self) -> str:
        at = f" at {self.pc:#x}{f' <{self.symbol}>' if self.symbol else ''}" if self.pc is not None else ""
        return f"{self.inferior.name}{at}: {self.text or self.reason}"

    def __repr__(self) -> str:
        return f"<Stop {self.reason}: {self}>"

    def _repr_html_(self) -> str:
        at = f"{self.pc:#x}{f' <{self.symbol}>' if self.symbol else ''}" if self.pc is not None else "-"
        rows: list[tuple[str, object]] = [
            ("why", self.text or self.reason), ("who", f"{self.inferior.name}, thread {self.thread}"), ("pc", at),
            ("time", f"{self.time} ticks"),
        ]  # fmt: skip
        if self.exit_status is not None:
            rows.append(("exit status", self.exit_status))
        return definitions(f"Stop: {self.reason}", [*rows, *(("note", note) for note in self.notes)])
