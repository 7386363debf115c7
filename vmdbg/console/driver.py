"""What the console needs of a machine that runs: this one's, or one behind a stub."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from gdbstub.target import Action, BreakpointKind, Event, Inferior, Thread, ThreadId
from introspect.expression import ExpressionError, parse_address
from vmdbg.history import HOST
from vmdbg.scopes import MachineNames, ThreadScope

if TYPE_CHECKING:
    from vmdbg.debugger import Debugger

__all__ = ["Driver", "LocalDriver"]


class Driver(Protocol):
    """A target as one of its clients: `gdbstub.target.Target` without what only the protocol needs."""

    def inferiors(self) -> Sequence[Inferior]: ...

    def threads(self, pid: int) -> Sequence[Thread]: ...

    def adopt(self, pid: int) -> None:
        """An inferior has appeared: its stops are wanted, too. The machine may stand still until `resume` or `go_on`."""

    def go_on(self) -> None:
        """With the same actions."""

    def resume(self, actions: Mapping[ThreadId, Action]) -> None: ...

    def run_slice(self) -> Event | None: ...

    def halt(self) -> ThreadId: ...

    def stop_at(self, time: int | None) -> None:
        """Stop at this guest time at the latest."""

    def insert(self, kind: BreakpointKind, address: int, length: int, thread: ThreadId) -> None: ...

    def remove(self, kind: BreakpointKind, address: int, length: int, pid: int) -> None: ...

    def judge(self, address: int, pid: int, conditions: Sequence[str]) -> None:
        """Stop at a software breakpoint only where one of these holds, or has no value; none: always.  A driver that cannot judge
        stops always: whoever asks looks at the conditions himself then."""

    def registers(self, thread: ThreadId) -> Mapping[str, int]:
        """By the names that the commands have for them."""

    def pc(self, thread: ThreadId) -> int | None:
        """The linear address of a thread's next instruction."""

    def read(self, thread: ThreadId, address: int, length: int) -> bytes:
        """Linear memory, as much as can be read of it."""

    def restart(self) -> ThreadId:
        """Start over; the thread to select.  TargetError where that is impossible."""

    def claim(self) -> None:
        """Something is to run: take the machine, if nobody else holds it any more."""

    @property
    def now(self) -> int:
        """Guest time in ticks."""

    @property
    def ended(self) -> str:
        """Why there is nothing to run any more; empty while there is."""

    @property
    def holder(self) -> str:
        """Who else holds the machine, in words, so that it is not the console's to run; empty if nobody does."""


class LocalDriver:
    """The machine of this process."""

    def __init__(self, debugger: Debugger) -> None:
        self.debugger = debugger
        self.holder = ""
        self.take_over: Callable[[], object] = lambda: None
        """Stop what a client that has gone left running."""

    def inferiors(self) -> Sequence[Inferior]:
        return self.debugger.inferiors()

    def threads(self, pid: int) -> Sequence[Thread]:
        return self.debugger.threads(pid)

    def adopt(self, pid: int) -> None:
        """All of them stop for who resumes them."""

    def go_on(self) -> None:
        """It has not been stopped."""

    def resume(self, actions: Mapping[ThreadId, Action]) -> None:
        self.take_over()
        self.debugger.resume(actions)

    def run_slice(self) -> Event | None:
        return self.debugger.run_slice()

    def halt(self) -> ThreadId:
        return self.debugger.halt()

    def claim(self) -> None:
        """Whoever comes and goes is seen at once."""

    def stop_at(self, time: int | None) -> None:
        self.debugger.running.deadline = time

    def insert(self, kind: BreakpointKind, address: int, length: int, thread: ThreadId) -> None:
        self.debugger.insert_breakpoint(kind, address, length, thread)

    def remove(self, kind: BreakpointKind, address: int, length: int, pid: int) -> None:
        self.debugger.remove_breakpoint(kind, address, length, pid)

    def judge(self, address: int, pid: int, conditions: Sequence[str]) -> None:
        debugger = self.debugger
        names = MachineNames(debugger.executables, pid=pid)
        try:
            parsed = [parse_address(text, names) for text in conditions]
        except ExpressionError:
            parsed = []

        def test(thread: ThreadId) -> bool:
            scope = ThreadScope(debugger.registers, thread, {})
            try:
                return any(one(scope).offset for one in parsed)
            except ExpressionError:
                return True

        for point in debugger.breakpoints.at(address, pid):
            if point.kind == BreakpointKind.SOFTWARE:
                point.test = test if parsed else None

    def registers(self, thread: ThreadId) -> Mapping[str, int]:
        commands = self.debugger.monitor_commands
        before, commands.thread = commands.thread, thread
        try:
            return commands.registers(thread.pid)
        finally:
            commands.thread = before

    def pc(self, thread: ThreadId) -> int | None:
        return self.debugger.context(thread).read("rip")

    def read(self, thread: ThreadId, address: int, length: int) -> bytes:
        return self.debugger.read_memory(thread, address, length)

    def restart(self) -> ThreadId:
        self.debugger.run("", [])
        return ThreadId(HOST, 1)

    @property
    def now(self) -> int:
        return self.debugger.machine.clock.now

    @property
    def ended(self) -> str:
        machine = self.debugger.machine
        return (machine.ended or "the machine has ended") if machine.exit_status is not None else ""
