"""Where a UART's bytes go to and come from outside the machine.

A backend never calls into the machine.  The machine asks `receive()` at points of guest time that it chooses and
records, and hands the bytes to `Uart.receive`; so a recorded run can be repeated without the backend.
"""

import os
import select
import socket
import sys
import termios
from typing import BinaryIO, Protocol


class SerialError(Exception):
    """A backend cannot be opened: one line with the reason and the remedy."""


class Serial(Protocol):
    """A backend.  `receive` returns what has arrived, without waiting; empty if nothing."""

    def write(self, data: bytes) -> None: ...

    def receive(self) -> bytes: ...

    def close(self) -> None: ...


class NullSerial:
    """Drops output, has no input."""

    def write(self, data: bytes) -> None:
        pass

    def receive(self) -> bytes:
        return b""

    def close(self) -> None:
        pass


class BufferSerial:
    """Keeps output in `output`; input is what the owner appends to `input`.  For tests and the Python API."""

    def __init__(self) -> None:
        self.output = bytearray()
        self.input = bytearray()

    def write(self, data: bytes) -> None:
        self.output += data

    def receive(self) -> bytes:
        data = bytes(self.input)
        self.input.clear()
        return data

    def close(self) -> None:
        pass


class FileSerial:
    """Appends output to a file that is truncated first; has no input."""

    def __init__(self, path: str) -> None:
        try:
            self._file: BinaryIO = open(path, "wb", buffering=0)  # noqa: SIM115 - closed by close()
        except OSError as error:
            raise SerialError(f"serial output {path!r}: {error.strerror}; name a file that can be written") from error
        except ValueError as error:  # a NUL in the name
            raise SerialError(f"serial output {path!r}: {error}; name a file that can be written") from error

    def write(self, data: bytes) -> None:
        self._file.write(data)

    def receive(self) -> bytes:
        return b""

    def close(self) -> None:
        self._file.close()


class StdioSerial:
    """The process's standard input and output.

    On a terminal, line editing and echo are off until `close`: the guest echoes.  Signals stay on, so that Ctrl-C
    belongs to the debugger.
    """

    def __init__(self) -> None:
        self._input = sys.stdin.fileno()
        self._open = True
        self._saved: list[int | list[bytes | int]] | None = None
        if os.isatty(self._input):
            self._saved = termios.tcgetattr(self._input)
            mode = termios.tcgetattr(self._input)
            mode[3] &= ~(termios.ICANON | termios.ECHO)
            termios.tcsetattr(self._input, termios.TCSANOW, mode)

    def write(self, data: bytes) -> None:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()

    def receive(self) -> bytes:
        if not self._open or not select.select([self._input], [], [], 0)[0]:
            return b""
        data = os.read(self._input, 4096)
        self._open = bool(data)
        return data

    def close(self) -> None:
        if self._saved is not None:
            termios.tcsetattr(self._input, termios.TCSANOW, self._saved)
            self._saved = None


class TcpSerial:
    """A listener on the loopback interface that serves one client at a time; output without a client is dropped.

    `port` is the port that listens: the system's choice if 0 was asked for.
    """

    def __init__(self, port: int) -> None:
        try:
            self._listener = socket.create_server(("127.0.0.1", port))
        except (OSError, OverflowError) as error:
            raise SerialError(f"serial TCP port {port} on 127.0.0.1: {error}; choose another port") from error
        self._listener.setblocking(False)
        self._client: socket.socket | None = None
        self.port: int = self._listener.getsockname()[1]

    def write(self, data: bytes) -> None:
        self._accept()
        if self._client is None:
            return
        try:
            self._client.sendall(data)
        except OSError:  # also the timeout: a client that stopped reading must not stop the machine
            self._drop()

    def receive(self) -> bytes:
        self._accept()
        if self._client is None or not select.select([self._client], [], [], 0)[0]:
            return b""
        try:
            data = self._client.recv(4096)
        except OSError:
            data = b""
        if not data:
            self._drop()
        return data

    def close(self) -> None:
        self._drop()
        self._listener.close()

    def _accept(self) -> None:
        if self._client is None:
            try:
                self._client = self._listener.accept()[0]
            except BlockingIOError:
                return
            self._client.settimeout(1)

    def _drop(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None


def open_serial(name: str) -> Serial:
    """The backend called `null`, `stdio`, `file:PATH` or `tcp:PORT`.  SerialError if it cannot be opened."""
    kind, _, argument = name.partition(":")
    if name == "null":
        return NullSerial()
    if name == "stdio":
        return StdioSerial()
    if kind == "file" and argument:
        return FileSerial(argument)
    if kind == "tcp" and argument.isdecimal() and argument.isascii() and int(argument) < 65536:
        return TcpSerial(int(argument))
    raise SerialError(f"serial backend {name!r} is unknown; use null, stdio, file:PATH or tcp:PORT (0..65535)")
