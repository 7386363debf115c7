# SPDX-License-Identifier: GPL-2.0-or-later
"""Breakpoints, watchpoints and catchpoints as objects."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmdbg.api.checked import checked
from vmdbg.api.errors import translated
from vmdbg.catchpoints import Catchpoint as CatchpointData
from vmdbg.console.control import Point
from vmdbg.watchpoints import Watchpoint as WatchpointData

if TYPE_CHECKING:
    from vmdbg.api.machine import Machine

__all__ = ["Breakpoint", "Catchpoint", "Watchpoint"]


@checked
class Breakpoint:
    """Stops an inferior at an address, where its condition holds."""

    def __init__(self, machine: Machine, point: Point) -> None:
        self._machine, self._point = machine, point

    @property
    def number(self) -> int:
        return self._point.number

    @property
    def inferior(self) -> int:
        """The inferior's number: 1 is the hypervisor."""
        return self._point.pid

    @property
    def address(self) -> int | None:
        """Linear; None while it waits for its guest to appear."""
        return self._point.address

    @property
    def location(self) -> str:
        """As it was written."""
        return self._point.text

    @property
    def when(self) -> str:
        """Its condition; empty if it has none."""
        return self._point.condition

    @property
    def hits(self) -> int:
        """How often it was reached with its condition true."""
        return self._point.hits

    @property
    def enabled(self) -> bool:
        return self._point.enabled

    @enabled.setter
    def enabled(self, on: bool) -> None:
        with translated():
            self._machine.control.enable(self._point, on)

    @property
    def exists(self) -> bool:
        """Whether it is still set: a temporary one is gone after its stop."""
        return self._machine.control.points.get(self.number) is self._point

    def delete(self) -> None:
        """Nothing if it is gone already."""
        if self.exists:
            with translated():
                self._machine.control.delete(self._point)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Breakpoint) and other._point is self._point

    def __hash__(self) -> int:
        return hash(id(self._point))

    def __repr__(self) -> str:
        where = f"{self.address:#x}" if self.address is not None else "waits for its guest"
        condition = f" when {self.when}" if self.when else ""
        return f"<Breakpoint {self.number}: {self.location} ({where}){condition}, {self.hits} hits>"


class Watchpoint:
    """Stops where memory is written, read or either, by whomever."""

    def __init__(self, machine: Machine, point: WatchpointData) -> None:
        self._machine, self._point = machine, point

    @property
    def number(self) -> int:
        return self._point.number

    @property
    def address(self) -> int:
        """In the space that it was given in."""
        return self._point.address

    @property
    def length(self) -> int:
        """In bytes."""
        return self._point.length

    @property
    def hits(self) -> int:
        return self._point.hits

    @property
    def exists(self) -> bool:
        return any(point is self._point for point in self._machine.debugger.watchpoints)

    def delete(self) -> None:
        """Nothing if it is gone already."""
        if self.exists:
            with translated():
                self._machine.debugger.watchpoints.delete(self.number)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Watchpoint) and other._point is self._point

    def __hash__(self) -> int:
        return hash(id(self._point))

    def __repr__(self) -> str:
        return f"<Watchpoint {self.number}: {self.length} bytes at {self._point.space}:{self.address:#x}, {self.hits} hits>"


@checked
class Catchpoint:
    """Stops at events of the processor and of devices, as `catch` does."""

    def __init__(self, machine: Machine, point: CatchpointData) -> None:
        self._machine, self._point = machine, point

    @property
    def number(self) -> int:
        return self._point.number

    @property
    def text(self) -> str:
        """As one would type it, without the word catch."""
        return self._point.text

    @property
    def hits(self) -> int:
        return self._point.hits

    @property
    def ignore(self) -> int:
        """How many hits are still to be passed over; may be set."""
        return self._point.ignore

    @ignore.setter
    def ignore(self, count: int) -> None:
        self._point.ignore = count

    @property
    def enabled(self) -> bool:
        return self._point.enabled

    @enabled.setter
    def enabled(self, on: bool) -> None:
        self._point.enabled = on
        self._machine.debugger.catchpoints.arm()

    @property
    def exists(self) -> bool:
        return self._machine.debugger.catchpoints.points.get(self.number) is self._point

    def delete(self) -> None:
        """Nothing if it is gone already."""
        if self.exists:
            self._machine.debugger.catchpoints.remove(self.number)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Catchpoint) and other._point is self._point

    def __hash__(self) -> int:
        return hash(id(self._point))

    def __repr__(self) -> str:
        return f"<Catchpoint {self.number}: {self.text}, {self.hits} hits>"
