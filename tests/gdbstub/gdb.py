"""Stock gdb, driven through its machine interface."""

import re
import shutil
import signal
import sysconfig
import time
from collections import deque
from pathlib import Path
from typing import Any

from pygdbmi.gdbcontroller import GdbController

from tests.patience import PATIENCE

__all__ = ["GDBS", "Gdb", "NonStopGdb", "captured", "newest"]

GDBS = [str(path) for path in (shutil.which("gdb"), Path(sysconfig.get_path("scripts"), "gdb")) if path and Path(path).exists()]
"""The gdb of the system, and the one that the package gdb-for-pwndbg puts beside Python."""


def newest() -> str | None:
    """The gdb that PyPI carries (gdb-for-pwndbg), if it is installed beside this Python."""
    program = str(Path(sysconfig.get_path("scripts"), "gdb"))
    return program if program in GDBS else None


def captured(pattern: str, text: str) -> str:
    """The first group of a pattern that the text must have."""
    found = re.search(pattern, text)
    assert found is not None, f"no {pattern!r} in {text!r}"
    return found[1]


class Gdb:
    """A gdb without a program; `text` is everything it has printed."""

    def __init__(self, program: str = "gdb") -> None:
        # Without the second argument every command takes the 50 ms that `_until` asks for.
        self.controller = GdbController([program, "--nx", "--quiet", "--interpreter=mi3"], 0.0005)
        self.text = ""
        self.stops: deque[dict[str, Any]] = deque()
        self._responses: deque[dict[str, Any]] = deque()
        self(f"set remotetimeout {PATIENCE:.0f}")
        self("set confirm off")
        self("set pagination off")

    def __call__(self, command: str) -> str:
        """Carry out a command of gdb's command line; what it printed, errors too. Waits for the stop of a resume."""
        printed, result = self._until(self._console(command), "done", "error", "running")
        if result == "running":
            printed += self.wait()
        return printed

    @staticmethod
    def _console(command: str) -> str:
        quoted = command.replace("\\", "\\\\").replace('"', '\\"')
        return f'-interpreter-exec console "{quoted}"'

    def start(self, command: str) -> None:
        """Resume and do not wait for the stop."""
        assert self._until(f'-interpreter-exec console "{command}"', "running")[1] == "running"

    def wait(self) -> str:
        """Wait for the stop of a resumed program; what was printed until then."""
        return self._until(None, "stopped")[0]

    def interrupt(self) -> None:
        """^C, as the terminal sends it."""
        process = self.controller.gdb_process
        assert process is not None
        process.send_signal(signal.SIGINT)

    def value(self, expression: str) -> int:
        """An integer expression's value."""
        return int(self(f"output/d {expression}").strip())

    def _until(self, command: str | None, *ends: str) -> tuple[str, str]:
        if command is not None:
            self.controller.write(command, read_response=False)
        printed, deadline = "", time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            if not self._responses:
                self._responses.extend(self.controller.get_gdb_response(0.05, raise_error_on_timeout=False))
                continue
            response = self._responses.popleft()
            if response["type"] in ("console", "target", "log") and response["payload"]:
                printed += response["payload"]
            if response["type"] == "notify" and response["message"] == "stopped":
                self.stops.append(response["payload"] or {})
            if response["type"] in ("result", "notify") and response["message"] in ends:
                if response["message"] == "error":
                    printed += response["payload"]["msg"]
                self.text += printed
                return printed, response["message"]
        raise AssertionError(f"gdb does not answer {command!r}; it printed {self.text + printed!r}")

    def close(self) -> None:
        """End gdb, whatever it does."""
        self.controller.exit()


class NonStopGdb(Gdb):
    """A gdb in non-stop mode: it resumes by `mi`, and `stop` waits for the next thread that stops."""

    def __init__(self, program: str = "gdb") -> None:
        super().__init__(program)
        for setting in ("osabi none", "displaced-stepping off", "schedule-multiple on", "mi-async on", "non-stop on"):
            self(f"set {setting}")

    def __call__(self, command: str) -> str:
        """As ever, but nothing waits for a stop."""
        return self._until(self._console(command), "done", "error")[0]

    def connect(self, port: int, stops: int = 1) -> None:
        """Connect; so many threads stand still."""
        self.mi(f"-target-select extended-remote 127.0.0.1:{port}", "connected")
        for _ in range(stops):
            self.stop()

    def mi(self, command: str, *ends: str) -> str:
        """Carry out a command of the machine interface; what it printed."""
        printed, result = self._until(command, "error", *(ends or ("done", "running")))
        assert result != "error", printed
        return printed

    def stop(self) -> dict[str, Any]:
        """The next stop of a thread."""
        if not self.stops:
            self._until(None, "stopped")
        return self.stops.popleft()

    def attach(self, pid: int, symbols: Path) -> dict[str, Any]:
        """Attach to a process in a new inferior, which is selected; the stop of its first thread."""
        added = self("add-inferior").split("Added inferior ")[1].split()[0]
        self(f"inferior {added}")
        self(f"file {symbols}")
        self.mi(f"-target-attach {pid}")
        return self.stop()
