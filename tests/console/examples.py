"""The examples of the console's own commands, carried out: in consoles that write to a file, and on a terminal what fills the screen."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping
from contextlib import chdir, closing, contextmanager
from functools import partial
from pathlib import Path
from unittest.mock import patch

from introspect.commands import Command
from introspect.dump_context import DumpContext
from tests.console.talking import ROOT, live
from tests.console.tmux import Terminal
from vmdbg.console.output import PlainOutput
from vmdbg.console.serial import ConsoleSerial
from vmdbg.console.shell import Quit, Shell
from vmdbg.console.source import ContextSource, LiveSource, Source
from vmdbg.inspect import dump_registry, opened
from vmdbg.monitor import Monitor

__all__ = ["SCREENS", "carried_out", "own_commands", "screens"]

SESSIONS = (
    ("continue", "step", "next", "stepi", "nexti", "finish", "until", "inferior", "thread", "py", "restart"),
    ("break", "tbreak", "points", "disable", "enable", "delete"),
    ("interrupt",),
    ("source", "edit", "set", "alias", "unalias", "shell", "echo", "send", "quit"),
)
"""A console each, and the commands whose examples are carried out in it, in this order."""
UNATTENDED = ("interrupt",)
"""Their console does not wait for what runs."""
FILES = {"setup.vmdbg": "tbreak main\ncontinue\n", "census.py": "print(len(guests().json()['guests']), 'inferiors')\n"}
"""What the examples find beside them."""
EDITOR = "sed -i '$ a here'"
"""An editor that needs nobody: it adds the line `here`."""
_WORK = ("inferior host", "tbreak 2:work", "continue")
BEFORE: Mapping[str, tuple[str, ...]] = {
    "continue": _WORK[:2],
    "step": _WORK,
    "finish": _WORK,
    "finish --json": _WORK,
    "until handle_exit": ("inferior host",),
    "edit setup.vmdbg --run": ("restart",),
    "inferior 2": ("continue 7600000",),
    "interrupt": (  # nothing would stop this one
        "tbreak main",
        "continue",
        "py context.debugger.write_memory(context.thread, context.registers(1)['rip'], b'\\xeb\\xfe')",
        "continue",
    ),
    "interrupt --json": ("continue",),
}
"""Lines that are carried out before an example, and not shown."""
NOTES = {
    "source setup.vmdbg": "[setup.vmdbg has two lines: tbreak main, and continue]",
    "source census.py": f"[census.py is {FILES['census.py'].strip()}]",
    "edit setup.vmdbg --run": "[$EDITOR has the terminal until it ends; the line `here` was added to the file]",
    "edit": "[$EDITOR has the terminal until it ends; the line `here` was added to an empty file]",
    "quit": "[the console has ended, with status 0]",
    "q": "[the console has ended, with status 0]",
}
"""What is to be known of an example besides what it shows."""
SCREENS = {"tui": (120, 24), "tui # in a narrow window": (80, 24)}
"""Examples that fill the screen: its columns and lines."""


def own_commands(image: Path) -> list[Command]:
    """Those that only a console has, in its order."""
    with _console(live(image), Path(os.devnull)) as shell:
        assert isinstance(shell.source, LiveSource)
        others = Monitor(shell.source.debugger).registry.commands
        return [command for name, command in shell.registry.commands.items() if name not in others]


def carried_out(image: Path) -> tuple[dict[str, str], dict[str, object]]:
    """What the examples show, by line, but for those that fill the screen; and the JSON of their results."""
    shown: dict[str, str] = {}
    results: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as name, chdir(name), patch.dict(os.environ, {"EDITOR": EDITOR, "SHELL": "/bin/sh"}):
        os.environ.pop("VISUAL", None)
        for file, text in FILES.items():
            Path(file).write_text(text, encoding="utf-8")
        for number, names in enumerate(SESSIONS):
            serial = ConsoleSerial()
            source = live(image, serial)
            source.send = serial.send
            with _console(source, Path(f"shown{number}"), waits=names != UNATTENDED) as shell:
                serial.show = partial(shell.output.show, kind="serial")
                _session(shell, names, Path(f"shown{number}"), shown, results)
                if "inferior" in names:
                    shell.execute("continue 7600000")
                    shell.execute("save core demo.core")
        with opened(Namespace(source="demo.core", base=None, stay_stopped=False)) as dump:
            of_dump = ContextSource("demo.core", DumpContext(dump), dump_registry())
            with _console(of_dump, Path("dump")) as shell:
                _session(shell, ("inferior",), Path("dump"), shown, {})
    return shown, results


@contextmanager
def _console(source: Source, path: Path, *, waits: bool = True) -> Iterator[Shell]:
    with path.open("w", encoding="utf-8") as file, closing(source):
        yield Shell(source, PlainOutput(file, file), waits=waits)


def _session(shell: Shell, names: Iterable[str], path: Path, shown: dict[str, str], results: dict[str, object]) -> None:
    for name in names:
        for line in shell.registry.commands[name].examples:
            for before in BEFORE.get(line, ()):
                shell.execute(before)
            start, shell.last = path.stat().st_size, None
            try:
                shell.execute(line)
            except Quit:
                assert shell.status == 0, path.read_text(encoding="utf-8")
            text = path.read_bytes()[start:].decode().rstrip("\n")
            shown[line] = "\n".join(part for part in (NOTES.get(line, ""), text) if part)
            if shell.last is not None and name != "py":
                results[line] = json.loads(json.dumps(shell.last.json()))


def screens(image: Path) -> dict[str, str]:
    """What the screen is after the examples that fill it: the demo, where guest 2 works."""
    found = {}
    for line, (columns, lines) in SCREENS.items():
        with tempfile.TemporaryDirectory() as name:
            command = f"{sys.executable} -m vmdbg console {image} --symbols guest2={image.with_name('guest64.elf')} --serial null"
            with closing(Terminal(Path(name), command, columns=columns, lines=lines, PYTHONPATH=str(ROOT))) as terminal:
                terminal.sees("host> ")
                terminal.type("tbreak 2:work", "Enter", "continue", "Enter")
                terminal.sees("guest 2> ")
                terminal.type(line, "Enter")
                terminal.shows_full_screen(True)
                terminal.sees("guest 2> ", "\n stopped ")  # drawn last
                found[line] = terminal.settled()
    return found
