# SPDX-License-Identifier: GPL-2.0-or-later
"""Patterns of #VMEXITs: `2: npf x3 if gpa >= 0x40000`, and lists of them that exits must, or must not, come in."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass

from introspect.exitlog import ExitRecord, RecordNames, RecordScope
from introspect.exits import ExitCode
from introspect.expression import Expression, ExpressionError, parse
from vmdbg.history import HOST

__all__ = ["ExitPattern", "Progress"]

_FORM = re.compile(
    r"\s*(?:(?P<guest>\d+)\s*:)?\s*(?P<code>\w+)(?:\s+x\s*(?P<count>\d+))?(?:\s+if\s+(?P<condition>.+))?\s*", re.DOTALL
)
_MOST = 1 << 32


@dataclass(frozen=True, slots=True)
class ExitPattern:
    """Exits of one guest or any, with one code or any, for which an expression holds; `count` of them."""

    text: str
    guest: int | None
    code: int | None
    count: int
    condition: Expression | None

    @classmethod
    def parse(cls, text: str) -> ExitPattern:
        """ValueError with the rule and the remedy."""
        found = _FORM.fullmatch(text)
        if found is None:
            raise ValueError(f'"{text}" is no pattern of exits; write "npf", or "2: npf x3 if gpa >= 0x40000"')
        code, count = _code(found["code"]), int(found["count"] or 1)
        if not 1 <= count <= _MOST:
            raise ValueError(f'"{text}": x{count} is no count; write x1 or more')
        guest = int(found["guest"]) if found["guest"] else None
        if guest is not None and guest <= HOST:
            raise ValueError(f'"{text}": there is no guest {guest}; the hypervisor is {HOST}, its guests begin with {HOST + 1}')
        condition = None
        if found["condition"]:
            try:
                condition = parse(found["condition"], RecordNames())
            except ExpressionError as error:
                raise ValueError(
                    f'"{text}": {error.value} (column {error.position + 1} behind if): {error.rule}; {error.remedy}'
                ) from None
        return cls(text, guest, code, count, condition)

    def holds(self, record: ExitRecord) -> bool:
        """Whether an exit is meant.  One that lacks what the condition asks for is not."""
        if self.guest not in (None, record.guest) or self.code not in (None, record.code):
            return False
        if self.condition is None:
            return True
        try:
            return self.condition.holds(RecordScope(record))
        except ExpressionError:
            return False


def _code(word: str) -> int | None:
    if word.lower() == "any":
        return None
    if word.upper() in ExitCode.__members__:
        return ExitCode[word.upper()].value
    try:
        return int(word, 0) & ((1 << 64) - 1)
    except ValueError:
        near = difflib.get_close_matches(word.upper(), ExitCode.__members__, n=2) or ["NPF", "CPUID", "any"]
        raise ValueError(
            f'"{word}" is no exit code; write a number or a name as `monitor exits` has it, such as {" or ".join(near)}'
        ) from None


class Progress:
    """How far a run has come in a list of patterns, one exit after the other: nothing but that is kept of it."""

    def __init__(self, wanted: Sequence[ExitPattern], never: Sequence[ExitPattern]) -> None:
        self.wanted, self.never = wanted, never
        self.reached, self._count = 0, 0
        self.last: ExitRecord | None = None
        """The exit with which the last pattern that was met was met."""
        self.forbidden: list[tuple[ExitPattern, ExitRecord]] = []
        """The first exit of each pattern that must not come."""

    def see(self, record: ExitRecord) -> None:
        for pattern in self.never:
            if pattern.holds(record) and all(known is not pattern for known, _ in self.forbidden):
                self.forbidden.append((pattern, record))
        if self.reached < len(self.wanted) and self.wanted[self.reached].holds(record):
            self._count += 1
            if self._count == self.wanted[self.reached].count:
                self.reached, self._count, self.last = self.reached + 1, 0, record

    @property
    def missing(self) -> str:
        """In words, the first pattern that was not met; empty if there is none."""
        if self.reached >= len(self.wanted):
            return ""
        pattern = self.wanted[self.reached]
        seen = f", {self._count} of {pattern.count} came" if pattern.count > 1 else ""
        behind = f" behind {self.wanted[self.reached - 1].text!r}" if self.reached else ""
        return f"no exit {pattern.text!r} has come{behind}{seen}"
