"""The random tests with far more seeds than each test run has time for:

python -m tests.thorough vmcbs [COUNT [FIRST]]    hostile VMCBs (100,000)
python -m tests.thorough walks [COUNT [FIRST]]    page walks, the engine's against `introspect`'s (1,000,000)
python -m tests.thorough exits [COUNT [FIRST]]    what `would-exit` predicts of random guests, against what they do (10,000)
python -m tests.thorough iommu [COUNT [FIRST]]    an IOMMU's tables, our walks against a plain reading of the manual (100,000)
python -m tests.thorough fingerprints [COUNT [FIRST]]  all examples, on both runtimes, with 1 to 8 processors, alone and under
                                                  gdb: one trace each (COUNT rounds of random cuts: 1)
python -m tests.thorough snapshots [COUNT [FIRST]]  states that somebody has invented: refused, or machines like any other (3,000)

Exit status 0 if all went well.  Five hundred seeds that take ten minutes count as a hang.  On a terminal the last line says which
of them are being tried, elsewhere those at most 20 seconds before.
"""

from __future__ import annotations

import faulthandler
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic

from introspect.exits import exit_name
from tests.engine.rig import MODES as PROCESSOR_MODES
from tests.engine.test_translation import MODES, one_dimension, two_dimensions
from tests.fingerprints import EXAMPLES, RUNTIMES, alone, cut, debugged
from tests.introspect.iommu.test_reference import compare, compare_interrupts
from tests.svm.test_hostile import run
from tests.svm.test_would_exit import predictions
from tests.timetravel import inventing

BATCH = 500
"""Seeds between two lines of progress."""
EVERY = 20.0
"""Seconds between two lines where the output is no terminal."""
EACH = 10
"""VMCBs that one machine is given: to make one takes longer than to run one."""


class Progress:
    """How far it is: one line on a terminal, elsewhere a line now and then."""

    def __init__(self, what: str, total: int) -> None:
        self.what, self.total, self.done = what, total, 0
        self.start = self.told = monotonic()

    def batches(self, part: str, first: int, count: int, size: int = BATCH) -> Iterator[range]:
        """The seeds in batches: what is being tried is told first, since the process may die of it."""
        for at in range(first, first + count, size):
            faulthandler.dump_traceback_later(600, exit=True)
            seeds = range(at, min(at + size, first + count))
            self.tell(f"{part} from seed {at}")
            yield seeds
            self.done += len(seeds)
        faulthandler.cancel_dump_traceback_later()

    def tell(self, doing: str) -> None:
        now = monotonic()
        if sys.stdout.isatty() or not self.done or now - self.told >= EVERY:
            self.told, spent = now, now - self.start
            left = f", about {spent / self.done * (self.total - self.done):,.0f} s left" if self.done else ""
            share = 100 * self.done // self.total
            self._print(f"{self.done:,} of {self.total:,} {self.what} ({share} %) in {spent:,.0f} s{left}; {doing}")

    def end(self, outcomes: Counter[str], of: str) -> None:
        """All is done: how it went."""
        found = ", ".join(f"{name} {times:,}" for name, times in outcomes.most_common())
        self._print(f"{self.done:,} {self.what} in {monotonic() - self.start:,.0f} s; {of}: {found}", last=True)

    @staticmethod
    def _print(line: str, *, last: bool = False) -> None:
        terminal = sys.stdout.isatty()
        print(f"\r\033[K{line}" if terminal else line, end="" if terminal and not last else "\n", flush=True)


def vmcbs(count: int, first: int) -> None:
    exits: Counter[str] = Counter()
    progress = Progress("VMCBs", count)
    for seeds in progress.batches("a machine for each ten", first, count):
        for seed in seeds[::EACH]:
            exits.update(map(exit_name, run(seed, EACH)))
    progress.end(exits, "machines that saw")


def walks(count: int, first: int) -> None:
    """As many in one dimension as in two."""
    kinds: list[tuple[str, Callable[[range], Counter[object]]]] = [
        *((f"{mode}", lambda seeds, mode=mode: one_dimension(mode, seeds)) for mode in MODES * 3),
        *(
            (f"{mode} over {host}", lambda seeds, mode=mode, host=host: two_dimensions(mode, host, seeds))
            for mode in MODES for host in MODES
        ),
    ]  # fmt: skip
    share = -(-count // len(kinds))
    outcomes: Counter[str] = Counter()
    progress = Progress("walks", share * len(kinds))
    for number, (name, walk) in enumerate(kinds):
        for seeds in progress.batches(name, first + number * share, share):
            outcomes.update({str(outcome): times for outcome, times in walk(seeds).items()})
    progress.end(outcomes, "outcomes")


def exits(count: int, first: int) -> None:
    """As many in each mode of the processor."""
    share = -(-count // len(PROCESSOR_MODES))
    outcomes: Counter[str] = Counter()
    progress = Progress("predictions", share * len(PROCESSOR_MODES))
    for number, mode in enumerate(PROCESSOR_MODES):
        for seeds in progress.batches(mode, first + number * share, share):
            outcomes.update({str(outcome): times for outcome, times in predictions(mode, seeds).items()})
    progress.end(outcomes, "outcomes")


def iommu(count: int, first: int) -> None:
    """Nine sets of page tables for each set of interrupt tables, and several requests to each."""
    outcomes: Counter[str] = Counter()
    progress = Progress("sets of tables", count)
    interrupts = count // 10
    for seeds in progress.batches("interrupt tables", first, interrupts):
        outcomes.update(compare_interrupts(seeds))
    for seeds in progress.batches("page tables", first + interrupts, count - interrupts):
        outcomes.update(compare(seeds))
    progress.end(outcomes, "outcomes")


def fingerprints(count: int, first: int) -> None:
    """Each example with each number of processors: the trace of the first run is what all others must have."""
    cells = [(example, cpus) for example in EXAMPLES for cpus in range(1, 9)]
    outcomes: Counter[str] = Counter()
    progress = Progress("runs", len(cells) * (4 + 4 * count))
    for example, cpus in cells:
        faulthandler.dump_traceback_later(3600, exit=True)
        progress.tell(f"{example} with {cpus} processors")
        whole, short = (alone(example, cpus, "native", limit) for limit in (None, EXAMPLES[example].ticks))
        found = [(f"{runtime}", alone(example, cpus, runtime, EXAMPLES[example].ticks), short) for runtime in RUNTIMES[1:]]
        for seed in range(first, first + count):
            found.append(("in slices and steps", cut(example, cpus, None, seed), whole))
            found.append(("in slices and steps, to a tick", cut(example, cpus, EXAMPLES[example].ticks, seed), short))
            for how in ("busy", "idle"):
                name, trace = debugged(example, cpus, how, seed)
                found.append((f"gdb {how}", whole._replace(identity=name, trace=trace), whole))
        for what, got, expected in found:
            outcomes[what] += 1
            if got != expected:
                raise AssertionError(f"{example} with {cpus} processors, {what}: {got[:2]} and not {expected[:2]}")
        progress.done += 4 + 4 * count
    faulthandler.cancel_dump_traceback_later()
    progress.end(outcomes, "alike")


def snapshots(count: int, first: int) -> None:
    """As many of each scene, a process for each batch: the engine keeps memory of machines that are closed."""
    names = inventing.names()
    share = -(-count // len(names))
    outcomes: Counter[str] = Counter()
    progress = Progress("invented states", share * len(names))
    for name in names:
        inventing.real(name)
        for seeds in progress.batches(name, first, share, 50):
            context = get_context("fork")
            mine, its = context.Pipe(duplex=False)
            child = context.Process(target=_examined, args=(name, seeds, its))
            child.start()
            its.close()
            try:
                outcomes.update(mine.recv())
            except EOFError:
                child.join()
                raise AssertionError(f"{name}, seeds from {seeds[0]}: see above, or it died with {child.exitcode}") from None
            child.join()
    progress.end(outcomes, "they were")


def _examined(name: str, seeds: range, answer: Connection) -> None:
    with TemporaryDirectory() as folder:
        answer.send([inventing.outcome(name, seed, Path(folder) / "invented") for seed in seeds])


WHAT = {
    "vmcbs": (vmcbs, 100_000), "walks": (walks, 1_000_000), "exits": (exits, 10_000), "iommu": (iommu, 100_000),
    "fingerprints": (fingerprints, 1), "snapshots": (snapshots, 3_000),
}  # fmt: skip


def main(arguments: list[str]) -> int:
    try:
        work, count = WHAT[arguments[0]]
        numbers = [int(text) for text in arguments[1:3]]
    except (IndexError, KeyError, ValueError):
        print(__doc__, file=sys.stderr)
        return 2
    faulthandler.enable()
    work(*(numbers + [count, 1_000_000][len(numbers) :]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
