"""A line becomes a command's text, where it was asked for. Prompt, scripts and `tui` share it: it knows no keys and no screen."""

from __future__ import annotations

import contextlib
import os
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path

from gdbstub.target import TargetError
from introspect.commands import Cancelled, Command, CommandError, Result, exit_status
from introspect.commands.parameters import Expression
from introspect.commands.registry import as_json, error_json, failure_json
from vmdbg.console.control import Report
from vmdbg.console.language import Line, split
from vmdbg.console.output import Output
from vmdbg.console.progress import Progress
from vmdbg.console.python import Python
from vmdbg.console.run_commands import RUNNING
from vmdbg.console.settings import Settings
from vmdbg.console.shell_commands import ShellCommands
from vmdbg.console.source import Pane, Source
from vmdbg.console.stopped import Asked, Kind, Started, Stopped
from vmdbg.console.user_commands import UserCommands

__all__ = ["ALIASES", "Quit", "Shell"]

ALIASES = {
    "c": "continue", "s": "step", "si": "stepi", "n": "next", "ni": "nexti", "b": "break",
    "tb": "tbreak", "d": "delete", "u": "until", "fin": "finish", "r": "restart", "run": "continue", "q": "quit", "exit": "quit",
    "w": "walk", "g": "guests", "v": "vmcb", "inf": "inferior", "t": "thread", "?": "help", "h": "help",
    "info breakpoints": "points", "i b": "points", "info registers": "context regs", "i r": "context regs",
    "info inferiors": "inferior", "info threads": "thread", "!": "shell",
}  # fmt: skip
"""For fingers that know gdb."""
DEEPEST = 16
"""Scripts that source scripts."""
AROUND = 13
"""Lines of the screen that the view of a stop leaves: for the line before it, the prompt, its menu and what is below."""
AT_ONCE = 0.2
"""Seconds that a step may take before the prompt comes back without it."""
_ERROR, _CANCELLED = 1, 130


def fitted(panes: Mapping[str, Pane], height: int | None) -> dict[str, Pane]:
    """Those with something in them, shortened where they are more than a screen: the stack first, then the exits."""
    found = {name: (title, list(lines)) for name, (title, lines) in panes.items() if lines}
    if height is None:
        return found
    over = sum(len(lines) + 1 for _, lines in found.values()) - max(height - AROUND, 10)
    order = (
        ("stack", 3, True),
        ("source", 5, True),
        ("exit", 1, False),
        ("stack", 0, True),
        ("source", 0, True),
        ("exit", 0, False),
    )
    for name, least, end in order:
        if over > 0 and name in found:
            lines = found[name][1]
            cut = min(over, len(lines) - least)
            over -= cut
            if end:
                del lines[len(lines) - cut :]
            else:
                del lines[:cut]
            if not lines:
                over -= 1
                del found[name]
    return found


def _kind(report: Report) -> Kind:
    """Who has said a line."""
    return Kind.NOTE if report.text.startswith("[") else Kind.SERIAL


class Quit(Exception):
    """The user wants to leave."""


class Shell:
    """Of one console. `status` is that of the last command that failed; 0 while none has."""

    def __init__(self, source: Source, output: Output, *, waits: bool = True, folders: Iterable[Path] = ()) -> None:
        """`waits`: a command that runs the machine ends when that stops. `folders` may have a commands.py."""
        self.source, self.output, self.waits = source, output, waits
        self.settings = Settings()
        if not output.interactive:
            self.settings.context = ()
        self.aliases = dict(ALIASES)
        self.status = 0
        self.last: Result | None = None
        self.progress = Progress(lambda line: self.output.progress(line))
        self.wants_screen = False
        """The full screen was asked for, or is to be left."""
        self._depth = 0
        self._asked: Asked | None = None
        """What runs the machine just now, if its result is due when that stops."""
        source.on_progress(self.progress)
        self.registry = source.registry
        for command in ShellCommands(self).commands():
            self.registry.add(command)
        self.python = Python(self)
        self.user = UserCommands(self, [folder / "commands.py" for folder in folders])

    # Lines

    def execute(self, text: str) -> int:
        """Carry a line out: its status.  Raises nothing but `Quit`."""
        status, wants_json = 0, self.registry.wants_json(text)
        try:
            self.user.refresh()
            with self.progress.command():
                status = self._execute(text)
                if self.source.control is not None and self.source.control.running:
                    self._run_on()
        except CommandError as error:
            status = self._failed(error_json(error) if wants_json else str(error), wants_json)
        except (TargetError, OSError) as error:
            status = self._failed(failure_json(str(error)) if wants_json else str(error), wants_json)
        except (KeyboardInterrupt, Cancelled):
            status = _CANCELLED
            self.output.show("cancelled", "error")
            if self.waits and self.source.control is not None:  # before it was waited for
                for report in self.source.control.interrupt():
                    self.report(report)
        except Quit:
            raise
        except Exception as error:
            self._unexpected(error)
            status = _ERROR
        self.tell()
        if self.source.control is None or not self.source.control.running:
            self._asked = None
        if status:
            self.status = status
        return status

    def _failed(self, words: str, as_result: bool = False) -> int:
        self.output.show(words, "" if as_result else "error")
        return _ERROR

    def _unexpected(self, error: Exception) -> None:
        if self.settings.traceback:
            self.output.show(traceback.format_exc().rstrip(), "error")
        else:
            self.output.show(
                f"{type(error).__name__}: {error}; this is a mistake of vmdbg's: `set traceback on` shows where", "error"
            )

    def expanded(self, text: str) -> str:
        """With the alias that it begins with in its place, once."""
        stripped = text.lstrip()
        if stripped.startswith("!"):
            return "shell " + stripped[1:]
        words = stripped.split(None, 2)
        for count in (2, 1):
            name = " ".join(words[:count])
            if len(words) >= count and name in self.aliases:
                rest = stripped.split(None, count)[count:]
                return " ".join([self.aliases[name], *rest])
        return text

    def command_of(self, text: str) -> Command | None:
        """Which command a line begins with, if that is known."""
        words = text.split()
        try:
            return self.registry.find(words)[0] if words else None
        except CommandError:
            return None

    def parsed(self, text: str) -> Line:
        """A line with its alias, taken apart."""
        text = self.expanded(text)
        command = self.command_of(text)
        if command is not None and command.name in ("py", "shell"):
            return Line(text.strip())
        operators = command is not None and any(isinstance(parameter.kind, Expression) for parameter in command.parameters)
        return split(text, operators=operators)

    def _execute(self, text: str) -> int:
        line = self.parsed(text)
        if not line.command:
            return 0
        command = self.command_of(line.command)
        if command is not None and command.name in ("py", "shell"):
            rest = line.command.split(None, 1)[1:]
            return self.python.run(rest[0]) if command.name == "py" and rest else self._shell(rest[0] if rest else "")
        if command is None and self.source.control is None and line.command.split()[0] in RUNNING:
            raise CommandError(line.command.split()[0], "a dump does not run", "start vmdbg console on an image, or on a stub")
        text, result = self.registry.answer(self.source.context, line.command)
        if isinstance(result, Started):
            name, as_program = command.name if command is not None else "", self.registry.wants_json(line.command)
            self._ask(Asked(name, as_program, bool(line.pipe or line.file)), result)
            if line.pipe or line.file:
                result = self._stopped()
                text = as_json(name, result) if as_program else result.text()
            else:
                text = "" if as_program else text
        self.last = self.python.last = result
        if line.pipe:
            return self.output.run(["sh", "-c", line.pipe], text + "\n")
        if line.file:
            with open(line.file, "a" if line.append else "w", encoding="utf-8") as file:
                file.write(text + "\n")
        elif text:
            self.output.show(text)
        return exit_status(result)

    def _shell(self, command: str) -> int:
        return self.output.run([os.environ.get("SHELL") or "sh", *(["-c", command] if command else [])])

    def call(self, name: str, *values: object, **options: object) -> Result:
        """A command from Python. One that runs the machine ends when that stops."""
        result = self.registry.call(self.source.context, name, *values, **options)
        if not isinstance(result, Started):
            return result
        self._ask(Asked(name, kept=True), result)
        return self._stopped()

    # Running

    def _ask(self, asked: Asked, started: Started) -> None:
        """From now on lines belong to this command, until the machine stops."""
        if started.words and (asked.json or asked.kept):
            asked.said.append((Kind.NOTE, started.words))
        self._asked = asked

    def _stopped(self) -> Stopped:
        """Wait for the stop of what was asked for."""
        last: Stopped | None = None
        for report in chain(self._wait(None), self._taken()):
            last = self._heard(report) or last
        self._asked = None
        return last or self._result(Report(""))

    def _heard(self, report: Report) -> Stopped | None:
        """Select who has stopped; the result of what was asked for, if this is it. A line before is kept for it."""
        if report.thread is not None:
            with contextlib.suppress(TargetError):
                self.source.select(report.thread)
            return self._result(report) if self._asked is not None else None
        if self._asked is not None:
            self._asked.said.append((_kind(report), report.text))
        return None

    def _result(self, report: Report) -> Stopped:
        control = self.source.control
        assert control is not None
        said = tuple(self._asked.said) if self._asked is not None else ()
        points = tuple(point.number for point in report.points if point.number)
        return Stopped(report.text, self.source.where(), control.selected.tid, points, control.driver.ended, said)

    @property
    def _silent(self) -> bool:
        """Whether lines are part of a result, and are not shown as they come."""
        return self._asked is not None and (self._asked.kept or (self._asked.json and not self.output.interactive))

    def serial(self, line: str) -> None:
        """The guest has printed this."""
        if self._asked is not None:
            self._asked.said.append((Kind.SERIAL, line))
        if self.settings.serial and not self._silent:
            self.output.show(line, Kind.SERIAL)

    def _run_on(self) -> None:
        for report in self._wait(None if self.waits else AT_ONCE):
            self.report(report)

    def _wait(self, seconds: float | None) -> Iterator[Report]:
        """Slices until it stops, or the time is over; ^C stops it. What is to be told."""
        control, until = self.source.control, time.monotonic() + (seconds or 0)
        assert control is not None
        # Also what is told between two slices is not cut short: it would be lost, and the machine be left running.
        with self.progress.deferring():
            while control.running and (seconds is None or time.monotonic() < until):
                found = list(control.advance())
                if self.progress.take():
                    found += control.interrupt()
                yield from found

    def tell(self) -> None:
        """What there is to be told."""
        for report in self._taken():
            self.report(report)

    def _taken(self) -> Iterator[Report]:
        while self.source.reports:
            yield self.source.reports.popleft()

    def report(self, report: Report) -> None:
        """A stop, with the context view; or a line."""
        stopped, asked = self._heard(report), self._asked
        if report.thread is None:
            if not self._silent:
                self.output.show(report.text, _kind(report))
            return
        self._asked = None
        if asked is not None and stopped is not None:
            self.last = self.python.last = stopped
            if asked.json:
                self.output.show(as_json(asked.command, stopped))
                return
        if report.text:
            self.output.show(report.text, "note")
        self.view()

    def view(self) -> None:
        """Where the selected inferior is: the context view as it is set, or one line."""
        try:
            if not self.settings.context:
                self.output.show(self.source.where().short())
                return
            panes = self.source.panes(self.settings.context, self.output.width)
            lines = []
            for title, content in fitted(panes, self.output.height).values():
                lines += [f"── {title} ".ljust(self.output.width, "─"), *content]
            pager, self.output.pager = self.output.pager, False
            try:
                self.output.show("\n".join(lines))
            finally:
                self.output.pager = pager
        except (CommandError, TargetError) as error:
            self.output.show(str(error), "error")

    # Scripts

    def run_file(self, path: str) -> int:
        """The lines of a file, or a Python file; the status of the last one that failed."""
        if self._depth >= DEEPEST:
            raise CommandError(path, f"scripts lie {DEEPEST} deep in each other", "one of them sources itself")
        try:
            with open(os.path.expanduser(path), encoding="utf-8") as file:
                text = file.read()
        except (OSError, UnicodeDecodeError, ValueError) as error:
            words = getattr(error, "strerror", None) or str(error)
            raise CommandError(path, words.lower(), "name a text file that can be read") from None
        self._depth += 1
        try:
            if path.endswith(".py"):
                return self.python.run_text(text, path)
            return self.run_lines(text.splitlines())
        finally:
            self._depth -= 1

    def run_lines(self, lines: Iterable[str]) -> int:
        """The status of the last one that failed."""
        failed, waits = 0, self.waits
        self.waits = True
        try:
            for line in lines:
                if status := self.execute(line):
                    failed = status
                    if status == _CANCELLED:
                        break
        finally:
            self.waits = waits
        return failed
