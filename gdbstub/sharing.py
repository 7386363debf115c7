"""One target for several clients at once, as several targets of one lldb, or two people: each debugs inferiors of its own.

They share one machine, which therefore runs only while all of them let it: a stop is told to the client whose inferior it is, and
the others see theirs running, without getting on, until that one continues. So what a client sees of a stopped inferior
stays true. A single client meets its target unchanged.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping, Sequence
from typing import cast

from gdbstub.target import Action, Created, Event, Exited, Kill, NonStop, Output, Run, Stop, Target, TargetError, ThreadId

__all__ = ["Share", "Sharing"]


class Share:
    """The target as one client has it: what is not here is the target's own."""

    def __init__(self, sharing: Sharing) -> None:
        self.sharing = sharing
        self.pids: set[int] = set()
        self.actions: Mapping[ThreadId, Action] | None = None
        """Of the last resume; None while the client holds its inferiors stopped."""
        self.events: deque[Event] = deque()

    @property
    def holds(self) -> bool:
        """Whether the machine stands still for this client."""
        return bool(self.pids) and self.actions is None

    def attach(self, pid: int) -> None:
        if any(pid in other.pids for other in self.sharing.others(self)):
            raise TargetError(f"process {pid} is debugged by another client: it must detach first")
        self.sharing.target.attach(pid)
        self.pids.add(pid)

    def detach(self, pid: int) -> None:
        self.pids.discard(pid)
        self.sharing.target.detach(pid)

    def resume(self, actions: Mapping[ThreadId, Action]) -> None:
        self.actions = actions
        if self.sharing.others(self):
            self.sharing.resumed = False
        else:
            self.sharing.target.resume(actions)
            self.sharing.resumed = True

    def halt(self) -> ThreadId:
        self.actions = None
        self.events.clear()
        self.sharing.resumed = False
        return self.sharing.target.halt()

    def run_slice(self) -> Event | None:
        return self.sharing.slice(self)


class _Restartable(Share):
    def run(self, program: str, arguments: Sequence[str]) -> int:
        self.sharing.alone(self)
        pid = cast(Run, self.sharing.target).run(program, arguments)
        self.pids.clear()
        return pid


class _Killable(Share):
    def kill(self, pid: int) -> None:
        self.sharing.alone(self)
        cast(Kill, self.sharing.target).kill(pid)
        self.pids.discard(pid)


class _Separable(Share):
    def hold(self, threads: Collection[ThreadId]) -> None:
        if self.sharing.others(self):
            raise TargetError("non-stop mode is for one client alone: the others must disconnect first")
        cast(NonStop, self.sharing.target).hold(threads)


_CAPABILITIES = ((Run, _Restartable), (Kill, _Killable), (NonStop, _Separable))


class Sharing:
    """The clients' shares of a target."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.resumed = False
        """Whether the target has been told what all clients together want."""
        self._members: list[Share] = []
        bases = (*(own for capability, own in _CAPABILITIES if isinstance(target, capability)), Share)
        here = {"sharing", "pids", "actions", "events"}.union(*map(dir, bases))
        rest = {name: _forwarded(name) for name in dir(target) if not name.startswith("_") and name not in here}
        self._kind: type[Share] = type("Share", bases, rest)

    def join(self) -> Share:
        """For a new client."""
        share = self._kind(self)
        self._members.append(share)
        return share

    def leave(self, share: Share) -> None:
        """Its client is gone."""
        self._members.remove(share)
        self.resumed = False
        if len(self._members) == 1 and self._members[0].actions is not None:
            self._members[0].resume(self._members[0].actions)

    def others(self, share: Share) -> list[Share]:
        return [other for other in self._members if other is not share]

    def free(self) -> int | None:
        """The first inferior that nobody is attached to."""
        taken = {pid for member in self._members for pid in member.pids}
        return next((inferior.pid for inferior in self.target.inferiors() if inferior.pid not in taken), None)

    @property
    def held(self) -> bool:
        """Whether the machine stands still for one of several clients. What a single one wants only the target knows."""
        return len(self._members) > 1 and any(member.holds for member in self._members)

    def alone(self, share: Share) -> None:
        """TargetError if another client would lose its inferiors."""
        if any(other.pids for other in self.others(share)):
            raise TargetError("another client debugs this machine, too: it must disconnect before the machine is ended")

    def slice(self, share: Share) -> Event | None:
        """Run, unless a client holds the machine; what happened, if it is this client's."""
        if share.events:
            return share.events.popleft()
        if not self.others(share):
            return self._noted(share, self.target.run_slice())
        if self.held:
            return None
        if not self.resumed:
            self.target.resume({thread: action for one in self._members for thread, action in (one.actions or {}).items()})
            self.resumed = True
        event = self.target.run_slice()
        if event is None:
            return None
        for member in self._whose(event):
            member.events.append(event)
            self._noted(member, event)
        return share.events.popleft() if share.events else None

    def _noted(self, share: Share, event: Event | None) -> Event | None:
        if isinstance(event, Stop) and event.thread.pid in share.pids:
            share.actions = None
            self.resumed = False
        elif isinstance(event, Exited) and event.pid in share.pids:
            share.pids.discard(event.pid)
            share.actions = None
            self.resumed = False
        return event

    def _whose(self, event: Event) -> list[Share]:
        if isinstance(event, Output):
            return [member for member in self._members if member.actions is not None]
        if isinstance(event, Exited):
            return [member for member in self._members if event.pid in member.pids]
        thread = event.parent if isinstance(event, Created) else event.thread
        return [member for member in self._members if thread.pid in member.pids]


def _forwarded(name: str) -> property:
    return property(lambda share: getattr(share.sharing.target, name))
