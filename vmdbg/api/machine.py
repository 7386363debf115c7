# SPDX-License-Identifier: GPL-2.0-or-later
"""A machine for scripts, notebooks and tests: make it, run it until something, and ask it anything."""

from __future__ import annotations

import argparse
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Self, Unpack

from gdbstub.target import ThreadId
from introspect.commands import Arguments, Result
from introspect.commands.binding import arguments
from vmdbg.api import options as machine_options
from vmdbg.api import snapshots
from vmdbg.api.addresses import check_to_come, worded
from vmdbg.api.checked import checked
from vmdbg.api.commands import RESULTS, Commands, MachineCommands
from vmdbg.api.display import register
from vmdbg.api.errors import Closed, CommandFailed, Error, translated
from vmdbg.api.exits import Exit, ExitList, remembered
from vmdbg.api.guests import Guests
from vmdbg.api.inferior import Access, Guest, Host, Inferior
from vmdbg.api.keywords import MachineOptions
from vmdbg.api.points import Breakpoint, Catchpoint, Watchpoint
from vmdbg.api.results import Stopped
from vmdbg.api.runner import Limits, Runner, Until
from vmdbg.api.snapshots import Snapshot
from vmdbg.api.stop import Stop
from vmdbg.api.threads import Thread
from vmdbg.catching import Set
from vmdbg.console.control import Goal
from vmdbg.console.source import LiveSource
from vmdbg.debugger import Debugger
from vmdbg.history import HOST
from vmdbg.platform.serial import BufferSerial
from vmdbg.run import build, debugger_of, writing

if TYPE_CHECKING:
    from types import TracebackType

    from vmdbg.console.control import Control
    from vmdbg.console.source import LiveContext
    from vmdbg.testkit.golden import Tolerances
    from vmdbg.testkit.recording import Recording

__all__ = ["AllCommands", "Machine"]

register(RESULTS)


class AllCommands(Commands):
    """Every command as a method, those too whose names `Machine` uses otherwise."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    def _call(self, name: str, values: Mapping[str, object], words: tuple[object, ...]) -> Result:
        return self._machine.invoke(name, values, words)


@checked
class Machine(MachineCommands):
    """An AMD64 machine with an image loaded, which stands before its first instruction.

    Keyword arguments are the options of `vmdbg run`, with _ for -: `memory="256M"`, `cpus=2`, `tlb="strict"`, `tpm=True`,
    `device=["edu,slot=03.0"]`, `symbols={2: "guest.elf"}`.  The serial port is the script's (`serial`, `send`) unless `serial`
    names another place.  Every command is a method, too.

    A machine is used from one thread, and ends with its `with` block, with `close`, or when nothing refers to it any more.
    """

    def __init__(self, image: str | os.PathLike[str], **options: Unpack[MachineOptions]) -> None:
        """Raises `OptionError` for an option, a value or an image that cannot be used."""
        self._make(image, dict(options))

    @classmethod
    def with_options(cls, image: str | os.PathLike[str] | None, options: Mapping[str, object]) -> Self:
        """The same for options that are not known before the program runs."""
        made = cls.__new__(cls)
        made._make(image, options)
        return made

    def _make(self, image: str | os.PathLike[str] | None, options: Mapping[str, object]) -> None:
        given = machine_options.parsed(image, options)
        own = BufferSerial() if "serial" not in options else None
        stack = ExitStack()
        with translated(), stack:
            trace = stack.enter_context(writing("trace_exits", given.trace_exits))
            machine = build(given, trace, serial=own)
            debugger = debugger_of(machine, given, trace, own)
            self._stand_on(debugger, given, own, options)
            self._close = weakref.finalize(self, _closing, debugger, stack.pop_all())

    @classmethod
    def on(cls, debugger: Debugger, options: argparse.Namespace, serial: BufferSerial | None) -> Machine:
        """One that somebody else has built, from `options`, and closes."""
        machine = cls.__new__(cls)
        machine._stand_on(debugger, options, serial, {})
        machine._close = weakref.finalize(machine, _letting_go, debugger, ExitStack())
        return machine

    def _stand_on(
        self, debugger: Debugger, given: argparse.Namespace, serial: BufferSerial | None, options: Mapping[str, object]
    ) -> None:
        self._own_serial, self._options = serial, given
        self.options: Mapping[str, object] = dict(options)
        """What it was given, as keyword arguments."""
        self.debugger = debugger
        """The target below, as gdb sees it."""
        self.source = LiveSource(given.image, debugger)
        self.control: Control = self.source.control
        self.context: LiveContext = self.source.context
        """What commands ask, for those who want more than they tell."""
        self.registry = self.source.registry
        self.commands = AllCommands(self)
        self.guests = Guests(self)
        """Those that are there now, by number: `for guest in machine.guests`, `machine.guests[2]`, `len(machine.guests)`."""
        self.host = Host(self, HOST)
        self._runner = Runner(self)
        self._kept: Snapshot | None = None
        """The last one: the next shares memory with it."""
        self.deadline: float | None = None
        """When (`time.monotonic()`) running must have an end, however often it is begun: then `TimeUp` is raised."""

    # Its life

    def close(self) -> None:
        """Free it.  More than once does no harm."""
        self._close()

    @property
    def closed(self) -> bool:
        return not self._close.alive

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None) -> None:
        self.close()

    def check_open(self) -> None:
        """Raises `Closed` if it is not."""
        if self.closed:
            raise Closed(f"{self.source.name}: this machine has been closed; make another one")

    @property
    def image(self) -> Path:
        return Path(self.source.name)

    @property
    def time(self) -> int:
        """Guest time in ticks, which are bytes of code executed."""
        return self.debugger.machine.clock.now

    @property
    def exit_status(self) -> int | None:
        """As that of `vmdbg run`; None while the machine has not ended."""
        return self.debugger.machine.exit_status

    @property
    def ended(self) -> str:
        """Why it has ended; empty while it has not."""
        machine = self.debugger.machine
        return machine.ended if machine.exit_status is not None else ""

    @property
    def identity(self) -> str:
        """A hash of all that this run was given: image, options, what came from outside.  Runs of one identity are the same;
        `fingerprint()` has the hash of what a run has done, where `fingerprint=True` asks for it."""
        return str(self.debugger.machine.identity)

    @property
    def stop(self) -> Stop | None:
        """The last one; None before the first run."""
        return self._runner.last

    # Running

    def run(
        self, until: Until = None, *, instructions: int | None = None, ticks: int | None = None, wall: float | None = None
    ) -> Stop:
        """Run until something stops it.

        `until`: a location ("host:main", "2:guest.c:42", an address), "guest-start" or what `catch` takes ("vmexit npf if gpa
        >= 0xfee00000"), a breakpoint, watchpoint or catchpoint (or several: others are passed then), or a function that is
        given the machine at each #VMEXIT and says whether to stop.  None: only what is set already stops it.

        `instructions` (of all CPUs together; an iteration of a repeated string instruction is one, too), `ticks` (guest time) and
        `wall` (seconds) bound it: then the reason is LIMIT, and it can go on.  Counting instructions makes it slower.
        The end of the machine is a `Stop`, too.  ^C stops it and raises KeyboardInterrupt; it can go on then as well.
        """
        self.check_open()
        return self._runner.run(until, Limits(instructions, ticks, wall))

    def step(self, count: int = 1, *, lines: bool = False) -> Stop:
        """Instructions of the thread that it stopped in, into calls; `lines`: lines of the source."""
        return self.go(Goal("step", self.control.selected, count, lines))

    def next(self, count: int = 1, *, lines: bool = False) -> Stop:
        """The same, over calls."""
        return self.go(Goal("next", self.control.selected, count, lines))

    def finish(self) -> Stop:
        """Run until the thread that it stopped in returns from its function."""
        return self.finish_of(self.control.selected)

    def go(self, goal: Goal) -> Stop:
        """Continue, or make some steps of a thread."""
        self.check_open()
        if goal.kind != "continue" and goal.count < 1:
            raise CommandFailed(str(goal.count), "a thread makes at least one step", "give 1 or more")
        return self._runner.go(goal)

    def finish_of(self, thread: ThreadId) -> Stop:
        """Run until a thread returns from its function."""
        self.check_open()
        with translated():
            self.source.select(thread)
            self.registry.run_line(self.context, "finish")
        return self._runner.wait()

    def restart(self) -> None:
        """Start over, before the first instruction.  Breakpoints stay; those of guests wait for them."""
        self.check_open()
        with translated():
            self.control.restart()
            self.source.select(self.control.selected)
        self._runner.last = None

    # Moments

    def snapshot(self) -> Snapshot:
        """The machine as it is now, in memory; it does not notice."""
        self.check_open()
        self._kept = snapshots.take(self, self._kept)
        return self._kept

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to a snapshot of this machine, also from its end.  It goes on exactly as it did then; `serial` is what it was.

        Breakpoints, watchpoints and catchpoints stay.
        """
        self.check_open()
        snapshots.restore(self, snapshot)
        self._runner.last = None

    def save(self, path: str | os.PathLike[str]) -> int:
        """Write the whole machine to a file, which `restore_from` and `vmdbg run --snapshot` take; its size in bytes."""
        self.check_open()
        return snapshots.save(self, path)

    @classmethod
    def restore_from(cls, path: str | os.PathLike[str], **options: Unpack[MachineOptions]) -> Self:
        """A machine as it was when it was saved.

        Options may say what is outside of it (`symbols`, `stop_on` ...), but not what it is made of.  `OptionError` for a file
        that is no snapshot, or not a whole one.
        """
        return cls.with_options(None, {**options, "snapshot": path})

    # Who

    def guest(self, number: int | str) -> Guest:
        """A guest by its number or name.  `Error` if there is none of it (yet); the hypervisor is `host`."""
        return self.guests[number]

    @property
    def inferior(self) -> Inferior:
        """Who is selected: whose thread it stopped in."""
        return self.inferior_of(self.control.selected.pid)

    def inferior_of(self, number: int) -> Inferior:
        return self.host if number == HOST else self.guests.of(number)

    @property
    def thread(self) -> Thread:
        """The one that it stopped in."""
        return Thread(self, self.control.selected)

    @property
    def cpus(self) -> tuple[Thread, ...]:
        """The hypervisor's threads."""
        return self.host.threads

    # What stops it

    def breakpoint(self, where: str | int, when: str = "", *, once: bool = False) -> Breakpoint:
        """Stop at a location: "host:main", "2:tick", "2:guest.c:42"; of who is selected, if it names nobody.

        One of a guest that is not there yet waits for it.  `when`: a condition that must not be 0 then.
        """
        self.check_open()
        with translated():
            location = worded(where)
            check_to_come(self.context, location)
            return Breakpoint(self, self.source.running.set(location, when, once=once))

    def watch(self, where: str | int, access: Access = "w", length: int = 8) -> Watchpoint:
        """Stop when memory is written (w), read (r) or either (a): "2:counter", "2:gpa:0x5000", "spa:0x10f6000"."""
        self.check_open()
        with translated():
            found = self._line("watch", [worded(where), str(length), "a" if access == "rw" else access]).json()
            assert isinstance(found, dict)
            number = found["number"]
            point = next(point for point in self.debugger.watchpoints if point.number == number)
        return Watchpoint(self, point)

    def catch(self, what: str) -> Catchpoint:
        """Stop at an event: "vmexit npf if gpa >= 0xfee00000", "msr w efer guest 2", "once inject"; `help("catch")` has all."""
        self.check_open()
        with translated():
            found = self._line("catch", what.removeprefix("catch ").split())
        if not isinstance(found, Set):
            raise CommandFailed(what, "it names no event", "`help('catch')` lists them; delete() and enabled change one")
        return Catchpoint(self, found.point)

    @property
    def breakpoints(self) -> tuple[Breakpoint, ...]:
        return tuple(Breakpoint(self, point) for point in self.control.points.values())

    @property
    def watchpoints(self) -> tuple[Watchpoint, ...]:
        return tuple(Watchpoint(self, point) for point in self.debugger.watchpoints if point.number)

    @property
    def catchpoints(self) -> tuple[Catchpoint, ...]:
        return tuple(Catchpoint(self, point) for point in self.debugger.catchpoints.points.values())

    # What happened

    def exits(
        self, guest: int | str | Inferior | None = None, code: str | int | None = None, last: int | None = None, *,
        since: int = 0, where: Callable[[Exit], bool] | None = None,
    ) -> ExitList:  # fmt: skip
        """#VMEXITs that are remembered (`exit_ring` of each guest), oldest first.

        `code`: EXITCODE by the manual's name or as a number; `last`: so many at most; `since`: only those with a higher number;
        `where`: what must be true of each.
        """
        self.check_open()
        number = guest.number if isinstance(guest, Inferior) else None if guest is None else self.guest(guest).number
        with translated():
            return remembered(self.context, number, code, last, since, where)

    def record(self, path: str | os.PathLike[str] | None = None, **tolerance: Unpack[Tolerances]) -> Recording:
        """All #VMEXITs from here on, also those that are no longer remembered: what golden traces are made from.

        `with machine.record("boot.exits", skip="INTR"): ...` writes one at the end of the block; without a path the recording's
        `save` and `check` do what they are asked to.
        """
        from vmdbg.testkit.recording import Recording  # which is made of this

        self.check_open()
        return Recording(self, path, **tolerance)

    @property
    def exit_count(self) -> int:
        """#VMEXITs of all guests so far: the number of the last one."""
        return self.debugger.history.total.value

    # The serial port

    @property
    def serial_bytes(self) -> bytes:
        """What has been written to the serial port so far."""
        if self._own_serial is None:
            raise Error(f"serial={self._options.serial}: what is written goes there; leave `serial` out to have it here")
        return bytes(self._own_serial.output)

    @property
    def serial(self) -> str:
        """The same as text."""
        return self.serial_bytes.decode("utf-8", "replace")

    def send(self, data: str | bytes) -> None:
        """To the serial port: the guest gets it when the machine runs on."""
        self.check_open()
        if self._own_serial is None:
            raise Error(f"serial={self._options.serial}: input comes from there; leave `serial` out to send it from here")
        self._own_serial.input += data.encode() if isinstance(data, str) else data

    # Commands

    def command(self, line: str) -> Result:
        """A line of the command language: its result, with `text()` and `json()`.

        One that runs the machine ends when that stops, with the stop as result.
        """
        self.check_open()
        with translated():
            self.source.select(self.control.selected)
            result = self.registry.run_line(self.context, line)
        return self._result(result)

    def _result(self, result: Result) -> Result:
        return Stopped(self._runner.wait()) if self.control.running else result

    def invoke(
        self, name: str, values: Mapping[str, object], words: Sequence[object] = (), thread: ThreadId | None = None
    ) -> Result:
        """A command by name, with values of its parameters by their Python names; `thread`: who is selected for it."""
        self.check_open()
        command = self.registry.commands.get(name)
        if command is None:
            raise CommandFailed(name, "there is no such command", "`help()` lists them")
        with translated(), self.selected(thread or self.control.selected):
            result = command.run(self.context, arguments(self.context, command, values, words))
        return self._result(result)

    def _call(self, name: str, values: Mapping[str, object], words: tuple[object, ...]) -> Result:
        return self.invoke(name, values, words)

    def _line(self, name: str, words: Iterable[str]) -> Result:
        command = self.registry.commands[name]
        return command.run(self.context, Arguments(self.context, command, list(words)))

    @contextmanager
    def selected(self, thread: ThreadId) -> Iterator[None]:
        """A thread is selected meanwhile."""
        self.check_open()
        before = self.control.selected
        self.source.select(thread)
        try:
            yield
        finally:
            if self.control.selected == thread:
                self.source.select(before)

    def __repr__(self) -> str:
        if self.closed:
            return f"<closed machine of {self.source.name}>"
        state = self.ended or f"at {self.time} ticks, {len(self.guests)} guests"
        return f"<machine of {self.source.name}: {state}>"


def _letting_go(debugger: Debugger, stack: ExitStack) -> None:
    """Its machine is closed by whoever has built it."""


def _closing(debugger: Debugger, stack: ExitStack) -> None:
    with stack:
        debugger.machine.close()
