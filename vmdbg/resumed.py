"""What the client has resumed, and whose stops it therefore expects."""

from __future__ import annotations

from collections.abc import Mapping

from gdbstub.target import Action, ThreadId
from vmdbg.holds import Holds
from vmdbg.inferiors import Inferiors
from vmdbg.stepping import Manner


class Resumed:
    """Stopping together, these are the threads of the last resume; one by one, those of attached inferiors but for `holds`."""

    def __init__(self, inferiors: Inferiors, holds: Holds) -> None:
        self.inferiors = inferiors
        self.holds = holds
        self.manner = Manner()
        self.attached: set[int] = set()
        self._acting: dict[ThreadId, Action] = {}
        """Stopping together: the threads that the client resumed."""
        self._resting: set[ThreadId] = set()
        """Threads of the same inferiors that it did not resume."""

    def set(self, actions: Mapping[ThreadId, Action]) -> None:
        """A resume of all that stopped together."""
        self._acting = dict(actions)
        pids = {thread.pid for thread in actions}
        self._resting = {thread for pid in pids for thread in self.inferiors.thread_ids(pid)} - actions.keys()

    def acts(self, thread: ThreadId) -> bool:
        """Whether the client expects stops of a thread: it runs, for the client, and is one of those chosen to stop.

        Stopping together, a thread that is new in what the client resumed runs for it, too.
        """
        if self.manner.chosen is not None and thread.pid not in self.manner.chosen:
            return False
        if self.holds.active:
            return thread.pid in self.attached and thread not in self.holds
        return thread in self._acting or (
            thread not in self._resting and any(other.pid == thread.pid for other in self._acting)
        )

    def threads(self) -> list[ThreadId]:
        """Those that run for the client."""
        if not self.holds.active:
            return [thread for thread in self._acting if self.inferiors.alive(thread.pid)]
        threads = (thread for pid in self.attached for thread in self.inferiors.thread_ids(pid))
        return [thread for thread in threads if thread not in self.holds]

    @property
    def awaited(self) -> bool:
        """Whether the client waits for a stop at all."""
        return bool(self._acting) or self.holds.active

    def reported(self, thread: ThreadId) -> ThreadId:
        """The thread to tell the client of: a client that let some threads run only expects one of them to stop."""
        if self.acts(thread):
            return thread
        acting = self.threads()
        if not acting:
            return thread
        return next((t for t in acting if t.pid == thread.pid), acting[0])
