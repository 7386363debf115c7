"""The socket: one client at a time, on TCP loopback or a Unix socket, in the thread of the event loop.

Protocol and engine share that thread, and replies leave from `data_received` (see `link.py`): a queue or a second thread
would cost more than most packets do. While the machine runs, slices and input take turns.
"""

import asyncio
import contextlib
import logging
import os
import socket
import stat
from collections.abc import Callable
from typing import cast

from gdbstub.link import Link
from gdbstub.packet import frame
from gdbstub.session import Session
from gdbstub.target import Attentive, Target

__all__ = ["Server", "new_event_loop"]

log = logging.getLogger(__name__)

_REFUSAL = b"+" + frame(b"E.another client is connected; disconnect it first")
_REFUSING_SECONDS = 1.0


def new_event_loop() -> asyncio.AbstractEventLoop:
    """uvloop's where it is installed: it doubles the rate of requests."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    return loop


class Server:
    """Offers a target to clients, one after the other; a second one at the same time is refused.

    `attach` is the pid a client starts attached to; the target's first inferior if None.
    """

    def __init__(self, target: Target, attach: int | None = None) -> None:
        self._target = target
        self._attentive = target if isinstance(target, Attentive) else None
        self._attach = attach
        self._servers: list[asyncio.Server] = []
        self._paths: list[str] = []
        self._client: _Client | None = None
        self._handle: asyncio.Handle | None = None
        self._session: Session | None = None

    async def listen_tcp(self, port: int = 0) -> int:
        """Listen on 127.0.0.1 only: the protocol knows no passwords. The port, chosen by the system for 0.

        OSError if the port is taken.
        """
        server = await asyncio.get_running_loop().create_server(self._accept, "127.0.0.1", port)
        self._servers.append(server)
        chosen: int = server.sockets[0].getsockname()[1]
        log.info("listening on 127.0.0.1:%d", chosen)
        return chosen

    async def listen_unix(self, path: str) -> None:
        """Listen on a Unix socket of mode 0600. A socket nobody listens on is replaced.

        OSError if the path is taken by anything else.
        """
        with contextlib.suppress(FileNotFoundError):
            if stat.S_ISSOCK(os.lstat(path).st_mode) and not _answers(path):
                os.unlink(path)
        listener = socket.socket(socket.AF_UNIX)
        mask = os.umask(0o177)  # the mode must be right before anyone can connect
        try:
            listener.bind(path)
        except OSError as error:
            listener.close()
            raise OSError(error.errno, f"cannot listen on {path}: {error.strerror}") from error
        finally:
            os.umask(mask)
        self._servers.append(await asyncio.get_running_loop().create_unix_server(self._accept, sock=listener))
        self._paths.append(path)
        log.info("listening on %s", path)

    @property
    def has_client(self) -> bool:
        """Whether a client is connected."""
        return self._client is not None

    @property
    def running(self) -> bool:
        """Whether a client, present or gone after a detach, lets the machine run in slices."""
        session = self._session
        return session is not None and (session.running or session.detached)

    def close(self) -> None:
        """Stop listening, drop the client and stop the machine."""
        for server in self._servers:
            server.close()
        self._servers.clear()
        for path in self._paths:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
        self._paths.clear()
        if self._client is not None:
            self._client.abort()
        self._halt_detached()

    def _accept(self) -> "_Client":
        return _Client(self)

    # -- for the client's protocol

    def connected(self, client: "_Client", write: Callable[[bytes], object]) -> Session | None:
        """A session for a new client; None if there is one already."""
        if self._client is not None:
            return None
        self._halt_detached()
        kept = () if self._session is None else self._session.breakpoints
        self._session = Session(self._target, write, self._attach, kept)
        self._client = client
        return self._session

    def watch_input(self, descriptor: int) -> None:
        """Tell the target where the client's requests arrive, if that wants to know."""
        if self._attentive is not None:
            self._attentive.watch_input(descriptor)

    def disconnected(self) -> None:
        """The client with the session is gone."""
        self._client = None
        if self._session is not None:
            self._session.close()

    def schedule(self) -> None:
        """Have the machine run, behind whatever input is waiting."""
        if self._handle is None:
            self._handle = asyncio.get_running_loop().call_soon(self._slice)

    def _slice(self) -> None:
        self._handle = None
        session = self._session
        # A client that does not read what the machine prints stops it until it does.
        if session is not None and (session.running or session.detached) and not session.paused:
            session.slice()
            if self._client is not None:
                self._client.look()
            self.schedule()

    def _halt_detached(self) -> None:
        if self._session is not None and self._session.detached:
            self._session.detached = False
            self._target.halt()


class _Client(asyncio.Protocol):
    """The transport of one client."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._session: Session | None = None
        self._transport: asyncio.Transport | None = None
        self._link: Link | None = None
        self._refused = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        stream = cast(asyncio.Transport, transport)  # a stream server makes no others
        self._transport = stream
        self._link = Link(stream)
        self._session = self._server.connected(self, self._link.write)
        if self._session is None:
            log.warning("refused a second client: the first is still connected")
            stream.write(_REFUSAL)
            asyncio.get_running_loop().call_later(_REFUSING_SECONDS, stream.close)
        else:
            self._server.watch_input(self._link.fileno())
            log.info("a client connected")
            self._converse(self._session)

    def data_received(self, data: bytes) -> None:
        session = self._session
        if session is not None:
            session.receive(data)
            self._converse(session)
        elif self._transport is not None:
            # GDB shows the reason only if it gets it as the answer to its second packet; the first has been answered.
            packets = data.count(b"#")
            self._transport.write(_REFUSAL * (packets if self._refused else max(packets - 1, 0)))
            self._refused += packets

    def look(self) -> None:
        """Take what came while the machine ran."""
        if self._link is not None and self._session is not None and (data := self._link.take()):
            self.data_received(data)

    def _converse(self, session: Session) -> None:
        """Go on with a client that sends its next request at once, until it lets the machine run."""
        link = self._link
        assert link is not None
        turn_ends = link.turn_ends()
        while not (session.running or session.detached or session.paused) and (data := link.follow(turn_ends)):
            session.receive(data)
        if session.running or session.detached:
            self._server.schedule()

    def pause_writing(self) -> None:
        # The client does not read its replies: make no more, and take no more requests.
        if self._session is not None and self._transport is not None:
            self._session.paused = True
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        if self._session is not None and self._transport is not None:
            self._session.paused = False
            self._transport.resume_reading()
            self.data_received(b"")

    def connection_lost(self, error: Exception | None) -> None:
        if self._session is not None:
            log.info("the client disconnected%s", f": {error}" if error else "")
            self._session = None
            self._server.watch_input(-1)
            self._server.disconnected()
        if self._link is not None:
            self._link.close()

    def abort(self) -> None:
        """Drop the connection."""
        if self._transport is not None:
            self._transport.abort()


def _answers(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(path) == 0
