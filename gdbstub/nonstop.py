"""Non-stop mode: threads stop one by one, the others go on, and stops are told as notifications.

The client has its answer to each packet at once.  Stops wait in a queue: the first one is sent by itself (%Stop), the
others as the client asks for them (vStopped), until it is told that there are no more.
"""

from __future__ import annotations

from binascii import hexlify
from collections import deque
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from gdbstub.packet import notification
from gdbstub.replies import exit_reply, safe_stop_reply, thread_end_reply
from gdbstub.target import (
    CONTINUE,
    Action,
    Created,
    Event,
    Exited,
    NonStop,
    Output,
    Signal,
    Stop,
    ThreadEnded,
    ThreadId,
    ThreadStarted,
)

if TYPE_CHECKING:
    from gdbstub.session import Session

__all__ = ["NonStopMode"]

_KEPT_LINES = 100


class _Told(NamedTuple):
    """What is to be told; `extra` goes into a stop reply, and `registers` says whether some go."""

    event: Stop | Exited | ThreadEnded
    extra: bytes = b""
    registers: bool = True

    @property
    def pid(self) -> int:
        return self.event.pid if isinstance(self.event, Exited) else self.event.thread.pid


class NonStopMode:
    """What a session has besides while its client is in non-stop mode; `held` are the threads that stand still."""

    def __init__(self, session: Session, target: NonStop) -> None:
        self.session = session
        self.target = target
        self.held: dict[ThreadId, Stop] = {}
        self.said: deque[str] = deque(maxlen=_KEPT_LINES)
        """Text that awaits a `monitor` command: between packets there is no place for it, the client would take it for a
        reply."""
        self._queue: deque[_Told] = deque()
        self._telling = False
        self._alone = False
        self._withheld = 0  # packets to answer before the next notification
        self.hold(thread for thread, _ in session.threads())

    # -- packets

    def reason(self) -> bytes:
        """`?`: all threads that stand still, the first one here and the others as stops of their own, later.

        While it connects GDB looks for more once, behind the OK of vStopped, and (13 to 18) aborts if it finds a second stop.
        Its next packet says that it is past that.
        """
        ended = [told for told in self._queue if isinstance(told.event, Exited)]
        self._queue = deque([*ended, *map(_Told, self.held.values())])
        self._telling = self._alone = bool(self._queue)
        return self._head() if self._queue else b"OK"

    def told(self) -> bytes:
        """vStopped: the client has the last one; the next, or OK for no more."""
        if self._telling and self._queue:
            self._queue.popleft()
        self._telling = bool(self._queue) and not self._alone
        if self._alone:
            self._alone, self._withheld = False, 2  # this packet and the next
        return self._head() if self._telling else b"OK"

    def resume(self, actions: Mapping[ThreadId, Action]) -> None:
        """Have threads run; those that run already, or whose stop the client has not been told of, are left alone."""
        untold = {told.event.thread for told in self._queue if isinstance(told.event, Stop)}
        going = {thread: action for thread, action in actions.items() if thread in self.held and thread not in untold}
        for thread in list(going):
            image = self.session.image_of_copy(thread.pid, going)
            if image:
                del going[thread]
                self.stop(Stop(thread), b"exec:%b;" % hexlify(image.encode()))
        for thread in going:
            del self.held[thread]
        if going:
            self.target.go(going)

    def hold(self, threads: Iterable[ThreadId]) -> None:
        """Have threads stand still, without telling."""
        running = [thread for thread in threads if thread not in self.held]
        self.held |= {thread: Stop(thread, Signal.NONE) for thread in running}
        self.target.hold(running)

    def stop(self, stop: Stop, extra: bytes = b"") -> None:
        """A thread stands still for this reason: tell."""
        self.held[stop.thread] = stop
        self._queue.append(_Told(stop, extra))

    def halt(self, threads: Iterable[ThreadId], signal: int = Signal.NONE) -> None:
        """Stop threads that run, and tell of each."""
        running = [thread for thread in threads if thread not in self.held]
        self.target.hold(running)
        for thread in running:
            self.stop(Stop(thread, signal))

    def tell(self, pid: int) -> None:
        """The client has attached to an inferior: tell of its threads, which stand still since.

        GDB would take their registers for those of its own default architecture: it reads the description later.
        """
        for thread, stop in self.held.items():
            if thread.pid == pid:
                self._queue.append(_Told(stop, registers=False))

    def interrupt(self) -> None:
        """^C: one of the threads that run stops, the selected one if it does."""
        running = [thread for thread, _ in self.session.threads() if thread not in self.held]
        if running:
            self.halt([self.session.general if self.session.general in running else running[0]], Signal.INT)

    # -- events

    def event(self, event: Event) -> None:
        """What came of a slice."""
        session = self.session
        if isinstance(event, Stop):
            if event.thread.pid not in session.attached:
                self.target.go({event.thread: CONTINUE})
                return
            if event.text:
                self.said.append(event.text + "\n")
            self.stop(event)
        elif isinstance(event, Output):
            self.said.append(event.text)
        elif isinstance(event, Exited):
            if event.pid in session.attached:
                session.forget(event.pid)
                self._queue.append(_Told(event))
        elif isinstance(event, Created):
            self._created(event)
        elif event.thread.pid in session.attached and session.thread_events:
            if isinstance(event, ThreadStarted):
                self.hold([event.thread])
                self.stop(Stop(event.thread), b"create:;")
            else:
                self.held.pop(event.thread, None)
                self._queue.append(_Told(event))

    def _created(self, event: Created) -> None:
        session = self.session
        if session.forks(event) and event.parent not in self.held:
            session.attach_copy(event.thread.pid)
            self.hold([event.parent])
            self.stop(Stop(event.parent), b"fork:%b;" % session.thread_name(event.thread))
        else:
            self.said.append(session.appearance(event))

    def forget(self, pid: int) -> None:
        """An inferior is gone, or let go of."""
        self.held = {thread: stop for thread, stop in self.held.items() if thread.pid != pid}
        # The first one may be on its way: it stays until the client has acknowledged it.
        sent = self._telling and bool(self._queue)
        self._queue = deque(told for n, told in enumerate(self._queue) if told.pid != pid or (sent and n == 0))

    def answered(self) -> None:
        """A packet was."""
        if self._withheld:
            self._withheld -= 1

    def settle(self) -> None:
        """Behind each packet and slice: tell of the first stop, and see whether there is something to run."""
        if self._queue and not self._telling and not self._withheld:
            self._telling = True
            self.session.send_plain(notification(b"Stop:" + self._head()))
        self.session.running = self.target.moves()

    def _head(self) -> bytes:
        event, extra, registers = self._queue[0]
        if isinstance(event, Exited):
            return exit_reply(self.session, event)
        if isinstance(event, ThreadEnded):
            return thread_end_reply(self.session, event)
        return safe_stop_reply(self.session, event, extra, registers)
