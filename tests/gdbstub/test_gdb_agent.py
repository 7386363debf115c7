"""Conditions in the stub, dynamic prints and tracepoints as gdb's users type them, with each gdb there is."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gdbstub.example import DATA
from gdbstub.target import ThreadId
from tests.gdbstub.gdb import GDBS, Gdb
from tests.gdbstub.serving import Serving, serving
from tests.patience import PATIENCE, until

PROGRAMS = pytest.mark.parametrize(
    "program", GDBS, ids=lambda program: "newest" if program.startswith(str(Path(sys.prefix))) else "system"
)
BYTE = f"*(unsigned char *){DATA:#x}"


@pytest.fixture
def served() -> Iterator[Serving]:
    with serving() as one:
        yield one


@pytest.fixture
def gdb(program: str, served: Serving) -> Iterator[Gdb]:
    one = Gdb(program)
    one(f"target extended-remote 127.0.0.1:{served.port}")
    one("set breakpoint condition-evaluation target")
    one("set scheduler-locking on")
    yield one
    one.close()


@PROGRAMS
def test_conditions_are_evaluated_in_the_stub(gdb: Gdb, served: Serving) -> None:
    gdb(f"break *0x1004 if {BYTE} % 7 == 5 && $rdi == {DATA:#x}")
    for value in (5, 12, 19):
        assert "hit Breakpoint 1" in gdb("continue")
        assert gdb.value(BYTE) == value
    assert "(target evals)" in gdb("info breakpoints")
    gdb("condition 1 $rip == 0")
    gdb(f"tbreak *0x1002 if {BYTE} == 30")
    assert "Temporary breakpoint 2" in gdb("continue")
    assert gdb.value(BYTE) == 30
    assert served.target.hits[1, 0x1004] == 3


@PROGRAMS
def test_a_condition_without_memory_stops(gdb: Gdb) -> None:
    gdb("break *0x1004 if *(long *)0x10 == 1")
    printed = gdb("continue")
    assert "no memory is readable at 0x10" in printed


@PROGRAMS
def test_dynamic_prints(gdb: Gdb) -> None:
    gdb("set dprintf-style agent")
    gdb(f'dprintf *0x1008,"%d of %#lx\\n", {BYTE}, $rdi')
    gdb(f"tbreak *0x1004 if {BYTE} == 4")
    assert "".join(f"{value} of 0x2000\n" for value in range(4)) in gdb("continue")


def batch(program: str, folder: Path, port: int, script: str) -> str:
    """What gdb prints for a script: its machine interface tells of trace frames in ways that pygdbmi cannot read."""
    path = folder / "script"
    head = f"set pagination off\nset confirm off\nset remotetimeout {PATIENCE:.0f}\ntarget extended-remote 127.0.0.1:{port}\nset scheduler-locking on\n"
    path.write_text(f"{head}set breakpoint condition-evaluation target\n{script}")
    done = subprocess.run(
        [program, "-nx", "-q", "-batch", "-x", path], capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    return done.stdout + done.stderr


@PROGRAMS
def test_tracepoints(program: str, served: Serving, tmp_path: Path) -> None:
    script = f"""
tvariable $count = 10
trace *0x1008
actions
collect $regs, {BYTE}, $count
teval $count = $count + 1
end
trace *0x1004 if {BYTE} & 1
actions
collect $rip
while-stepping 2
collect $rip
end
end
tbreak *0x1002 if {BYTE} == 4
tstart
continue
tstatus
tstop enough of it
tstatus
tfind start
tdump
tfind tracepoint 2
output $pc
tfind
output $pc
tfind
output $pc
tfind end
tfind pc 0x1008
output $pc
output {BYTE}
tfind pc 0x1008
output $pc
output {BYTE}
tfind none
output {BYTE}
info tvariables
info tracepoints
tfind 0
x/x 0x2100
"""
    printed = batch(program, tmp_path, served.port, script)
    for piece in (
        "Trace is running on the target.",
        "Collected 10 trace frames.",
        "Trace stopped by a tstop command (enough of it)",
        "Found trace frame 0, tracepoint 1",
        "rip            0x1008 ",
        "exitcode       <unavailable>",
        f"{BYTE} = 0 '\\000'",
        "$count = 10",
        "Found trace frame 1, tracepoint 2\n(void (*)()) 0x1004",
        "Found trace frame 2, tracepoint 2\n(void (*)()) 0x1005",
        "Found trace frame 3, tracepoint 2\n(void (*)()) 0x1006",
        "Found trace frame 0, tracepoint 1\n(void (*)()) 0x10080 '\\000'",
        "Found trace frame 4, tracepoint 1\n(void (*)()) 0x10081 '\\001'",
        "$count          10          14",
        "tracepoint already hit 4 times",
        "trace buffer usage",
        "0x2100:\t<unavailable>",
    ):
        assert piece in printed, (piece, printed)
        printed = printed.partition(piece)[2] if piece.startswith("Found") else printed


@PROGRAMS
def test_strings_and_bases(program: str, served: Serving, tmp_path: Path) -> None:
    served.call(lambda: served.target.write_memory(ThreadId(1, 1), DATA + 0x10, b"a string\0 and more"))
    script = f"""
trace *0x1008
actions
collect/s (char *)($rdi + 0x10)
collect (*(unsigned short (*)[4])($rdi + 0x10))
end
tbreak *0x1002 if {BYTE} == 2
tstart
continue
tstop
tfind start
output (char *){DATA + 0x10:#x}
x/4bx {DATA + 0x18:#x}
"""
    printed = batch(program, tmp_path, served.port, script)
    assert '"a string"' in printed
    assert "0x2018:\t0x00\t<unavailable>" in printed


@PROGRAMS
def test_saved_traces(program: str, served: Serving, tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    script = f"""
trace *0x1008
actions
collect $regs, {BYTE}
end
tbreak *0x1002 if {BYTE} == 4
tstart
continue
tstop
tsave {saved}
disconnect
target tfile {saved}
tstatus
tfind 3
output {BYTE}
info registers rip gif
"""
    printed = batch(program, tmp_path, served.port, script)
    assert "Using a trace file." in printed, printed
    assert "Found trace frame 3, tracepoint 1" in printed
    assert "3 '\\003'" in printed
    assert "rip            0x1008 " in printed
    assert "gif            0x1 " in printed


@PROGRAMS
def test_the_buffer(program: str, served: Serving, tmp_path: Path) -> None:
    script = f"""
set trace-buffer-size 200
trace *0x1008
actions
collect {BYTE}
end
tbreak *0x1002 if {BYTE} == 200
tstart
continue
tstatus
set circular-trace-buffer on
tbreak *0x1002 if {BYTE} == 255
tstart
continue
tstop
tstatus
tfind 7
output {BYTE}
"""
    printed = batch(program, tmp_path, served.port, script)
    assert "Trace stopped because the buffer was full" in printed
    assert "Collected 8 trace frames." in printed
    assert "Buffer contains 8 trace frames (of 55 created total)." in printed
    assert "254 '\\376'" in printed


@PROGRAMS
def test_a_trace_outlives_its_client(program: str, served: Serving, tmp_path: Path) -> None:
    script = f"set disconnected-tracing on\ntrace *0x1008\nactions\ncollect {BYTE}\nend\ntstart\ndetach\n"
    batch(program, tmp_path, served.port, script)
    until(lambda: served.call(lambda: len(served.target.trace.buffer)) >= 100)
    printed = batch(program, tmp_path, served.port, f"tstatus\ntstop\ntfind 50\noutput {BYTE}\ninfo tracepoints\n")
    assert "Trace is running on the target" in printed
    assert "Found trace frame 50, tracepoint 1" in printed
    assert f"collect {BYTE}" in printed  # gdb has it from the stub
