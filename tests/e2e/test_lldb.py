"""Stock lldb on the example hypervisor."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.served import Served


@pytest.mark.skipif(shutil.which("lldb") is None, reason="lldb is not in PATH")
def test_lldb(serve: Callable[..., Served], hypervisor: Path) -> None:
    served = serve(hypervisor)
    symbols = subprocess.run(
        ["nm", hypervisor.parent / "hypervisor.debug"], capture_output=True, text=True, check=True
    ).stdout.split("\n")
    address = {line.split()[2]: int(line.split()[0], 16) for line in symbols if len(line.split()) == 3}
    commands = [
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
    ]
    arguments = [argument for command in commands for argument in ("-o", command)]
    done = subprocess.run(
        ["lldb", "--no-lldbinit", "--batch", *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True,
        timeout=60, check=False,
    )  # fmt: skip
    for expected in (
        "name = 'CPU 0'",
        "rip = 0x000000000010000c",
        "rax = 0x000000002badb002",
        "stop reason = instruction step into",
        "rip = 0x000000000010000d",
        "stop reason = breakpoint 1.1",
        "efer = 0x0000000000001d00",
        "0x00007000: 0x12345678",
        "r12 = 0x0000000000000077",
        "stop reason = watchpoint 1",
        "4-level over 4-level",
        "exited with status = 1",
    ):
        assert expected in done.stdout, (expected, done.stdout, done.stderr)
