# SPDX-License-Identifier: GPL-2.0-or-later
"""What stands behind the plugin's fixtures: the machines of one test, their gdb, their golden traces, and their end."""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

import pytest

from gdbstub.server import Server, new_event_loop
from vmdbg.api.errors import Error, OptionError, TimeUp
from vmdbg.api.machine import Machine
from vmdbg.attach import find_gdb
from vmdbg.history import HOST
from vmdbg.run import debug_file
from vmdbg.testkit.golden import Tolerances
from vmdbg.testkit.mi import Gdb
from vmdbg.testkit.plugin import RECORDED
from vmdbg.testkit.recording import Recording
from vmdbg.timetravel.file import save

if TYPE_CHECKING:
    from vmdbg.api.inferior import Inferior

__all__ = ["Bench", "Golden"]

FIRST_GUEST = 2
IDLE_SECONDS = 0.0005
_OURS = ("image", "guest", "wall")
"""What a marker says of the test; the rest are options of the machine."""


def options_of(words: list[str]) -> dict[str, object]:
    """Words of a `vmdbg run` command line as keyword arguments.  OptionError."""
    found: dict[str, list[str]] = {}
    name = ""
    for word in words:
        if word.startswith("--"):
            key, equals, value = word[2:].partition("=")
            name = key.replace("-", "_")
            found.setdefault(name, []).extend([value] if equals else [])
        elif name:
            found[name].append(word)
        else:
            raise OptionError(f"{word}: an option of `vmdbg run` begins with --; write --tlb strict")
    return {name: values if len(values) > 1 else values[0] if values else True for name, values in found.items()}


def plain(name: str) -> str:
    """As a file's name."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-.")


def near(path: Path) -> Path:
    """As seen from here, if it is below."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


class Stub:
    """A stub on a machine, which runs whenever somebody waits for gdb."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self._folder = tempfile.TemporaryDirectory(prefix="vmdbg-")
        self.path = str(Path(self._folder.name) / "gdb")
        self._loop = new_event_loop()
        self._server = Server(machine.debugger, HOST)
        self._loop.run_until_complete(self._server.listen_unix(self.path))

    def turn(self) -> None:
        """Serve what has come, and run a slice of the machine if gdb lets it run."""
        deadline = self.machine.deadline
        if deadline is not None and time.monotonic() > deadline:
            self.machine.debugger.halt()
            raise TimeUp(f"the time for this machine is over while gdb runs it; it stands at guest time {self.machine.time}")
        self.machine.debugger.machine.poll_input()
        self._loop.run_until_complete(asyncio.sleep(0 if self._server.running else IDLE_SECONDS))

    def close(self) -> None:
        self._server.close()
        self._loop.run_until_complete(asyncio.sleep(0))
        self._loop.close()
        self._folder.cleanup()


class Golden:
    """The golden traces of a test.  Its machine's exits are recorded from the start."""

    def __init__(self, bench: Bench, machine: Machine) -> None:
        self.bench = bench
        self.recording = Recording(machine)

    def __repr__(self) -> str:
        return f"<golden traces beside {self.bench.item.path.name}>"

    def path(self, name: str = "") -> Path:
        """Where a golden trace of this test lies."""
        item = self.bench.item
        return near(item.path.parent / "golden" / f"{plain(name or item.name)}.exits")

    def __call__(self, name: str = "", **tolerance: Unpack[Tolerances]) -> None:
        """Compare the exits so far with a golden trace, or with --vmdbg-record make it one; tolerances are those of `Tolerance`.

        AssertionError tells the first exit that differs, GoldenError that there is no golden trace, or none that can be used.
        """
        __tracebackhide__ = True
        path = self.path(name)
        try:
            if self.bench.config.getoption("vmdbg_record"):
                self.recording.save(path, **tolerance)
                self.bench.item.user_properties.append((RECORDED, str(path)))
            else:
                self.recording.check(path, **tolerance)
        except ValueError as error:
            raise Error(str(error)) from None


class Bench:
    """The machines of one test."""

    def __init__(self, request: pytest.FixtureRequest, folders: pytest.TempPathFactory) -> None:
        item = request.node
        self._folders = folders
        assert isinstance(item, pytest.Item)
        self.item, self.config = item, item.config
        self.machines: list[Machine] = []
        self.gdbs: list[Gdb] = []
        self._stubs: list[Stub] = []
        self._goldens: list[Golden] = []
        marked: dict[str, object] = {}
        for mark in reversed(list(item.iter_markers("vmdbg"))):  # the closest last
            if len(mark.args) > 1:
                raise Error(f"{item.nodeid}: the marker vmdbg takes one image; give options by name, as cpus=2")
            marked |= {**({"image": mark.args[0]} if mark.args else {}), **mark.kwargs}
        self.marked = {name: value for name, value in marked.items() if name in _OURS}
        ini = options_of(list(self.config.getini("vmdbg_options")))
        line = options_of(shlex.split(self.config.getoption("vmdbg_options")))
        self.options = {**ini, **line, **{name: value for name, value in marked.items() if name not in _OURS}}
        self.wall = self._seconds()
        self.deadline = time.monotonic() + self.wall

    def __repr__(self) -> str:
        return f"<machines of {self.item.name}: {len(self.machines)}>"

    def _seconds(self) -> float:
        given = self.marked.get("wall", self.config.getini("vmdbg_wall"))
        try:
            seconds = float(str(given))
        except ValueError:
            seconds = 0.0
        if not seconds > 0:
            raise Error(f"wall={given}: seconds that the machines of a test may run are meant; write a number above 0")
        return seconds

    # Machines

    def _image(self, given: object = None) -> Path:
        """The image: of a call, the marker, the command line, or the ini file, each as seen from there."""
        beside, where = self.item.path.parent, "boot()"
        if given is None:
            given, where = self.marked.get("image"), "the marker"
        if given is None:
            given, beside, where = self.config.getoption("vmdbg_image"), self.config.invocation_params.dir, "--vmdbg-image"
        if given is None:
            given, beside, where = self.config.getini("vmdbg_image") or None, self._ini(), "vmdbg_image of the ini file"
        if given is None:
            raise Error(
                f"{self.item.nodeid}: no image is named; write @pytest.mark.vmdbg(\"hypervisor.elf\"), --vmdbg-image, or "
                "vmdbg_image in the ini file"
            )
        path = beside / str(given)
        if not path.is_file():
            raise Error(f"{given}, which {where} names, is no file in {beside}; name the image to boot, or make it first")
        return path

    def _ini(self) -> Path:
        return self.config.inipath.parent if self.config.inipath is not None else self.config.rootpath

    def _files(self, image: Path, options: Mapping[str, object]) -> dict[str, object]:
        """Symbols' files: beside the image, else beside the test, else beside the ini file."""
        given = options.get("symbols")
        if given is None:
            return dict(options)
        pairs = given.items() if isinstance(given, Mapping) else (
            str(one).split("=", 1) for one in (given if isinstance(given, list) else [given]))  # fmt: skip
        folders = image.parent, self.item.path.parent, self._ini()
        found = {}
        for who, name in pairs:
            places = [folder / str(name) for folder in folders]
            found[who] = next((place for place in places if Path(str(place).rpartition("@")[0] or place).exists()), places[0])
        return {**options, "symbols": found}

    def boot(self, image: str | os.PathLike[str] | None = None, **changes: object) -> Machine:
        """Another machine: as marker, command line and ini file say, but for these changes.  `vmdbg.Error`."""
        path = self._image(image)
        machine = Machine.with_options(path, self._files(path, {**self.options, **changes}))
        machine.deadline = self.deadline
        self.machines.append(machine)
        return machine

    def reach_guest(self, machine: Machine) -> Inferior:
        """The guest of the marker, before its first instruction."""
        number = self.marked.get("guest", FIRST_GUEST)
        if not isinstance(number, int) or number < FIRST_GUEST:
            raise Error(f"guest={number}: guests are numbered from {FIRST_GUEST}, in the order in which they appear")
        while number not in machine.guests:
            stop = machine.run("guest-start")
            if not stop.reached:
                __tracebackhide__ = True
                raise AssertionError(f"guest {number} has not appeared: {stop}")
        return machine.guests[number]

    def gdb(self, machine: Machine) -> Gdb:
        """A real gdb, connected."""
        stub = Stub(machine)
        self._stubs.append(stub)
        gdb = Gdb(find_gdb(), idle=stub.turn, timeout=self.wall)
        self.gdbs.append(gdb)
        symbols = debug_file(str(machine.image))
        gdb.execute(f"directory {machine.image.parent}")
        if symbols is not None:
            gdb.execute(f"file {symbols}")
        gdb.connect(stub.path)
        return gdb

    def snapshot(self, machine: Machine) -> str:
        """Save it, as it stands; the file's path.  SnapshotError."""
        chosen = self.config.getoption("vmdbg_snapshots")
        folder = Path(chosen).absolute() if chosen else self._folders.getbasetemp() / "vmdbg"
        folder.mkdir(parents=True, exist_ok=True)
        number = f"-{self.machines.index(machine) + 1}" if len(self.machines) > 1 else ""
        path = folder / f"{plain(self.item.nodeid)}{number}.snapshot"
        save(machine.debugger.machine, path)
        return str(near(path))

    def golden(self, machine: Machine) -> Golden:
        self._goldens.append(Golden(self, machine))
        return self._goldens[-1]

    def close(self) -> None:
        """End all of them, whatever becomes of one."""
        with ExitStack() as ends:
            for close in (one.close for group in (self.machines, self._stubs, self.gdbs) for one in group):
                ends.callback(close)
