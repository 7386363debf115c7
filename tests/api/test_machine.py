# SPDX-License-Identifier: GPL-2.0-or-later
"""The Python API on the demo hypervisor."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import vmdbg
from tests import api_source, reference
from vmdbg import Machine, Reason

BUILD = Path(__file__).resolve().parents[2] / "examples/hypervisor/build"
IMAGE = BUILD / "hypervisor.elf"

pytestmark = pytest.mark.skipif(not IMAGE.exists(), reason="the demo hypervisor is not built: no gcc and ld for x86-64")


@pytest.fixture
def machine() -> Iterator[Machine]:
    with Machine(IMAGE, memory="256M", symbols={2: BUILD / "guest64.elf"}) as made:
        yield made


def test_the_generated_modules_are_current() -> None:
    with reference.monitor() as commands:
        again = "run `python -m tests.reference`"
        assert api_source.COMMANDS.read_text() == api_source.commands_module(reference.api_registry(commands).commands.values()), again
        assert api_source.FIELDS.read_text() == api_source.fields_module(), again


def test_run_until_a_location_then_an_event(machine: Machine) -> None:
    stop = machine.run(until="host:main")
    assert stop.reason == Reason.BREAKPOINT
    assert stop.reached
    assert stop.symbol == "main"
    assert stop.inferior == machine.host
    stop = machine.run(until="guest-start")
    assert (stop.reason, stop.inferior.number) == (Reason.CATCHPOINT, 2)
    assert [guest.number for guest in machine.guests] == [2]
    stop = machine.run(until="vmexit npf if gpa >= 0x100000")
    assert stop.reached
    assert machine.breakpoints == machine.catchpoints == ()


def test_guests(machine: Machine) -> None:
    machine.run(until="2:tick")
    guest = machine.guest(2)
    assert guest.rip == guest.registers["rip"] == guest.symbol("tick")
    assert guest.symbol(guest.rip) == "tick"
    assert guest.read("counter", 8) == guest.read(guest.address_of("counter"), 8)
    guest.write_int("counter", 77)
    assert guest.read_int("counter") == 77
    assert guest.walk("counter").walk.mode == "4-level"
    with pytest.raises(vmdbg.Error, match="no guest has this number"):
        machine.guest(99)


def test_a_breakpoint_with_a_condition(machine: Machine) -> None:
    point = None
    machine.run(until="2:tick")
    point = machine.guest(2).breakpoint("work", when="$rdi > 2")
    stop = machine.run(ticks=50_000_000)
    assert stop.points == (point,)
    assert point.hits == 1
    assert machine.guest(2).registers.rdi > 2
    point.delete()
    assert not point.exists


def test_exits_and_serial(machine: Machine) -> None:
    stop = machine.run()
    assert stop.reason == Reason.ENDED
    assert stop.exit_status == machine.exit_status == 1
    assert machine.serial.startswith("hypervisor: ")
    exits = machine.exits(guest=2, code="VMMCALL", last=1)
    assert len(exits) == 1
    assert {one.name for one in exits} == {"VMMCALL"}
