"""Guests and their vCPUs that come and go while the machine runs."""

from __future__ import annotations

from collections.abc import Iterator

from gdbstub.target import Created, Exited, ThreadEnded, ThreadId, ThreadStarted
from vmdbg.history import HOST
from vmdbg.inferiors import Inferiors
from vmdbg.machine import Machine


class Arrivals:
    """Those of one machine; the first `take` tells of all that are there already."""

    def __init__(self, machine: Machine, inferiors: Inferiors) -> None:
        self.machine = machine
        self.history = machine.history
        self.inferiors = inferiors
        self._known: dict[int, set[int]] = {}
        self._version = -1

    @property
    def pending(self) -> bool:
        """Whether `take` may have something to tell: cheaper than to look."""
        return self._version != self.history.version

    def take(self) -> Iterator[Created | Exited | ThreadStarted | ThreadEnded]:
        """What has changed since the last look."""
        self._version = self.history.version
        guests = self.history.guests.items()
        alive = {number: {v.thread for v in guest.vcpus.values()} for number, guest in guests if not guest.gone}
        before, self._known = self._known, alive
        for number in sorted(before.keys() - alive.keys()):
            yield Exited(number)
        for number, threads in sorted(alive.items()):
            known = before.get(number)
            if known is None:
                yield Created(self.inferiors.first_thread(number), ThreadId(HOST, self.machine.cpu.index + 1))
                continue
            for tid in sorted(threads - known):
                yield ThreadStarted(ThreadId(number, tid))
            for tid in sorted(known - threads):
                yield ThreadEnded(ThreadId(number, tid))
