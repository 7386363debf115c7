# SPDX-License-Identifier: GPL-2.0-or-later
"""A moment of a machine, in memory: taken, put back, again and again."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vmdbg.platform.serial import BufferSerial

from . import memory
from .restoring import restore, state
from .tree import Malformed, SnapshotError, Tree, Unlisted

if TYPE_CHECKING:
    from vmdbg.machine import Machine


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything of a machine at an instruction boundary, or where a debugger has stopped it amid an event."""

    time: int
    """Guest time, in ticks."""
    state: Tree = field(repr=False)
    ram: dict[int, bytes] = field(repr=False)
    """By `memory.pieces`."""
    serial: tuple[bytes, bytes] | None = field(default=None, repr=False)
    """What had been written and was still to be read, where the serial port's other end is a buffer, which goes back, too."""

    @property
    def size(self) -> int:
        """Bytes of RAM in it."""
        return sum(map(len, self.ram.values()))


def take(machine: Machine, former: Snapshot | None = None) -> Snapshot:
    """The machine as it is; it does not notice.  With `former`, a snapshot of the same machine, unchanged memory is shared."""
    try:
        kept, ram = state(machine), memory.pieces(machine.ram, former.ram if former is not None else {})
    except Unlisted as found:
        raise SnapshotError(
            f"this machine cannot be kept: vmdbg does not know how to keep {found}. Remedy: report it, this is a defect of vmdbg"
        ) from None
    port = machine.config.serial
    written = (bytes(port.output), bytes(port.input)) if isinstance(port, BufferSerial) else None
    return Snapshot(machine.clock.now, kept, ram, written)


def put_back(machine: Machine, snapshot: Snapshot) -> None:
    """Make the machine what it was.  Breakpoints and whatever else debuggers have on it stay.  `SnapshotError` if that is nothing
    that may be: the machine is of no use then."""
    memory.put_back(machine.ram, snapshot.ram)
    try:
        restore(machine, snapshot.state)
    except Malformed as error:  # a machine from a file may be where none comes to, and so may what is kept of it
        raise SnapshotError(f"the machine cannot be what it was: {error}. Start it over, or restore another snapshot") from None
    port = machine.config.serial
    if isinstance(port, BufferSerial) and snapshot.serial is not None:
        port.output[:], port.input[:] = snapshot.serial
