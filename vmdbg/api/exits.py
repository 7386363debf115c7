# SPDX-License-Identifier: GPL-2.0-or-later
"""#VMEXITs as a script sees them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from introspect.exitlog import ExitRecord, facts_of, what
from introspect.exits import ExitCode, exit_name
from vmdbg.api.display import table

__all__ = ["Exit", "ExitList"]

_CODES = {member.value: member for member in ExitCode}


@dataclass(frozen=True)
class Exit(ExitRecord):
    """One #VMEXIT: the record, and what follows from it."""

    symbol: str = ""
    """Of `rip`, as in the guest's symbols now; empty if it has none."""

    @property
    def exitcode(self) -> ExitCode | int:
        """EXITCODE; a plain number where the manual defines none."""
        return _CODES.get(self.code, self.code)

    @property
    def name(self) -> str:
        """EXITCODE by the manual's name: "NPF"."""
        return exit_name(self.code)

    @property
    def text(self) -> str:
        """The exit in words."""
        return what(self)

    @cached_property
    def facts(self) -> dict[str, int]:
        """What conditions may ask for: gpa, gva, port, size, msr, write, vector ..., as far as this exit has them."""
        return facts_of(self)

    @property
    def gpa(self) -> int | None:
        """Of a nested page fault."""
        return self.facts.get("gpa")

    @property
    def port(self) -> int | None:
        return self.facts.get("port")

    @property
    def msr(self) -> int | None:
        return self.facts.get("msr")

    @property
    def write(self) -> bool | None:
        """Whether it is about a write; None where that is no question."""
        found = self.facts.get("write")
        return None if found is None else bool(found)

    def __str__(self) -> str:
        at = f"{self.rip:#x}{f' <{self.symbol}>' if self.symbol else ''}"
        return f"#{self.number} t={self.time} guest {self.guest} at {at}: {self.text}"


class ExitList(list[Exit]):
    """Exits, oldest first; a table where a notebook shows it."""

    def __repr__(self) -> str:
        return "\n".join(map(str, self)) or "no exits"

    def _repr_html_(self) -> str:
        return table(
            ("#", "time", "guest", "rip", "exit"),
            ((e.number, e.time, e.guest, f"{e.rip:#x}{f' <{e.symbol}>' if e.symbol else ''}", e.text) for e in self),
        )
