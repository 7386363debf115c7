"""A console's shell on a machine of its own, without a terminal."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from vmdbg.console.serial import ConsoleSerial
from vmdbg.console.shell import Shell
from vmdbg.console.source import LiveSource
from vmdbg.debugger import Debugger
from vmdbg.machine import Config, Machine
from vmdbg.run import debug_file

ROOT = Path(__file__).resolve().parents[2]


class Kept:
    """An output that remembers: (kind, text)."""

    interactive = False
    pager = False
    width, height = 100, None

    def __init__(self) -> None:
        self.said: list[tuple[str, str]] = []
        self.programs: list[tuple[list[str], str | None]] = []
        self.bars: list[str] = []

    def show(self, text: str, kind: str = "") -> None:
        self.said.append((kind, text))

    def progress(self, line: str) -> None:
        self.bars.append(line)

    def run(self, command: list[str], text: str | None = None) -> int:
        self.programs.append((command, text))
        return 0


def live(image: Path, serial: ConsoleSerial | None = None) -> LiveSource:
    """A machine before its first instruction, with the demo's symbols."""

    def machine() -> Machine:
        made = Machine(image, Config(serial=serial or ConsoleSerial()))
        made.image = replace(made.image, debug_file=debug_file(str(image)))
        return made

    debugger = Debugger(machine(), lambda arguments: machine())
    for number, name in ((2, "guest64"), (5, "gueststray")):
        debugger.executables.assign(number, image.with_name(f"{name}.elf"))
    return LiveSource("demo", debugger)


class Talk:
    """`talk("here")` is what a line shows."""

    def __init__(self, image: Path, folder: Path, *, waits: bool = True) -> None:
        self.source = live(image)
        self.output = Kept()
        self.folder = folder
        self.shell = Shell(self.source, self.output, waits=waits, folders=[folder])
        self.control = self.source.control

    def __call__(self, line: str) -> str:
        """All that a line shows, whatever its kind."""
        self.output.said.clear()
        self.shell.execute(line)
        return "\n".join(text for _, text in self.output.said)

    def errors(self, line: str) -> list[str]:
        self(line)
        return [text for kind, text in self.output.said if kind == "error"]

    @property
    def pc(self) -> int:
        found = self.control.pc(self.control.selected)
        assert found is not None
        return found

    def at(self) -> str:
        """The symbol where the selected thread is."""
        return self.source.symbol(self.control.selected.pid, self.pc)

    def close(self) -> None:
        self.source.close()
