"""A real terminal: tmux, typed into and looked at."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from itertools import count
from pathlib import Path

import pytest

from tests.patience import PATIENCE, until

_numbers = count()


class Terminal:
    """One window of a tmux server of its own."""

    def __init__(self, folder: Path, command: str, *, columns: int = 120, lines: int = 40, **environment: str) -> None:
        tmux = shutil.which("tmux")
        if tmux is None:
            pytest.skip("tmux, the terminal of this test, is not in PATH")
        self._tmux = [tmux, "-S", f"{folder}/tmux{next(_numbers)}", "-f", "/dev/null"]
        given = {"HOME": str(folder), "XDG_STATE_HOME": str(folder / "state"), "XDG_CONFIG_HOME": str(folder / "config"), **environment}
        settings = " ".join(f"{name}={value}" for name, value in given.items())
        clean = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "TMUX")}
        size = ["-x", str(columns), "-y", str(lines)]
        script = f"env {settings} {command}; echo left with $?; exec sleep 1000"
        self._run("new-session", "-d", "-s", "t", *size, script, environment=clean)

    def _run(self, *words: str, environment: dict[str, str] | None = None) -> str:
        done = subprocess.run([*self._tmux, *words], capture_output=True, text=True, check=True, timeout=PATIENCE, env=environment)
        return done.stdout

    def type(self, *keys: str) -> None:
        """Names of keys, as tmux has them, or text."""
        self._run("send-keys", "-t", "t", *keys)

    def screen(self, *, colours: bool = False) -> str:
        return self._run("capture-pane", "-t", "t", "-p", *(["-e"] if colours else []))

    def sees(self, *texts: str, without: str = "\0") -> str:
        """Wait for a screen with all of these and without that; the screen. Spaces at the ends of lines are not told.

        What is looked for together must be seen together: a screen may be looked at before all of it has been drawn.
        """
        wanted, screen = [text.rstrip(" ") for text in texts], ""

        def seen() -> bool:
            nonlocal screen
            screen = self.screen()
            return all(text in screen for text in wanted) and without not in screen

        until(seen, lambda: f"{wanted!r}:\n{screen}")
        return screen

    def finds(self, pattern: str) -> str:
        """Wait for what matches; the first group of it."""
        found: list[str] = []

        def seen() -> bool:
            found[:] = re.findall(pattern, self.screen(), re.MULTILINE)[:1]
            return bool(found)

        until(seen, lambda: f"{pattern!r}:\n{self.screen()}")
        return found[0]

    def settled(self) -> str:
        """The screen, once it has not changed for a while; where it has been seen to be complete, for all that may still come."""
        screen, before = self.screen(), ""
        while screen != before:
            time.sleep(0.5)
            screen, before = self.screen(), screen
        return screen.rstrip()

    def resize(self, columns: int, lines: int) -> None:
        self._run("resize-window", "-t", "t", "-x", str(columns), "-y", str(lines))

    def shows_full_screen(self, shown: bool) -> None:
        """Wait until it does, or does not."""
        until(lambda: (self._run("display", "-t", "t", "-p", "#{alternate_on}").strip() == "1") == shown, self.screen)

    def close(self) -> None:
        subprocess.run([*self._tmux, "kill-server"], capture_output=True, check=False, timeout=PATIENCE)
