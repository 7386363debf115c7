"""Exits, VMCBs and leaks under a real gdb, on the demo hypervisor."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from tests.e2e.served import Served, attach, run, vmdbg
from tests.gdbstub.gdb import Gdb
from tests.introspect.test_exit_export import validate

Serve = Callable[..., Served]


def until(gdb: Gdb, text: str) -> str:
    """Continue over other stops to one that says this."""
    for _ in range(50):
        said = gdb("continue")
        if text in said:
            return said
    raise AssertionError(f"no stop said {text!r}")


def test_exits_in_gdb(gdb: Gdb, serve: Serve, hypervisor: Path, tmp_path: Path) -> None:
    """Both RIPs by symbols, and all of it in files; the run is as it would have been."""
    undebugged = run(hypervisor, tmp_path)
    machine = serve(hypervisor, "--exit-ring", "500", "--symbols", f"guest2={hypervisor.parent / 'guest64.elf'}")
    machine.connect(gdb)
    gdb("monitor tcatch vmexit npf guest 5")
    until(gdb, "catchpoint 1")
    listed = gdb("monitor exits --code ioio --last 3")
    assert "<put+" in gdb("monitor exits 2 5")
    assert "<vmrun_instruction>" in listed
    assert "out 0xe9, al" in listed
    trace, page = tmp_path / "exits.json", tmp_path / "exits.html"
    assert "#VMEXITs written to" in gdb(f"monitor exits --perfetto {trace} --plot {page}")
    tracks = validate(json.loads(trace.read_text()))
    assert {"1.1", "2.1", "3.1", "4.1", "5.1"} == tracks.keys()
    assert page.stat().st_size > 5_000
    by = gdb("monitor exits --by port")
    assert "0x3f8 w" in by
    assert "0xe9 w" in by
    machine.ends_as(gdb, undebugged)


def test_vmcbs_in_gdb(gdb: Gdb, serve: Serve, hypervisor: Path, tmp_path: Path) -> None:
    """A field that is watched stops by whom, and the difference says the same."""
    undebugged = run(hypervisor, tmp_path)
    machine = serve(hypervisor)
    machine.connect(gdb)
    gdb("monitor tcatch vmexit vmmcall guest 3")
    until(gdb, "catchpoint 1")
    assert "Catchpoint 2 (vmcb rax guest 3)" in gdb("monitor vmcb watch rax 3")
    said = until(gdb, "catchpoint 2: rax of the VMCB at")
    assert "by software before the VMRUN at" in said
    gdb("monitor catch delete all")
    attach(gdb, 3)
    diff = gdb("monitor vmcb diff --guest 3")
    assert "behind #VMEXIT" in diff
    assert ", by hardware:" in diff
    assert "no field was changed under a set clean bit" in gdb("monitor clean-bits check")
    assert "start with `vmdbg run --tlb strict`" in gdb("monitor tlb audit")
    assert "possible: debug registers" in gdb("monitor leak check 3")
    gdb("inferior 2")
    gdb("detach")
    gdb("inferior 1")
    machine.ends_as(gdb, undebugged)


def test_the_ring_has_a_size(hypervisor: Path) -> None:
    for size in ("0", "-1", "x", "2000000"):
        done = vmdbg("run", str(hypervisor), "--exit-ring", size)
        assert done.returncode == 2
        assert "exits cannot be remembered; choose 1 to 1048576" in done.stderr
