"""What monitor says of registers, memory and frames is what gdb says of them, and asking changes nothing."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.served import Served, attach, reach, run, same
from tests.gdbstub.gdb import Gdb

Serve = Callable[..., Served]

FORMATS = ("8xb", "8xh", "8xw", "4xg", "8db", "4dh", "4dw", "2dg", "8ub", "4uw", "2ug", "4ow", "4oh", "4ob", "2og", "2tb", "2th",
           "2tw", "4zw", "2zg", "8cb", "2ag", "2fg", "4fw")  # fmt: skip
UNWIND = """
import gdb

def frames():
    "Of functions: what is inlined has no frame of the machine's."
    frame, found = gdb.newest_frame(), []
    try:
        while frame is not None and len(found) < 100:
            if frame.type() != gdb.INLINE_FRAME:
                found.append(frame.pc())
            frame = frame.older()
    except (gdb.error, OverflowError):
        pass
    return found
"""


def result(gdb: Gdb, line: str) -> Any:
    return json.loads(gdb(f"monitor {line} --json"))["result"]


def values(printed: str) -> list[str]:
    """What x shows behind the addresses, without symbols: the two spell them differently."""
    lines = [line.partition(":")[2] for line in printed.strip().split("\n")]
    return " ".join(re.sub(r"<[^>]*>", "", line) for line in lines).split()


def same_frames(gdb: Gdb, guest: str = "") -> int:
    """How many there are. Behind the outermost one, an assembly program's, gdb goes on to what is no code."""
    found = [pc & (1 << 64) - 1 for pc in ast.literal_eval(gdb("python print(frames())").strip())]
    shown = result(gdb, f"bt {guest}")
    mine = [frame["pc"] for frame in shown["frames"]]
    assert mine == found[: len(mine)], shown
    assert shown["frames"][-1]["symbol"].partition("+")[0] in ("long_mode", "high"), shown
    return len(shown["frames"])


@pytest.fixture
def unwinding(gdb: Gdb, tmp_path: Path) -> Gdb:
    (tmp_path / "unwind.py").write_text(UNWIND)
    gdb(f"source {tmp_path / 'unwind.py'}")
    gdb("set backtrace past-main on")
    gdb("set backtrace past-entry on")
    return gdb


def test_frames_are_gdbs(unwinding: Gdb, serve: Serve, hypervisor: Path) -> None:
    gdb = unwinding
    served = serve(hypervisor, "--symbols", f"guest2={hypervisor.parent / 'guest64.elf'}")
    served.connect(gdb)
    depths = set()
    for function, steps in (("put_char", 12), ("on_nested_page_fault", 30), ("allocate_page", 20)):
        gdb(f"tbreak {function}")
        gdb("continue")
        for _ in range(steps):
            depths.add(same_frames(gdb))
            gdb("stepi")
        gdb("finish")
        depths.add(same_frames(gdb))
    assert max(depths) > 5
    gdb("kill")


def test_frames_go_on_behind_an_interrupt(gdb: Gdb, serve: Serve, hypervisor: Path) -> None:
    """The entry of the demo's handlers has no call frame information: gdb ends there."""
    serve(hypervisor).connect(gdb)
    gdb("break trap")
    whole = 0
    for _ in range(6):
        gdb("continue")
        names = [frame["symbol"].partition("+")[0] for frame in result(gdb, "bt")["frames"]]
        assert names[:2] == ["trap", "common"]
        assert "in ?? ()" in gdb("bt")
        if names[2] != "vmexit":  # behind VMRUN the frame pointer is the guest's
            assert names[-2:] == ["main", "long_mode"], names
            whole += 1
    assert whole
    gdb("kill")


def test_frames_of_a_guest_are_gdbs(unwinding: Gdb, serve: Serve, hypervisor: Path) -> None:
    gdb = unwinding
    serve(hypervisor, "--symbols", f"guest2={hypervisor.parent / 'guest64.elf'}").connect(gdb)
    reach(gdb, "on_nested_page_fault")
    attach(gdb, 2)
    depths = set()
    for function, steps in (("put", 3), ("work", 20), ("hypercall", 3)):
        reach(gdb, function)
        for _ in range(steps):
            depths.add(same_frames(gdb, "--guest 2"))
            gdb("stepi")
    assert max(depths) > 2
    gdb("kill")


def test_memory_is_gdbs(gdb: Gdb, serve: Serve, hypervisor: Path) -> None:
    serve(hypervisor).connect(gdb)
    gdb("break handle_exit")
    gdb("continue")
    for place in ("$pc", "$sp", "&guests", "$pc + 3"):
        address = gdb.value(f"(long)({place})") & (1 << 64) - 1
        for form in FORMATS:
            assert values(gdb(f"x/{form} {address:#x}")) == values(gdb(f"monitor x/{form} {address:#x}")), (place, form)
    gdb("set disassembly-flavor intel")
    theirs = re.findall(r"^(?:=> |   )0x([0-9a-f]+)", gdb("x/40i $pc"), re.MULTILINE)
    mine = re.findall(r"^(?:=> |   )0x([0-9a-f]+)", gdb("monitor x/40i $pc"), re.MULTILINE)
    assert theirs == mine
    assert "Cannot access memory" in gdb("x/xg 0xffffff0000000000")
    assert "not mapped" in gdb("monitor x/xg 0xffffff0000000000")
    assert "APIC of CPU 0: devices are not read" in gdb("monitor xp/xw 0xfee00020")
    assert gdb("x/1s &guests") is not None
    gdb("kill")


def test_registers_are_gdbs_and_changes_are_marked(gdb: Gdb, serve: Serve, hypervisor: Path) -> None:
    serve(hypervisor).connect(gdb)
    gdb("break handle_exit")
    gdb("continue")
    shown = result(gdb, "regs")["registers"]
    for name in ("rax", "rbx", "rcx", "rsp", "rbp", "rip", "r8", "r15", "cr0", "cr3", "cr4", "efer"):
        assert shown[name]["value"] == gdb.value(f"(unsigned long long)${name}") & (1 << 64) - 1, name
    assert not any("before" in one for one in shown.values())
    before = shown["rip"]["value"], shown["rsp"]["value"]
    gdb("stepi")
    changed = {name: one["before"] for name, one in result(gdb, "regs")["registers"].items() if "before" in one}
    assert changed == {"rip": before[0], "rsp": before[1]}  # push %rbp
    assert "rsp*" in gdb("monitor regs")
    gdb("kill")


ASKED = ("regs all", "regs svm 2", "gdt", "ldt", "idt", "tss", "msr", "msr --guest 2", "cpuid", "x/64xg $rsp", "xp/8xg 0x1000", "stack 64",
         "print u64[$rsp]", "disasm", "bt", "sym *", "search PASS in 2:gpa:0 +64m", "mtree", "devices", "lapic", "ioapic", "pic", "pit",
         "rtc", *(f"devices {name}" for name in ("com1", "keyboard", "port61", "power", "fw-cfg", "pci-config", "mmconfig", "ioapic", "smi", "debug-exit")))  # fmt: skip


def test_asking_changes_nothing(gdb: Gdb, serve: Serve, hypervisor: Path, tmp_path: Path) -> None:
    """A run in which everything is asked for at several stops is the run that nobody looked at."""
    undebugged = run(hypervisor, tmp_path)
    served = serve(hypervisor)
    served.connect(gdb)
    for _ in range(3):
        gdb("tbreak on_nested_page_fault")
        gdb("continue")
        for line in ASKED:
            if "2" not in line or "guest 2" in gdb("monitor guests"):
                assert "Protocol error" not in gdb(f"monitor {line}"), line
    assert "exited with code 01" in gdb("continue")
    gdb.close()
    same(served.finish(), undebugged)
