# SPDX-License-Identifier: GPL-2.0-or-later
"""Tests in processes of their own: so many at once, within their budgets, whatever becomes of each.

Each test runs in a fork of this process, which has imported everything and has had a machine: that takes milliseconds where
a new Python would take seconds. The parent has one thread, no event loop and no machine when it forks.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import selectors
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from vmdbg.testkit.bench import SharedText, tail
from vmdbg.testkit.child import Parent, adopt_orphans, become, orphans
from vmdbg.testkit.division import Division
from vmdbg.testkit.outcome import Outcome, Verdict

__all__ = ["Pool", "Task"]

LATE = 8.0
"""Seconds that a process has, behind its wall budget, to end by itself and say what it knows."""
TICK = 0.1
"""Seconds between two looks at budgets and the display, at most."""
_CHUNK = 1 << 18


class Task(Protocol):
    """What runs in a process of its own."""

    @property
    def id(self) -> str: ...

    @property
    def wall(self) -> float: ...

    @property
    def output_limit(self) -> int: ...

    @property
    def address_space(self) -> int: ...

    @property
    def folder(self) -> Path:
        """Where it runs."""

    @property
    def division(self) -> Division | None:
        """Its tests, if several processes may run them; each asks for its next one."""

    def run(self, printed: SharedText, parent: Parent) -> None:
        """In that process, which tells its parent outcomes as they come."""

    def skeleton(self, name: str = "") -> Outcome:
        """What is known of a test before it begins; without a name, of the only one, or of what concerns all of them."""

    def review(self, outcome: Outcome, printed: str) -> None:
        """Judge what only the whole output shows."""


@dataclass(slots=True)
class _Child:
    """A process, and what it has said."""

    task: Task
    fail_fast: bool
    pid: int
    mark: str
    output: int
    said: int
    answers: int
    printed: SharedText
    started: float
    pidfd: int = -1
    text: deque[bytes] = field(default_factory=deque)
    kept: int = 0
    count: int = 0
    line: bytes = b""
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    at: str = ""
    """Which of its tests is under way, if it says so."""
    over: list[Outcome] = field(default_factory=list)
    """Outcomes of tests that are over, and that nobody has been told of."""
    shown: dict[str, Verdict] = field(default_factory=dict)
    """Those that somebody has been told of."""
    asked: bool = False
    """It has come so far as to ask which test it is to run."""
    given: str = ""
    """The last one that it was told."""
    done: bool = False
    killed: str = ""
    """Why we have ended it."""

    def hear(self, data: bytes) -> None:
        """What it prints."""
        self.count += len(data)
        self.text.append(data)
        self.kept += len(data)
        while self.kept - len(self.text[0]) > self.task.output_limit:
            self.kept -= len(self.text.popleft())

    def printed_text(self) -> str:
        """What is kept of what it has printed."""
        return b"".join(self.text).decode("utf-8", "replace")

    def take(self, data: bytes) -> None:
        """What it says, a line each: outcomes, which tests there are, and that it could run one."""
        *lines, self.line = (self.line + data).split(b"\n")
        division = self.task.division
        for line in lines:
            said = json.loads(line)
            if "outcome" in said:
                outcome = Outcome.from_json(said["outcome"])
                self.outcomes[outcome.name] = outcome
                self.at = "" if outcome.verdict is not Verdict.NOT_RUN else outcome.name
                if not self.at:
                    self.over.append(outcome)
            if division is not None and "tests" in said:
                division.collected(said["tests"])
            if division is not None and "next" in said:
                self.asked = True
                enough = self.killed or (self.fail_fast and any(one.bad for one in self.outcomes.values()))
                name = None if enough else division.next(self.pid)
                self.given = name or ""
                self._answer(name, division.following(self.pid))
            if division is not None and "stopped" in said:
                division.give_up()
            self.done |= "done" in said

    def _answer(self, *answer: object) -> None:
        with contextlib.suppress(BrokenPipeError):  # it has ended meanwhile
            os.write(self.answers, json.dumps(answer).encode() + b"\n")

    @property
    def unbegun(self) -> str:
        """A test that it was told to run and has said nothing of; nothing if there is none."""
        return "" if self.given in self.outcomes else self.given

    def fresh(self) -> list[Outcome]:
        """What somebody can be told of now: of a task that is one test that comes at its end, with its output."""
        if self.task.division is None:
            return []
        found, self.over = self.over, []
        self.shown.update((one.name, one.verdict) for one in found)
        return found


class Pool:
    """Runs tasks; `started`, `came`, `ended` and `tick` are told of it as it happens.

    Where a processor has nothing to do, the tests of a file that another runs are divided between them.
    """

    def __init__(self, tasks: Sequence[Task], workers: int, *, fail_fast: bool = False) -> None:
        self.workers, self.fail_fast = workers, fail_fast
        self.tasks = list(tasks)
        self.started: Callable[[Task], object] = lambda task: None
        self.came: Callable[[Sequence[Outcome]], object] = lambda outcomes: None
        self.ended: Callable[[Task], object] = lambda task: None
        self.tick: Callable[[], object] = lambda: None
        self.asked = ""
        """Set it to have the run stop, and why; also from a signal handler."""
        self.stopping = ""
        """Why nothing new is begun."""
        self.cpu = 0.0
        """Seconds of processor time that tests have had."""
        self._begun = 0
        self._waiting = deque(self.tasks)
        self._running: list[_Child] = []
        self._selector = selectors.DefaultSelector()

    def run(self) -> list[Outcome]:
        """All outcomes, in the order of the tasks and of their tests."""
        found: dict[str, list[Outcome]] = {}
        adopt_orphans(True)
        try:
            while self._running or (self._waiting and not self.stopping):
                while not self.stopping and len(self._running) < self.workers and (task := self._next_task()) is not None:
                    self._start(task)
                for child in self._advance():
                    outcomes = self._outcomes_of(child)
                    found.setdefault(child.task.id, []).extend(outcomes)
                    self._heard(child, [one for one in outcomes if child.shown.get(one.name) is not one.verdict])
                    if not any(other.task is child.task for other in self._running) and child.task not in self._waiting:
                        self.ended(child.task)
                for child in self._running:
                    self._heard(child, child.fresh())
                self.tick()
                if self.asked and not self.stopping:
                    self.stop(self.asked)
        finally:
            for child in self._running:
                self._end(child, "vmdbg test has ended")
                os.waitpid(child.pid, 0)
            adopt_orphans(False)
        return [outcome for task in self.tasks for outcome in self._all_of(task, found.get(task.id, []))]

    @property
    def count(self) -> int:
        """How many tests there are, as far as it is known: a file that has not been read counts as one."""
        return sum(len(task.division.order) if task.division is not None and task.division.known else 1 for task in self.tasks)

    def _next_task(self) -> Task | None:
        """What has not begun; or else a file that has more tests left than processes that are about to ask for one."""
        if self._waiting:
            return self._waiting.popleft()
        for child in self._running:
            division = child.task.division
            if division is not None and division.free > sum(one.task is child.task and not one.asked for one in self._running):
                return child.task
        return None

    def _heard(self, child: _Child, outcomes: list[Outcome]) -> None:
        """Of tests that are over."""
        if outcomes:
            self.came(outcomes)
        if self.fail_fast and not self.stopping and any(one.bad for one in outcomes):
            self.stop(f"{next(one.id for one in outcomes if one.bad)} failed, and --fail-fast was given")

    def _all_of(self, task: Task, found: list[Outcome]) -> list[Outcome]:
        """The outcomes of a task, with those of tests that nobody has begun."""
        if task.division is None or not task.division.known:
            return found or self._not_run(task)
        order = {name: place for place, name in enumerate(task.division.order)}
        return sorted([*found, *self._not_run(task)], key=lambda one: order.get(one.name, -1))

    def stop(self, why: str) -> None:
        """Begin nothing more, end what runs."""
        self.stopping = self.stopping or why
        for child in self._running:
            self._end(child, self.stopping)

    def _not_run(self, task: Task) -> list[Outcome]:
        division = task.division
        names = division.left if division is not None and division.known else [""]
        outcomes = [task.skeleton(name) for name in names]
        for outcome in outcomes:
            outcome.reasons = [self.stopping or "pytest has ended before it"]
        return outcomes

    # Processes

    def _start(self, task: Task) -> None:
        printed = SharedText(task.output_limit)
        (out, out_child), (said, said_child), (answers_child, answers) = os.pipe(), os.pipe(), os.pipe()
        self._begun += 1
        mark = f"{os.getpid()}.{self._begun}"
        pid = os.fork()
        if pid == 0:
            become(task, printed, mark, out_child, said_child, answers_child, close=[out, said, answers])
        for descriptor in (out_child, said_child, answers_child):
            os.close(descriptor)
        child = _Child(task, self.fail_fast, pid, mark, out, said, answers, printed, time.monotonic())
        for descriptor, hear in ((out, child.hear), (said, child.take)):
            os.set_blocking(descriptor, False)
            self._selector.register(descriptor, selectors.EVENT_READ, hear)
        if hasattr(os, "pidfd_open"):
            with contextlib.suppress(OSError):
                child.pidfd = os.pidfd_open(pid)
                self._selector.register(child.pidfd, selectors.EVENT_READ)
        if all(other.task is not task for other in self._running):
            self.started(task)
        self._running.append(child)

    def _advance(self) -> Iterator[_Child]:
        """Wait for something to happen; those that have ended."""
        quick = any(child.pidfd < 0 for child in self._running)
        for key, _ in self._selector.select(TICK / 10 if quick else TICK):
            if key.data is not None:
                self._read(key.fd, key.data)
        now = time.monotonic()
        for child in list(self._running):
            pid, status, usage = os.wait4(child.pid, os.WNOHANG)
            if pid:
                self.cpu += usage.ru_utime + usage.ru_stime
                self._running.remove(child)
                self._close(child)
                if over := self._printed_too_much(child):  # also what it has printed at last, of which we hear now
                    child.killed = child.killed or over
                self._died(child, status, usage)
                yield child
            elif child.killed:
                continue
            elif over := self._printed_too_much(child):
                self._end(child, over)
            elif now > child.started + child.task.wall + LATE:
                self._end(child, f"the wall budget of {child.task.wall:g} s is used up, and it did not end by itself")

    @staticmethod
    def _printed_too_much(child: _Child) -> str:
        limit = child.task.output_limit
        return f"it has printed more than {limit} bytes (output-limit)" if child.count > limit else ""

    def _read(self, descriptor: int, hear: Callable[[bytes], None]) -> bool:
        """A piece of what a process writes; whether there may be more."""
        try:
            data = os.read(descriptor, _CHUNK)
        except BlockingIOError:
            return False
        if not data:
            self._selector.unregister(descriptor)
            return False
        hear(data)
        return True

    def _end(self, child: _Child, why: str) -> None:
        """Kill it, with all that it has started."""
        child.killed = child.killed or why
        for kill, what in ((os.killpg, child.pid), (os.kill, child.pid)):  # it may not have made its group yet
            with contextlib.suppress(ProcessLookupError, PermissionError):
                kill(what, signal.SIGKILL)

    def _close(self, child: _Child) -> None:
        """Its process has ended: end what it has left behind, and hear the rest."""
        while True:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(child.pid, signal.SIGKILL)
            # Killed is not yet gone: what was its child is ours now, and is waited for.
            with contextlib.suppress(ChildProcessError):
                while True:
                    os.waitpid(-child.pid, 0)
            # So is who has left the group; and its own children will be.
            left = list(orphans(child.mark, [one.pid for one in self._running]))
            if not left:
                break
            for pid in left:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
        registered = self._selector.get_map()
        for descriptor, hear in ((child.output, child.hear), (child.said, child.take)):
            while descriptor in registered and self._read(descriptor, hear):
                pass
            if descriptor in registered:
                self._selector.unregister(descriptor)
            os.close(descriptor)
        if child.pidfd >= 0:
            self._selector.unregister(child.pidfd)
            os.close(child.pidfd)
        os.close(child.answers)

    # What became of it

    def _died(self, child: _Child, status: int, usage: resource.struct_rusage) -> None:
        """Say of a process that did not come to its end why, in the test that it was about."""
        if child.done and not child.killed:
            return
        if self.stopping and child.killed == self.stopping:
            return
        code = os.waitstatus_to_exitcode(status)
        if child.killed:
            reason, verdict = child.killed, Verdict.FAILED
        elif code < 0:
            name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
            memory = f"; it had {usage.ru_maxrss >> 10} MiB of memory" if code == -signal.SIGKILL else ""
            described = signal.strsignal(-code) or "unknown"
            reason, verdict = f"its process was killed by {name} ({described.lower()}){memory}", Verdict.ERROR
        else:
            reason, verdict = f"its process has ended with status {code} before the test was over", Verdict.ERROR
        known = child.outcomes.get(child.at)
        if known is None:
            last = next(reversed(child.outcomes.values()), None)
            known = child.task.skeleton(child.unbegun) if child.unbegun or last is None else last
        if not (known.bad and child.killed):  # it has said itself that its budget is used up
            known.verdict, known.reasons = verdict, [reason, *known.reasons]
        known.output = known.output or tail(child.printed_text())
        child.outcomes[known.name] = known

    def _outcomes_of(self, child: _Child) -> list[Outcome]:
        """What has become of its tests; and who goes on with those that are left."""
        outcomes = list(child.outcomes.values())
        division = child.task.division
        if division is not None:
            division.gone(child.pid, child.unbegun if self.stopping else "")
            if not self.stopping and division.known and division.free and not child.done:
                self._waiting.appendleft(child.task)
        for outcome in outcomes:
            if outcome.verdict is Verdict.NOT_RUN:
                outcome.reasons = [self.stopping]
        printed = child.printed_text()
        text = tail(printed)
        serial = child.printed.text()
        child.printed.close()
        elapsed = time.monotonic() - child.started
        for outcome in outcomes:
            if len(outcomes) == 1:
                outcome.seconds = outcome.seconds or elapsed
                outcome.serial = outcome.serial or tail(serial)
                outcome.output = outcome.output or text
            child.task.review(outcome, printed)
        return outcomes
