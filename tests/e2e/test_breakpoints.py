"""Breakpoints and watchpoints across modes, world switches and pages of code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.served import Served, attach, reach, run
from tests.gdbstub.gdb import Gdb

Serve = Callable[..., Served]
Image = Callable[[str], Path]


def test_before_paging_and_through_world_switches(gdb: Gdb, serve: Serve, hypervisor: Path) -> None:
    guest = hypervisor.parent / "guest64.elf"
    served = serve(hypervisor, "--symbols", f"guest2={guest}")
    served.connect(gdb)
    assert gdb.value("$cr0 & 0x80000000") == 0  # at reset, in 32-bit code
    gdb("hbreak schedule")
    gdb("monitor stop-on vmexit msr")
    assert "reakpoint 1, schedule () at" in gdb("continue")
    gdb("delete")
    printed = gdb("continue")
    assert "#VMEXIT MSR of guest 2" in printed, printed

    # The guest has just been made: 32-bit code, no paging. Its symbols say that it will be 64-bit.
    printed = attach(gdb, 2)
    assert "Reading symbols from target:/guest 2 asid=1 vmcb=0x800000/guest64.elf" in printed
    assert gdb.value("$cr0 & 0x80000000") == 0
    gdb("break tick")
    for _ in range(3):
        printed = gdb("continue")
        assert "Thread 2.1" in printed, printed
        assert "Breakpoint 2, tick ()" in printed, printed
    assert gdb.value("$cr0 & 0x80000000") != 0

    # In and out again, as clients do at every stop, and by hand.
    for number in range(3, 20):
        gdb("delete")
        gdb("break work" if number % 2 else "tbreak tick")
        assert f"reakpoint {number}, " in gdb("continue")
    gdb("delete")
    assert "exited with code 01" in gdb("continue")


def test_watchpoints_of_a_guest(gdb: Gdb, serve: Serve, hypervisor: Path, tmp_path: Path) -> None:
    undebugged = run(hypervisor, tmp_path)
    served = serve(hypervisor)
    served.connect(gdb)
    gdb("tbreak on_nested_page_fault")
    gdb("continue")
    attach(gdb, 2, hypervisor.parent / "guest64.elf")
    old = gdb.value("counter")
    gdb("watch counter")
    printed = gdb("continue")
    assert 'Thread 2.1 "guest 2' in printed
    assert f"Old value = {old}\nNew value = {old + 1}\n" in printed
    # pc is behind the store, whose line it belongs to.
    assert "guest64.c:93" in printed
    here = gdb.value("$pc")
    code = gdb("disassemble main").splitlines()
    behind = next(n for n, line in enumerate(code) if f"{here & (1 << 64) - 1:#x}" in line)
    assert "<counter>" in code[behind - 1], code[behind - 1]
    gdb("delete")

    gdb("rwatch counter")
    printed = gdb("continue")
    assert "Hardware read watchpoint 3: counter" in printed, printed
    assert f"Value = {old + 1}\n" in printed
    gdb("delete")
    gdb("awatch ticks")
    printed = gdb("continue")
    assert "Hardware access (read/write) watchpoint 4: ticks" in printed
    assert "tick () at" in printed
    gdb("delete")

    # A guest's memory that its hypervisor writes, by another mapping: the store is told where it was made.
    gdb("inferior 1")
    gdb("watch *(long *)0x10f6000")
    assert "Hardware watchpoint 5" in gdb("continue")  # the guest's own store, seen by the hypervisor's watchpoint
    gdb("delete")
    gdb("watch guests[1].vmcb->exit_code")  # the processor stores it
    printed = gdb("continue")
    assert "Hardware watchpoint 6" in printed, printed
    gdb("delete")
    served.ends_as(gdb, undebugged)


@pytest.mark.parametrize("runtime", ["native", "python"])
def test_on_a_page_of_hot_code(gdb: Gdb, serve: Serve, image: Image, tmp_path: Path, runtime: str) -> None:
    elf = image("vcpus")
    undebugged = run(elf, tmp_path)
    served = serve(elf, "--runtime", runtime)
    served.connect(gdb)
    reach(gdb, "again")
    value = gdb.value("*(long *)&hot")
    gdb("watch *(long *)&hot")
    gdb("break *after_vmexit")
    for _ in range(10):
        printed = gdb("continue")
        assert "Breakpoint 3, after_vmexit" in printed, printed
        printed = gdb("continue")
        value += 1
        assert f"New value = {value}\n" in printed, printed
        assert "cmpl" in gdb("x/i $pc")
    gdb("delete")
    gdb("rwatch *(long *)&hot")
    assert "Value = " in gdb("continue")
    gdb("delete")
    served.ends_as(gdb, undebugged)


def test_a_breakpoint_of_one_that_was_not_resumed_is_passed(gdb: Gdb, serve: Serve, image: Image) -> None:
    gdb("set schedule-multiple off")
    served = serve(image("vcpus"))
    served.connect(gdb)
    reach(gdb, "second_vcpu")
    attach(gdb, 2)
    gdb("inferior 1")
    increment = gdb.value("(long)&increment")
    gdb("break *after_vmexit")
    gdb("inferior 2")
    gdb(f"tbreak *{increment:#x} thread 2.1")
    printed = gdb("continue")
    assert "[inferior 1 ran past its breakpoint at" in printed
    assert "Temporary breakpoint 3" in printed
    gdb("delete")
    gdb("stepi 20")
    assert gdb.value("$_inferior") == 2


@pytest.mark.parametrize("runtime", ["native", "python"])
def test_string_input_and_output(gdb: Gdb, serve: Serve, image: Image, tmp_path: Path, runtime: str) -> None:
    """Each iteration of a repeated INS or OUTS is a step, and what it stores and loads can be watched."""
    elf = image("strings")
    undebugged = run(elf, tmp_path)
    served = serve(elf, "--runtime", runtime)
    served.connect(gdb)
    where = {name: gdb.value(f"(long)&{name}") for name in ("at_ins", "at_ins_again", "at_outs", "behind")}
    gdb("tbreak *at_ins")
    gdb("continue")
    seen = []
    while gdb.value("$pc") == where["at_ins"]:
        seen.append((gdb.value("$rcx"), gdb.value("*(long *)&buffer")))
        gdb("stepi")
    assert seen == [(5 - n, 0x0807060504030201 >> 8 * n << 8 * n | 0x5A5A5A5A5A >> 8 * (5 - n)) for n in range(6)]

    gdb("awatch *((char *)&buffer + 2)")
    printed = gdb("continue")
    assert "Value = 90 'Z'" in printed, printed  # stored again
    assert (gdb.value("$pc"), gdb.value("$rcx")) == (where["at_ins_again"], 2)
    printed = gdb("continue")
    assert "Value = 90 'Z'" in printed, printed  # loaded
    assert (gdb.value("$pc"), gdb.value("$rcx")) == (where["at_outs"], 2)
    gdb("delete")
    gdb("set var *(char *)&buffer = 1")
    gdb("tbreak *behind")
    gdb("continue")
    assert gdb.value("$rcx") == 0
    served.ends_as(gdb, undebugged, changed=True)


def test_a_watched_destination_changes(gdb: Gdb, serve: Serve, image: Image, tmp_path: Path) -> None:
    elf = image("strings")
    undebugged = run(elf, tmp_path)
    served = serve(elf)
    served.connect(gdb)
    gdb("watch *((char *)&buffer + 2)")
    printed = gdb("continue")
    assert "Old value = 3" in printed, printed
    assert "New value = 90" in printed, printed
    assert (gdb.value("$pc"), gdb.value("$rcx")) == (gdb.value("(long)&at_ins"), 2)
    gdb("delete")
    served.ends_as(gdb, undebugged)


@pytest.mark.parametrize("runtime", ["native", "python"])
def test_beside_those_of_the_software_itself(gdb: Gdb, serve: Serve, image: Image, tmp_path: Path, runtime: str) -> None:
    """Debug registers and the debugger have the same instruction and the same variable: each gets its own."""
    elf = image("debug")
    undebugged = run(elf, tmp_path)
    assert undebugged.status == 20 << 1 | 1
    served = serve(elf, "--runtime", runtime)
    served.connect(gdb)
    handler = gdb.value("(long)&on_debug")
    gdb("break *target")
    assert "Breakpoint 1, " in gdb("continue")
    gdb("stepi")
    assert gdb.value("$pc") == handler  # the #DB in the place of the instruction
    assert gdb.value("*(long *)&variable") == 0
    assert "Breakpoint 1, " in gdb("continue")  # back at it, to be executed
    assert gdb.value("$eflags & 0x10000") != 0
    gdb("stepi")
    assert gdb.value("$pc") == handler  # the trap of the data breakpoint
    assert gdb.value("*(long *)&variable") == 1
    gdb("delete")
    gdb("watch *(long *)&variable")
    for value in range(2, 5):
        assert f"New value = {value}\n" in gdb("continue")
    gdb("delete")
    served.ends_as(gdb, undebugged)
