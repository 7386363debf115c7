"""A small real machine for the fuzzer of the stub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch

from vmdbg.breakpoints import Rule
from vmdbg.debugger import Debugger
from vmdbg.machine import Config, Machine

TOP = Path(__file__).resolve().parents[1]
IMAGE = TOP / "examples/hypervisor/build/hypervisor.elf"
BOOT_TICKS = 8_000_000
"""Until its four guests have run."""


class Clock:
    """Stands for the module `time` where slices are made: a run then depends on its packets alone."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        self.now += 0.0004
        return self.now

    def sleep(self, seconds: float) -> None:
        """Machines that idle need not wait here."""


class DebuggedMachine:
    """The example hypervisor with its guests, restarted by every `run`."""

    batch = 1000

    def __init__(self) -> None:
        if not IMAGE.exists():
            raise SystemExit(f"{IMAGE} is not there: make examples")
        self._patch = patch("vmdbg.running.time", Clock())
        self._patch.start()
        self.target = Debugger(self._boot(()), self._boot)

    @staticmethod
    def _boot(arguments: Sequence[str]) -> Machine:
        machine = Machine(str(IMAGE), Config(memory=32 << 20, command_line=" ".join(arguments)))
        machine.run(BOOT_TICKS)
        return machine

    def left(self) -> str:
        # What is taken out is remembered until the machine goes on; one that has ended has no inferiors that could meet any.
        points = [point for point in self.target.breakpoints if point.inserted and self.target.inferiors()]
        return f"breakpoints {points}" if points else ""

    def forget_choices(self) -> None:
        """What a user has chosen holds over a restart, too."""
        self.target.architectures.clear()
        self.target.breakpoints.rule = Rule.SHARED

    def close(self) -> None:
        self.target.machine.close()
        self._patch.stop()
