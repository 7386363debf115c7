"""The guest's serial port under a console: what it prints is shown line by line, what it reads is sent by a command."""

from __future__ import annotations

import re
from collections.abc import Callable

__all__ = ["ConsoleSerial"]

_SEQUENCE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
"""What a terminal of the guest's own would obey: colours, and questions where the cursor is."""
_LONGEST = 4096
"""Bytes of a line that is shown before its end has come."""


class ConsoleSerial:
    """Implements `vmdbg.platform.serial.Serial`. It outlives machines that are started over."""

    def __init__(self) -> None:
        self.show: Callable[[str], None] = lambda line: None
        self._out = bytearray()
        self._in = bytearray()
        self._seen = 0

    def write(self, data: bytes) -> None:
        self._out += data
        while (end := self._out.find(b"\n")) >= 0 or len(self._out) > _LONGEST:
            end = end if end >= 0 else len(self._out) - 1
            line = bytes(self._out[: end + 1])
            del self._out[: end + 1]
            self._show(line)

    def rest(self) -> None:
        """Called now and then: a line that nothing was added to since the last time is shown without its end, as a prompt is."""
        if self._out and len(self._out) == self._seen:
            self.flush()
        self._seen = len(self._out)

    def flush(self) -> None:
        """Show what has no end yet."""
        if self._out:
            line = bytes(self._out)
            self._out.clear()
            self._show(line)

    def _show(self, line: bytes) -> None:
        self.show(_SEQUENCE.sub("", line.decode("utf-8", "replace")).rstrip("\r\n"))

    def send(self, data: bytes) -> None:
        """For the guest to read."""
        self._in += data

    def receive(self) -> bytes:
        data = bytes(self._in)
        self._in.clear()
        return data

    def close(self) -> None:
        self.flush()
