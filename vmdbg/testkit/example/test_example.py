# SPDX-License-Identifier: GPL-2.0-or-later
"""Tests of hypervisor.S, one for each part of the plugin."""

import shutil
from collections.abc import Callable

import pytest

from vmdbg.api import Guest, Machine
from vmdbg.testkit import Gdb, assert_vmrun_ok, expect_exit, expect_isolation, expect_no_exit, expect_no_notice
from vmdbg.testkit.fixtures import Golden

pytestmark = pytest.mark.vmdbg("hypervisor.elf", symbols={2: "guest.elf"})

UPPER_HALF = range(0x8000, 0x10000)
"""Guest-physical memory whose pages come as they are touched."""


def test_runs_to_its_end(machine: Machine) -> None:
    stop = machine.run()
    assert stop.exit_status == 1, "0 was written to the debug exit port"
    assert machine.serial == "hello from the guest\ndone\n"


def test_guest_is_told_who_is_there(guest: Guest) -> None:
    expect_exit(guest, "CPUID", rip="vendor")
    assert guest.registers.rax == 0x40000000
    guest.breakpoint("work")
    guest.machine.run()
    assert guest.read(guest.address_of("signature"), 12) == b"vmdbgExample"


def test_memory_comes_as_it_is_touched(guest: Guest) -> None:
    expect_no_exit(guest, "NPF", gpa=range(0x8000), ticks=200_000)
    expect_exit(guest, "NPF", within=0, gpa=UPPER_HALF, rip="work")


def test_isolation(guest: Guest) -> None:
    expect_exit(guest, "VMMCALL")
    expect_isolation(guest.machine)


def test_vmcb(guest: Guest) -> None:
    assert_vmrun_ok(guest)
    assert guest.vmcb.guest_asid == 1


@pytest.mark.vmdbg(tlb="strict")
def test_no_flush_is_missing(machine: Machine) -> None:
    machine.run()
    expect_no_notice(machine)


def test_exits_are_those_of_ever(machine: Machine, golden: Golden) -> None:
    machine.run()
    golden("example", rip="function")


@pytest.mark.parametrize("cpus", [1, 2])
def test_processors_make_no_difference(boot: Callable[..., Machine], cpus: int) -> None:
    machine = boot(cpus=cpus)
    machine.run()
    assert len(machine.exits(2, "NPF")) == 4


@pytest.mark.skipif(shutil.which("gdb") is None, reason="there is no gdb (apt install gdb)")
def test_with_gdb(gdb: Gdb) -> None:
    gdb.run_to("on_nested_page_fault")
    gdb.attach(2)
    assert gdb.backtrace()[0].function == "work"
    gdb.break_at("work", when="*(int *)&counter == 5")
    gdb.resume()
    assert gdb.eval("*(int *)&counter") == 5
    assert len(gdb.monitor("exits 2 4096 --code npf --json")) == 4
