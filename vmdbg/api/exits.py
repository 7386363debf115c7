# SPDX-License-Identifier: GPL-2.0-or-later
"""#VMEXITs as a script sees them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from introspect.commands import CommandError, Context
from introspect.exitlog import ExitRecord, facts_of, what
from introspect.exits import ExitCode, exit_name
from vmdbg.api.display import table

__all__ = ["Exit", "ExitList", "remembered"]

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


def _exit_code(code: str | int) -> int:
    if isinstance(code, int):
        return int(code)
    name = code.upper().removeprefix("VMEXIT_").removeprefix("#")
    if name not in ExitCode.__members__:
        raise CommandError(code, "there is no such EXITCODE", "write the manual's name, as NPF or CPUID, or a number")
    return ExitCode[name].value


def remembered(
    context: Context, guest: int | None, code: str | int | None, last: int | None, since: int,
    where: Callable[[Exit], bool] | None,
) -> ExitList:  # fmt: skip
    """As `Machine.exits`.  CommandError."""
    wanted = None if code is None else _exit_code(code)
    records = [r for r in context.exits(guest, 1 << 62) if r.number > since and wanted in (None, r.code)]
    most = len(records) if last is None else max(last, 0)
    if where is None:
        records = records[len(records) - min(most, len(records)) :]
    found = ExitList(one for one in (_with_symbol(context, r) for r in records) if where is None or where(one))
    del found[: max(len(found) - most, 0)]
    return found


def _with_symbol(context: Context, r: ExitRecord) -> Exit:
    symbols = context.symbols(r.guest)
    return Exit(**{name: getattr(r, name) for name in ExitRecord.__slots__}, symbol=symbols.name(r.rip) if symbols else "")
