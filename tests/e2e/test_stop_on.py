"""Stopping where a hypervisor went wrong, with the reason in words: alone, and under gdb."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.exits import BASE, VMCB_PAGE, guest_image
from introspect.vmcb import VMCB
from tests.e2e.served import Served, vmdbg
from tests.engine.assembler import assemble
from tests.gdbstub.gdb import Gdb

Serve = Callable[..., Served]


def image(folder: Path, **fields: int) -> Path:
    """A hypervisor that runs a guest of VMMCALLs; its VMCB with these fields."""
    code = bytearray(guest_image("0f01d9", 3))
    at = VMCB_PAGE - BASE
    for name, value in fields.items():
        VMCB.write(memoryview(code)[at : at + 0x1000], name, value)
    path = folder / "hypervisor.bin"
    path.write_bytes(code)
    return path


FLAT = ("--flat", hex(BASE), "--mode", "long")


def test_the_run_ends_with_the_reason(tmp_path: Path) -> None:
    path, trace = image(tmp_path, guest_asid=0), tmp_path / "trace"
    options = (*FLAT, "--serial", "null", "--trace-exits", str(trace))
    done = vmdbg("run", str(path), *options, "--stop-on", "vmrun-fail,shutdown")
    assert done.returncode == 124
    assert "stopped: VMRUN of the VMCB at" in done.stderr
    assert "the guest's ASID is 0" in done.stderr
    assert "Give the guest an ASID from 1 up" in done.stderr
    assert "# vmrun-fail" in trace.read_text()


def test_nothing_to_stop_for(tmp_path: Path) -> None:
    assert vmdbg("run", str(image(tmp_path)), *FLAT, "--stop-on", "vmrun-fail,shutdown,stale").returncode == 1
    done = vmdbg("run", str(image(tmp_path)), *FLAT, "--stop-on", "vmrun-fial")
    assert done.returncode == 2
    assert "'vmrun-fial' is nothing to stop for; name any of vmrun-fail,shutdown,stale" in done.stderr


@pytest.mark.parametrize("by", ["option", "monitor"])
def test_gdb_is_told(by: str, gdb: Gdb, serve: Serve, tmp_path: Path) -> None:
    path = image(tmp_path, guest_asid=0)
    served = serve(path, *FLAT, *(("--stop-on", "vmrun-fail") if by == "option" else ()))
    served.connect(gdb)
    if by == "monitor":
        assert "stops on vmrun-fail" in gdb("monitor stop-on vmrun-fail")
    printed = gdb("continue")
    assert "the guest's ASID is 0" in printed, printed
    assert gdb.value(f"*(long *){VMCB_PAGE + VMCB.offset_of('exitcode')}") in (-1, 0xFFFFFFFFFFFFFFFF)
    assert gdb("x/i $pc").strip().endswith("stgi"), gdb("x/i $pc")
    assert "ASID is 0" in gdb("monitor why")
    assert "none of" in gdb("monitor stop-on nothing")
    gdb("kill")


FORGETFUL = """
    movq %cr3, %rbx; movq (%rbx), %rbx; andq $-4096, %rbx
    movl 0x40000000, %eax
    movq $0x83, 8(%rbx)                     # the second GiB leads to the first; no INVLPG
    movl 0x40000000, %eax; xorl %eax, %eax; outl %eax, $0xf4
"""


def test_a_stale_translation_ends_the_run(tmp_path: Path) -> None:
    path = tmp_path / "forgetful.bin"
    path.write_bytes(assemble(FORGETFUL, BASE).code)
    options = ("run", str(path), *FLAT, "--serial", "null", "--stop-on", "stale")
    assert vmdbg(*options).returncode == 1
    assert vmdbg(*options, "--tlb", "coherent").returncode == 1
    done = vmdbg(*options, "--tlb", "strict")
    assert done.returncode == 124
    assert "stopped: a read of 0x40000000 at RIP" in done.stderr
    assert "holds for ASID 0: 0x40000000; the tables now say 0x0." in done.stderr
    assert "Execute INVLPG" in done.stderr


def test_gdb_stops_at_the_stale_use(gdb: Gdb, serve: Serve, tmp_path: Path) -> None:
    path = tmp_path / "forgetful.bin"
    path.write_bytes(assemble(FORGETFUL, BASE).code)
    serve(path, *FLAT, "--tlb", "strict", "--stop-on", "stale").connect(gdb)
    printed = gdb("continue")
    assert "a read of 0x40000000 at RIP" in printed, printed
    assert "mov    0x40000000,%eax" in gdb("x/i $pc"), gdb("x/i $pc")
    gdb("kill")
