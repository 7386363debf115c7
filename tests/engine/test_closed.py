"""Machines that are closed: how many stay until they are collected."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from vmdbg.engine import closed
from vmdbg.machine import Config, Machine


@pytest.fixture
def nobody_collects() -> Iterator[None]:
    """Python's collector does not come by itself."""
    before = closed._most
    closed.keep_at_most(8 << 30)
    gc.collect()
    gc.disable()
    yield
    gc.enable()
    closed.keep_at_most(before)


@pytest.mark.usefixtures("nobody_collects")
def test_closed_machines_do_not_pile_up() -> None:
    def make() -> int:
        Machine(b"\xf4", Config(memory=1 << 20, flat_address=0x1000, mode="protected")).close()
        return len(closed._held)

    others = len(closed._held)  # that other tests have not let go of
    held = [make() - others for _ in range(12)]
    assert max(held) <= 5, "of two gibibytes each, eight stay"
    closed.keep_at_most(0)
    assert [make() - others for _ in range(4)] == [1] * 4
    kept = [Machine(b"\xf4", Config(memory=1 << 20, flat_address=0x1000, mode="protected")) for _ in range(3)]
    for one in kept:
        one.close()
    assert [make() - others for _ in range(3)] == [4] * 3
