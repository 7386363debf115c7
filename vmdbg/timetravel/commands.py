# SPDX-License-Identifier: GPL-2.0-or-later
"""`snapshot`, `snapshots`, `restore`: moments of the machine under names, and in files."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gdbstub.target import TargetError
from introspect.commands import Arguments, Command, Context
from introspect.commands.parameters import Candidate, File, Parameter, Text
from introspect.commands.render import amount_text, columns
from vmdbg.timetravel.file import save
from vmdbg.timetravel.snapshot import Snapshot
from vmdbg.timetravel.tree import SnapshotError

if TYPE_CHECKING:
    from vmdbg.debugger import Debugger


@dataclass(frozen=True)
class Known(Text):
    """The name of a snapshot that there is."""

    names: Callable[[], Iterable[tuple[str, str]]] = lambda: ()
    noun: str = "the name of a snapshot"

    def complete(self, context: Context, prefix: str) -> Iterable[Candidate]:
        return (Candidate(name, meaning) for name, meaning in self.names())


@dataclass(frozen=True, slots=True)
class Moment:
    """A snapshot: a guest time in ticks, and bytes of memory that are not zero."""

    name: str
    time: int
    size: int
    new: int
    """Of its memory, what no earlier one has, too."""

    def row(self) -> tuple[str, ...]:
        return self.name, str(self.time), amount_text(self.size), amount_text(self.new)

    def json(self) -> dict[str, object]:
        return {"name": self.name, "time": self.time, "size": self.size, "new": self.new}


@dataclass(frozen=True, slots=True)
class Moments:
    """All of them, in the order in which they were taken."""

    moments: tuple[Moment, ...]

    def text(self) -> str:
        if not self.moments:
            return "there is no snapshot; `snapshot NAME` takes one"
        return "\n".join(columns([("name", "time", "memory", "of it new"), *(one.row() for one in self.moments)]))

    def json(self) -> object:
        return {"snapshots": [one.json() for one in self.moments]}


@dataclass(frozen=True, slots=True)
class Taken:
    """A snapshot that was taken."""

    moment: Moment

    def text(self) -> str:
        one = self.moment
        memory = amount_text(one.size)
        return f"snapshot {one.name}: guest time {one.time}, {memory} of memory. `restore {one.name}` comes back here"

    def json(self) -> object:
        return self.moment.json()


@dataclass(frozen=True, slots=True)
class Kept:
    """A file that was written."""

    path: str
    time: int
    size: int
    """Of the file, in bytes."""

    def text(self) -> str:
        size = amount_text(self.size)
        return f"{self.path}: guest time {self.time}, {size}. `vmdbg run --snapshot {self.path}` goes on from it"

    def json(self) -> object:
        return {"path": self.path, "time": self.time, "size": self.size}


@dataclass(frozen=True, slots=True)
class Restored:
    """The machine is at an earlier (or later) moment again."""

    name: str
    time: int
    where: str
    """In words, where the CPU is whose turn it is."""
    gone: tuple[int, ...]
    """Guests that were there before, and are not now."""

    def text(self) -> str:
        lines = [f"restored {self.name}: guest time {self.time}, {self.where}"]
        if self.gone:
            guests = f"guest{'s' * (len(self.gone) > 1)} {', '.join(map(str, self.gone))}"
            lines.append(f"{guests} did not exist then: select another inferior")
        return "\n".join(lines)

    def json(self) -> object:
        return {"name": self.name, "time": self.time, "where": self.where, "gone": list(self.gone)}


_RESTORE = """\
Breakpoints, watchpoints and catchpoints stay. `restore` and `snapshot restore` are the same; gdb has a `restore` of its own.
Behind `monitor restore` gdb still shows registers and memory of before: `maintenance flush register-cache` and `maintenance
flush dcache` have it look again. `snapshot restore` of the module that `vmdbg gdb` loads does that by itself."""


class SnapshotCommands:
    """Those on the machine of a debugger."""

    def __init__(self, debugger: Debugger) -> None:
        self.debugger = debugger
        self._new = Parameter("NAME", Text("a name"))
        self._name = Parameter("NAME", Known(names=self._names))
        self._which = Parameter(
            "NAME", Known(names=self._names), optional=True, help="a snapshot that was taken; now if none is named"
        )
        self._file = Parameter("FILE", File())
        self.commands = (
            Command(
                "snapshot", self._take, "Keep the machine as it is now, under a name, to come back to.", (self._new,),
                "CPUs, memory, devices, timers, and what was remembered of exits. The machine does not notice. Memory that has\n"
                "not changed since the snapshot before costs nothing. An earlier snapshot of this name is forgotten.",
                ("snapshot before", "snapshot after"),
            ),
            Command(
                "snapshots", self._list, "List the snapshots.", (),
                "They last as long as the debugger, over a restart of the machine, too.", ("snapshots", "snapshots --json"),
            ),
            Command(
                "snapshot save", self._save, "Write the machine, or a snapshot of it, to a file.", (self._file, self._which),
                "`vmdbg run --snapshot FILE` and `vmdbg console FILE` go on from it, as the machine itself would.",
                ("snapshot save machine.snapshot", "snapshot save then.snapshot before"),
            ),
            *(
                Command(
                    name, self._restore, "Make the machine what it was when a snapshot was taken.", (self._name,), _RESTORE,
                    (f"{name} before", f"{name} before --json"),
                )
                for name in ("restore", "snapshot restore")
            ),
            Command(
                "snapshot delete", self._delete, "Forget a snapshot.", (self._name,), "",
                ("snapshot delete before", "snapshot delete after"),
            ),
        )  # fmt: skip

    @property
    def _snapshots(self) -> dict[str, Snapshot]:
        return self.debugger.snapshots

    def _names(self) -> Iterable[tuple[str, str]]:
        return ((name, f"guest time {snapshot.time}") for name, snapshot in self._snapshots.items())

    def _moments(self) -> list[Moment]:
        seen: set[int] = set()
        found = []
        for name, snapshot in self._snapshots.items():
            new = sum(len(piece) for piece in snapshot.ram.values() if id(piece) not in seen)
            seen.update(map(id, snapshot.ram.values()))
            found.append(Moment(name, snapshot.time, snapshot.size, new))
        return found

    def _chosen(self, arguments: Arguments, name: str) -> Snapshot:
        found = self._snapshots.get(name)
        if found is None:
            known = ", ".join(self._snapshots) or "there is none yet: `snapshot NAME` takes one"
            raise arguments.error(name, "there is no such snapshot", f"choose from {known}" if self._snapshots else known)
        return found

    def _take(self, context: Context, arguments: Arguments) -> Taken:
        name = arguments[self._new]
        try:
            self.debugger.snapshot(name)
        except SnapshotError as error:
            raise TargetError(str(error)) from None
        return Taken(self._moments()[-1])

    def _list(self, context: Context, arguments: Arguments) -> Moments:
        return Moments(tuple(self._moments()))

    def _save(self, context: Context, arguments: Arguments) -> Kept:
        path, name, machine = arguments[self._file], arguments.get(self._which), self.debugger.machine
        snapshot = self._chosen(arguments, name) if name is not None else None
        try:
            size = save(machine, path, snapshot)
        except SnapshotError as error:
            raise TargetError(str(error)) from None
        return Kept(path, machine.clock.now if snapshot is None else snapshot.time, size)

    def _delete(self, context: Context, arguments: Arguments) -> Moments:
        name = arguments[self._name]
        self._chosen(arguments, name)
        del self._snapshots[name]
        return self._list(context, arguments)

    def _restore(self, context: Context, arguments: Arguments) -> Restored:
        name = arguments[self._name]
        snapshot, debugger = self._chosen(arguments, name), self.debugger
        before = {inferior.pid for inferior in debugger.who.living()}
        try:
            debugger.restore(snapshot)
        except SnapshotError as error:
            raise TargetError(str(error)) from None
        gone = before - {inferior.pid for inferior in debugger.who.living()}
        return Restored(name, snapshot.time, debugger.machine.cpu.where, tuple(sorted(gone)))
