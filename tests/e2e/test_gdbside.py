"""The module on gdb's side: its commands, their completion and errors, its functions; in each gdb there is."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.served import Served, attach, run, same, vmdbg
from tests.gdbstub.gdb import Gdb
from tests.gdbstub.serving import serving
from vmdbg.attach import MODULE

Serve = Callable[..., Served]


@pytest.fixture
def gdb(each_gdb: Gdb) -> Gdb:
    each_gdb(f"source {MODULE}")
    return each_gdb


def test_commands_functions_and_completion(gdb: Gdb, serve: Serve, hypervisor: Path, tmp_path: Path) -> None:
    undebugged = run(hypervisor, tmp_path)
    served = serve(hypervisor, "--symbols", f"guest2={hypervisor.parent / 'guest64.elf'}")
    assert "is gdb connected to vmdbg?" in gdb("guests")
    assert gdb("complete vmcb g") == ""
    served.connect(gdb)
    assert "No guest has been entered" in gdb("guests")
    gdb("break on_nested_page_fault")
    gdb("continue")
    while "5 " not in gdb("guests"):
        gdb("continue")
    gdb("delete")
    assert gdb.value("$guest()") == 0

    # In the hypervisor: a VMCB by an expression of its source.
    gdb("break handle_exit if guest->number == 1")
    if "Breakpoint" not in gdb("continue"):
        gdb("continue")
    by_name, by_number = gdb("vmcb guest->vmcb"), gdb("vmcb 2")
    assert "VMCB at 0x800000, guest 2" in by_number
    assert by_name == by_number
    assert gdb("vmcb 2 rip cr3").split()[0::2][:2] == ["rip", "cr3"]
    assert gdb.value('$vmcb("guest_asid", 2)') == 1
    assert gdb.value('$vmcb("rip", 2) == guest->vmcb->rip') == 1
    assert "missing, and no guest is selected" in gdb("vmcb")
    assert "a VMCB has no field 'moon'" in gdb("vmcb 2 moon")
    assert 'No symbol "moon"' in gdb("vmcb moon")
    assert "which is not mapped here" in gdb("vmcb 0xffffff0000000000")
    gdb("delete")

    # In a guest all of them mean that guest.
    attach(gdb, 2)
    gdb("tbreak work")
    gdb("continue")
    assert gdb.value("$guest()") == 2
    assert "\n*    2 " in gdb("guests")
    assert "VMCB at 0x800000, guest 2" in gdb("vmcb")
    assert "in guest 2 (guest 2), supervisor read" in gdb("walk &counter")
    assert gdb("walk work") == gdb("walk &work") != gdb("walk work 2 x")
    assert f"{gdb.value('$pc') & (1 << 64) - 1:#x} in guest 2" in gdb("walk $pc")
    assert gdb("walk '&counter + 1' 2 w").splitlines()[0].endswith("supervisor write: 4-level paging over 4-level nested paging")
    assert gdb("walk 0x100000 host").startswith("0x100000 in the host, supervisor read")
    assert "walk needs an address" in gdb("walk")
    assert 'No symbol "moon"' in gdb("walk moon")
    assert len(gdb("exits 2 3").splitlines()) >= 4
    assert "VMMCALL" in gdb("intercepts")
    assert gdb("vmrun why") == gdb("monitor vmrun why 2")
    assert "memory of process 2 is at gpa" in gdb("space gpa")
    assert "memory of process 2 is at gva" in gdb("space gva")
    assert "usage" in gdb("stop-on moon")
    assert "List the host and its guests" in gdb("help guests")
    assert "monitor help walk" in gdb("help walk")

    assert gdb("complete vmcb 2 guest_as") == "vmcb 2 guest_asid\n"
    assert gdb("complete vmcb 5") == "vmcb 5\n"
    assert "walk &counter" in gdb("complete walk &coun")
    assert gdb("complete walk 0x1000 h") == "walk 0x1000 host\n"
    assert gdb("complete exits ").split("\n")[:4] == ["exits 2", "exits 3", "exits 4", "exits 5"]
    assert "exits --by\n" in gdb("complete exits --b")
    assert "disasm 2:counter\n" in gdb("complete disasm 2:count")
    assert "disasm 2:gva:counter\n" in gdb("complete disasm 2:gva:count")
    assert gdb("complete regs sv") == "regs svm\n"
    assert gdb("complete msr lst") == "msr lstar\n"
    assert gdb("complete vmcb wat") == "vmcb watch\n"
    assert "regs" in gdb("help regs")
    assert "monitor help regs" in gdb("help regs")

    # All of monitor's but those whose names gdb has itself: these are gdb's.
    assert gdb("regs") == gdb("monitor regs 2")
    assert gdb("stack 4") == gdb("monitor stack 4 2")
    assert gdb("mtree") == gdb("monitor mtree")
    assert gdb("vmcb diff --guest 2") == gdb("monitor vmcb diff --guest 2")
    assert "0x" in gdb("monitor x/2gx 2:counter")
    assert gdb("x/1xw &counter").startswith("0x")
    assert "Print backtrace of all stack frames" in gdb("help bt")
    assert "usage" in gdb("regs moon")
    assert gdb("complete space g") == "space gpa\nspace gva\n"

    # Conditions with the functions, evaluated by gdb; loading again changes nothing; the run was the run all the while.
    gdb(f"source {MODULE}")
    gdb("detach")
    gdb("inferior 1")
    gdb('tbreak handle_exit if $vmcb("exitcode", 2) == guest->vmcb->exitcode && $guest() == 0')
    assert "handle_exit (" in gdb("continue")
    gdb("delete")
    assert "exited with code 01" in gdb("continue")
    gdb.close()
    same(served.finish(), undebugged)


def test_the_path_of_the_module_is_printed() -> None:
    done = vmdbg("gdb", "--print-module")
    assert done.returncode == 0
    assert Path(done.stdout.strip()) == MODULE


def test_vmdbg_gdb_loads_it(hypervisor: Path, gdb: Gdb) -> None:
    assert gdb
    done = vmdbg("gdb", str(hypervisor), "--", "-batch", "-ex", "rules", "-ex", "print $guest()")
    assert "$1 = 0" in done.stdout, done
    assert "canonical" in done.stdout or "EFER" in done.stdout, done


def test_another_stub_is_told_apart(gdb: Gdb) -> None:
    with serving() as one:
        gdb(f"target extended-remote 127.0.0.1:{one.port}")
        printed = gdb("guests")
        assert "no vmdbg" in printed or "is gdb connected to vmdbg?" in printed
        gdb("detach")


def test_it_needs_gdb() -> None:
    done = subprocess.run(["python3", str(MODULE)], capture_output=True, text=True, check=False)
    assert "No module named 'gdb'" in done.stderr
