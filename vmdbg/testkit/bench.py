# SPDX-License-Identifier: GPL-2.0-or-later
"""A job's machine: built, watched exit by exit, and described when it is over."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator, Sequence

from gdbstub.target import Event, TargetError, ThreadId
from introspect.commands import CommandError
from vmdbg.boot.image import ImageError
from vmdbg.debugger import Debugger
from vmdbg.history import HOST
from vmdbg.machine import LIMIT_REACHED, Machine
from vmdbg.platform.serial import BufferSerial
from vmdbg.run import build
from vmdbg.testkit import keys, machine_options
from vmdbg.testkit.exit_patterns import Progress
from vmdbg.testkit.jobs import Job
from vmdbg.testkit.outcome import Outcome

__all__ = ["Bench", "SharedText", "tail"]

LAST_EXITS = 16
TAIL = 16 << 10
"""Characters of a text that a report shows."""
_LENGTH = struct.Struct("<QQ")


def tail(text: str, most: int = TAIL) -> str:
    """The end of a text, from the beginning of a line."""
    if len(text) <= most:
        return text
    cut = text[-most:]
    line = cut.find("\n")
    cut = cut[line + 1 :] if 0 <= line < most // 2 else cut
    return f"[{len(text) - len(cut)} characters before this]\n{cut}"


class SharedText:
    """What the serial port prints, in memory that the process that started the job has too: it outlives a crash."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._memory = mmap.mmap(-1, _LENGTH.size + limit)
        self._length = self.lost = 0

    def add(self, data: bytes) -> None:
        kept = data[: self.limit - self._length]
        begin = _LENGTH.size + self._length
        self._memory[begin : begin + len(kept)] = kept
        self._length += len(kept)
        self.lost += len(data) - len(kept)
        _LENGTH.pack_into(self._memory, 0, self._length, self.lost)

    def read(self) -> bytes:
        length, _ = _LENGTH.unpack_from(self._memory, 0)
        return self._memory[_LENGTH.size : _LENGTH.size + length]

    def text(self) -> str:
        """With line ends as Python has them: terminals want others."""
        return self.read().decode("utf-8", "replace").replace("\r\n", "\n")

    def close(self) -> None:
        self._memory.close()


class JobSerial(BufferSerial):
    """A serial port whose other end is the job's."""

    def __init__(self, printed: SharedText, given: bytes) -> None:
        super().__init__()
        self.printed = printed
        self.input += given

    def write(self, data: bytes) -> None:
        self.printed.add(data)
        if not self.printed.lost:
            super().write(data)

    def send(self, data: bytes) -> None:
        """For the guest to read."""
        self.input += data


class _Watched(Debugger):
    """A debugger whose machine is looked after slice by slice."""

    bench: Bench | None = None

    def run_slice(self) -> Event | None:
        if self.bench is not None:
            self.bench.bound()
        event = super().run_slice()
        if self.bench is not None:
            self.bench.look()
        return event


class Bench:
    """The machine of a job, for whatever drives it."""

    def __init__(self, job: Job, printed: SharedText) -> None:
        """Raises `UsageError` for a machine that cannot be."""
        self.job = job
        self.serial = JobSerial(printed, job.values[keys.INPUT].encode())
        self.options = machine_options.namespace(job.image, job.words)
        self.options.max_time = job.values[keys.TICKS]
        self.options.fingerprint = bool(job.values[keys.FINGERPRINT])
        self.most_instructions = job.values[keys.INSTRUCTIONS]
        wanted, never = job.values[keys.EXITS], job.values[keys.EXITS_NEVER]
        self.progress = Progress(wanted, never)
        self._sees_exits = bool(wanted or never)
        self.debugger = _Watched(self._build(), lambda arguments: self._build(arguments), self.options.snapshot)
        self.debugger.bench = self
        for option in self.options.symbols:
            self.debugger.executables.assign(*option)
        self.budget = ""
        """Which budget is used up, in words; not one of guest time whose end the job expects, by status 124."""
        self._may_stop = LIMIT_REACHED in job.values[keys.STATUS]

    def _build(self, arguments: Sequence[str] = ()) -> Machine:
        machine = build(self.options, None, arguments, self.serial)
        if self._sees_exits:
            machine.history.record(self.progress.see)
        return machine

    @property
    def machine(self) -> Machine:
        return self.debugger.machine

    def bound(self) -> None:
        """Before a slice: it ends at the budget of instructions, also where a script has set a limit of its own."""
        if self.most_instructions is None:
            return
        left = max(self.most_instructions - self.machine.engine.instructions, 0)
        own = self.machine.instructions_left
        if own is None or own > left:
            self.machine.limit_instructions(left)

    def look(self) -> None:
        """Between two slices: output before it is too much."""
        machine, most = self.machine, self.most_instructions
        if machine.exit_status is not None:
            return
        if self.serial.printed.lost:
            self.end(f"the serial port has printed more than {self.serial.printed.limit} bytes (output-limit)")
        elif most is not None and machine.engine.instructions >= most:
            machine.limit_instructions(None)
            self.end(f"the budget instructions = {most} is used up", expected=self._may_stop)

    def end(self, budget: str, *, expected: bool = False) -> None:
        """The machine ends: a budget is used up."""
        if not expected:
            self.budget = self.budget or budget
        self.machine.give_up(budget)

    def where(self) -> str:
        """Of the processor whose turn it is."""
        return self.machine.cpu.where

    def describe(self, outcome: Outcome) -> None:
        """How it ended."""
        machine = self.machine
        machine.history.collect()
        ticks = self.job.values[keys.TICKS]
        if machine.exit_status == LIMIT_REACHED and ticks is not None and machine.clock.now >= ticks and not self.budget:
            budget = f"the budget ticks = {ticks} is used up"
            machine.ended = f"{budget} at {self.where()}"
            if not self._may_stop:
                self.budget = budget
        outcome.status, outcome.ticks = machine.exit_status, machine.clock.now
        outcome.ended = machine.ended or f"at {self.where()}"

    def explain(self, outcome: Outcome) -> None:
        """What a report of a failure shows of the machine."""
        asked = {"why": "why", "context": "context"}
        if self.machine.history.total.value:
            outcome.exits = self._answer(f"exits --last {LAST_EXITS}").splitlines()
            asked["guests"] = "guests"
        for title, line in asked.items():
            if (text := self._answer(line)) and text != outcome.ended:
                outcome.sections[title] = text

    def _answer(self, line: str) -> str:
        """A command's text; nothing where it has none to give now."""
        commands = self.debugger.monitor_commands
        try:
            commands.thread = self._thread()
            return commands.registry.run_line(commands, line).text()
        except (CommandError, TargetError, ImageError):
            return ""

    def _thread(self) -> ThreadId:
        thread = self.debugger.who.thread_on(self.machine.cpu)
        return thread if self.debugger.who.alive(thread.pid) else ThreadId(HOST, 1)

    def close(self) -> None:
        self.machine.close()


def numbered(text: str) -> Iterator[tuple[int, str]]:
    """Lines of a script, without those that say nothing."""
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip() and not line.lstrip().startswith("#"):
            yield number, line.strip()
