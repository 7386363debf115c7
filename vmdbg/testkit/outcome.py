# SPDX-License-Identifier: GPL-2.0-or-later
"""What became of tests: what a report is made of, in each of its forms. docs/jobs.md describes the JSON."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import StrEnum
from pathlib import Path
from typing import Any

__all__ = ["RECORDED", "SCHEMA", "Outcome", "Report", "Verdict", "printable", "test_id"]

SCHEMA = 1
"""Version of the JSON: it changes when a name or a type in it does, not when something is added."""
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def test_id(file: str, name: str) -> str:
    """FILE::NAME; of a job that is its file's only one, and named like it, FILE."""
    return file if name == Path(file).stem else f"{file}::{name}"


class Verdict(StrEnum):
    PASSED = "passed"
    FAILED = "failed"
    """Something is not as the test expects it."""
    ERROR = "error"
    """The test itself could not be carried out to its end: it has crashed, or there is no gdb."""
    SKIPPED = "skipped"
    NOT_RUN = "not run"
    """The run ended before."""


RECORDED = "recorded"
"""The section that says which golden trace a test has written."""
BAD = (Verdict.FAILED, Verdict.ERROR)


@dataclass(slots=True)
class Outcome:
    """Of one test. All but the first four fields may be empty."""

    name: str
    file: str
    line: int
    kind: str
    """run, console, gdb, mi, python or pytest."""
    verdict: Verdict = Verdict.NOT_RUN
    seconds: float = 0.0
    """Of wall time."""
    reasons: list[str] = field(default_factory=list)
    """Why it failed or was skipped, a sentence or a few lines each; the most important first."""
    image: str = ""
    status: int | None = None
    """Of the run; None if the machine has not ended."""
    ended: str = ""
    """In words, how the machine ended, or where it was."""
    ticks: int = 0
    """Guest time."""
    serial: str = ""
    """The end of what the serial port printed."""
    output: str = ""
    """The end of what the script, gdb or pytest printed."""
    exits: list[str] = field(default_factory=list)
    """The last #VMEXITs before the end, a line each."""
    trace_diff: str = ""
    """Of the exits and the golden trace."""
    sections: dict[str, str] = field(default_factory=dict)
    """What else is known, by title."""
    reproduce: list[str] = field(default_factory=list)
    """Commands: the first runs this test alone, others show the machine in a debugger."""

    @property
    def id(self) -> str:
        return f"{self.file}::{self.name}" if self.kind == "pytest" else test_id(self.file, self.name)

    @property
    def bad(self) -> bool:
        return self.verdict in BAD

    def as_json(self) -> dict[str, Any]:
        return {one.name: getattr(self, one.name) for one in fields(self)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Outcome:
        """TypeError, ValueError for anything that `as_json` has not made."""
        found = cls(**data)
        found.verdict = Verdict(found.verdict)
        return found

    def settle(self) -> None:
        """Passed, unless there are reasons why not."""
        if self.verdict is Verdict.NOT_RUN:
            self.verdict = Verdict.FAILED if self.reasons else Verdict.PASSED


@dataclass(slots=True)
class Report:
    """Of a run of tests."""

    command: str
    """That started it."""
    outcomes: Sequence[Outcome]
    seconds: float
    workers: int
    busy: float
    """Part of the workers' time in which they had a processor, 0 to 1."""
    version: str
    interrupted: str = ""
    """Why it ended early; empty if it did not."""

    def counts(self) -> dict[Verdict, int]:
        found = Counter(outcome.verdict for outcome in self.outcomes)
        return {verdict: found[verdict] for verdict in Verdict}

    @property
    def status(self) -> int:
        """Exit status of the command."""
        return 1 if any(outcome.bad for outcome in self.outcomes) or self.interrupted else 0

    def as_json(self) -> str:
        return json.dumps(
            {
                "schema": SCHEMA, "vmdbg": self.version, "command": self.command, "seconds": round(self.seconds, 3),
                "workers": self.workers, "busy": round(self.busy, 4), "interrupted": self.interrupted,
                "counts": self.counts(), "tests": [{"id": one.id, **one.as_json()} for one in self.outcomes],
            },
            indent=1,
        ) + "\n"  # fmt: skip

    def summary(self) -> str:
        """One line."""
        counted = [f"{count} {verdict}" for verdict, count in self.counts().items() if count]
        return f"{', '.join(counted) or 'no tests'} in {self.seconds:.2f} s"


def printable(text: str) -> str:
    """Without what XML, terminals and browsers do not take as text: it comes from guests."""
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text.replace("\r\n", "\n"))
