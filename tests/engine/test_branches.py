"""The ring of branches: which blocks were left, and for where."""

from __future__ import annotations

from tests.engine.rig import Rig
from vmdbg.engine.runtime import BRANCH_RING


def test_branches_are_recorded(python: bool) -> None:
    rig = Rig("movl $3, %ecx\nagain: nop; loop again\njmp end\nnop\nend: call function\nhlt\nfunction: ret", "long", python=python)
    rig.run()
    at = rig.labels
    taken = [(start + size, to) for start, size, to in rig.machine.engine.branches(100)]
    assert taken == [
        (at["again"] + 3, at["again"]), (at["again"] + 3, at["again"]), (at["end"] - 1, at["end"]),
        (at["end"] + 5, at["function"]), (at["function"] + 1, at["end"] + 5),
    ]  # fmt: skip


def test_the_ring_keeps_the_last(python: bool) -> None:
    count = BRANCH_RING + 100
    rig = Rig(f"movl ${count}, %ecx\nagain: nop; loop again\njmp end\nnop\nend: hlt", "long", python=python)
    rig.run(1_000_000)
    branches = rig.machine.engine.branches(count)
    assert len(branches) == BRANCH_RING == 65536
    assert branches[-1][2] == rig.labels["end"]
    assert {to for _, _, to in branches[:-1]} == {rig.labels["again"]}
