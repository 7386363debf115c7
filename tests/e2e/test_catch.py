"""Catchpoints: one of each kind under stock gdb, and the run that is the same with all of them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.served import Served, attach, run, same
from tests.gdbstub.gdb import Gdb

Serve = Callable[..., Served]
Image = Callable[[str], Path]


def caught(printed: str) -> list[str]:
    """The catchpoints' messages of a stop, without their numbers."""
    return re.findall(r"catchpoint \d+: (.*)", printed)


@pytest.fixture
def connected(gdb: Gdb, serve: Serve, image: Image) -> Served:
    served = serve(image("catch"))
    served.connect(gdb)
    return served


IN_HOST = [
    ("msr w 0xc0000082", "at_wrmsr", "WRMSR 0xc0000082 (LSTAR) of 0x567800001234"),
    ("msr lstar r", "at_rdmsr", "RDMSR 0xc0000082 (LSTAR)"),
    ("msr 0xc0000080-0xc0000084 if value == 0x567800001234", "at_wrmsr", "WRMSR 0xc0000082 (LSTAR) of 0x567800001234"),
    ("cr 3 w if value == host:pml4 && $efer & 0x400", "at_write_cr3", "write of CR3, value 0x10"),
    ("cr 3 r if $cr3 == value", "at_read_cr3", "read of CR3, value 0x10"),
    ("cr 0 r if value >> 31", "at_read_cr0", "read of CR0, value 0x80000011"),
    ("cr 0 w if $cr0 >> 31", "at_clts", "write of CR0, value 0x80000011"),
    ("io 0x80 w", "at_out", "OUT port 0x80, 8-bit, value 0x41"),
    ("io 0x70-0x8f r", "at_in", "IN port 0x80, 8-bit"),
    ("exception 6", "host_ud", "exception #UD"),
]
IN_GUEST = [
    ("msr w 0xc0000082", "guest_wrmsr", "WRMSR 0xc0000082 (LSTAR) of 0x4321 by guest 2"),
    ("msr lstar r guest 2", "guest_rdmsr", "RDMSR 0xc0000082 (LSTAR) by guest 2"),
    ("cr 3 w", "guest_write_cr3", "write of CR3, value 0x10"),
    ("cr 3 r if $cr3 == value", "guest_read_cr3", "read of CR3, value 0x10"),
    ("io 0x80 w if value == 0x42", "guest_out", "OUT port 0x80, 8-bit, value 0x42 by guest 2"),
    ("exception ud", "guest", "exception #UD by guest 2"),
    ("exception pf", "guest_load", "exception #PF by guest 2: supervisor read, not present, address 0x40000000"),
    ("exception 14 if gva == 0x40000000 && error == 0 && cpl == 0 && $rbx == gva", "guest_load", "exception #PF by guest 2"),
    ("triple-fault", "guest", "triple fault by guest 2"),
    ("vmexit cpuid", "guest_cpuid", "#VMEXIT CPUID of guest 2"),
    ("vmexit 0x70-0x7f if code == ioio && port == 0x80 && write && value == 0x42", "guest_out", "#VMEXIT IOIO of guest 2: OUT port 0x80, 8-bit"),
    (
        "vmexit any if $exitcode == vmmcall && u16[rip] == 0x010f && u8[rip + 2] == 0xd9 && u32[host:rounds] == 2 && u8[spa:rip] == 15",
        "guest_vmmcall", "#VMEXIT VMMCALL of guest 2",
    ),
]  # fmt: skip
BEFORE_VMRUN = [
    ("vmrun guest 2", "VMRUN of the VMCB at VMCB (guest 2)"),
    ("inject 0x20", "VMRUN of the VMCB at VMCB (guest 2) injects interrupt, vector 0x20"),
    ("inject if vector == 32 && vmcb.asid == 1 && !type", "VMRUN of the VMCB at VMCB (guest 2) injects interrupt, vector 0x20"),
]


def stop(gdb: Gdb, text: str) -> None:
    """Go on to a stop that says so."""
    printed = gdb("continue")
    found = caught(printed)
    assert len(found) == 1, printed
    assert found[0].startswith(text), printed


@pytest.mark.parametrize(("what", "place", "text"), IN_HOST)
def test_events_of_the_hypervisor(gdb: Gdb, connected: Served, what: str, place: str, text: str) -> None:
    """The instruction has not been executed, and goes on as if nothing had been."""
    gdb(f"monitor catch {what}")
    stop(gdb, text)
    assert f"<{place}>" in gdb("x/i $pc"), gdb("x/i $pc")
    following = "<invalid>" if what.startswith("exception") else gdb("x/2i $pc").splitlines()[1].split(":")[0].strip()
    gdb("stepi")
    assert following in gdb("x/i $pc")


@pytest.mark.parametrize(("what", "place", "text"), IN_GUEST)
def test_events_of_a_guest(gdb: Gdb, connected: Served, image: Image, what: str, place: str, text: str) -> None:
    """Also where its hypervisor does not intercept them; the guest's thread is the one that stops."""
    gdb("monitor tcatch guest-start")
    stop(gdb, "guest 2 starts with the VMCB at 0x")
    attach(gdb, 2, image("catch"))
    assert "<guest" in gdb("x/i $pc")
    gdb(f"monitor catch {what}")
    gdb("inferior 1")
    printed = gdb("continue")
    assert "Thread 2.1" in printed, printed
    assert text in printed
    gdb("inferior 2")
    assert f"<{place}>" in gdb("x/i $pc"), gdb("x/i $pc")


@pytest.mark.parametrize(("what", "text"), BEFORE_VMRUN)
def test_before_vmrun(gdb: Gdb, connected: Served, what: str, text: str) -> None:
    gdb(f"monitor catch {what}")
    stop(gdb, text.replace("at VMCB", f"at {gdb.value('(long)&vmcb'):#x}"))
    assert "<at_vmrun>" in gdb("x/i $pc")
    assert gdb.value("$rax") == gdb.value("(long)&vmcb")


EVERYTHING = (
    "vmexit any", "vmrun", "inject", "exception", "io", "msr", "cr", "guest-start", "triple-fault",
    "vmexit cpuid if u32[rsp] == 1 || vmcb.asid == 7", "io 0x80 if value == 1",
)  # fmt: skip


@pytest.mark.parametrize("runtime", ["native", "python"])
def test_the_run_is_the_same(gdb: Gdb, serve: Serve, image: Image, tmp_path: Path, runtime: str) -> None:
    """Every exit at its time, though each event of the machine has stopped it."""
    undebugged = run(image("catch"), tmp_path)
    served = serve(image("catch"), "--runtime", runtime)
    served.connect(gdb)
    for what in EVERYTHING:
        gdb(f"monitor catch {what}")
    stops, printed = 0, gdb("continue")
    while "exited with" not in printed:
        assert caught(printed), printed
        stops, printed = stops + 1, gdb("continue")
    gdb.close()
    same(served.finish(), undebugged)
    assert stops > 60  # three rounds of the guest have ten events each


def test_a_stepped_run_is_the_same(gdb: Gdb, serve: Serve, image: Image, tmp_path: Path) -> None:
    """What was held back is what a step does."""
    undebugged = run(image("catch"), tmp_path)
    served = serve(image("catch"))
    served.connect(gdb)
    for what in ("io", "msr", "cr", "exception", "vmrun"):
        gdb(f"monitor catch {what}")
    gdb("break host_ud")
    while "Breakpoint" not in gdb("continue"):
        pass
    gdb("delete")
    places = []
    for _ in range(14):
        gdb("stepi")
        places.append(gdb.value("$pc"))
    assert places.count(gdb.value("(long)&host_ud")) == 1  # caught; the next step is in the handler
    assert places[1] == gdb.value("(long)&invalid")
    gdb("monitor catch delete all")
    assert "exited with code 01" in gdb("continue")
    gdb.close()
    same(served.finish(), undebugged)


def test_counts(gdb: Gdb, connected: Served) -> None:
    gdb("monitor catch vmexit cpuid")
    gdb("monitor catch ignore 1 1")
    gdb("monitor catch once vmexit vmmcall if u32[host:rounds] == 2")
    gdb("monitor tcatch io 0x80 w guest 2")
    gdb("monitor catch msr guest 1")
    assert gdb("monitor catch disable 4").splitlines() == [
        "number  enabled  hits  ignore  what", "1       y        0     1       vmexit cpuid",
        "2       y        0             once vmexit vmmcall if u32[host:rounds] == 2",
        "3       y        0             once io 0x80 w guest 2", "4       n        0             msr guest 1",
    ]  # fmt: skip
    texts = [caught(gdb("continue")) for _ in range(4)]
    kinds = ["OUT port", "#VMEXIT CPUID", "#VMEXIT VMMCALL", "#VMEXIT CPUID"]
    assert all(len(found) == 1 and found[0].startswith(kind) for found, kind in zip(texts, kinds, strict=True)), texts
    assert gdb("monitor catch").splitlines()[1:] == [
        "1       y        3             vmexit cpuid", "4       n        0             msr guest 1",
    ]  # fmt: skip
    assert "No catchpoints" in gdb("monitor catch delete all")
    assert "Catchpoint 5 (vmexit npf)" in gdb("monitor catch vmexit npf")
    assert "exited with code 01" in gdb("continue")


def test_what_is_wrong_is_said(gdb: Gdb, connected: Served) -> None:
    for line, words in (
        ("catch vmexit nfp", "nfp: a code is a number up to 0xffffffffffffffff, or a name; write npf, cpuid, vmmcall or 0x72"),
        ("catch cr 16", "16: a cr is a number up to 0xf"), ("catch io 9-8", "a range goes from the smaller"),
        ("catch vmrun 3", "3: not understood behind vmrun"), ("catch tea", "tea: it must be one of vmexit, vmrun"),
        ("catch io if gpa == 1", "gpa (column 1 behind if): there is no such name"),
        ("catch vmexit if gpa == ", "the end (column 7 behind if): a value is missing before this"),
        ("catch vmexit if gpq", "did you mean gpa"), ("catch delete 7", "7: there is no catchpoint of this number; there are: none"),
    ):  # fmt: skip
        printed = gdb(f"monitor {line}")
        assert words in printed, printed
    assert "before it is delivered, intercepted or not" in gdb("monitor help catch")
    gdb("monitor catch msr if 1 / (rax - rax)")
    assert "catchpoint 1 (its condition: / (column 3): the divisor is zero" in gdb("continue")


def test_a_pc_that_is_set_drops_what_was_held_back(gdb: Gdb, connected: Served) -> None:
    gdb("monitor catch exception ud guest 1")
    stop(gdb, "exception #UD")
    gdb("set $pc = $pc + 2")
    gdb("break at_vmrun")
    assert "Breakpoint" in gdb("continue")
    assert gdb.value("(long)hits") == 0


def test_catchpoints_stay_when_the_machine_runs_again(gdb: Gdb, connected: Served) -> None:
    gdb("monitor catch exception ud guest 1")
    for _ in range(2):
        assert "exception #UD by CPU 0 of the hypervisor" in gdb("run")


def test_exceptions_on_the_way_to_a_shutdown(gdb: Gdb, connected: Served) -> None:
    """Each that delivery raises, and the double fault that two of them become (APM2 8.2.9); all at the same instruction."""
    gdb("monitor catch exception guest 2 if u32[host:rounds] == 0 && u64[host:vmcb + 0xa8] == 0")
    gdb("monitor catch triple-fault")
    gdb("monitor catch vmexit shutdown")
    texts = [found for _ in range(7) for found in caught(gdb("continue"))]
    words = [" ".join(text.split()[:2]) for text in texts]
    assert words == [
        "exception #UD", "exception #GP", "exception #GP", "exception #DF", "exception #GP", "triple fault", "#VMEXIT SHUTDOWN",
    ]  # fmt: skip
    assert "error code 0x33" in texts[1]  # entry 6 of the IDT, by an event that no instruction asked for
    assert "exited with code 01" in gdb("continue")
