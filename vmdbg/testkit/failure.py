# SPDX-License-Identifier: GPL-2.0-or-later
"""What stands in the report of a failed test: the machine as it was then, and how to be there again."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import TYPE_CHECKING

import pytest
from _pytest.outcomes import fail

from vmdbg.api.errors import Error
from vmdbg.timetravel.tree import SnapshotError

if TYPE_CHECKING:
    from vmdbg.api.machine import Machine
    from vmdbg.testkit.fixtures import Bench

__all__ = ["sections", "users_part"]

EXITS, LINES, CHARACTERS = 12, 30, 6000
_UNPRINTABLE = {code: "?" for code in (*range(32), *range(127, 160)) if code not in (9, 10)}
"""Guests print, and files name their symbols, as they like: nothing of it moves a terminal's cursor."""


def users_part(raised: pytest.ExceptionInfo[BaseException]) -> pytest.ExceptionInfo[BaseException]:
    """An error or assertion of ours, which explains itself, without the way that it took through vmdbg; any other as it is.

    Where no line of the user's leads to it, as in our fixtures, its words are all.
    """
    frames = []
    trace: TracebackType | None = raised.tb
    while trace is not None:
        frames.append(trace)
        trace = trace.tb_next
    explained = isinstance(raised.value, Error) or "__tracebackhide__" in frames[-1].tb_frame.f_locals
    if not explained or not _is_of(frames[-1], *_OURS):
        return raised
    while frames and _is_of(frames[-1], *_OURS, "argparse", "contextlib"):
        frames.pop()
    if not frames or _is_of(frames[-1], "_pytest", "pluggy"):
        told = fail.Exception(str(raised.value), pytrace=False)
        return pytest.ExceptionInfo.from_exception(told.with_traceback(raised.tb))
    shortened = None
    for one in reversed(frames):
        shortened = TracebackType(shortened, one.tb_frame, one.tb_lasti, one.tb_lineno)
    raised.value.__cause__, raised.value.__suppress_context__ = None, True
    return pytest.ExceptionInfo.from_exception(raised.value.with_traceback(shortened))


_OURS = "vmdbg", "introspect", "gdbstub"


def _is_of(trace: TracebackType, *packages: str) -> bool:
    module: str = trace.tb_frame.f_globals.get("__name__", "")
    return module.partition(".")[0] in packages


def sections(bench: Bench) -> Iterator[tuple[str, str]]:
    """(title, text) of each section."""
    for number, machine in enumerate(bench.machines):
        which = f" of machine {number + 1}" if len(bench.machines) > 1 else ""
        if machine.closed:
            yield f"machine{which}", f"{machine.image}: the test has closed it"
            continue
        for title, tell in _PARTS:
            text = _told(tell, machine)
            if text:
                yield f"{title}{which}", text
        yield f"again{which}", _told(lambda machine: _again(bench, machine), machine)
    for gdb in bench.gdbs:
        yield "gdb", _tail(gdb.transcript)


def _told(tell: Callable[[Machine], str], machine: Machine) -> str:
    """A report that cannot be made says why, and the others are made: pytest itself would end."""
    try:
        return tell(machine).translate(_UNPRINTABLE)
    except Error as error:
        return f"not known: {error}"
    except Exception as error:
        return f"not known: {type(error).__name__}: {error}; this is a mistake of vmdbg's"


def _state(machine: Machine) -> str:
    never = "it has run, and not come to a stop" if machine.time else "it has not run"
    head = f"{machine.image.name}: {machine.ended or machine.stop or never}"
    where = f"guest time {machine.time}, {machine.exit_count} #VMEXITs"
    return "\n".join((head, where, f"identity {machine.identity}", *machine.debugger.history.notices))


def _exits(machine: Machine) -> str:
    return "\n".join(map(str, machine.exits(last=EXITS)))


def _context(machine: Machine) -> str:
    return machine.command("context").text()


def _serial(machine: Machine) -> str:
    return _tail(machine.serial.replace("\r\n", "\n")) if machine.options.get("serial") is None else ""


_PARTS: tuple[tuple[str, Callable[[Machine], str]], ...] = (
    ("machine", _state), ("last exits", _exits), ("context", _context), ("serial output", _serial),
)  # fmt: skip


def _tail(text: str) -> str:
    lines = text.translate(_UNPRINTABLE)[-CHARACTERS:].splitlines()
    left = len(text.splitlines()) - LINES
    return "\n".join(([f"... ({left} lines before)"] if left > 0 else []) + lines[-LINES:])


def _again(bench: Bench, machine: Machine) -> str:
    """Commands that lead here."""
    symbols = list(_words({"symbols": machine.options.get("symbols")}))
    try:
        snapshot = bench.snapshot(machine)
        lines = ["the machine as it stands here, at a prompt:", _command("vmdbg", "console", "--snapshot", snapshot, *symbols)]
    except (SnapshotError, OSError) as error:
        lines = [f"no snapshot: {error}"]
    to = [f"--max-time={machine.time}"] if machine.time else []
    words = ["vmdbg", "run", os.path.relpath(machine.image), *_words(machine.options)]
    lines += ["the run from its beginning to this time:", _command(*words, *to)]
    return "\n".join([*lines, "the test alone:", _command(*_pytest(bench))])


def _command(*words: str) -> str:
    return f"    {shlex.join(words)}"


def _pytest(bench: Bench) -> Iterator[str]:
    """The command line for this test alone, as from where pytest was started."""
    config, item = bench.config, bench.item
    yield from ("pytest", f"{os.path.relpath(item.path, config.invocation_params.dir)}::{item.nodeid.partition('::')[2]}")
    for option in ("image", "options"):
        given = config.getoption(f"vmdbg_{option}")
        if given:
            yield f"--vmdbg-{option}={given}"


def _words(options: Mapping[str, object]) -> Iterator[str]:
    """Keyword arguments as `vmdbg run` takes them."""
    for name, value in options.items():
        option = f"--{name.replace('_', '-')}"
        if value is True:
            yield option
        elif isinstance(value, Mapping):
            for who, file in value.items():
                yield f"{option}={who}={os.path.relpath(file)}"
        elif isinstance(value, list | tuple):
            yield from (f"{option}={one}" for one in value)
        elif value is not None and value is not False:
            yield f"{option}={value}"
