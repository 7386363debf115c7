"""Stock lldb, driven by command lines: every lldb there is in PATH."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
import time

from tests.patience import PATIENCE

__all__ = ["WAITS", "Lldb", "lldb", "programs"]

WAITS = f"settings set plugin.process.gdb-remote.packet-timeout {PATIENCE:.0f}"
"""It gives a stub up else that does not answer for five seconds."""


def programs() -> list[str]:
    """`lldb`, and those of other versions beside it (`lldb-19`); an empty list if there is none."""
    found = [shutil.which(name) for name in ("lldb", *(f"lldb-{version}" for version in range(30, 13, -1)))]
    return list({os.path.realpath(path): path for path in reversed(found) if path is not None}.values())[::-1]


def lldb(program: str, *commands: str) -> str:
    """What it printed of commands, one after the other, to the first that fails."""
    done = subprocess.run(
        [program, "--no-lldbinit", "--batch", *(word for line in (WAITS, *commands) for word in ("-o", line))],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=PATIENCE, check=False,
    )  # fmt: skip
    return done.stdout


class Lldb:
    """A running lldb that takes a command while what it debugs runs; `text` is everything it has printed."""

    def __init__(self, program: str) -> None:
        self.process = subprocess.Popen(
            [program, "--no-lldbinit", "--no-use-colors", "-o", WAITS], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, bufsize=1,
        )  # fmt: skip
        self.text = ""
        self._seen = 0
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        stream = self.process.stdout
        assert stream is not None
        while data := os.read(stream.fileno(), 1 << 16):
            self.text += data.decode(errors="replace")

    def __call__(self, command: str, expected: str) -> str:
        """Send a command; what was printed up to the expected text."""
        assert self.process.stdin is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        until = time.monotonic() + PATIENCE
        while (at := self.text.find(expected, self._seen)) < 0:
            assert time.monotonic() < until, (command, expected, self.text)
            time.sleep(0.01)
        printed = self.text[self._seen : at + len(expected)]
        self._seen = at + len(expected)
        return printed

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
