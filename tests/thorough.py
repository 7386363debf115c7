"""The random tests with far more seeds than each test run has time for:

python -m tests.thorough vmcbs [COUNT [FIRST]]    hostile VMCBs (100,000)
python -m tests.thorough walks [COUNT [FIRST]]    page walks, the engine's against `introspect`'s (1,000,000)

Exit status 0 if all went well.  Five hundred seeds that take ten minutes count as a hang; what was being done is on the last line.
"""

from __future__ import annotations

import faulthandler
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from time import monotonic

from introspect.exits import exit_name
from tests.engine.test_translation import MODES, one_dimension, two_dimensions
from tests.svm.test_hostile import run

BATCH = 500
"""Seeds between two lines of progress."""
EACH = 10
"""VMCBs that one machine is given: to make one takes longer than to run one."""


def batches(what: str, first: int, count: int) -> Iterator[range]:
    """The seeds in batches; what is being done stands on the last line, should the process die of it."""
    start = monotonic()
    for at in range(first, first + count, BATCH):
        faulthandler.dump_traceback_later(600, exit=True)
        print(f"\r{what}: from seed {at}, {monotonic() - start:.0f} s", end="", flush=True)
        yield range(at, min(at + BATCH, first + count))
    faulthandler.cancel_dump_traceback_later()
    print(f"\r{what}: seeds {first} to {first + count - 1} in {monotonic() - start:.0f} s")


def vmcbs(count: int, first: int) -> None:
    exits: Counter[int] = Counter()
    for seeds in batches("VMCBs", first, count):
        for seed in seeds[::EACH]:
            exits.update(run(seed, EACH))
    print("machines that saw: " + ", ".join(f"{exit_name(code)} {times}" for code, times in exits.most_common()))


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
    for number, (name, walk) in enumerate(kinds):
        outcomes: Counter[object] = Counter()
        for seeds in batches(name, first + number * share, share):
            outcomes += walk(seeds)
        print(f"  {dict(outcomes)}")


WHAT = {"vmcbs": (vmcbs, 100_000), "walks": (walks, 1_000_000)}


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
