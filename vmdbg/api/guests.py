# SPDX-License-Identifier: GPL-2.0-or-later
"""The guests of a machine, as a mapping by number that is iterated as they are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from vmdbg.api.checked import checked
from vmdbg.api.display import table
from vmdbg.api.errors import CommandFailed
from vmdbg.api.inferior import Guest

if TYPE_CHECKING:
    from vmdbg.api.machine import Machine

__all__ = ["Guests"]


@checked
class Guests:
    """Those that are there now.

    `guests[2]` is guest 2, by its number, not its place; `guests["guest 2"]` is by name.  Iteration gives guests, in the order in
    which they appeared; `numbers` are theirs.
    """

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._known: dict[int, Guest] = {}

    def of(self, number: int) -> Guest:
        """The object of a guest that is or was there."""
        return self._known.setdefault(number, Guest(self._machine, number))

    @property
    def numbers(self) -> tuple[int, ...]:
        self._machine.check_open()
        return tuple(number for number, guest in self._machine.debugger.history.guests.items() if not guest.gone)

    def get(self, number: int | str) -> Guest | None:
        """None if there is none of this number or name."""
        return next((one for one in self if number in (one.number, str(one.number), one.name)), None)

    def __getitem__(self, number: int | str) -> Guest:
        found = self.get(number)
        if found is None:
            known = ", ".join(f"{one.number} ({one.name})" for one in self)
            none_yet = "none has been entered by VMRUN yet: run(until='guest-start') waits for one"
            raise CommandFailed(
                str(number), "no guest has this number or name", f"the guests are {known}" if known else none_yet
            )
        return found

    def __iter__(self) -> Iterator[Guest]:
        return iter([self.of(number) for number in self.numbers])

    def __len__(self) -> int:
        return len(self.numbers)

    def __contains__(self, guest: object) -> bool:
        return (guest.number if isinstance(guest, Guest) else guest) in self.numbers

    def __repr__(self) -> str:
        return "\n".join(map(repr, self)) or "no guests yet"

    def _repr_html_(self) -> str:
        rows = (
            (one.number, one.name, one.asid, f"{one.ncr3:#x}" if one.ncr3 is not None else "-", one.view.state, one.exit_count)
            for one in self
        )
        return table(("guest", "name", "ASID", "nCR3", "state", "exits"), rows)
