# SPDX-License-Identifier: GPL-2.0-or-later
"""All examples on both runtimes, with one processor and with several, alone and under debuggers: one identity, one trace.

`python -m tests.thorough fingerprints` runs all of it; tests/test_fingerprint.py a part.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import NamedTuple

import pytest

from tests.gdbstub.gdb import Gdb
from tests.patience import PATIENCE
from vmdbg.attach import GDB_SETTINGS
from vmdbg.cli import parser
from vmdbg.fingerprint import Checkpoint
from vmdbg.machine import Event, Machine
from vmdbg.platform.serial import NullSerial
from vmdbg.run import build

ROOT = Path(__file__).resolve().parents[1]


class Example(NamedTuple):
    """An image, and the options that it needs.  Beyond `ticks` the Python runtime would take minutes."""

    image: str
    options: tuple[str, ...] = ()
    ticks: int = 2_000_000


EXAMPLES = {
    "hypervisor": Example("hypervisor/build/hypervisor.elf", ("--append", "guests=2")),
    "nested": Example("nested/build/matryoshka.elf", ("--append", "depth=2"), 1_500_000),
    "assignment": Example(
        "assignment/build/assignment.elf", ("--memory", "5G", "--iommu", "--device", "edu,slot=05.0"), 1_500_000
    ),
    "secure-loader": Example("secure-loader/build/launcher.elf", ("--tpm", "--device", "edu"), 3_000_000),
    "bootsector": Example("bootsector/build/bootsector.img"),
    "compute": Example("bench/build/compute.elf", ("--append", "kernel=mix n=100000")),
    "worldswitch": Example("bench/build/worldswitch.elf", ("--append", "n=500"), 400_000),
    "iommucases": Example("bench/build/iommucases.elf", ("--iommu", "--device", "edu,slot=05.0")),
}
"""Those that come to an end; the others of examples/bench loop, or take a command line to do something."""
RUNTIMES = ("native", "switches in Python", "python")


class Run(NamedTuple):
    """What two runs must have in common."""

    identity: str
    trace: str
    checkpoints: tuple[Checkpoint, ...]


def arguments(example: str, cpus: int, *more: str) -> list[str]:
    known = EXAMPLES[example]
    return [
        "run", str(ROOT / "examples" / known.image), "--serial", "null", "--cpus", str(cpus), "--fingerprint",
        "--fingerprint-every", "100000", *known.options, *more,
    ]  # fmt: skip


@contextmanager
def machine(example: str, cpus: int, runtime: str, max_time: int | None) -> Iterator[Machine]:
    """As the command line makes it."""
    limit = ["--max-time", str(max_time)] if max_time is not None else []
    words = arguments(example, cpus, *limit, "--runtime", "python" if runtime == "python" else "native")
    with pytest.MonkeyPatch.context() as patch:
        if runtime == "switches in Python":
            patch.setattr(Machine, "_switch_in_c", lambda machine: None)
        made = build(parser().parse_args(words), None, serial=NullSerial())
    try:
        yield made
    finally:
        made.close()


def told(made: Machine) -> Run:
    assert made.fingerprint is not None
    return Run(str(made.identity), made.fingerprint.trace(made).hash, tuple(made.fingerprint.checkpoints))


def alone(example: str, cpus: int, runtime: str, max_time: int | None) -> Run:
    """An undebugged run, to its end or to a tick."""
    with machine(example, cpus, runtime, max_time) as made:
        while made.exit_status is None:
            if made.run() == Event.IDLE:
                made.give_up("every CPU waits")
        return told(made)


def cut(example: str, cpus: int, max_time: int | None, seed: int) -> Run:
    """The same in slices of any length, with single steps between them, as a debugger has it."""
    random = Random(seed)
    with machine(example, cpus, "native", max_time) as made:
        while made.exit_status is None:
            for _ in range(random.randrange(20)):
                made.run(step=True)
            if made.run(random.choice((1, 17, 1000, 30_000))) == Event.IDLE:
                made.give_up("every CPU waits")
        return told(made)


class Debugged:
    """`vmdbg run` in a process of its own, with a real gdb on it."""

    def __init__(self, example: str, cpus: int, max_time: int | None = None) -> None:
        limit = ["--max-time", str(max_time)] if max_time is not None else []
        command = [sys.executable, "-m", "vmdbg", *arguments(example, cpus, *limit), "--gdb", "0", "--wait"]
        self.process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        line = self.process.stderr.readline()
        where = re.search(r"127.0.0.1:\d+", line)
        assert where is not None, line
        self.gdb = Gdb()
        for setting in GDB_SETTINGS:
            self.gdb(setting)
        self.gdb(f"target extended-remote {where[0]}")

    def idle(self) -> None:
        """gdb only looks on."""

    def busy(self, random: Random) -> None:
        """Breakpoints, steps, watchpoints and questions, wherever it happens to be; all is taken out in the end."""
        gdb = self.gdb
        for _ in range(12):
            gdb(f"monitor stop-at +{random.randrange(1, 60_000)}")
            if "exited" in gdb("continue"):
                return
            for question in ("info registers rip", "x/4i $pc", "monitor exits", "monitor walk 0x100000", "monitor context"):
                gdb(question)
            gdb("monitor fingerprint")
            at = gdb.value("$pc")
            what = random.randrange(4)
            if what == 0:
                gdb(f"stepi {random.randrange(1, 30)}")
            elif what == 1:
                gdb(f"break *{at:#x} if $sp == 0x123456789")  # a condition that is false each time
            elif what == 2:
                gdb(f"tbreak *{at:#x}")
            else:
                stack = gdb.value("$sp") & -8
                gdb(f"watch *(long *){stack:#x} if $sp == 0x123456789")
        gdb("delete")

    def finish(self) -> tuple[str, str]:
        """Identity and trace."""
        gdb = self.gdb
        for _ in range(100):
            if "exited" in gdb.text[-300:] or "exited" in gdb("continue"):
                break
        gdb.close()
        errors = self.process.communicate(timeout=PATIENCE)[1]
        found = re.search(r"identity=(\w+) trace=(\w+)", errors)
        assert found is not None, errors
        return found[1], found[2]

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


def debugged(example: str, cpus: int, how: str, seed: int, max_time: int | None = None) -> tuple[str, str]:
    """Identity and trace of a run under gdb, which is "busy" or "idle"."""
    one = Debugged(example, cpus, max_time)
    try:
        if how == "busy":
            one.busy(Random(seed))
        return one.finish()
    finally:
        one.close()
