"""Stock lldb, where there is one, against the example target."""

import shutil
import subprocess

import pytest

from tests.gdbstub.lldb import WAITS
from tests.gdbstub.serving import serving
from tests.patience import PATIENCE


@pytest.mark.skipif(shutil.which("lldb") is None, reason="lldb is not in PATH")
def test_lldb() -> None:
    with serving() as one:
        commands = [
            WAITS,
            f"gdb-remote 127.0.0.1:{one.port}",
            "thread list",
            "register read rip asid",
            "thread step-inst",
            "breakpoint set -a 0x1008",
            "process continue",
            "breakpoint delete 1",
            "watchpoint set expression -s 1 -- 0x2000",
            "process continue",
            "memory region 0x1000",
            "memory write 0x2100 7",
            "memory read -c 4 0x2100",
            "register write rax 5",
            "register read rax",
            "process plugin packet monitor echo hi",
            "process detach",
        ]
        arguments = [argument for command in commands for argument in ("-o", command)]
        done = subprocess.run(
            ["lldb", "--no-lldbinit", "--batch", *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
    for expected in (
        "thread #2: tid = 0x0002, 0x0000000000001000, name = 'cpu1'",
        "asid = 0x00000001",
        "stop reason = instruction step into",
        "stop reason = breakpoint 1.1",
        "incb   (%rdi)",
        "stop reason = watchpoint 1",
        "r-x code",
        "0x00002100: 07 00 00 00",
        "rax = 0x0000000000000005",
        "hi\n",
        "Process 1 detached",
    ):
        assert expected in done.stdout, (expected, done.stdout, done.stderr)
