"""What a console stands on: a machine of this process, a dump, or a machine behind a stub."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Protocol

from gdbstub.target import TargetError, ThreadId
from introspect.commands import CommandError, Context, GuestView, HostView, Registry
from introspect.commands.situation import Situation, Where, situation, where
from introspect.expression import ExpressionError, parse
from vmdbg.console.control import Control, Point, Report
from vmdbg.console.driver import LocalDriver
from vmdbg.console.run_commands import RunCommands
from vmdbg.monitor import Monitor

if TYPE_CHECKING:
    from vmdbg.debugger import Debugger

__all__ = ["ContextSource", "LiveSource", "Pane", "Source"]

Pane = tuple[str, list[str]]
"""A title, and lines."""
Progress = Callable[[float, str], None]


class Source(Protocol):
    """`context` and `registry` are what commands run on; `control` is None where nothing can run."""

    name: str
    registry: Registry
    control: Control | None
    reports: deque[Report]
    """What is to be told, besides what `Control.advance` yields."""

    @property
    def context(self) -> Context: ...

    def select(self, thread: ThreadId) -> None: ...

    def where(self) -> Where: ...

    def panes(self, sections: tuple[str, ...], width: int) -> Mapping[str, Pane]:
        """Sections of `context`, of who is selected."""

    def on_progress(self, report: Progress) -> None:
        """Have long commands report here."""

    def close(self) -> None: ...


def panes_of(found: Situation) -> dict[str, Pane]:
    return {section: (found.title(section), found.lines(section)) for section in found.sections}


class ContextSource:
    """Any context of introspect that stands still: a dump."""

    def __init__(self, name: str, context: Context, registry: Registry) -> None:
        self.name, self.context, self.registry = name, context, registry
        self.control: Control | None = None
        self.reports: deque[Report] = deque()

    @property
    def _owner(self) -> GuestView | HostView:
        return self.context.selected or self.context.host

    def select(self, thread: ThreadId) -> None:
        guest = next((guest for guest in self.context.guests if guest.number == thread.pid), None)
        self.context.selected = guest  # type: ignore[misc] - a dump's may be chosen

    def where(self) -> Where:
        return where(self.context, self._owner)

    def panes(self, sections: tuple[str, ...], width: int) -> Mapping[str, Pane]:
        return panes_of(situation(self.context, self._owner, sections, width))

    def on_progress(self, report: Progress) -> None:
        self.context.progress = report  # type: ignore[method-assign]

    def close(self) -> None:
        pass


class LiveContext(Monitor):
    """The machine's commands as the console has them."""

    def __init__(self, debugger: Debugger) -> None:
        super().__init__(debugger)
        self.report: Progress = lambda part, what: None

    def progress(self, part: float, what: str) -> None:
        self.report(part, what)


class LiveSource:
    """The machine of this process."""

    def __init__(self, name: str, debugger: Debugger) -> None:
        self.name, self.debugger = name, debugger
        self.context = LiveContext(debugger)
        self.registry = self.context.registry
        self.driver = LocalDriver(debugger)
        self.control: Control | None = Control(self.driver, self._holds)
        self.reports: deque[Report] = deque()
        for command in RunCommands(self, self.control).commands():
            self.registry.add(command)

    def _holds(self, point: Point, thread: ThreadId) -> bool:
        before, self.context.thread = self.context.thread, thread
        try:
            return bool(parse(point.condition, self.context.names(thread.pid))(self.context.scope(thread.pid)))
        except (ExpressionError, TargetError) as error:
            raise CommandError(point.condition, str(error), "`delete` it, or correct it") from None
        finally:
            self.context.thread = before

    def select(self, thread: ThreadId) -> None:
        assert self.control is not None
        self.control.selected = self.context.thread = thread

    @property
    def _owner(self) -> GuestView | HostView:
        assert self.control is not None
        self.context.thread = self.control.selected
        return self.context.selected or self.context.host

    def where(self) -> Where:
        return where(self.context, self._owner)

    def panes(self, sections: tuple[str, ...], width: int) -> Mapping[str, Pane]:
        return panes_of(situation(self.context, self._owner, sections, width))

    def on_progress(self, report: Progress) -> None:
        self.context.report = report

    def close(self) -> None:
        self.debugger.machine.close()
