# SPDX-License-Identifier: GPL-2.0-or-later
"""A restored machine goes on exactly as the original: exits, guest time, serial output, and at the end every bit of its state."""

from __future__ import annotations

import io
import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.timetravel.cases import CASES, TOP, Case, finish
from vmdbg.machine import Machine
from vmdbg.timetravel.file import save

pytestmark = pytest.mark.usefixtures("examples")
Half = Callable[[str, Path], dict[str, object]]


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[Half]:
    """Runs second halves in a process of its own."""
    with subprocess.Popen(
        [sys.executable, "-m", "tests.timetravel.cases"], cwd=TOP, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None

        def run(name: str, path: Path) -> dict[str, object]:
            assert child.stdin is not None
            assert child.stdout is not None
            print(json.dumps([name, str(path)]), file=child.stdin, flush=True)
            found: dict[str, object] = json.loads(child.stdout.readline())
            return found

        yield run
        child.stdin.close()


def run_until(machine: Machine, tick: int) -> None:
    while machine.clock.now < tick and machine.exit_status is None:
        machine.run(tick - machine.clock.now)


def cut(name: str, case: Case, tick: int, folder: Path, elsewhere: Half) -> tuple[dict[str, object], dict[str, object], str]:
    """The second halves of the original and of the restored one, and the exits of the first half."""
    machine = case.machine()
    run_until(machine, tick)
    path = folder / "machine.snapshot"
    save(machine, path)
    trace = machine.config.trace
    assert isinstance(trace, io.StringIO)
    first = trace.getvalue()
    original = finish(machine)
    machine.close()
    return original, elsewhere(name, path), first


@pytest.mark.parametrize("name", CASES)
def test_the_second_half_is_the_same(name: str, tmp_path: Path, elsewhere: Half) -> None:
    case = CASES[name]
    whole = case.machine()
    uncut = finish(whole)
    end = whole.clock.now
    whole.close()
    chance = random.Random(name)
    for _ in range(2):
        original, restored, first = cut(name, case, chance.randrange(end), tmp_path, elsewhere)
        assert restored == original
        assert first + str(original["exits"]) == uncut["exits"]  # saving has changed nothing
        assert original["state"] == uncut["state"]
