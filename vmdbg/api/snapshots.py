# SPDX-License-Identifier: GPL-2.0-or-later
"""Moments of a machine that a script keeps and goes back to."""

from __future__ import annotations

import os
import weakref
from typing import TYPE_CHECKING

from vmdbg.api.errors import Error, translated
from vmdbg.timetravel import file, snapshot

if TYPE_CHECKING:
    from vmdbg.api.machine import Machine

__all__ = ["Snapshot", "restore", "save", "take"]


class Snapshot:
    """A machine as it was at `time`, in memory: `Machine.restore` goes back to it, as often as one likes.

    Memory that has not changed is shared with the snapshot before.
    """

    def __init__(self, machine: Machine, kept: snapshot.Snapshot) -> None:
        self._machine, self._kept = weakref.ref(machine), kept

    @property
    def time(self) -> int:
        """Guest time in ticks."""
        return self._kept.time

    @property
    def size(self) -> int:
        """Bytes of RAM in it."""
        return self._kept.size

    def __repr__(self) -> str:
        return f"<snapshot at {self.time} ticks, {self.size >> 10} KiB>"


def take(machine: Machine, former: Snapshot | None) -> Snapshot:
    """The machine as it is, which does not notice."""
    with translated():
        return Snapshot(machine, snapshot.take(machine.debugger.machine, former._kept if former is not None else None))


def restore(machine: Machine, kept: Snapshot) -> None:
    """Go back.  Breakpoints stay; those of guests that are not there then wait for them."""
    if kept._machine() is not machine:
        raise Error(f"{kept!r} is of another machine; save() one to a file, and Machine.restore_from makes a machine of it")
    with translated():
        machine.debugger.restore(kept._kept)
        machine.source.select(machine.control.selected)


def save(machine: Machine, path: str | os.PathLike[str]) -> int:
    """Write the machine to a file; its size in bytes."""
    with translated():
        return file.save(machine.debugger.machine, os.fspath(path))
