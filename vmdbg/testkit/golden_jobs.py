# SPDX-License-Identifier: GPL-2.0-or-later
"""A job's golden exit trace: recorded if that is asked for, else compared with."""

from __future__ import annotations

import shlex
from pathlib import Path

from vmdbg.api import Machine
from vmdbg.api.errors import Error
from vmdbg.testkit import keys
from vmdbg.testkit.bench import Bench
from vmdbg.testkit.divergence import compare
from vmdbg.testkit.golden import Trace
from vmdbg.testkit.outcome import RECORDED, Outcome
from vmdbg.testkit.recording import Recording

__all__ = ["Golden"]


class Golden:
    """Of one job."""

    def __init__(self, bench: Bench, record: bool) -> None:
        self.wanted, self.record = bench.job.values[keys.GOLDEN], record
        machine = Machine.on(bench.debugger, bench.options, bench.serial)
        machine.options = {word.removeprefix("--").partition("=")[0]: word.partition("=")[2] for word in bench.job.words}
        self.recording = Recording(machine)
        self.id = bench.job.id

    def judge(self, outcome: Outcome) -> str:
        """Compare, or record if nothing else is wrong; why it fails, if it does."""
        path, tolerance = Path(self.wanted.file), self.wanted.tolerance
        try:
            if self.record:
                if not outcome.reasons:
                    self.recording.save(path, **tolerance)
                    outcome.sections[RECORDED] = f"{len(self.recording)} exits recorded in {path}"
                return ""
            if not path.exists():
                return f"golden: there is no {path} yet; record it: vmdbg test --record {shlex.quote(self.id)}"
            golden = Trace.load(path)
            found = compare(golden, self.recording.trace(), golden.tolerance.changed(**tolerance))
        except Error as error:
            return f"golden: {error}"
        if found is None:
            return ""
        outcome.trace_diff = found.text()
        return outcome.trace_diff.split("\n")[0]
