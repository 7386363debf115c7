"""Stock lldb on the example hypervisor: what its users type, and what they see."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.served import Served, run, same
from tests.gdbstub.lldb import Lldb, lldb, programs

Serve = Callable[..., Served]


@pytest.fixture(params=programs() or [""], ids=lambda path: Path(path).name)
def program(request: pytest.FixtureRequest) -> str:
    if not request.param:
        pytest.skip("lldb is not in PATH")
    return str(request.param)


def addresses(elf: Path) -> dict[str, int]:
    lines = subprocess.run(["nm", elf], capture_output=True, text=True, check=True).stdout.splitlines()
    return {line.split()[2]: int(line.split()[0], 16) for line in lines if len(line.split()) == 3}


def expect(printed: str, *lines: str) -> None:
    """These in this order."""
    at = 0
    for line in lines:
        found = printed.find(line, at)
        assert found >= 0, (line, printed)
        at = found + len(line)


def test_a_session(serve: Serve, hypervisor: Path, program: str) -> None:
    served = serve(hypervisor)
    address = addresses(hypervisor.parent / "hypervisor.debug")
    printed = lldb(
        program,
        f"gdb-remote 127.0.0.1:{served.port}",
        "thread list",
        "register read rip rax",
        "thread step-inst",
        "register read rip",
        f"breakpoint set -a {address['schedule']:#x}",
        "process continue",
        "register read cr3 efer",
        "thread step-inst",
        "memory read -s 8 -c 2 -f x 0x100000",
        "memory write -s 4 0x7000 0x12345678",
        "memory read -s 4 -c 1 -f x 0x7000",
        "register write r12 0x77",
        "register read r12",
        "memory region 0x100000",
        "breakpoint delete 1",
        f"watchpoint set expression -s 8 -- {address['guests'] + 384 + 176:#x}",
        "process continue",
        "process plugin packet monitor guests",
        "watchpoint delete 1",
        "process continue",
    )
    expect(
        printed, "name = 'CPU 0'", "rip = 0x000000000010000c", "rax = 0x000000002badb002", "stop reason = instruction step into",
        "rip = 0x000000000010000d", "stop reason = breakpoint 1.1", "efer = 0x0000000000001d00", "0x00007000: 0x12345678",
        "r12 = 0x0000000000000077", "stop reason = watchpoint 1", "4-level over 4-level", "exited with status = 1",
    )  # fmt: skip


def test_conditions_by_source_and_expressions_that_call(
    serve: Serve, hypervisor: Path, program: str, tmp_path: Path
) -> None:
    undebugged = run(hypervisor, tmp_path)
    served = serve(hypervisor)
    printed = lldb(
        program,
        f"target create {hypervisor.parent / 'hypervisor.debug'}",
        f"gdb-remote 127.0.0.1:{served.port}",
        "breakpoint set --name handle_exit --condition 'guest->number == 1'",
        "process continue",
        "frame variable guest->number",
        "bt",
        "register read rip rsp",
        "expression -- (unsigned long)guest->vmcb->rip + 1",
        "process plugin packet send QSaveRegisterState;thread:1;",
        "register write rax 0x1234567",
        "process plugin packet send QRestoreRegisterState:1;thread:1;",
        "thread info --json",
        "process plugin packet send qStructuredDataPlugins",
        "breakpoint delete 1",
        "thread step-over",
        "thread step-out",
        "process plugin packet monitor exits 3",
        "process continue",
    )
    expect(
        printed, "stop reason = breakpoint 1.1", "number = 1", "frame #1", "rip = ", "(unsigned long) $0 = ", "response: 1",
        "response: OK", '"name": "CPU 0"', "[]", "stop reason = step over",
        "stop reason = step out", "exited with status = 1",
    )  # fmt: skip
    same(served.finish(), undebugged, changed=True)  # registers were written, and restored


def test_from_the_boot_sector_to_long_mode(serve: Serve, examples: Path, program: str, tmp_path: Path) -> None:
    """In one session: with the symbols of a 64-bit file the registers are 64-bit ones throughout."""
    sector = examples / "bootsector/build/bootsector.img"
    elf = sector.with_suffix(".elf")
    undebugged = run(sector, tmp_path)
    served = serve(sector, "--symbols", f"host={elf}")
    printed = lldb(
        program,
        f"target create {elf}",
        f"gdb-remote 127.0.0.1:{served.port}",
        "register read rip cr0",
        "disassemble -A i386-unknown-unknown-code16 -s 0x7c00 -c 1",
        "thread step-inst",
        "disassemble -A i386-unknown-unknown-code16 -n real_mode -c 3",
        "breakpoint set -K false -n protected_mode",
        "breakpoint set -K false -n long_mode",
        "process continue",
        "disassemble -A i386 -n protected_mode -c 1",
        "thread step-inst",
        "register read rax",
        "process continue",
        "register read efer",
        "disassemble -n long_mode -c 1",
        "thread step-inst",
        "register read rdx",
        "process continue",
    )
    expect(
        printed, "`_start at bootsector.S", "rip = 0x0000000000007c00", "cr0 = 0x0000000000000010", "ljmpw  $0x0, $0x7c05",
        "`real_mode at bootsector.S", "xorw   %ax, %ax", "stop reason = breakpoint 1.1", "`protected_mode at bootsector.S",
        "movl   $0x10, %eax", "stop reason = instruction step into", "rax = 0x0000000000000010", "stop reason = breakpoint 2.1",
        "`long_mode at bootsector.S", "efer = 0x0000000000000500", "movl   $0x3f8, %edx", "rdx = 0x00000000000003f8",
        "exited with status = 1",
    )  # fmt: skip
    same(served.finish(), undebugged)


def test_the_machine_waits_while_nobody_is_attached(serve: Serve, hypervisor: Path, program: str) -> None:
    served = serve(hypervisor)
    where = f"gdb-remote 127.0.0.1:{served.port}"
    first = lldb(program, where, "thread step-inst", "process plugin packet monitor time", "process detach --keep-stopped true")
    second = lldb(program, where, "register read rip", "process plugin packet monitor time", "process detach --keep-stopped true")
    times = [re.findall(r"(\d+) ticks", printed) for printed in (first, second)]
    assert times[0] == times[1] != []
    assert "rip = 0x000000000010000d" in second


def test_two_targets_of_one_lldb(serve: Serve, hypervisor: Path, program: str, tmp_path: Path) -> None:
    """One for the hypervisor, one for its guest, each with its own connection, on one machine."""
    undebugged = run(hypervisor, tmp_path)
    served = serve(hypervisor, "--symbols", f"guest2={hypervisor.parent / 'guest64.elf'}")
    where = f"gdb-remote 127.0.0.1:{served.port}"
    one = Lldb(program)
    try:
        one(f"target create {hypervisor.parent / 'hypervisor.debug'}", "(x86_64)")
        one(where, "stop reason")
        one("breakpoint set --name on_nested_page_fault", "Breakpoint 1")
        one("process continue", "stop reason = breakpoint 1.1")
        one("breakpoint delete 1", "1 breakpoints deleted")
        one(f"target create {hypervisor.parent / 'guest64.elf'}", "(x86_64)")
        one(where, "stop reason")
        one("thread info", "guest 2 asid=1")
        one("breakpoint set --name work", "Breakpoint 1")
        one("target list", "* target #1")

        # The machine runs when both let it; a stop of one is no stop of the other.
        one("process continue", "Process 2 resuming")
        one("target select 0", "* target #0")
        one("process status", "Process 1 stopped")
        one("process continue", "Process 1 resuming")
        one("target select 1", "* target #1")
        one("frame variable", "round")
        one("breakpoint delete 1", "1 breakpoints deleted")
        one("process detach", "Process 2 detached")
        one("target select 0", "exited with status = 1")
    finally:
        one.close()
    same(served.finish(), undebugged)
