"""In continuous integration (CI=true) a skipped test is a failure: there, everything that tests need is installed."""

from __future__ import annotations

import os

import pytest
from _pytest.terminal import TerminalReporter
from hypothesis import settings

pytest_plugins = ("pytester",)  # tests of the pytest plugin run pytest

settings.register_profile("untimed", deadline=None)  # how long a test takes is the computer's business
settings.load_profile("untimed")

LONG = ("tests/real/", "tests/e2e/", "tests/benchmarks/", "tests/timetravel/", "tests/test_package.py", "tests/test_site.py")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take long first: at the end no process waits for another's."""
    items.sort(key=lambda item: not item.nodeid.startswith(LONG))


def _skipped(config: pytest.Config) -> list[pytest.TestReport]:
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("CI") != "true" or not isinstance(reporter, TerminalReporter):
        return []
    return list(reporter.stats.get("skipped", []))


def pytest_terminal_summary(terminalreporter: TerminalReporter, config: pytest.Config) -> None:
    skipped = _skipped(config)
    if skipped:
        terminalreporter.section("CI=true: nothing may be skipped", red=True)
        for report in skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
            terminalreporter.line(f"{report.nodeid}: {reason}")


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    if _skipped(session.config) and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
