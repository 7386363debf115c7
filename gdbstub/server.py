"""The socket: clients on TCP or a Unix socket, in the thread of the event loop.

Protocol and engine share that thread, and replies leave from `data_received` (see `link.py`): a queue or a second thread
would cost more than most packets do. While the machine runs, slices and input take turns.
"""

import asyncio
import contextlib
import logging
import os
import socket
import stat
from collections.abc import Callable, Iterable
from typing import cast

from gdbstub.link import Link
from gdbstub.packet import frame
from gdbstub.recording import RecordedSession, Recorder
from gdbstub.session import Point, Session
from gdbstub.sharing import Share, Sharing
from gdbstub.target import Attentive, Target

__all__ = ["Server", "new_event_loop"]

log = logging.getLogger(__name__)

_REFUSAL = b"+" + frame(b"E.another client is connected, and no process is left that nobody debugs; disconnect it first")
_REFUSING_SECONDS = 30.0
"""So long a client that is refused may take to hear why, or to say that it observes: it may be busy. Most leave by themselves."""
_OBSERVE = frame(b"QObserve")
"""From a client that was refused: it will only ask `monitor` commands."""


def new_event_loop() -> asyncio.AbstractEventLoop:
    """uvloop's where it is installed: it doubles the rate of requests."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    return loop


class Server:
    """Offers a target to clients. Several at once share it (`gdbstub.sharing`), each with inferiors of its own.

    `attach` is the pid that a client alone starts attached to; the target's first inferior if None. Others start with the
    first that nobody debugs, and are refused if there is none. `recorder` writes down what clients and stub say.
    """

    def __init__(self, target: Target, attach: int | None = None, recorder: Recorder | None = None) -> None:
        self._target = target
        self._attentive = target if isinstance(target, Attentive) else None
        self._attach = attach
        self.recorder = recorder
        self._servers: list[asyncio.Server] = []
        self._paths: list[str] = []
        self._sharing = Sharing(target)
        self._clients: dict[_Client, tuple[Session, Share]] = {}
        self._handle: asyncio.Handle | None = None
        self._kept: set[Point] = set()  # breakpoints that clients have left behind
        # Called before a client is served.
        self.arriving: Callable[[], object] = lambda: None
        # The last client's that has gone; it may have left the machine running.
        self._gone: Session | None = None

    async def listen_tcp(self, port: int = 0, host: str = "127.0.0.1") -> int:
        """Listen on a TCP port; the port, chosen by the system for 0.

        The protocol knows no passwords: who reaches an address other than loopback's owns the target and this process.
        OSError if the port is taken or the address is not one of this machine's.
        """
        server = await asyncio.get_running_loop().create_server(self._accept, host, port)
        self._servers.append(server)
        chosen: int = server.sockets[0].getsockname()[1]
        log.info("listening on %s:%d", host, chosen)
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
            listener.listen(100)  # at once: who sees the socket may connect
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
        return bool(self._clients)

    @property
    def running(self) -> bool:
        """Whether a client, present or gone after a detach, lets the machine run in slices."""
        return any(session.running or session.detached for session in self._sessions())

    def _sessions(self) -> list[Session]:
        present = [session for session, _ in self._clients.values()]
        return present if present or self._gone is None else [self._gone]

    def close(self) -> None:
        """Stop listening, drop the clients and stop the machine."""
        for server in self._servers:
            server.close()
        self._servers.clear()
        for path in self._paths:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
        self._paths.clear()
        for client in list(self._clients):
            client.abort()
        self.stop_detached()

    def _accept(self) -> "_Client":
        return _Client(self)

    # -- for the client's protocol

    def connected(self, client: "_Client", write: Callable[[bytes], object], *, observes: bool = False) -> Session | None:
        """A session for a new client; None if there is nothing for it to debug. One that only `observes` needs nothing."""
        attach = self._attach
        kept: Iterable[Point] = ()
        if not observes:
            self.arriving()
        if observes:
            attach = 0
        elif self._clients:
            attach = self._sharing.free()
            if attach is None or any(session.non_stop for session in self._sessions()):
                return None
        else:
            self.stop_detached()
            kept, self._kept = self._kept, set()
        share = self._sharing.join()
        target = cast(Target, share)  # what a share does not have itself it has from the target
        session = (
            Session(target, write, attach, kept) if self.recorder is None
            else RecordedSession(self.recorder, target, write, attach, kept)
        )  # fmt: skip
        self._clients[client] = session, share
        return session

    def watch_input(self) -> None:
        """Tell the target where requests arrive, if that wants to know: those of the client that came last."""
        if self._attentive is not None:
            last = next(reversed(self._clients), None)
            self._attentive.watch_input(-1 if last is None else last.descriptor)

    def disconnected(self, client: "_Client") -> None:
        """A client with a session is gone."""
        self._gone, share = self._clients.pop(client)
        self._gone.close()
        self._kept.update(self._gone.breakpoints)
        self._sharing.leave(share)
        self.watch_input()
        self.schedule()

    def schedule(self) -> None:
        """Have the machine run, behind whatever input is waiting, if it may."""
        if self._handle is None and not self._waits():
            self._handle = asyncio.get_running_loop().call_soon(self._slice)

    def _waits(self) -> bool:
        """Whether there is nothing to run, or to tell a client.

        A client that does not read what the machine prints stops it until it does.
        """
        if not self.running or any(session.paused for session in self._sessions()):
            return True
        return self._sharing.held and not any(share.events for _, share in self._clients.values())

    def _slice(self) -> None:
        self._handle = None
        for session in self._sessions():
            if (session.running or session.detached) and not session.paused:
                session.slice()
        for client in list(self._clients):
            client.look()
        self.schedule()

    def stop_detached(self) -> None:
        """Stop a machine that the last client has left running."""
        if self._gone is not None and self._gone.detached:
            self._gone.detached = False
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
            log.warning("refused a client: others debug every process")
            stream.write(_REFUSAL)
            asyncio.get_running_loop().call_later(_REFUSING_SECONDS, self._leave)
        else:
            self._server.watch_input()
            log.info("a client connected")
            self._converse(self._session)

    def data_received(self, data: bytes) -> None:
        session = self._session
        if session is not None:
            session.receive(data)
            self._converse(session)
        elif _OBSERVE in data and self._link is not None:
            # It does not want to debug: it has questions.
            self._session = self._server.connected(self, self._link.write, observes=True)
            self._link.write(b"+" + frame(b"OK"))
        elif self._transport is not None:
            # GDB shows the reason only if it gets it as the answer to its second packet; the first has been answered.
            packets = data.count(b"#")
            self._transport.write(_REFUSAL * (packets if self._refused else max(packets - 1, 0)))
            self._refused += packets

    @property
    def descriptor(self) -> int:
        """Where its requests arrive."""
        return -1 if self._link is None else self._link.fileno()

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
        self._server.schedule()

    def _leave(self) -> None:
        """A refused client has heard why."""
        if self._session is None and self._transport is not None:
            self._transport.close()

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

    def eof_received(self) -> None:
        # It is gone now, and not when the transport has closed: who asks next, as soon as this client has left, finds it gone.
        self._gone(None)

    def connection_lost(self, error: Exception | None) -> None:
        self._gone(error)
        if self._link is not None:
            self._link.close()

    def _gone(self, error: Exception | None) -> None:
        if self._session is not None:
            log.info("the client disconnected%s", f": {error}" if error else "")
            self._session = None
            self._server.disconnected(self)

    def abort(self) -> None:
        """Drop the connection."""
        if self._transport is not None:
            self._transport.abort()


def _answers(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(path) == 0
