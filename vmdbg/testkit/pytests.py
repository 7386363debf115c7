# SPDX-License-Identifier: GPL-2.0-or-later
"""A pytest file, run by pytest in this process, test by test into outcomes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from vmdbg.testkit.bench import tail
from vmdbg.testkit.outcome import Outcome, Verdict

__all__ = ["COLLECTION", "run_file"]

COLLECTION = "(collection)"
"""Name of what a file is before its tests are known."""
_PASSING = (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED, pytest.ExitCode.INTERRUPTED)


class _Reporter:
    """A pytest plugin: says what becomes of each test."""

    def __init__(self, file: str, wanted: Callable[[str], bool], say: Callable[[Outcome], None]) -> None:
        self.file, self.wanted, self.say = file, wanted, say
        self.current: dict[str, Outcome] = {}
        self.told = False

    def outcome(self, nodeid: str, line: int = 1) -> Outcome:
        name = nodeid.partition("::")[2] or COLLECTION
        test = f"{self.file}::{name}" if name != COLLECTION else self.file
        return Outcome(name, self.file, line, "pytest", reproduce=[f"vmdbg test {_quoted(test)}", f"pytest {_quoted(test)}"])

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        chosen = [item for item in items if self.wanted(f"{self.file}::{item.nodeid.partition('::')[2]}")]
        left = [item for item in items if item not in chosen]
        if left:
            config.hook.pytest_deselected(items=left)
            items[:] = chosen

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            outcome = self.outcome("")
            outcome.verdict, outcome.reasons = Verdict.ERROR, _reasons(report)
            self._say(outcome)

    def pytest_runtest_logstart(self, nodeid: str, location: tuple[str, int | None, str]) -> None:
        self.current[nodeid] = self.outcome(nodeid, (location[1] or 0) + 1)
        self._say(self.current[nodeid])

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        outcome = self.current[report.nodeid]
        outcome.seconds += report.duration
        if report.failed:
            outcome.verdict = Verdict.FAILED if report.when == "call" and not outcome.bad else Verdict.ERROR
            outcome.reasons += _reasons(report)
        elif report.skipped and not outcome.bad:
            expected = getattr(report, "wasxfail", None)
            outcome.verdict = Verdict.SKIPPED
            outcome.reasons = [f"fails, as expected: {expected}" if expected is not None else _skipped(report)]
        if report.failed:
            for title, text in report.sections:
                key = "output" if title.startswith("Captured std") else title
                if key == "output":
                    outcome.output = tail(outcome.output + text)
                else:
                    outcome.sections[title] = tail(text)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        outcome = self.current.pop(nodeid)
        outcome.settle()
        self._say(outcome)

    def _say(self, outcome: Outcome) -> None:
        self.told = True
        self.say(outcome)


def _quoted(text: str) -> str:
    import shlex

    return shlex.quote(text)


def _skipped(report: pytest.TestReport) -> str:
    where: Any = report.longrepr
    return str(where[2]).removeprefix("Skipped: ") if isinstance(where, tuple) else str(where)


def _reasons(report: pytest.TestReport | pytest.CollectReport) -> list[str]:
    """What it failed with, in a line, then all that pytest says of it."""
    crash = getattr(report.longrepr, "reprcrash", None)
    when = f"{report.when}: " if isinstance(report, pytest.TestReport) and report.when != "call" else ""
    whole = tail(report.longreprtext)
    first = crash.message.split("\n")[0] if crash is not None else whole.strip().split("\n")[-1]
    return [when + first, whole]


def run_file(
    path: str, file: str, wanted: Callable[[str], bool], say: Callable[[Outcome], None], *, fail_fast: bool = False
) -> None:
    """Run one.  `file`: its name in reports; `wanted` is asked of each test's id."""
    reporter = _Reporter(file, wanted, say)
    arguments = [path, "--color=no", "-p", "no:cacheprovider", *(["-x"] if fail_fast else [])]
    status = pytest.main(arguments, plugins=[reporter])
    if status not in _PASSING and not reporter.told:
        outcome = reporter.outcome("")
        outcome.verdict = Verdict.ERROR
        outcome.reasons = [f"pytest has ended with status {int(status)}: its words are in the output"]
        say(outcome)
