# SPDX-License-Identifier: GPL-2.0-or-later
"""`vmdbg test`: job files, gdb and MI scripts, console scripts and pytest files, at once and with reports."""

from __future__ import annotations

import argparse
import contextlib
import os
import resource
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from vmdbg.engine.errors import EngineError
from vmdbg.options import UsageError, version
from vmdbg.testkit import machine_options

if TYPE_CHECKING:
    from vmdbg.testkit.collecting import Tests
    from vmdbg.testkit.outcome import Report
    from vmdbg.testkit.schedule import Pool

__all__ = ["add_parser", "main", "run_tasks"]

DESCRIPTION = """\
Run tests: job files (.toml), gdb scripts (.gdb), MI commands (.mi), console scripts (.vmdbg), pytest files (test_*.py), or
all that are in a directory. FILE::NAME is one test of a file. docs/jobs.md says what a job file has.
Exit status: 0 if all passed, 1 if one failed, 2 for a test that cannot be read (nothing runs then), 130 for ^C."""
PYTEST_WALL = 600.0
"""Seconds for all tests of a file of pytest's."""
NOTHING = 2
"""Exit status if something is wrong with the tests themselves."""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "test", help="run jobs, scripts and pytest files", description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("paths", nargs="+", metavar="PATH", help="a file, FILE::NAME, or a directory")
    add("-j", "--jobs", type=workers, default=1, metavar="N", help="so many at once; auto: as many as there are processors (1)")
    add("-x", "--fail-fast", action="store_true", help="end with the first failure")
    add("-k", dest="patterns", action="append", default=[], metavar="PATTERN",
        help="only tests whose FILE::NAME has PATTERN in it, or fits it (* and ?); may be repeated")  # fmt: skip
    add("-q", "--quiet", action="store_true", help="say nothing of tests that pass")
    add("--record", action="store_true",
        help="write golden traces anew, of jobs that are all right otherwise and of pytest's tests")  # fmt: skip
    add("--snapshots", metavar="DIR", help="keep the machine of each test that fails there, for `vmdbg console` to open")
    add("--list", action="store_true", help="list the tests, and run none")
    add("--junit", metavar="FILE", help="write a report as JUnit XML")
    add("--json", metavar="FILE", help="write a report as JSON")
    add("--html", metavar="FILE", help="write a report as one page")
    add("--wall", type=seconds, metavar="S", help=f"wall budget of each pytest process ({PYTEST_WALL:g})")
    add("--image", default="", metavar="IMAGE", help="the image of scripts, and of jobs and pytest's tests that name none")
    machine_options.add_to(parser)
    parser.set_defaults(run=main)


def workers(text: str) -> int:
    if text == "auto":
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not text.isdecimal() or not 1 <= int(text) <= 1024:
        raise argparse.ArgumentTypeError(f"{text!r} tests at once are not possible; choose 1 to 1024, or auto")
    return int(text)


def seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds; write 60, or 0.5")
    return value


def main(options: argparse.Namespace) -> int:
    """Returns the exit status."""
    from vmdbg.testkit.collecting import collect
    from vmdbg.testkit.jobs import Defaults

    machine_options.namespace("", options.machine_words)  # what is wrong with them is told at once
    image = os.path.abspath(options.image) if options.image else ""
    if image and not Path(image).is_file():
        raise UsageError(f"--image {options.image}: there is no such file; name the image to boot")
    found = collect(
        options.paths, Defaults(image, tuple(options.machine_words)), options.patterns, record=options.record,
        snapshots=Path(options.snapshots).absolute() if options.snapshots else None,
        pytest_wall=options.wall or PYTEST_WALL,
    )  # fmt: skip
    for note in found.notes:
        print(f"vmdbg: {note}", file=sys.stderr)
    for error in found.errors:
        print(f"vmdbg: {error}", file=sys.stderr)
    if found.errors:
        return NOTHING
    if not found.tasks:
        why = f"no test fits {' or '.join(map(repr, options.patterns))}" if options.patterns else "there are no tests"
        raise UsageError(f"{' '.join(options.paths)}: {why}; `vmdbg test --list` shows what there is")
    if options.list:
        for task in found.tasks:
            print(task.id)
        return 0
    files = _writable(options)
    if options.snapshots:
        _folder(options.snapshots)
    report, status = run_tasks(found, options)
    for form, path in files.items():
        _write(form, path, report)
    return status


def _folder(path: str) -> None:
    """UsageError before anything runs, if snapshots cannot be kept there."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except (OSError, ValueError) as error:
        words = getattr(error, "strerror", None) or error
        raise UsageError(f"--snapshots {path}: {words}; choose a directory that can be written") from None


def _writable(options: argparse.Namespace) -> dict[str, Path]:
    """Reports that were asked for.  UsageError before anything runs, if one cannot be written."""
    found = {form: Path(path) for form in ("junit", "json", "html") if (path := getattr(options, form))}
    for form, path in found.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8"):
                pass
        except (OSError, ValueError) as error:
            words = getattr(error, "strerror", None) or error
            raise UsageError(f"--{form} {path}: {words}; choose a file that can be written") from None
    return found


def _write(form: str, path: Path, report: Report) -> None:
    from vmdbg.testkit.junit import junit
    from vmdbg.testkit.outcome import Report
    from vmdbg.testkit.page import page

    text = {"junit": junit, "json": Report.as_json, "html": page}[form](report)
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--{form} {path}: {error.strerror}; choose a file that can be written") from None


def run_tasks(found: Tests, options: argparse.Namespace) -> tuple[Report, int]:
    """Run them all; the report, and the exit status."""
    # Threads of numeric libraries have no part in this, and would be lost in a fork.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from vmdbg.testkit.child import warm
    from vmdbg.testkit.collecting import PytestTask
    from vmdbg.testkit.display import display
    from vmdbg.testkit.outcome import Report
    from vmdbg.testkit.schedule import Pool
    from vmdbg.testkit.scratch import scratch

    try:
        warm(pytest_too=any(task.id.endswith(".py") for task in found.tasks))
    except EngineError as error:
        raise UsageError(str(error)) from None
    if any(isinstance(task, PytestTask) for task in found.tasks):
        folder = scratch()
        for task in found.tasks:
            if isinstance(task, PytestTask):
                task.scratch = folder
    pool = Pool(found.tasks, options.jobs, fail_fast=options.fail_fast)
    shown = display(lambda: pool.count, quiet=options.quiet, workers=options.jobs)
    pool.started, pool.came, pool.ended, pool.tick = shown.started, shown.came, shown.ended, shown.tick
    begun, used = time.monotonic(), _own_cpu()
    with _interrupts(pool) as came:
        outcomes = pool.run()
    elapsed = time.monotonic() - begun
    processors = min(options.jobs, workers("auto"))
    busy = (pool.cpu + _own_cpu() - used) / max(elapsed * processors, 1e-9)
    command = shlex.join(["vmdbg", *sys.argv[1:]]) if sys.argv[1:2] == ["test"] else "vmdbg test"
    report = Report(command, outcomes, elapsed, options.jobs, min(busy, 1.0), version(), pool.stopping)
    shown.close(report)
    return report, 128 + came[0] if came else report.status


def _own_cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


@contextlib.contextmanager
def _interrupts(pool: Pool) -> Iterator[list[int]]:
    """^C and its like end the run in order: what ran so far is reported. The second one ends it at once."""
    came: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if came:
            raise KeyboardInterrupt
        came.append(number)
        pool.asked = f"interrupted ({signal.Signals(number).name})"

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(number, note) for number in numbers]
    try:
        yield came
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
