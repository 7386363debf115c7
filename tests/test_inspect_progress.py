"""How `vmdbg inspect` says how far it is, and how ^C ends what takes long."""

from __future__ import annotations

import io
import os
import signal
import sys

import pytest

from introspect.commands import CommandError
from vmdbg import inspect
from vmdbg.inspect import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Time:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Time:
    made = Time()
    monkeypatch.setattr(inspect, "time", made)
    return made


def test_nothing_within_a_second_then_every_now_and_then(monkeypatch: pytest.MonkeyPatch, time: Time) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    progress = Progress()
    for part in range(10):
        time.now += 0.09
        assert progress(part / 100, "looking")
    assert terminal.getvalue() == ""
    for part in range(10):
        time.now += 0.15
        progress(part / 10, "looking")
    assert terminal.getvalue().count("looking: ") == 5
    assert terminal.getvalue().endswith("looking:  80% (^C ends it) ")
    progress.clear()
    assert terminal.getvalue().endswith("\r\x1b[K")


def test_nothing_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch, time: Time) -> None:
    plain = io.StringIO()
    monkeypatch.setattr(sys, "stderr", plain)
    progress = Progress()
    time.now += 60
    assert progress(0.5, "looking")
    assert plain.getvalue() == ""


def test_control_c_cancels_and_a_second_one_ends() -> None:
    before = signal.getsignal(signal.SIGINT)
    progress = Progress()
    with progress.watching():
        assert progress(0, "")
        os.kill(os.getpid(), signal.SIGINT)
        assert not progress(0, "")
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == before


@pytest.mark.parametrize("name", ["continue", "break", "lapic", "vmcb diff"])
def test_what_only_a_machine_can_do(name: str) -> None:
    with pytest.raises(CommandError, match="only a machine that runs does"):
        inspect.dump_registry().find(name.split())
