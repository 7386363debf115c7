"""Record what stock clients say to the example target: `python -m tests.gdbstub.record NAME PROGRAM`.

NAME is a file below `recorded`, PROGRAM a gdb or an lldb; a NAME with `nonstop` is of a gdb in non-stop mode. `test_recorded.py` says the same again to the stub of today, and
the fuzzer starts from it. A recording is made anew when a client's packets have become others that are right, too.
"""

from __future__ import annotations

import io
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from gdbstub.example import Example
from gdbstub.recording import Recorder
from tests.gdbstub.gdb import NonStopGdb
from tests.gdbstub.serving import serving

FOLDER = Path(__file__).parent / "recorded"

GDB = """
set confirm off
set pagination off
set osabi none
set sysroot
set schedule-multiple on
info inferiors
info threads
x/4i $pc
stepi 3
info registers rip eflags efer
info registers svm
set var $xmm1.v4_int32[2] = 7
set var *(long *)0x2000 = 0x1122334455667788
x/16xb 0x2000
find /b 0x1000, 0x1fff, 0xfe, 0x07
break *0x1004 thread 2
continue
delete
hbreak *0x1006
continue
delete
watch *(char *)0x2000
continue
delete
rwatch *(char *)0x2000
continue
delete
break *0x1002 if *(unsigned char *)0x2000 >= 0x90
continue
delete
info os processes
monitor help
monitor echo hi
monitor lines 40
monitor space physical
x/4xb 0x1000
monitor space virtual
info mem
add-inferior
inferior 2
attach 2
info registers eip
break *0x1004
continue
continue
delete
stepi
set scheduler-locking on
stepi
set scheduler-locking off
monitor say hello
break *0x1008
continue
delete
detach
inferior 1
maintenance packet qqemu.PhyMemMode
maintenance packet jAddressSpacesInfo
break *0x1004
kill
run
delete
stepi
x/i $pc
disconnect
"""

NON_STOP = """
-exec-step-instruction --thread 1
info threads
break *0x1008
-exec-continue --thread 2
-exec-continue --thread 1
delete
thread 1
watch *(char *)0x2000
-exec-continue --thread 1
delete
thread 2
tbreak *0x1002 if $rdi == 0x2000
-exec-continue --thread 2
-exec-step-instruction --thread 2
print $rip
x/4i $pc
monitor echo hi
thread apply all print $eflags
kill
tbreak *0x1004
-exec-run
info threads
disconnect
"""
"""Behind each -exec a thread stops."""

LLDB = """
thread list
register read
register read asid gif
register write rax 5
memory region 0x1000
thread step-inst
breakpoint set -a 0x1008 -c "$rdi==0x2000"
process continue
breakpoint delete 1
watchpoint set expression -s 1 -- 0x2000
process continue
watchpoint delete 1
expression -- (int)1+2
expression -- $rax = 7
register read rax
memory write 0x2100 7
memory read -c 16 0x2100
memory find -e 7 0x2000 0x3000
disassemble -c 3
process status
process plugin packet monitor echo hi
process plugin packet monitor lines 40
process plugin packet send qRegisterInfo0
process plugin packet send QSaveRegisterState;thread:1;
process plugin packet send QRestoreRegisterState:1;thread:1;
process plugin packet send jAddressSpacesInfo
process plugin packet send m1000,8;address_space:2;
bt
thread info
process detach
"""


def command(program: str, port: int) -> list[str]:
    """The client's command line for its script."""
    if "lldb" in Path(program).name:
        lines = [f"gdb-remote 127.0.0.1:{port}", *LLDB.strip().splitlines()]
        return [program, "--no-lldbinit", "--batch", *(word for line in lines for word in ("-o", line))]
    lines = GDB.strip().splitlines()
    lines.insert(5, f"target extended-remote 127.0.0.1:{port}")
    return [program, "--nx", "--quiet", "--batch", *(word for line in lines for word in ("-ex", line))]


def say(program: str, port: int) -> str:
    """Have a client carry out its script; what it printed."""
    with tempfile.TemporaryFile("w+") as printed:
        subprocess.run(
            command(program, port), stdin=subprocess.DEVNULL, stdout=printed, stderr=subprocess.STDOUT, timeout=60, check=True
        )
        printed.seek(0)
        return printed.read()


def say_one_by_one(program: str, port: int) -> str:
    """The same in non-stop mode."""
    gdb = NonStopGdb(program)
    try:
        gdb("set sysroot")
        gdb.connect(port, stops=2)
        for line in NON_STOP.strip().splitlines():
            if line.startswith("-exec"):
                gdb.mi(line)
                gdb.stop()
            else:
                gdb(line)
        return gdb.text
    finally:
        gdb.close()


def record(program: str, talk: Callable[[str, int], str] = say) -> tuple[str, str]:
    """What was said, as a recording, and what the client printed."""
    file, target = io.StringIO(), Example()
    with serving(target) as served:
        served.server.recorder = Recorder(file)
        printed = talk(program, served.port)
        return file.getvalue(), printed


def main(name: str, program: str) -> None:
    text, printed = record(program, say_one_by_one if "nonstop" in name else say)
    version = subprocess.run([program, "--version"], capture_output=True, text=True, check=False).stdout.splitlines()[0]
    (FOLDER / f"{name}.txt").write_text(f"# {version} on gdbstub.example, by tests/gdbstub/record.py\n{text}", encoding="ascii")
    print(printed)
    print(f"{text.count(chr(10))} lines, {len(text)} bytes")


if __name__ == "__main__":
    main(*sys.argv[1:])
