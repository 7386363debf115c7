"""A server in a thread of its own, and blocking sockets to talk to it."""

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from gdbstub.example import Example
from gdbstub.packet import expand_runs, frame
from gdbstub.server import Server, new_event_loop
from tests.patience import PATIENCE

T = TypeVar("T")


class Serving:
    """The running server; `call` runs a function in its thread."""

    def __init__(self, target: Example, loop: asyncio.AbstractEventLoop) -> None:
        self.target = target
        self.loop = loop
        self.server = Server(target)
        self.port = 0

    def call(self, function: Callable[[], T]) -> T:
        async def run() -> T:
            return function()

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(PATIENCE)


@contextmanager
def serving(
    target: Example | None = None, factory: Callable[[], asyncio.AbstractEventLoop] = new_event_loop
) -> Iterator[Serving]:
    """Serve on a TCP port until the end of the block."""
    loop = factory()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    serving = Serving(target or Example(), loop)
    try:
        serving.port = asyncio.run_coroutine_threadsafe(serving.server.listen_tcp(), loop).result(PATIENCE)
        yield serving
    finally:
        serving.call(serving.server.close)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(PATIENCE)
        loop.close()


class Wire:
    """A blocking client of a TCP port or a Unix socket."""

    def __init__(self, address: int | str) -> None:
        if isinstance(address, int):
            self.socket = socket.create_connection(("127.0.0.1", address), PATIENCE)
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # as gdb does
        else:
            self.socket = socket.socket(socket.AF_UNIX)
            self.socket.settimeout(PATIENCE)
            self.socket.connect(address)
        self.data = b""

    def send(self, payload: bytes) -> None:
        self.socket.sendall(frame(payload))

    def read(self) -> bytes:
        """The next packet; EOFError at the end of the connection."""
        while True:
            start = self.data.find(b"$")
            end = self.data.find(b"#", start)
            if 0 <= start < end and end + 3 <= len(self.data):
                packet, self.data = self.data[start + 1 : end], self.data[end + 3 :]
                return expand_runs(packet)
            more = self.socket.recv(1 << 16)
            if not more:
                raise EOFError
            self.data += more

    def ask(self, payload: bytes) -> bytes:
        self.send(payload)
        return self.read()

    def __enter__(self) -> "Wire":
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()
