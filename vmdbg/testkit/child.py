# SPDX-License-Identifier: GPL-2.0-or-later
"""What the process of one test is: alone in its session, with limits, and with nothing of its parent's to harm."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import json
import os
import resource
import signal
import sys
import traceback
from collections.abc import Collection, Iterable, Iterator
from importlib import import_module
from typing import TYPE_CHECKING, Any, NoReturn

from vmdbg.engine.closed import keep_at_most
from vmdbg.testkit.bench import SharedText
from vmdbg.testkit.outcome import Outcome

if TYPE_CHECKING:
    from vmdbg.testkit.schedule import Task

__all__ = ["Parent", "adopt_orphans", "become", "orphans", "warm"]

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
"""linux/prctl.h"""
MARK = "VMDBG_TEST_PROCESS"
"""In the environment of all that a test has started: which test's it is."""
_CODE = b"\xf4\xb8\x00\x00\x00\x00\xe7\xf4"
"""HLT; MOV EAX, 0; OUT 0xF4, EAX."""


def warm(*, pytest_too: bool) -> None:
    """Once, before the first fork: import what tests need, have a machine, and let go of it."""
    if pytest_too:
        for name in ("vmdbg.testkit.pytests", "vmdbg.testkit.fixtures", "vmdbg.testkit.failure"):
            import_module(name)
    from vmdbg.debugger import Debugger
    from vmdbg.machine import Config, Machine

    machine = Machine(_CODE[1:], Config(memory=1 << 20, flat_address=0x10000, mode="protected"))
    try:
        Debugger(machine)
        machine.run(1000)
    finally:
        machine.close()
    gc.collect()
    gc.freeze()  # or else each child's first collection copies all of the parent's memory


class Parent:
    """What a test's process says to the one that started it, and hears from it: a line of JSON each."""

    def __init__(self, said: int, answers: int) -> None:
        self._said, self._answers = said, answers

    def tell(self, outcome: Outcome) -> None:
        """What is known of a test; the last of a name counts."""
        self.say(outcome=outcome.as_json())

    def say(self, **what: object) -> None:
        _write(self._said, json.dumps(what).encode() + b"\n")

    def ask(self, **what: object) -> Any:
        """Say it, and wait for the answer.  SystemExit if nobody answers any more."""
        self.say(**what)
        line = b""
        while not line.endswith(b"\n"):
            piece = os.read(self._answers, 1 << 16)
            if not piece:
                raise SystemExit("nobody answers")
            line += piece
        return json.loads(line)


def become(
    task: Task, printed: SharedText, mark: str, output: int, said: int, answers: int, close: Iterable[int]
) -> NoReturn:  # fmt: skip
    """Behind fork: run a task and end.

    `mark` is for `orphans`; `output` and `said` are pipes to the parent, `answers` is one from it, `close` its ends of them.
    """
    status = 1
    try:
        os.setsid()
        _signals()
        for descriptor in close:
            os.close(descriptor)
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        for descriptor in (nothing, output):
            os.close(descriptor)
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 - for the process's life
        sys.stdout = open(1, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False)  # noqa: SIM115
        faulthandler.enable(2)
        os.environ[MARK] = mark
        os.chdir(task.folder)
        _limit(task.address_space)
        keep_at_most(0)
        parent = Parent(said, answers)
        task.run(printed, parent)
        parent.say(done=True)
        status = 0
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def adopt_orphans(on: bool) -> None:
    """Have this process be the parent of what its children leave behind, where the system knows such a thing."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, int(on))


def orphans(mark: str, known: Collection[int]) -> Iterator[int]:
    """Children of this process that a test has left behind, besides those that are known."""
    try:
        with open(f"/proc/self/task/{os.getpid()}/children", encoding="ascii") as file:
            children = [int(word) for word in file.read().split()]
    except OSError:
        return
    for pid in children:
        if pid not in known:
            with contextlib.suppress(OSError), open(f"/proc/{pid}/environ", "rb") as file:
                if f"{MARK}={mark}".encode() in file.read().split(b"\0"):
                    yield pid


def _write(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def _signals() -> None:
    """As in a new process; and if the parent dies, so does this one."""
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _limit(address_space: int) -> None:
    """Bound what it may have; no core files of crashes."""
    for what, most in ((resource.RLIMIT_AS, address_space), (resource.RLIMIT_CORE, 0)):
        _, hard = resource.getrlimit(what)
        allowed = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(what, (allowed, hard))
