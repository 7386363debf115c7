# SPDX-License-Identifier: GPL-2.0-or-later
"""What the demo hypervisor must keep to.  Guests are numbered as gdb numbers them: the hypervisor is 1, its guests 2 to 5."""

import pytest

from vmdbg.api import Guest, Machine
from vmdbg.testkit import (
    Gdb,
    assert_vmrun_ok,
    expect_exit,
    expect_isolation,
    expect_no_exit,
    expect_no_notice,
)
from vmdbg.testkit.fixtures import Golden

LONG, PAE, REAL, STRAY = 2, 3, 4, 5
RELEASED = 0x200000
"""The page that the PAE guest gives back, and touches again."""


def test_all_guests_come_to_their_end(machine: Machine) -> None:
    stop = machine.run()
    assert "hypervisor: all well" in machine.serial
    assert stop.exit_status == 1


@pytest.mark.vmdbg(tlb="strict", stop_on="stale")
def test_no_missing_tlb_flush(machine: Machine) -> None:
    """With strict TLBs a translation stays until it must be forgotten: the machine stops where a stale one is used."""
    machine.run()
    expect_no_notice(machine, "stale")
    assert len(machine.exits(PAE, "NPF", where=lambda one: one.gpa == RELEASED)) == 2


@pytest.mark.vmdbg(guest=PAE)
def test_no_wrong_intercept(guest: Guest) -> None:
    """CPUID is the hypervisor's to answer; FS.base is the guest's own."""
    expect_exit(guest, "CPUID", rip="vendor", within=10_000)
    expect_no_exit(guest, "MSR", msr=range(0xC0000100, 0xC0000103), within=1_000_000)


def test_no_isolation_hole(machine: Machine) -> None:
    expect_exit(machine, "NPF", gpa=RELEASED)
    expect_isolation(machine)
    assert_vmrun_ok(machine)


@pytest.mark.vmdbg(guest=STRAY)
def test_stray_guest_is_stopped_at_the_end_of_its_memory(guest: Guest) -> None:
    expect_exit(guest, "NPF", gpa=0x40000, write=1)
    expect_no_exit(guest)


def test_guests_do_as_ever(machine: Machine, golden: Golden) -> None:
    """Timer interrupts (INTR) come when they come, and so do turns; what each guest does otherwise may not change."""
    machine.run()
    golden("guests", skip="INTR", reorder="guests", rip="function")


@pytest.mark.vmdbg(guest=LONG)
def test_timer_of_the_64_bit_guest(guest: Guest, gdb: Gdb) -> None:
    gdb.attach(LONG)
    gdb.break_at("tick", when="ticks == 3")
    assert gdb.resume().function == "tick"
    assert gdb.eval("ticks") == 3
    assert "INTR" in gdb.monitor(f"exits --guest {LONG} --by code")
