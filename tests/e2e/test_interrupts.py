"""A short run of tests/interrupts.py: no ^C is lost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from gdbstub.example import CODE
from tests.e2e.served import Served
from tests.gdbstub.serving import serving
from tests.interrupts import interrupt

COUNT = 300


def test_the_example_target() -> None:
    with serving() as example:
        assert len(interrupt(example.port, COUNT)) == COUNT
    with serving() as example:
        assert len(interrupt(example.port, COUNT, breakpoint_at=CODE + 8)) == COUNT


def test_a_hypervisor_with_guests(serve: Callable[..., Served], hypervisor: Path) -> None:
    assert len(interrupt(serve(hypervisor, "--append", "loop=0").port, COUNT)) == COUNT


def test_a_guest_that_spins_with_interrupts_off(serve: Callable[..., Served], image: Callable[[str], Path]) -> None:
    assert len(interrupt(serve(image("spin")).port, COUNT)) == COUNT
