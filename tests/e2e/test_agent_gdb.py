"""What gdb's users do with conditions, dynamic prints and tracepoints in a hypervisor and its guests."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.served import Served, run, same
from tests.gdbstub.gdb import GDBS
from tests.patience import PATIENCE
from vmdbg.attach import GDB_SETTINGS

Serve = Callable[..., Served]
PROGRAMS = pytest.mark.parametrize(
    "program", GDBS, ids=lambda program: "newest" if program.startswith(sys.prefix) else "system"
)


def batch(program: str, served: Served, folder: Path, script: str) -> str:
    path = folder / "script"
    head = "\n".join(["set pagination off", "set confirm off", *GDB_SETTINGS])
    path.write_text(
        f"{head}\ntarget extended-remote 127.0.0.1:{served.port}\nset breakpoint condition-evaluation target\n"
        f"set dprintf-style agent\n{script}"
    )
    done = subprocess.run(
        [program, "-nx", "-q", "-batch", "-x", path], capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    return done.stdout + done.stderr


def attach(hypervisor: Path) -> str:
    """To guest 2, in 64-bit mode."""
    build = hypervisor.parent
    return (
        f"file {build / 'hypervisor.debug'}\ntbreak handle_exit if guest->vmcb->efer & 0x400\ncontinue\nadd-inferior\n"
        f"inferior 2\nfile {build / 'guest64.elf'}\nattach 2\n"
    )


@PROGRAMS
def test_a_guest(program: str, serve: Serve, hypervisor: Path, tmp_path: Path) -> None:
    """A condition on its variable, and prints of what it counts, while everything runs; the run is as without."""
    undebugged = run(hypervisor, tmp_path)
    served = serve(hypervisor)
    script = f"""{attach(hypervisor)}
break work if counter == 40
dprintf tick,"tick %lu\\n", ticks
continue
print counter
info breakpoints
delete
continue
"""
    printed = batch(program, served, tmp_path, script)
    assert 'Thread 2.1 "guest 2 asid=1 vmcb=0x800000" hit Breakpoint' in printed, printed
    assert "$1 = 40" in printed
    ticks = [int(number) for number in re.findall(r"^tick (\d+)$", printed, re.MULTILINE)]
    assert ticks == list(range(ticks[0], ticks[0] + len(ticks)))
    assert len(ticks) > 5
    assert "(target evals)\n\tbreakpoint already hit 1 time" in printed
    same(served.finish(), undebugged)


@PROGRAMS
def test_tracepoints_in_hypervisor_and_guest(program: str, serve: Serve, hypervisor: Path, tmp_path: Path) -> None:
    undebugged = run(hypervisor, tmp_path)
    served = serve(hypervisor)
    script = f"""{attach(hypervisor)}
eval "trace *%p", &work
actions
collect $regs, *(unsigned long *)$rsp, $trace_timestamp
while-stepping 2
collect $regs
end
end
inferior 1
trace handle_exit if guest->vmcb->exit_code == 0x81
actions
collect guest, *guest->vmcb
end
tstart
monitor tracepoints
inferior 2
tbreak work if counter == 20
continue
tstatus
tstop
inferior 1
tfind tracepoint 3
print/x guest->vmcb->exit_code
print guest->vmcb->asid
tfind tracepoint 3
print/x guest->vmcb->exit_code
print *(char *)0x900000
tfind none
inferior 2
tfind tracepoint 2
output $pc == &work
info tvariables
tfind
info symbol $pc
tfind none
info tracepoints
continue
"""
    printed = batch(program, served, tmp_path, script)
    assert "Trace is running on the target." in printed, printed
    assert re.search(r"^2 +2 +0xffffffff80100228 +yes +0 +0 *$", printed, re.MULTILINE), printed  # though inferior 1 was selected
    assert re.search(r"^3 +1 +0x103[0-9a-f]{3} +yes +0 +0 *$", printed, re.MULTILINE)
    assert "$1 = 0x81\n" in printed, printed
    assert "$3 = 0x81\n" in printed
    assert "$2 = 1" in printed
    assert "Cannot access memory at address 0x900000" in printed or "<unavailable>" in printed
    assert "Found trace frame" in printed
    assert re.search(r"work \+ 1 in section .text", printed)  # a step behind its first instruction
    assert re.search(r"trace_timestamp 0 +\d+", printed)
    assert re.search(r"tracepoint already hit \d\d+ times", printed)
    same(served.finish(), undebugged)


@PROGRAMS
def test_locals_arguments_and_where_it_returns(program: str, serve: Serve, hypervisor: Path, tmp_path: Path) -> None:
    """What gdb makes of names: expressions, stretches of the stack, and registers outside the block of `g` are all the same."""
    served = serve(hypervisor)
    script = f"""{attach(hypervisor)}
trace work
actions
collect $args, $locals, $_ret
end
tstart
tbreak work if counter == 12
continue
tstop
tfind 5
info args
info locals
backtrace 2
tfind none
delete
continue
"""
    printed = batch(program, served, tmp_path, script)
    frame = printed[printed.index("Found trace frame 5") :]
    assert re.search(r"^round = \d+$", frame, re.MULTILINE), printed
    assert re.search(r"^sum = \d+$", frame, re.MULTILINE)
    assert re.search(r"#1 .* in main \(", frame)


@PROGRAMS
def test_whose_a_tracepoint_is_can_be_said(program: str, serve: Serve, hypervisor: Path, tmp_path: Path) -> None:
    served = serve(hypervisor)
    script = f"""{attach(hypervisor)}
trace work
actions
collect $regs
end
tstart
monitor tracepoints 2 1
tbreak work if counter == 9
continue
monitor tracepoints 2 2
tbreak work if counter == 12
continue
monitor tracepoints
monitor tracepoints 2 77
"""
    printed = batch(program, served, tmp_path, script)
    rows = re.findall(r"^2 +(\d) +0xffffffff\w+ +yes +(\d+) +\d+ *$", printed, re.MULTILINE)
    assert rows == [("1", "0"), ("2", "0"), ("2", "4")], printed  # where it stops, too
    assert "no process 77" in printed
