# SPDX-License-Identifier: GPL-2.0-or-later
"""A job from its machine to its verdict, in the process that is the job's alone."""

from __future__ import annotations

import contextlib
import errno
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from vmdbg.engine.errors import EngineError
from vmdbg.machine import LIMIT_REACHED, Event
from vmdbg.options import UsageError
from vmdbg.run import IDLE_SECONDS
from vmdbg.testkit import keys
from vmdbg.testkit.bench import Bench, SharedText, tail
from vmdbg.testkit.jobs import Job
from vmdbg.testkit.outcome import Outcome, Verdict
from vmdbg.testkit.reproduction import commands_of, joined

if TYPE_CHECKING:
    from vmdbg.testkit.golden_jobs import Golden

__all__ = ["WallBudget", "budget", "carry_out", "skeleton"]

GRACE = 1.0
"""Seconds between a machine's end by its wall budget and that of a script which does not take note."""
NO_MEMORY = "not enough memory (address-space)"
SUCCESS = (0, 1)
"""Exit statuses of a run that has ended by itself and says that all is well: power-off, and 0 at port F4."""


class WallBudget(BaseException):
    """The wall budget is used up. It is no Exception, so that scripts do not take it for one of theirs."""


def skeleton(job: Job) -> Outcome:
    """What is known of a job before it runs."""
    return Outcome(job.name, job.file, job.line, job.kind, image=job.image, reproduce=commands_of(job))


@contextlib.contextmanager
def budget(seconds: float, over: Callable[[], object]) -> Iterator[None]:
    """Call `over` when the time is over; raise `WallBudget` a while later, and again."""
    warned = False

    def ring(number: int, frame: FrameType | None) -> None:
        nonlocal warned
        if warned:
            raise WallBudget
        warned = True
        over()

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds, GRACE)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def carry_out(
    job: Job, printed: SharedText, say: Callable[[Outcome], None], *, record: bool = False, snapshots: Path | None = None
) -> None:
    """Run a job; `say` takes its outcome, and before the end what is known so far.

    `record`: its golden trace is written anew. `snapshots`: where a machine that has failed is kept.
    """
    outcome = skeleton(job)
    if job.values[keys.SKIP]:
        outcome.verdict, outcome.reasons = Verdict.SKIPPED, [job.values[keys.SKIP]]
        say(outcome)
        return
    try:
        bench = Bench(job, printed)
    except UsageError as error:
        outcome.verdict, outcome.reasons = Verdict.ERROR, [f"{job.file}:{job.line}: {error}"]
        say(outcome)
        return
    except (MemoryError, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.ENOMEM:
            raise
        outcome.verdict, outcome.reasons = Verdict.ERROR, [NO_MEMORY]
        say(outcome)
        return
    wall = job.values[keys.WALL]
    golden = None
    if job.values[keys.GOLDEN].file:
        from vmdbg.testkit.golden_jobs import Golden

        golden = Golden(bench, record)

    def over() -> None:
        bench.end(f"the wall budget of {wall:g} s is used up")
        known = skeleton(job)  # in case nothing comes behind it
        bench.describe(known)
        known.verdict, known.reasons = Verdict.FAILED, [_spent(bench, known)]
        say(known)

    try:
        with budget(wall, over):
            outcome.reasons = _DRIVERS[job.kind](bench)
    except WallBudget:
        outcome.reasons = []
    except UsageError as error:
        outcome.verdict, outcome.reasons = Verdict.ERROR, [str(error)]
    except EngineError as error:
        outcome.verdict, outcome.reasons = Verdict.ERROR, [f"the engine: {error}"]
    except MemoryError:
        outcome.verdict, outcome.reasons = Verdict.ERROR, [NO_MEMORY]
    except Exception as error:
        if not bench.budget:  # or else it is what a machine that has ended amid a script comes to
            traceback.print_exc()
            outcome.verdict = Verdict.ERROR
            outcome.reasons = [f"{type(error).__name__}: {error}; this is a mistake of vmdbg's, its traceback is in the output"]
    _describe(bench, golden, outcome)
    say(outcome)
    if outcome.bad and snapshots is not None:
        _keep(bench, outcome, snapshots)
        say(outcome)
    bench.close()


def _spent(bench: Bench, outcome: Outcome) -> str:
    """Which budget, and where the machine was then."""
    return outcome.ended if outcome.ended.startswith(bench.budget) else bench.budget


def _keep(bench: Bench, outcome: Outcome, folder: Path) -> None:
    """Save the machine as it is at the failure."""
    from vmdbg.timetravel.file import save
    from vmdbg.timetravel.tree import SnapshotError

    path = folder / f"{re.sub(r'[^A-Za-z0-9_.=-]+', '-', outcome.id).strip('-.')}.snapshot"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save(bench.machine, str(path))
    except (SnapshotError, OSError) as error:
        outcome.sections["snapshot"] = f"none: {error}"
        return
    outcome.reproduce.append(joined(["vmdbg", "console", str(path)]))


def _describe(bench: Bench, golden: Golden | None, outcome: Outcome) -> None:
    bench.describe(outcome)
    outcome.serial = bench.serial.printed.text()
    if outcome.verdict is Verdict.NOT_RUN:
        known = [_spent(bench, outcome)] if bench.budget else []
        outcome.reasons = [*known, *(reason for reason in outcome.reasons if reason not in known), *unmet(bench, outcome)]
        if golden is not None and not bench.budget and (differs := golden.judge(outcome)):
            outcome.reasons.append(differs)
        outcome.settle()
    if outcome.bad:
        bench.explain(outcome)
    outcome.serial = tail(outcome.serial)


def unmet(bench: Bench, outcome: Outcome) -> Iterator[str]:
    """What the job expects and the run has not shown."""
    job, values = bench.job, bench.job.values
    expected = values[keys.STATUS] or (() if job.kind != "run" else SUCCESS)
    if expected and outcome.status not in expected and not bench.budget:
        wanted = " or ".join(map(str, expected))
        if outcome.status is None:
            yield f"the machine has not ended, and status {wanted} is expected; let the script run it to its end"
        elif outcome.status == LIMIT_REACHED and outcome.ended:
            yield f"{outcome.ended} (status {LIMIT_REACHED}, expected {wanted})"
        else:
            yield f"exit status {outcome.status}, expected {wanted}: {outcome.ended}"
    for pattern in values[keys.SERIAL]:
        if not pattern.search(outcome.serial):
            yield f"the serial port has not printed {pattern.text!r}"
    for pattern in values[keys.SERIAL_NEVER]:
        if pattern.search(outcome.serial):
            yield f"the serial port has printed {pattern.text!r}, which it must not"
    if (wanted_hash := values[keys.FINGERPRINT]) and bench.machine.fingerprint is not None and not bench.budget:
        hash = bench.machine.fingerprint.trace(bench.machine).hash
        if hash != wanted_hash:
            yield f"the run's fingerprint is {hash}, expected {wanted_hash}; `vmdbg run --against FILE` shows where two runs part"
    for never, record in bench.progress.forbidden:
        yield f"exit {never.text!r} must not come, and has: {record.line()}"
    if bench.progress.missing:
        last = bench.progress.last
        yield bench.progress.missing + (f"; the one before was {last.line()}" if last is not None else "")


def _run(bench: Bench) -> list[str]:
    """Without a script: to the end."""
    while bench.machine.exit_status is None:
        machine = bench.machine
        machine.poll_input()
        bench.bound()
        event = machine.run()
        bench.look()
        if machine.history.stopped_for:
            machine.give_up(f"stopped: {machine.history.stopped_for},")
        if event == Event.IDLE and not machine.poll_input():
            if not machine.chipset.hears:
                machine.give_up("every CPU waits, and nothing is left that could wake one,")
            else:
                time.sleep(IDLE_SECONDS)
    return []


def _console(bench: Bench) -> list[str]:
    from vmdbg.testkit.console_scripts import run

    return run(bench)


def _gdb(bench: Bench) -> list[str]:
    from vmdbg.testkit.gdb_scripts import run

    return run(bench)


def _mi(bench: Bench) -> list[str]:
    from vmdbg.testkit.mi_scripts import run

    return run(bench)


def _python(bench: Bench) -> list[str]:
    from vmdbg.testkit.python_scripts import run

    return run(bench)


_DRIVERS: dict[str, Callable[[Bench], list[str]]] = {
    "run": _run, "console": _console, "gdb": _gdb, "mi": _mi, "python": _python,
}  # fmt: skip


def flush() -> None:
    """Standard streams, of which a killed reader may be gone."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
