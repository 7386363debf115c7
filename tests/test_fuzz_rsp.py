"""A short run of the fuzzer of the stub, and that it would notice."""

from __future__ import annotations

from random import Random

import pytest

from gdbstub.target import TargetError, ThreadId
from tests.fuzz_rsp import ExampleTarget, Failure, fuzz
from tests.gdbstub.mutate import corpus, stream
from tests.gdbstub.strict import Strict
from tests.subjects import IMAGE, DebuggedMachine


def test_the_example_target_survives() -> None:
    assert fuzz(ExampleTarget(), 20_000, 7, 0) == 20_000


def test_a_machine_survives() -> None:
    if not IMAGE.exists():
        pytest.skip("the example hypervisor is not built: make examples")
    subject = DebuggedMachine()
    try:
        assert fuzz(subject, 2000, 7, 0) == 2000
    finally:
        subject.close()


def test_a_seed_makes_the_same_stream_again() -> None:
    seeds = corpus()
    once, again, other = (list(stream(Random(f"{seed} 3"), seeds, 500)) for seed in (1, 1, 2))
    assert once == again != other


class Brittle(Strict):
    """Fails where a client reads an odd number of bytes."""

    def read_memory(self, thread: ThreadId, address: int, length: int) -> bytes:
        if length % 2:
            raise ZeroDivisionError
        return super().read_memory(thread, address, length)


class Forgetful(Strict):
    """Does not restart in full."""

    def boot(self) -> None:
        super().boot()
        self.processes[1].memory[8] = self.boots = getattr(self, "boots", 0) + 1


class Sticky(Strict):
    """Keeps breakpoints."""

    def remove_breakpoint(self, *arguments: object) -> None:
        raise TargetError("not now")


@pytest.mark.parametrize(
    ("target", "message"),
    [(Brittle, "handler failed"), (Forgetful, "reference dialogue has other answers"), (Sticky, "gone has left|caught a fault")],
)
def test_what_is_wrong_is_found_with_its_batch(target: type[Strict], message: str) -> None:
    subject = ExampleTarget()
    subject.target = target()
    with pytest.raises(Failure, match=rf"seed 1, batch 0: .*({message})") as failed:
        fuzz(subject, 20_000, 1, 0)
    assert failed.value.batch == 0
