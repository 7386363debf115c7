# SPDX-License-Identifier: GPL-2.0-or-later
"""The pytest plugin: machines, guests, gdb and golden traces as fixtures; what a failed test was about, in its report.

It is loaded by every pytest of an environment that has vmdbg, so it imports nothing of vmdbg's before a test asks for it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from typing import TYPE_CHECKING
from xml.etree.ElementTree import Element

import pytest
from _pytest.junitxml import bin_xml_escape, xml_key

if TYPE_CHECKING:
    from vmdbg.api.inferior import Inferior
    from vmdbg.api.machine import Machine
    from vmdbg.testkit.fixtures import Bench, Golden
    from vmdbg.testkit.mi import Gdb

MARKER = """\
vmdbg(image=None, *, guest=2, wall=120, **options): the machine of a test: its image (beside the test's file), the guest that \
the fixture `guest` waits for, seconds that its machines may run; options are those of vmdbg.Machine, as cpus=2, tlb="strict"."""
RECORDED = "vmdbg_recorded"
"""Name of a report's property: a golden trace that was recorded."""
SECTION = "vmdbg "
"""What the titles of a report's sections begin with."""
BENCH: pytest.StashKey[Bench] = pytest.StashKey()
"""The machines of a test."""
USED: pytest.StashKey[bool] = pytest.StashKey()
"""It asks for some."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("vmdbg", "debugged machines (vmdbg)")
    group.addoption("--vmdbg-image", metavar="FILE", help="the image of tests that name none; instead of the ini file's")
    group.addoption("--vmdbg-options", metavar="WORDS", default="", help="options of `vmdbg run` for all machines")
    group.addoption("--vmdbg-record", action="store_true", help="record golden exit traces instead of comparing with them")
    group.addoption("--vmdbg-snapshots", metavar="DIR", help="where snapshots of failed tests go (pytest's temporary directory)")
    parser.addini("vmdbg_image", "the image of tests that name none, beside the ini file")
    parser.addini("vmdbg_options", "options of `vmdbg run` for all machines", type="args", default=[])
    parser.addini("vmdbg_wall", "seconds that the machines of a test may run (120)", default="120")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", MARKER)
    config.pluginmanager.register(JUnitSections(config), "vmdbg-junit")


# Fixtures


def _bench(request: pytest.FixtureRequest) -> Bench:
    found: Bench = request.node.stash[BENCH]
    return found


@pytest.fixture
def boot(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Machine]]:
    """Makes machines: `boot()` as marker and ini file say, `boot("other.elf", cpus=2)` with these changes. All are closed."""
    from vmdbg.testkit.fixtures import Bench

    request.node.stash[USED] = True
    bench = request.node.stash[BENCH] = Bench(request, tmp_path_factory)
    try:
        yield bench.boot
    finally:
        bench.close()


@pytest.fixture
def machine(boot: Callable[..., Machine]) -> Machine:
    """A machine with the image loaded, before its first instruction."""
    return boot()


@pytest.fixture
def guest(request: pytest.FixtureRequest, machine: Machine) -> Inferior:
    """The guest of the marker (2, the first one), before its first instruction; the machine has run until there."""
    return _bench(request).reach_guest(machine)


@pytest.fixture
def gdb(request: pytest.FixtureRequest, machine: Machine) -> Gdb:
    """A real gdb on the machine, with the hypervisor's symbols, as inferior 1; gdb runs the machine from then on."""
    return _bench(request).gdb(machine)


@pytest.fixture
def golden(request: pytest.FixtureRequest, machine: Machine) -> Golden:
    """`golden()` compares the machine's exits so far with the golden trace of the test, `golden("boot", ignore=["rax"])` with
    golden/boot.exits beside the test's file; with --vmdbg-record it records it."""
    return _bench(request).golden(machine)


# Reports


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    if call.excinfo is not None and USED in item.stash and not item.config.getoption("fulltrace"):
        from vmdbg.testkit.failure import users_part

        call.excinfo = users_part(call.excinfo)
    report = yield
    if report.failed and BENCH in item.stash:
        from vmdbg.testkit.failure import sections

        report.sections += [(SECTION + title, text) for title, text in sections(item.stash[BENCH])]
    if call.when == "teardown" and BENCH in item.stash:
        del item.stash[BENCH]  # items are there as long as the session, machines need not be
    return report


class JUnitSections:
    """Where JUnit XML is written, the sections become the test's system-out: pytest has only captured text there, if asked."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        found = [f"{title}\n{text}" for title, text in report.sections if title.startswith(SECTION)]
        xml = self.config.stash.get(xml_key, None)
        if found and report.failed and xml is not None:
            element = Element("system-out")
            element.text = bin_xml_escape("\n\n".join(found))
            xml.node_reporter(report).append(element)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Golden traces are never recorded silently."""
    reports = (report for kind in terminalreporter.stats.values() for report in kind)
    recorded = [value for report in reports for name, value in getattr(report, "user_properties", ()) if name == RECORDED]
    if recorded:
        terminalreporter.section("golden exit traces recorded (look at them, and put them under version control)")
        for path in dict.fromkeys(recorded):
            terminalreporter.line(str(path))
