"""`vmdbg console ADDR`: the commands of a machine behind a stub, carried out there."""

from __future__ import annotations

import json
import shlex
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from gdbstub.target import TargetError, ThreadId
from introspect.commands import Arguments, Command, CommandError, Completion, Context, Registry, Result
from introspect.commands.help import help_command
from introspect.commands.parameters import Candidate, Parameter, Rest
from introspect.commands.render import columns
from introspect.commands.situation import Where
from vmdbg.console.control import Control, Point, Report
from vmdbg.console.run_commands import RunCommands
from vmdbg.console.source import Pane, Progress
from vmdbg.console.wire import Wire, WireDriver
from vmdbg.history import HOST
from vmdbg.options import UsageError

__all__ = ["RemoteSource", "connect"]


@dataclass(frozen=True, slots=True)
class Answer:
    """What a command gave there."""

    words: str
    data: object
    exit_status: int = 0

    def text(self) -> str:
        return self.words

    def json(self) -> object:
        return self.data


class _There:
    """In the place of a context: what commands run on is at the other end."""

    def __init__(self, source: RemoteSource) -> None:
        self.source = source

    @property
    def guests(self) -> Sequence[object]:
        return ()

    def __repr__(self) -> str:
        return f"<the machine at {self.source.name}: `vm` has its commands>"


class RemoteSource:
    """One connection."""

    def __init__(self, name: str, wire: Wire) -> None:
        self.name, self.wire = name, wire
        self.driver = WireDriver(wire)
        self.control = Control(self.driver, self._holds)
        self.context: Any = _There(self)
        self.reports: deque[Report] = deque()
        self._theirs: set[str] = set()
        self.registry = Registry(self._proxies())
        self.registry.add(help_command(self.registry))
        for command in RunCommands(self, self.control).commands():
            self.registry.add(command)

    def _proxies(self) -> Iterable[Command]:
        for one in self.driver.ask_json(ThreadId(HOST, 1), "help")["data"]:
            if one["name"] != "help":
                self._theirs.add(str(one["name"]))
                yield self._proxy(one)

    def _proxy(self, one: Mapping[str, Any]) -> Command:
        name = str(one["name"])

        def run(context: Context, arguments: Arguments) -> Result:
            words, arguments.words = arguments.words, []
            return self.ask(" ".join([name, shlex.join(words)]).strip())

        details = [str(one["details"])] if one["details"] else []
        rows = [(p["option"] or p["name"], p["help"] or p["kind"]) for p in one["parameters"]]
        details += columns(rows, "  ") if rows and len(rows) > 1 else []
        return Command(
            name, run, str(one["summary"]), (Parameter("WORDS", Rest("words"), optional=True),), "\n".join(details),
            tuple(str(each["line"]) for each in one["examples"]), str(one["synopsis"]),
        )  # fmt: skip

    def _complete(self, line: str) -> list[Candidate]:
        selected = self.control.selected
        found = json.loads(self.wire.command(f"--candidates {selected.pid}.{selected.tid} {line}"))
        return [Candidate(str(text), str(meaning)) for text, meaning in found]

    def ask(self, line: str) -> Answer:
        """A command there.  CommandError with what it said."""
        try:
            found = self.driver.ask_json(self.control.selected, line)
        except TargetError as error:
            value, _, rest = str(error).partition(": ")
            rule, _, remedy = rest.partition("; ")
            raise CommandError(value, rule, remedy) if rest and remedy else error from None
        return Answer(str(found["text"]), found["data"], int(found.get("status", 0)))

    # Source

    def _holds(self, point: Point, thread: ThreadId) -> bool:
        before = self.control.selected
        self.select(thread)
        try:
            return bool(self.locate(point.condition)[2])
        finally:
            self.select(before)

    def select(self, thread: ThreadId) -> None:
        self.control.selected = thread

    def where(self) -> Where:
        data: Any = self.ask("here").data
        return Where(**{field.name: data[field.name] for field in fields(Where)})

    def panes(self, sections: tuple[str, ...], width: int, rows: int | None = None) -> Mapping[str, Pane]:
        found: dict[str, Pane] = {}
        for section in sections:
            more = f" --rows {rows}" if rows else ""
            title, *lines = self.ask(f"context {section} --width {max(width, 30)}{more}").text().split("\n")
            found[section] = (title.strip("- "), lines) if title.startswith("-- ") else (section, [])
        return found

    def _locate(self, text: str, thread: ThreadId) -> tuple[int, str, int]:
        found = json.loads(self.wire.command(f"--locate {thread.pid}.{thread.tid} {text}"))
        if "error" in found:
            error = found["error"]
            raise CommandError(error["value"], error["rule"], error["remedy"])
        return int(found["owner"]), str(found["space"]), int(found["offset"])

    def locate(self, text: str) -> tuple[int, str, int]:
        return self._locate(text, self.control.selected)

    def check(self, expression: str, number: int) -> None:
        self._locate(expression, ThreadId(number, self.driver.threads(number)[0].tid))

    def _symbol(self, number: int, address: int) -> Any:
        return json.loads(self.wire.command(f"--symbol {number}.1 {address:#x}"))

    def symbol(self, number: int, address: int) -> str:
        return str(self._symbol(number, address)["name"])

    def line(self, number: int, address: int) -> str:
        return str(self._symbol(number, address)["line"])

    def frames(self) -> list[tuple[int, int | None]]:
        data: Any = self.ask("bt 2").data
        return [(int(frame["pc"]), frame["cfa"]) for frame in data["frames"]]

    def complete(self, line: str) -> Completion:
        """Commands that are carried out there are completed there."""
        found = self.registry.complete(self.context, line)
        words = line.split()
        try:
            command = self.registry.find(words)[0] if words and line[: found.start].strip() else None
        except CommandError:
            return found
        if command is None or command.name not in self._theirs:
            return found
        return Completion(found.start, self._complete(line))

    def addresses(self, prefix: str) -> Iterable[Candidate]:
        return self._complete(f"walk {prefix}")

    def on_progress(self, report: Progress) -> None:
        """It is carried out elsewhere: nobody tells."""

    def close(self) -> None:
        self.wire.close()


def connect(where: str) -> RemoteSource:
    """UsageError if there is no stub of vmdbg's."""
    wire = Wire(where)
    try:
        return RemoteSource(where, wire)
    except (TargetError, ValueError, KeyError) as error:
        wire.close()
        raise UsageError(f"{where}: {error}") from None
