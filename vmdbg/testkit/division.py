# SPDX-License-Identifier: GPL-2.0-or-later
"""The tests of one pytest file among the processes that run them: each asks for its next one when it is free."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["Division"]


class Division:
    """Which tests there are is known when the first process has collected them.

    Tests of one group run in one process, one after the other.
    """

    def __init__(self) -> None:
        self.order: list[str] = []
        """Names of all, as the file has them."""
        self.known = False
        self._waiting: dict[str, str] = {}
        self._owners: dict[str, int] = {}
        self._given_up: list[str] = []

    def collected(self, tests: Iterable[tuple[str, str]]) -> None:
        """(name, group or nothing) of each; what another process has told before is so."""
        if not self.known:
            self.known = True
            self._waiting = dict(tests)
            self.order = list(self._waiting)

    @property
    def left(self) -> list[str]:
        """Names of those that nobody has begun, in their order."""
        return [*self._waiting, *self._given_up]

    @property
    def free(self) -> int:
        """How many of them another process could begin."""
        return sum(1 for group in self._waiting.values() if group not in self._owners)

    def next(self, pid: int) -> str | None:
        """The test that a process begins now; None if there is none for it."""
        name = self.following(pid)
        if name is not None and (group := self._waiting.pop(name)):
            self._owners[group] = pid
        return name

    def following(self, pid: int) -> str | None:
        """The one that it would begin now."""
        return next((name for name, group in self._waiting.items() if self._owners.get(group, pid) == pid), None)

    def gone(self, pid: int, unbegun: str = "") -> None:
        """A process has ended: others may go on with its groups.  `unbegun`: a test of its that nobody has begun after all."""
        self._owners = {group: owner for group, owner in self._owners.items() if owner != pid}
        self._given_up += [unbegun] if unbegun else []

    def give_up(self) -> None:
        """Nothing more is begun."""
        self._given_up += self._waiting
        self._waiting = {}
