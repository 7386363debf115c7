"""The guest's serial port under a console: what it prints is shown line by line, what it reads is sent by a command."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["ConsoleSerial"]

_LONGEST = 4096
"""Bytes of a line that is shown before its end has come."""


class ConsoleSerial:
    """Implements `vmdbg.platform.serial.Serial`. It outlives machines that are started over."""

    def __init__(self) -> None:
        self.show: Callable[[str], None] = lambda line: None
        self._out = bytearray()
        self._in = bytearray()

    def write(self, data: bytes) -> None:
        self._out += data
        while (end := self._out.find(b"\n")) >= 0 or len(self._out) > _LONGEST:
            end = end if end >= 0 else len(self._out) - 1
            line = bytes(self._out[: end + 1])
            del self._out[: end + 1]
            self._show(line)

    def flush(self) -> None:
        """Show what has no end yet, as a prompt."""
        if self._out:
            line = bytes(self._out)
            self._out.clear()
            self._show(line)

    def _show(self, line: bytes) -> None:
        self.show(line.decode("utf-8", "replace").rstrip("\r\n"))

    def send(self, data: bytes) -> None:
        """For the guest to read."""
        self._in += data

    def receive(self) -> bytes:
        data = bytes(self._in)
        self._in.clear()
        return data

    def close(self) -> None:
        self.flush()
