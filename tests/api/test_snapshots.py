# SPDX-License-Identifier: GPL-2.0-or-later
"""Snapshots from a script: gone back to, also from the machine's end, and files of whole machines."""

from __future__ import annotations

from pathlib import Path

import pytest

import vmdbg
from tests.api.conftest import BUILD
from vmdbg import Machine, Reason


def ends(machine: Machine, whole: Machine) -> None:
    """It ends as the one that ran through."""
    for point in machine.breakpoints:
        point.delete()
    stop = machine.run()
    assert (stop.reason, stop.time, machine.serial) == (Reason.ENDED, whole.time, whole.serial)
    assert [one.line() for one in machine.exits()] == [one.line() for one in whole.exits()]


def test_a_machine_goes_back_from_its_end_and_ends_the_same(machine: Machine, whole: Machine) -> None:
    point = machine.breakpoint("2:work")
    machine.run()
    kept, before = machine.snapshot(), machine.guest(2).registers.rdi
    assert (kept.time, "KiB" in repr(kept)) == (machine.time, True)
    point.enabled = False
    machine.run()
    assert machine.exit_status == 1
    machine.restore(kept)
    assert not machine.ended
    assert (machine.time, machine.guest(2).registers.rdi) == (kept.time, before)
    assert machine.guest(2).symbol(machine.guest(2).pc) == "work"
    point.enabled = True
    assert machine.run().points == (point,)
    machine.restore(kept)
    ends(machine, whole)


def test_the_serial_port_goes_back_by_command_too(machine: Machine) -> None:
    machine.run(until="2:work")
    machine.command("snapshot before")
    before = machine.serial
    machine.send("typed ahead")
    machine.run()
    assert len(machine.serial) > len(before)
    machine.command("restore before")
    assert machine.serial == before
    machine.run()
    again = machine.serial
    machine.commands.restore("before")
    machine.run()
    assert machine.serial == again


@pytest.mark.parametrize("name", ["/nonexistent/file", "\0", ""])
def test_a_file_that_cannot_be_written(machine: Machine, name: str) -> None:
    with pytest.raises(vmdbg.Error) as caught:
        machine.save(name)
    assert "\n" not in str(caught.value)


def test_before_a_guest_its_breakpoints_wait_again(machine: Machine, whole: Machine) -> None:
    kept = machine.snapshot()
    point = machine.breakpoint("2:tick")
    first = machine.run().time
    machine.restore(kept)
    assert point.address is None
    assert (len(machine.guests), machine.inferior) == (0, machine.host)
    assert machine.run().time == first
    ends(machine, whole)


def test_a_snapshot_of_another_machine_is_refused(machine: Machine, whole: Machine) -> None:
    with pytest.raises(vmdbg.Error, match="of another machine"):
        machine.restore(whole.snapshot())


def test_a_file_of_a_machine(machine: Machine, whole: Machine, tmp_path: Path) -> None:
    machine.run(until="2:tick")
    path = tmp_path / "machine.snapshot"
    assert machine.save(path) == path.stat().st_size
    before = len(machine.serial)
    with Machine.restore_from(path, symbols={2: BUILD / "guest64.elf"}) as again:
        assert (again.time, again.guest(2).symbol(again.guest(2).pc)) == (machine.time, "tick")
        stop = again.run()
        assert (stop.reason, stop.time, again.serial) == (Reason.ENDED, whole.time, whole.serial[before:])
    path.write_bytes(path.read_bytes()[:-100])
    for other in (path, BUILD / "hypervisor.elf"):
        with pytest.raises(vmdbg.Error) as caught:
            Machine.restore_from(other)
        assert "\n" not in str(caught.value)
