# SPDX-License-Identifier: GPL-2.0-or-later
"""Exits of a running machine, all of them: what a golden trace is made from and compared with."""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Unpack

from introspect.disassembly import instruction_text
from introspect.exitlog import ExitRecord
from vmdbg.api.checked import checked
from vmdbg.api.errors import Error
from vmdbg.testkit.divergence import compare
from vmdbg.testkit.golden import DEFAULT, Seen, Tolerances, Trace

if TYPE_CHECKING:
    from vmdbg.api.machine import Machine

__all__ = ["Recording"]

MOST = 2_000_000
"""Exits that are kept."""


@checked
class Recording:
    """Every #VMEXIT of a machine from now on, also those that its rings forget.

    It follows the machine: what came behind a snapshot that is restored, or before the machine starts over, has not happened.
    The run is the same, and hardly slower.  As a context manager it ends with the block.

    With a path it becomes a golden trace when it ends, with these tolerances; not where the block ends with an exception.
    """

    def __init__(self, machine: Machine, path: str | os.PathLike[str] | None = None, **tolerance: Unpack[Tolerances]) -> None:
        """ValueError for a tolerance that is none."""
        self.machine = machine
        DEFAULT.changed(**tolerance)
        self._path, self._tolerance = path, tolerance
        self._open = True
        self._debugger = machine.debugger
        self._debugger.starting_over.append(self._begin)
        self._begin()

    def _begin(self) -> None:
        """From the machine's history as it is now."""
        self._history = self._debugger.history
        self._records: list[ExitRecord] = []
        self._lost = 0
        self._history.record(self._note)

    def _forget_behind(self, number: int) -> None:
        """Of a machine that a snapshot was restored into, what came after the snapshot has not happened."""
        while self._records and self._records[-1].number > number:
            self._records.pop()

    def _catch_up(self) -> None:
        """Take what the rings still have."""
        if self._open:
            self._history.collect()
            self._forget_behind(self._history.total.value)

    def _note(self, record: ExitRecord) -> None:
        self._forget_behind(record.number - 1)
        if len(self._records) < MOST:
            self._records.append(record)
        else:
            self._lost += 1

    def close(self) -> None:
        """Record no more.  What has been recorded stays, and is written if there is a path."""
        self._end()
        path, self._path = self._path, None
        if path is not None:
            self.save(path, **self._tolerance)

    def _end(self) -> None:
        if self._open:
            self._catch_up()
            self._open = False
            self._history.record_no_more(self._note)
            self._debugger.starting_over.remove(self._begin)

    def __enter__(self) -> Recording:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None) -> None:
        self.close() if error is None else self._end()

    def __repr__(self) -> str:
        return f"<recording of {self.machine.image.name}{'' if self._open else ', ended'}>"

    def __len__(self) -> int:
        self._catch_up()
        return len(self._records)

    def trace(self, **tolerance: Unpack[Tolerances]) -> Trace:
        """What has been recorded so far.  `Error` if it is not the whole; ValueError for a tolerance that is none."""
        self._catch_up()
        if self._lost:
            raise Error(f"{len(self) + self._lost} exits: a recording has {MOST} at most; run for less, as with ticks=")
        names: dict[tuple[int, int], str] = {}
        exits = []
        for record in self._records:
            place = record.guest, record.rip
            if place not in names:
                symbols = self.machine.context.symbols(record.guest)
                names[place] = symbols.name(record.rip) if symbols else ""
            exits.append(Seen(replace(record, insn=_instruction(record.insn, record.bits)), names[place]))
        return Trace(exits, DEFAULT.changed(**tolerance), _image(self.machine.image), self._options())

    def _options(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.machine.options.items() if name != "symbols")

    def save(self, path: str | os.PathLike[str], **tolerance: Unpack[Tolerances]) -> None:
        """Make it a golden trace, with the tolerances that later runs are to be granted.  GoldenError."""
        self.trace(**tolerance).save(Path(path))

    def check(self, path: str | os.PathLike[str], **tolerance: Unpack[Tolerances]) -> None:
        """Compare it with a golden trace: AssertionError tells the first exit that differs.

        Of tolerances that are given, `ignore` and `skip` add to those in the file, others stand in their place.
        """
        __tracebackhide__ = True
        golden = Trace.load(Path(path))
        found = compare(golden, self.trace(), golden.tolerance.changed(**tolerance))
        if found is not None:
            raise AssertionError(found.text())


def _image(path: Path) -> str:
    return f"{path.name} sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"


@lru_cache(4096)
def _instruction(code: bytes, bits: int) -> bytes:
    """Without the bytes behind it."""
    found = instruction_text(code, 0, bits) if code else None
    return code[: found[1]] if found is not None else b""
