# SPDX-License-Identifier: GPL-2.0-or-later
"""A pytest file, run by pytest in this process, test by test into outcomes."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from vmdbg.testkit.bench import tail
from vmdbg.testkit.child import Parent
from vmdbg.testkit.outcome import RECORDED, Outcome, Verdict
from vmdbg.testkit.plugin import RECORDED as RECORDED_PROPERTY
from vmdbg.testkit.plugin import SECTION

__all__ = ["COLLECTION", "commands_of", "run_file"]

COLLECTION = "(collection)"
"""Name of what a file is before its tests are known."""
_PASSING = (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED, pytest.ExitCode.INTERRUPTED)


class _Reporter:
    """A pytest plugin: runs the tests that it is given one by one, and says what becomes of each."""

    def __init__(self, file: str, wanted: Callable[[str], bool], parent: Parent, given: Sequence[str]) -> None:
        self.file, self.wanted, self.parent, self.given = file, wanted, parent, given
        self.current: dict[str, Outcome] = {}
        self.told = False

    def outcome(self, nodeid: str, line: int = 1) -> Outcome:
        name = _name(nodeid) or COLLECTION
        return Outcome(name, self.file, line, "pytest", reproduce=commands_of(self.file, name, self.given))

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        chosen = [item for item in items if self.wanted(f"{self.file}::{_name(item.nodeid)}")]
        left = [item for item in items if item not in chosen]
        if left:
            config.hook.pytest_deselected(items=left)
            items[:] = chosen

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool | None:
        """As pytest's own, but for who says which test is next: other processes may run some of them."""
        if session.testsfailed or session.config.pluginmanager.hasplugin("dsession"):
            return None  # pytest says what could not be collected; or pytest-xdist has processes of its own
        items = {_name(item.nodeid): item for item in session.items}
        self.parent.say(tests=[(name, _group(item)) for name, item in items.items()])
        try:
            while True:
                name, following = self.parent.ask(next=True)
                if name is None:
                    return True
                if name not in items:
                    self._missing(name)
                    continue
                session.config.hook.pytest_runtest_protocol(item=items[name], nextitem=items.get(following))
                if session.shouldfail:
                    raise session.Failed(session.shouldfail)
                if session.shouldstop:
                    raise session.Interrupted(session.shouldstop)
        except BaseException:
            self.parent.say(stopped=True)
            raise

    def _missing(self, name: str) -> None:
        outcome = self.outcome(f"::{name}")
        outcome.verdict = Verdict.ERROR
        outcome.reasons = ["one process has collected it and another has not: a file must have the same tests each time"]
        self._say(outcome)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """Another process may have taken the test for which fixtures were kept: those that this one has not go now."""
        item.session._setupstate.teardown_exact(item)

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
                self._add(outcome, title, text)
        for name, value in report.user_properties if report.when == "teardown" else ():
            if name == RECORDED_PROPERTY:
                outcome.sections[RECORDED] = f"exits recorded in {value}"

    def _add(self, outcome: Outcome, title: str, text: str) -> None:
        """A section of a report, where a job has the same."""
        known = title.removeprefix(SECTION)
        if title.startswith("Captured std"):
            outcome.output = tail(outcome.output + text)
        elif known == "last exits":
            outcome.exits = text.splitlines()
        elif known == "serial output":
            outcome.serial = tail(text)
        elif known.partition(" ")[0] == "again":
            outcome.reproduce += [line.strip() for line in text.splitlines() if line.startswith("    vmdbg")]
        else:
            outcome.sections[known] = tail(text)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        outcome = self.current.pop(nodeid)
        outcome.settle()
        self._say(outcome)

    def _say(self, outcome: Outcome) -> None:
        self.told = True
        self.parent.tell(outcome)


def _name(nodeid: str) -> str:
    return nodeid.partition("::")[2]


def _group(item: pytest.Item) -> str:
    """Tests that belong together, by the marker of pytest-xdist; nothing for one that stands alone."""
    mark = item.get_closest_marker("xdist_group")
    return str(mark.args[0] if mark.args else mark.kwargs.get("name", "default")) if mark is not None else ""


def commands_of(file: str, name: str, given: Sequence[str]) -> list[str]:
    """That run a test alone.  `given`: options of pytest's plugin."""
    test = file if name == COLLECTION else f"{file}::{name}"
    kept = [option for option in given if option != "--vmdbg-record"]
    ours = [word for option in kept for word in _of_command(option)]
    return [shlex.join(["vmdbg", "test", test, *ours]), shlex.join(["pytest", test, *kept])]


def _of_command(option: str) -> list[str]:
    """An option of the plugin as `vmdbg test` has it."""
    name, _, value = option.removeprefix("--vmdbg-").partition("=")
    return shlex.split(value) if name == "options" else [f"--{name}", value]


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
    path: str, file: str, wanted: Callable[[str], bool], parent: Parent, *, options: Sequence[str] = (), given: Sequence[str] = ()
) -> None:  # fmt: skip
    """Run one, or as much of it as the parent says.

    `file`: its name in reports; `wanted` is asked of each test's id; `options` are pytest's, `given` those that reports name.
    """
    reporter = _Reporter(file, wanted, parent, given)
    status = pytest.main([path, "--color=no", "-p", "no:cacheprovider", *options], plugins=[reporter])
    if status not in _PASSING and not reporter.told:
        outcome = reporter.outcome("")
        outcome.verdict = Verdict.ERROR
        outcome.reasons = [f"pytest has ended with status {int(status)}: its words are in the output"]
        parent.tell(outcome)
