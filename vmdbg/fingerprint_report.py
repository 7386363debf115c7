# SPDX-License-Identifier: GPL-2.0-or-later
"""`--fingerprint`: what a run says of itself at its end, the file that keeps it, and where two runs part."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vmdbg.fingerprint import EVERY, Checkpoint, FingerprintOptions
from vmdbg.options import UsageError

if TYPE_CHECKING:
    from vmdbg.machine import Machine

FORMAT = "vmdbg fingerprint 1"
DIFFERS = 122
"""Exit status of a run that is not the run it was compared with.  No guest can give it: theirs are odd, or 0."""
LARGEST = 64 << 20
"""Bytes of a file at most: of many times as many checkpoints as are kept."""
SHOWN = 32
"""Bytes of an input that are in the file."""
_PARTS = {
    "code": "code executed", "switches": "world switches", "events": "devices, interrupts and input",
    "registers": "registers at the end", "memory": "memory at the end",
}  # fmt: skip


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--fingerprint", action="store_true",
        help="say at the end what identity the run had, and the hash of all that it did (docs/determinism.md)")  # fmt: skip
    add("--fingerprint-file", metavar="FILE", help="write both to a file, with a hash for each part and for each checkpoint")
    add("--fingerprint-every", type=grid, default=FingerprintOptions(), metavar="TICKS[,FIRST]",
        help=f"a checkpoint at every so many ticks, from tick FIRST on ({EVERY},0)")  # fmt: skip
    add("--against", metavar="FILE",
        help=f"compare with the run of such a file; where they part is said, and the exit status is {DIFFERS}")  # fmt: skip


def grid(text: str) -> FingerprintOptions:
    """ "1000" or "1000,5000000"."""
    every, comma, first = text.partition(",")
    if not every.isdecimal() or not int(every) or (comma and not first.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} are no checkpoints; write TICKS or TICKS,FIRST, such as 1000,5000000")
    return FingerprintOptions(int(every), int(first or 0))


def wanted(options: argparse.Namespace) -> FingerprintOptions | None:
    """What the options ask of the machine."""
    asked = options.fingerprint or options.fingerprint_file is not None or options.against is not None
    given: FingerprintOptions = options.fingerprint_every
    return given if asked else None


@dataclass(frozen=True)
class Report:
    """One run, as the file has it."""

    identity: str
    given: Mapping[str, object]
    inputs: Sequence[tuple[int, str, str]]
    """The last ones: tick, from where, and the beginning of the data in hexadecimal."""
    input_count: int
    input_hash: str
    trace: str
    ticks: int
    status: int | None
    parts: Mapping[str, str]
    every: int
    first: int
    checkpoints: Sequence[Checkpoint]

    @classmethod
    def of(cls, machine: Machine) -> Report:
        """Of a machine with a fingerprint, up to now."""
        fingerprint, identity = machine.fingerprint, machine.identity
        assert fingerprint is not None
        trace, inputs = fingerprint.trace(machine), identity.inputs
        return cls(
            str(identity), identity.given, [(i.tick, i.what, i.data[:SHOWN].hex()) for i in inputs.last], inputs.count,
            inputs.chain, trace.hash, trace.tick, trace.status, {part: getattr(trace, part) for part in _PARTS},
            fingerprint.every, fingerprint.first, fingerprint.checkpoints,
        )  # fmt: skip

    @classmethod
    def load(cls, path: str) -> Report:
        """UsageError for whatever is no such file."""
        try:
            with Path(path).open("rb") as file:
                data = file.read(LARGEST + 1)
            found: Any = json.loads(data) if len(data) <= LARGEST else None
        except OSError as error:
            raise UsageError(f"--against {path}: {error.strerror}; name a file that --fingerprint-file has written") from None
        except (ValueError, RecursionError):
            found = None
        try:
            if found["format"] != FORMAT:
                raise TypeError("another format")
            inputs = [(int(tick), str(what), bytes.fromhex(data).hex()) for tick, what, data in found["inputs"]]
            return cls(
                str(found["identity"]), dict(found["given"]), inputs,
                int(found["input_count"]), str(found["input_hash"]), str(found["trace"]), int(found["ticks"]),
                None if found["status"] is None else int(found["status"]),
                {part: str(found["parts"][part]) for part in _PARTS}, max(int(found["every"]), 1), int(found["first"]),
                [Checkpoint(int(tick), str(c), str(s), str(e)) for tick, c, s, e in found["checkpoints"]],
            )  # fmt: skip
        except (TypeError, KeyError, ValueError, OverflowError):
            raise UsageError(
                f"--against {path}: no file of {FORMAT!r}; make one with --fingerprint-file of this version of vmdbg"
            ) from None

    def json(self) -> dict[str, Any]:
        return {
            "format": FORMAT, "identity": self.identity, "trace": self.trace, "ticks": self.ticks, "status": self.status,
            "given": self.given, "input_count": self.input_count, "input_hash": self.input_hash,
            "inputs": [list(one) for one in self.inputs], "parts": dict(self.parts), "every": self.every, "first": self.first,
            "checkpoints": [list(one) for one in self.checkpoints],
        }  # fmt: skip

    def line(self) -> str:
        """For people and for grep."""
        status = "none" if self.status is None else self.status
        return (
            f"fingerprint: identity={self.identity} trace={self.trace} ticks={self.ticks} inputs={self.input_count} "
            f"status={status}"
        )

    def at(self, tick: int) -> tuple[str, ...]:
        """What had happened up to a tick of the grid.  Where nothing did since the checkpoint before, there is none."""
        low, high = 0, len(self.checkpoints)
        while low < high:
            middle = (low + high) // 2
            if self.checkpoints[middle].tick <= tick:
                low = middle + 1
            else:
                high = middle
        return tuple(self.checkpoints[low - 1][1:]) if low else ()


def differences(ours: Report, theirs: Report) -> Iterator[str]:
    """In words, how a run differs from another one; nothing if it does not."""
    if ours.identity != theirs.identity:
        yield from _given_otherwise(ours, theirs)
    if ours.trace != theirs.trace:
        yield _parting(ours, theirs)


def _given_otherwise(ours: Report, theirs: Report) -> Iterator[str]:
    names = [name for name in {**theirs.given, **ours.given} if ours.given.get(name) != theirs.given.get(name)]
    for name in names:
        yield f"{ascii(name)[1:-1]} is {json.dumps(ours.given.get(name))} here, and {json.dumps(theirs.given.get(name))} there"
    if ours.input_hash != theirs.input_hash:
        pairs = zip(ours.inputs, theirs.inputs, strict=False)
        apart = next(((here, there) for here, there in pairs if here != there), None)
        more = max(ours.inputs, theirs.inputs, key=len)[min(len(ours.inputs), len(theirs.inputs)) :]
        if apart is not None:
            yield f"what came from outside is not the same: {_input(apart[0])} here, and {_input(apart[1])} there"
        elif more:
            where = "here" if len(ours.inputs) > len(theirs.inputs) else "there"
            yield f"only {where} {_input(more[0])} came from outside"
        else:
            yield f"what came from outside is not the same: {ours.input_count} times here, {theirs.input_count} times there"


def _input(one: tuple[int, str, str]) -> str:
    tick, what, data = one
    return f"{bytes.fromhex(data)!r} ({ascii(what)[1:-1]}, tick {tick})"


def _parting(ours: Report, theirs: Report) -> str:
    """Between which checkpoints two runs part, and in what."""
    every, finer = sorted((ours.every, theirs.every), reverse=True)
    first, end = max(ours.first, theirs.first), min(ours.ticks, theirs.ticks)
    ticks = sorted({one.tick for report in (ours, theirs) for one in report.checkpoints if first <= one.tick <= end})
    alike = 0
    for tick in ticks if every % finer == 0 else ():
        if tick % every:
            continue
        here, there = ours.at(tick), theirs.at(tick)
        if here != there:
            parts = [name for name, a, b in zip(_PARTS.values(), here, there, strict=False) if a != b] or ["code executed"]
            text = f"the runs part between ticks {alike} and {tick}: {', '.join(parts)}"
            step = max((tick - alike) // 1000, 1)
            return text if step == every else f"{text}; run both with --fingerprint-every {step},{alike} to come closer"
        alike = tick
    names = [name for part, name in _PARTS.items() if ours.parts[part] != theirs.parts[part]]
    if ours.ticks != theirs.ticks:
        names.insert(0, f"one ends at tick {ours.ticks}, the other at {theirs.ticks}")
    elif ours.status != theirs.status:
        names.insert(0, f"one ends with status {ours.status}, the other with {theirs.status}")
    return f"the runs part behind tick {alike}: {', '.join(names)}"


class Fingerprints:
    """What the options of one run ask for at its end."""

    def __init__(self, options: argparse.Namespace) -> None:
        """UsageError before anything runs, if the files cannot be used."""
        self.wanted = wanted(options) is not None
        self.path: str | None = options.fingerprint_file
        self.against: str | None = options.against
        self._theirs = Report.load(self.against) if self.against is not None else None
        if self.path is not None:
            self._write("")

    def _write(self, text: str) -> None:
        assert self.path is not None
        try:
            Path(self.path).write_text(text, encoding="utf-8")
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise UsageError(f"--fingerprint-file {self.path}: {reason}; choose a file that can be written") from None

    def tell(self, machine: Machine, status: int) -> int:
        """The run is over, with this exit status: say what was asked for.  The exit status that the process is to have."""
        if not self.wanted:
            return status
        report = Report.of(machine)
        print(f"vmdbg: {report.line()}", file=sys.stderr, flush=True)
        if self.path is not None:
            self._write(json.dumps(report.json(), indent=1) + "\n")
        if self._theirs is None:
            return status
        found = list(differences(report, self._theirs))
        for line in found:
            print(f"vmdbg: --against {self.against}: {line}", file=sys.stderr)
        if not found:
            print(f"vmdbg: --against {self.against}: the same run", file=sys.stderr)
        return DIFFERS if found else status
