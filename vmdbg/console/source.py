"""What a console stands on: a machine of this process, a dump, or a machine behind a stub."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Protocol

from gdbstub.target import ThreadId
from introspect.commands import (
    HOST_NUMBER,
    Arguments,
    Command,
    CommandError,
    Completion,
    Context,
    GuestView,
    HostView,
    Registry,
)
from introspect.commands.backtrace import Backtrace
from introspect.commands.parameters import Address, AddressWord, Candidate, Owner, Parameter, remedy_of
from introspect.commands.situation import Situation, Where, situation, where
from introspect.dump_context import DumpContext
from introspect.expression import ExpressionError, Space, parse_address
from introspect.source_lines import SourceLines
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
    reports: deque[Report]
    """What is to be told, besides what `Control.advance` yields."""

    @property
    def control(self) -> Control | None: ...

    @property
    def context(self) -> Context: ...

    def select(self, thread: ThreadId) -> None: ...

    def where(self) -> Where: ...

    def panes(self, sections: tuple[str, ...], width: int, rows: int | None = None) -> Mapping[str, Pane]:
        """Sections of `context`, of who is selected."""

    def locate(self, text: str) -> tuple[int, str, int]:
        """(inferior, space, offset) of an address, or of an expression with its value as the offset.  CommandError."""

    def check(self, expression: str, number: int) -> None:
        """CommandError for one that makes no sense about an inferior."""

    def symbol(self, number: int, address: int) -> str:
        """The name of a linear address; empty if it has none."""

    def line(self, number: int, address: int) -> str:
        """The file and line of a linear address; empty if they are not known."""

    def frames(self) -> list[tuple[int, int | None]]:
        """The two innermost frames of who is selected: their addresses, and the stack pointer after they return."""

    def complete(self, line: str) -> Completion:
        """As `Registry.complete`."""

    def addresses(self, prefix: str) -> Iterable[Candidate]:
        """How the beginning of an address may go on."""

    def on_progress(self, report: Progress) -> None:
        """Have long commands report here."""

    def close(self) -> None: ...


def panes_of(found: Situation) -> dict[str, Pane]:
    return {section: (found.title(section), found.lines(section)) for section in found.sections}


_WHO = Parameter("GUEST|host", Owner(), optional=True, help="a guest's number or name")


class _Own(ABC):
    """A source whose context is in this process."""

    registry: Registry

    @property
    @abstractmethod
    def _context(self) -> Context: ...

    @property
    @abstractmethod
    def _owner(self) -> GuestView | HostView:
        """Who is selected."""

    def where(self) -> Where:
        return where(self._context, self._owner)

    def panes(self, sections: tuple[str, ...], width: int, rows: int | None = None) -> Mapping[str, Pane]:
        return panes_of(situation(self._context, self._owner, sections, width, rows))

    def locate(self, text: str) -> tuple[int, str, int]:
        where = AddressWord(text, Space.GVA).locate(self._context, self._owner)
        return where.owner.number, str(where.space), where.offset

    def check(self, expression: str, number: int) -> None:
        try:
            parse_address(expression, self._context.names(number))
        except ExpressionError as error:
            what, remedy = f"{error.value} (column {error.position + 1} behind if)", remedy_of(self._context, error, number)
            raise CommandError(what, error.rule, remedy) from None

    def symbol(self, number: int, address: int) -> str:
        symbols = self._context.symbols(number)
        return symbols.name(address) if symbols is not None else ""

    def line(self, number: int, address: int) -> str:
        symbols = self._context.symbols(number)
        place = SourceLines.of(symbols).at(address) if symbols is not None else None
        return f"{place.path}:{place.line}" if place is not None else ""

    def frames(self) -> list[tuple[int, int | None]]:
        self._owner  # noqa: B018 - selects the thread
        found = self.registry.call(self._context, "bt", 2)
        assert isinstance(found, Backtrace)
        return [(frame.pc, frame.cfa) for frame in found.frames]

    def complete(self, line: str) -> Completion:
        return self.registry.complete(self._context, line)

    def addresses(self, prefix: str) -> Iterable[Candidate]:
        return Address().complete(self._context, prefix)


class ContextSource(_Own):
    """A dump: it stands still."""

    def __init__(self, name: str, context: DumpContext, registry: Registry) -> None:
        self.name, self.registry, self.context = name, registry, context
        self.control = None
        self.reports: deque[Report] = deque()
        registry.add(Command("inferior", self._inferior, "Choose whose the commands are, or say whose.", (_WHO,), "",
                             ("inferior 3", "inferior host")))  # fmt: skip

    def _inferior(self, context: Context, arguments: Arguments) -> Where:
        owner = arguments.get(_WHO)
        if owner is not None:
            self.context.select(owner.number if isinstance(owner, GuestView) else None)
        return self.where()

    @property
    def _context(self) -> Context:
        return self.context

    @property
    def _owner(self) -> GuestView | HostView:
        return self.context.selected or self.context.host

    def select(self, thread: ThreadId) -> None:
        self.context.select(None if thread.pid == HOST_NUMBER else thread.pid)

    def on_progress(self, report: Progress) -> None:
        def told(part: float, what: str) -> bool:
            report(part, what)
            return True

        self.context.told = told

    def close(self) -> None:
        pass


class LiveContext(Monitor):
    """The machine's commands as the console has them."""

    def __init__(self, debugger: Debugger) -> None:
        super().__init__(debugger)
        self.report: Progress = lambda part, what: None
        self._seen: dict[int, tuple[int, Mapping[str, int], Mapping[str, int]]] = {}
        """Registers of inferiors, when somebody looked last: at what time, what they were, and at an earlier time."""

    def progress(self, part: float, what: str) -> None:
        self.report(part, what)

    def registers_before(self, number: int) -> Mapping[str, int] | None:
        """When they were looked at before, at an earlier time: what one command of the console runs may be resumed many times."""
        now, (time, last, earlier) = self.now, self._seen.get(number, (-1, {}, {}))
        if time != now:
            earlier = last
            self._seen[number] = now, self.registers(number), earlier
        return earlier


class LiveSource(_Own):
    """The machine of this process."""

    def __init__(self, name: str, debugger: Debugger) -> None:
        self.name, self.debugger = name, debugger
        self.context = LiveContext(debugger)
        self.registry = self.context.registry
        self.driver = LocalDriver(debugger)
        self.control = Control(self.driver, self._holds)
        debugger.restoring.append(self.control.restoring)
        self.reports: deque[Report] = deque()
        self.send: Callable[[bytes], object] | None = None
        """To the guest's serial port, where that is the console's."""
        self.running = RunCommands(self, self.control)
        for command in self.running.commands():
            self.registry.add(command)

    def _holds(self, point: Point, thread: ThreadId) -> bool:
        before = self.control.selected
        self.select(thread)
        try:
            return bool(self.locate(point.condition)[2])
        finally:
            self.select(before)

    def select(self, thread: ThreadId) -> None:
        self.control.selected = self.context.thread = thread

    @property
    def _context(self) -> Context:
        return self.context

    @property
    def _owner(self) -> GuestView | HostView:
        self.context.thread = self.control.selected
        return self.context.selected or self.context.host

    def on_progress(self, report: Progress) -> None:
        self.context.report = report

    def close(self) -> None:
        self.debugger.machine.close()
