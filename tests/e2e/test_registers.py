"""The register groups under stock clients: names of flags, one read for each that is asked for, and none at a stop."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.served import Served, attach
from tests.gdbstub.gdb import Gdb
from tests.patience import PATIENCE

Serve = Callable[..., Served]


def test_gdb_prints_names(gdb: Gdb, serve: Serve, hypervisor: Path) -> None:
    serve(hypervisor).connect(gdb)
    assert "<unavailable>" in gdb("print $exitcode")
    assert "guest 3: read of the final address" in (gdb("monitor tcatch vmexit npf") and gdb("continue"))
    attach(gdb, 3)
    for inferior in ("inferior 1", "inferior 2"):  # the hypervisor, and the guest that it is about to handle
        gdb(inferior)
        for register, shown in (
            ("exitcode", "= NPF"), ("asid", "= 2"), ("misc_ctl", "= [ np_enable ]"), ("v_intr", "v_intr_masking"),
            ("intercept_misc1", "[ INTR NMI RDPMC CPUID INVD HLT INVLPGA IOIO MSR SHUTDOWN ]"), ("insn_len", "= 15"),
            ("exitintinfo", "type=INTR"), ("efer", "SVME ]"), ("cs_attrib", "[ TYPE=11 S DPL=0 P"), ("tlb_control", "action="),
        ):  # fmt: skip
            assert shown in gdb(f"print ${register}"), gdb(f"print ${register}")
    assert "DB" in gdb("print $cs_attrib")
    assert "error code" not in gdb("set $asid = 9")
    assert gdb.value("$asid") == 9
    gdb("inferior 1")
    assert gdb.value("*(int *)($vmcb_pa + 0x58)") == 9
    assert gdb.value("$exitcode == 0x400") == 1
    assert "Could not write register" in gdb("set $vmcb_pa = 1")
    everything = gdb("info all-registers")
    assert all(re.search(rf"^{name} ", everything, re.MULTILINE) for name in ("rax", "gdtr_limit", "dr7", "lstar", "exitcode", "ncr3"))
    shown = gdb("monitor registers svm 3")
    assert re.search(r"exitcode +0x400 +NPF", shown), shown
    assert re.search(r"misc_ctl +0x1 +np_enable", shown), shown
    assert re.search(r"gif +0x0\n", gdb("monitor registers svm host"))  # as #VMEXIT leaves it
    gdb("kill")


def test_gdb_reads_none_of_them_at_a_stop(gdb: Gdb, serve: Serve, hypervisor: Path, tmp_path: Path) -> None:
    gdb(f"set remotelogfile {tmp_path / 'log'}")
    serve(hypervisor).connect(gdb)
    gdb("break main")
    gdb("continue")
    for _ in range(3):
        gdb("stepi")
    gdb("next")
    gdb("backtrace")
    gdb("print $rax + $cr0")
    assert "w $p" not in (tmp_path / "log").read_text()
    gdb("print $lstar")
    assert (tmp_path / "log").read_text().count("w $p") == 1


@pytest.mark.parametrize(("pid", "architecture"), [(3, "i386"), (4, "i8086")])
def test_narrow_inferiors_have_them_too(gdb: Gdb, serve: Serve, hypervisor: Path, pid: int, architecture: str) -> None:
    serve(hypervisor).connect(gdb)
    gdb("monitor tcatch vmexit npf guest 5")
    assert "guest 5" in gdb("continue")
    attach(gdb, pid)
    assert f'"{architecture}"' in gdb("show architecture")
    assert gdb.value("$asid") == pid - 1
    assert "[ " in gdb("print $cs_attrib")
    assert gdb.value("$cs_limit & 0xffff") == 0xFFFF
    gdb("kill inferiors 1")


@pytest.mark.skipif(shutil.which("lldb") is None, reason="lldb is not in PATH")
def test_lldb_shows_them_by_group(serve: Serve, hypervisor: Path) -> None:
    served = serve(hypervisor)
    commands = [
        f"gdb-remote 127.0.0.1:{served.port}", "process plugin packet monitor tcatch vmexit npf", "process continue",
        "register read exitcode asid cs_attrib", "register write asid 7", "register read asid", "register read --all",
    ]  # fmt: skip
    arguments = [argument for command in commands for argument in ("-o", command)]
    done = subprocess.run(
        ["lldb", "--no-lldbinit", "--batch", *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True,
        timeout=PATIENCE, check=False,
    )  # fmt: skip
    for expected in ("exitcode = 0x0000000000000400", "asid = 0x00000002", "asid = 0x00000007", "\nsvm:\n", "lstar = 0x", "catchpoint 1: #VMEXIT NPF of guest 3"):
        assert expected in done.stdout, (expected, done.stdout, done.stderr)
