# SPDX-License-Identifier: GPL-2.0-or-later
"""What a run of tests shows while it goes on: a live display on a terminal, a line for each test elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Protocol, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from vmdbg.testkit.outcome import RECORDED, Outcome, Report, Verdict, printable
from vmdbg.testkit.schedule import Task

__all__ = ["Display", "display"]

_MARKS = {
    Verdict.PASSED: ("✓", "pass", "green"), Verdict.FAILED: ("✗", "FAIL", "bold red"), Verdict.ERROR: ("✗", "ERROR", "bold red"),
    Verdict.SKIPPED: ("○", "skip", "yellow"), Verdict.NOT_RUN: ("·", "not run", "dim"),
}  # fmt: skip
_REFRESH = 0.1
_MOST_SHOWN = 8
"""Running tests in the display."""


class Display(Protocol):
    """Told of a run as it goes on."""

    def started(self, task: Task) -> None: ...

    def came(self, outcomes: Sequence[Outcome]) -> None:
        """Of tests that are over; or that were not run."""

    def ended(self, task: Task) -> None: ...

    def tick(self) -> None: ...

    def close(self, report: Report) -> None:
        """The last words."""


def display(count: Callable[[], int], *, quiet: bool, workers: int) -> Display:
    """The one that fits standard output.  `count`: how many tests there are, as far as it is known."""
    if sys.stdout.isatty():
        return _Terminal(count, quiet, workers)
    return _Lines(count, quiet)


def _words(one: Outcome) -> list[str]:
    """What is said at once: why it failed, or which file it has changed."""
    if not one.bad:
        return [f"    {printable(text)}" for title, text in one.sections.items() if title == RECORDED]
    lines = [f"    {line}" for reason in one.reasons[:3] for line in printable(reason).split("\n")[:12]]
    return [*lines, *(f"    $ {printable(command)}" for command in one.reproduce[:1])]


class _Lines:
    """For logs."""

    def __init__(self, count: Callable[[], int], quiet: bool, out: TextIO | None = None) -> None:
        self.count, self.quiet, self.out = count, quiet, out or sys.stdout
        self.done = 0

    def started(self, task: Task) -> None:
        pass

    def ended(self, task: Task) -> None:
        pass

    def came(self, outcomes: Sequence[Outcome]) -> None:
        for one in outcomes:
            self.done += 1
            if one.bad or not self.quiet:
                mark = f"{_MARKS[one.verdict][1]:7} {one.seconds:6.2f} s"
                self._say(f"[{self.done}/{max(self.count(), self.done)}] {mark}  {printable(one.id)}")
            self._say(*_words(one))

    def _say(self, *lines: str) -> None:
        try:
            self.out.write("".join(f"{line}\n" for line in lines))
            self.out.flush()
        except BrokenPipeError:  # whoever reads has seen enough; reports are wanted all the same
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.out.fileno())
            os.close(nowhere)

    def tick(self) -> None:
        pass

    def close(self, report: Report) -> None:
        if report.interrupted:
            self._say(report.interrupted)
        self._say(f"{report.summary()}; {report.workers} at once, {report.busy:.0%} busy")


class _Terminal:
    """For eyes: failures stay, the rest is a bar and what runs just now."""

    def __init__(self, count: Callable[[], int], quiet: bool, workers: int) -> None:
        self.count, self.quiet, self.workers = count, quiet, workers
        self.counts: Counter[Verdict] = Counter()
        self.running: dict[str, float] = {}
        self.done = 0
        self.begun = self._shown = time.monotonic()
        self.console = Console(highlight=False)
        # No thread of its own: this process forks.
        self.live = Live(self._picture(), console=self.console, auto_refresh=False, transient=True)
        self.live.start()

    def _picture(self) -> Group:
        now = time.monotonic()
        counted = Text("  ").join(
            Text(f"{_MARKS[verdict][0]} {count} {verdict}", _MARKS[verdict][2]) for verdict, count in self.counts.items()
        )
        head = Table.grid(padding=(0, 1))
        bar = ProgressBar(max(self.count(), self.done, 1), self.done, width=30)
        head.add_row(bar, f"{self.done}/{self.count()}", Text(f"{now - self.begun:.0f} s", "dim"), counted)
        rows = Table.grid(padding=(0, 1))
        for id, since in list(self.running.items())[:_MOST_SHOWN]:
            name = Text(printable(id), overflow="ellipsis", no_wrap=True)
            rows.add_row(Text("▸", "cyan"), name, Text(f"{now - since:.1f} s", "dim"))
        if len(self.running) > _MOST_SHOWN:
            rows.add_row("", Text(f"and {len(self.running) - _MOST_SHOWN} more", "dim"))
        return Group(head, rows)

    def started(self, task: Task) -> None:
        self.running[task.id] = time.monotonic()

    def ended(self, task: Task) -> None:
        self.running.pop(task.id, None)

    def came(self, outcomes: Sequence[Outcome]) -> None:
        for one in outcomes:
            self.done += 1
            self.counts[one.verdict] += 1
            mark, _, style = _MARKS[one.verdict]
            if said := _words(one):
                self.console.print(Text(f"{mark} {printable(one.id)}", style), Text(f"{one.seconds:.2f} s", "dim"))
                self.console.print(Text("\n".join(said)))

    def tick(self) -> None:
        if time.monotonic() - self._shown >= _REFRESH:
            self._shown = time.monotonic()
            self.live.update(self._picture(), refresh=True)

    def close(self, report: Report) -> None:
        self.live.stop()
        if report.interrupted:
            self.console.print(Text(report.interrupted, "yellow"))
        style = "bold red" if report.status else "bold green"
        self.console.print(Text(report.summary(), style), Text(f"{report.workers} at once, {report.busy:.0%} busy", "dim"))
