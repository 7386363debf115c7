"""Where the console's text goes: a terminal, also above a prompt that waits, or plain streams."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Protocol, TextIO

from vmdbg.console import paint

__all__ = ["Output", "PlainOutput", "TerminalOutput", "blocking", "clean"]

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def clean(text: str) -> str:
    """Without what would reach the terminal as commands: text of a guest, names in a file."""
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


class Output(Protocol):
    """`kind` is one of `paint.PALETTE`, "" for a command's text."""

    interactive: bool
    pager: bool

    @property
    def width(self) -> int: ...

    @property
    def height(self) -> int | None:
        """Lines of the screen; None where there is none."""

    def show(self, text: str, kind: str = "") -> None: ...

    def progress(self, line: str) -> None:
        """A line that the next one takes the place of; "" removes it."""

    def run(self, command: list[str], text: str | None = None) -> int:
        """A program with the terminal, `text` being its input; its status."""


class PlainOutput:
    """Scripts: results on standard output, errors on standard error."""

    interactive = False
    pager = False
    width, height = 100, None

    def __init__(self, out: TextIO | None = None, err: TextIO | None = None) -> None:
        self._out, self._err = out or sys.stdout, err or sys.stderr

    def show(self, text: str, kind: str = "") -> None:
        stream = self._err if kind == "error" else self._out
        stream.write(f"vmdbg: {text}\n" if kind == "error" else text + "\n")
        stream.flush()

    def progress(self, line: str) -> None:
        pass

    def run(self, command: list[str], text: str | None = None) -> int:
        self._out.flush()
        return _run(command, text, self._out)


def _run(command: list[str], text: str | None, out: TextIO | None) -> int:
    try:
        return subprocess.run(command, input=text, text=True, check=False, stdout=_descriptor(out), errors="replace").returncode
    except OSError as error:
        raise OSError(error.errno, f"{command[0]}: {error.strerror}") from None


def _descriptor(out: TextIO | None) -> int | TextIO | None:
    try:
        return out.fileno() if out is not None else None
    except (OSError, ValueError):
        return None


@contextlib.contextmanager
def blocking() -> Iterator[None]:
    """While somebody else reads the terminal: the event loop has it not block, and that is seen by all who have it open."""
    try:
        descriptor = sys.stdin.fileno()
        before = os.get_blocking(descriptor)
        os.set_blocking(descriptor, True)
    except (OSError, ValueError):
        yield
        return
    try:
        yield
    finally:
        os.set_blocking(descriptor, before)


class TerminalOutput:
    """A terminal with a prompt. `above` shows text above one that waits, False from it if none does."""

    interactive = True

    def __init__(self, out: TextIO | None = None) -> None:
        self._out = out or sys.stdout
        self.may_colour = self.colour = paint.may_colour(self._out)
        self.pager = True
        self._progress = False

    @property
    def width(self) -> int:
        return max(40, shutil.get_terminal_size((100, 30)).columns - 1)

    @property
    def height(self) -> int:
        return shutil.get_terminal_size((100, 30)).lines

    def painted(self, text: str, kind: str = "") -> str:
        if not self.colour:
            return text
        return paint.tinted(text, kind) if kind else paint.ansi(text)

    def show(self, text: str, kind: str = "") -> None:
        text = "\n".join(map(clean, text.split("\n")))
        painted = self.painted(text, kind)
        if not kind and self.pager and text.count("\n") + 3 > self.height and self._page(painted):
            return
        self.write(painted + "\n")

    def write(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()

    def _page(self, painted: str) -> bool:
        """Through the pager, if that can be run now."""
        command = os.environ.get("PAGER") or "less"
        if command.split()[0] == "less":
            command += " -RFX"
        try:
            return self.run(["sh", "-c", command], painted + "\n") == 0
        except OSError:
            return False

    def progress(self, line: str) -> None:
        if line or self._progress:
            self._progress = bool(line)
            self._out.write(f"\r\x1b[K{line[: self.width]}")
            self._out.flush()

    def run(self, command: list[str], text: str | None = None) -> int:
        self._out.flush()
        with blocking():
            return _run(command, text, None)
