"""A hypervisor in a hypervisor: examples/nested on its own, on both runtimes, and under gdb at every level at once."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from textwrap import dedent
from typing import NamedTuple

import pytest

from introspect.exitlog import ExitRecord
from introspect.rules import SVM_FEATURES
from tests.e2e.served import ROOT, Served, attach, run
from tests.gdbstub.gdb import Gdb
from tests.patience import PATIENCE
from vmdbg.machine import Config, Machine
from vmdbg.platform.serial import BufferSerial
from vmdbg.svm import world

SOURCES = ROOT / "examples/nested"
GUEST_START = 0x1000000


@pytest.fixture(scope="session")
def matryoshka(examples: Path) -> Path:
    return examples / "nested/build/matryoshka.elf"


def check(printed: str, depth: int) -> int:
    """What the levels say; how many exits the first one counted."""
    lines = printed.splitlines()
    above = f"level {depth - 1}"
    assert lines[:-depth] == [
        *(f"level {n}: hypervisor of level {n + 1}, with {16 * (depth - n + 1)} MiB" for n in range(depth)),
        f"level {depth}: leaf, with 16 MiB",
        f"{above}: #NPF, EXITINFO1 100000004, gpa 40000000",
        f"{above}: #NPF, EXITINFO1 100000007, gpa 40000000",
        f"level {depth}: 1229 primes below 10000, written to 40000000",
        f"level {depth}: a tick",
        f"level {depth}: a tick that ended HLT",
    ]
    total = 0
    for level, line in zip(reversed(range(depth)), lines[-depth:], strict=True):
        found = re.fullmatch(
            rf"level {level}: level {level + 1} reports 1229 after (\d+) exits of it, (\d+) of its guests \((\d+) passed on, "
            r"(\d+) for shadow tables\)", line,
        )  # fmt: skip
        assert found is not None, line
        own, nested, passed, filled = map(int, found.groups())
        assert passed == total  # all that the level below has seen came through this one
        assert nested == passed + filled
        total = own + nested
    return total


class Finished(NamedTuple):
    """What a run leaves behind."""

    status: int | None
    ticks: int
    serial: str
    exits: int
    last: list[list[ExitRecord]]
    """The last ones of each guest."""
    notices: list[str]


def finish(image: Path, config: Config) -> tuple[Finished, int]:
    """Run to the end; also how many world switches were made in C."""
    serial = BufferSerial()
    machine = Machine(image, replace(config, serial=serial))
    while machine.exit_status is None and not machine.ended:
        machine.run(10_000_000)
    history, switcher = machine.history, machine.cpus[0].switcher
    last = [guest.exits for guest in history.guests.values()]
    found = Finished(
        machine.exit_status, machine.clock.now, serial.output.decode(), history.total.value, last, list(history.notices)
    )
    switches = switcher.made if switcher is not None else 0
    machine.close()
    return found, switches


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_to_its_end(matryoshka: Path, depth: int) -> None:
    found, switches = finish(matryoshka, Config(command_line=f"depth={depth}"))
    assert found.status == 1
    assert found.exits == check(found.serial, depth)
    assert len(found.last) == depth
    if switches:  # nearly all are common ones
        assert switches > 1.9 * found.exits - 700


@pytest.mark.parametrize("depth", [1, 2])
def test_the_same_run_on_both_runtimes_and_without_the_native_switch(matryoshka: Path, depth: int) -> None:
    config = Config(command_line=f"depth={depth}")
    native, _ = finish(matryoshka, config)
    assert finish(matryoshka, replace(config, native_switch=False)) == (native, 0)
    assert finish(matryoshka, replace(config, python_runtime=True)) == (native, 0)


def test_no_flush_and_no_clean_bit_is_forgotten(matryoshka: Path) -> None:
    config = Config(command_line="depth=2")
    coherent, _ = finish(matryoshka, config)
    assert coherent.notices == []
    assert finish(matryoshka, replace(config, strict_tlb=True)) == (coherent, 0)
    assert finish(matryoshka, replace(config, vmcb_cache=True)) == (coherent, 0)


def test_optional_features_are_used_where_they_are_claimed(matryoshka: Path) -> None:
    plain, _ = finish(matryoshka, Config(command_line="depth=2"))
    vgif, vls = SVM_FEATURES.vGIF, SVM_FEATURES.V_VMSAVE_VMLOAD
    for words, needed in (("vgif", vgif), ("vls", vls), ("vgif vls", vgif | vls)):
        found, _ = finish(matryoshka, Config(command_line=f"depth=2 {words}"))
        if not needed & ~world.FEATURES:
            assert found.status == 1
            assert found.exits == check(found.serial, 2) < plain.exits
        else:
            assert found.status == 3
            assert "vgif or vls: this CPU does not have the feature" in found.serial


@pytest.mark.parametrize("depth", [1, 3])
def test_qemu_says_the_same(matryoshka: Path, depth: int) -> None:
    """And has as many exits of each kind: its time counts instructions here."""
    if shutil.which("qemu-system-x86_64") is None:
        pytest.skip("qemu-system-x86_64 is not in PATH")
    command = ["make", "-s", "-C", str(SOURCES), "qemu", f"ARGS=depth={depth}"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PATIENCE, check=True)
    found, _ = finish(matryoshka, Config(command_line=f"depth={depth}"))
    assert done.stdout.splitlines() == found.serial.splitlines()


def line_of(text: str, source: str) -> int:
    return (SOURCES / source).read_text().split("\n").index(text) + 1


def test_gdb_on_every_level(gdb: Gdb, serve: Callable[..., Served], matryoshka: Path, tmp_path: Path) -> None:
    undebugged = run(matryoshka, tmp_path, "--append", "depth=3")
    symbols = matryoshka.with_suffix(".debug")
    served = serve(matryoshka, "--append", "depth=3")
    served.connect(gdb)

    # The hypervisor has made the VMCB for the third guest, the leaf, whose first exit is CPUID's.
    gdb("break tables_create if count == 64")
    for _ in range(2):
        assert "Breakpoint 1, tables_create" in gdb("continue")
    gdb("delete 1")
    gdb("monitor stop-on vmexit cpuid")
    assert "#VMEXIT CPUID of guest 4" in gdb("continue")

    def tree() -> str:
        """The guests' numbers in the listing, indented as they are."""
        return dedent("\n".join(re.findall(r"^( +\d+) ", gdb("monitor guests").replace("*", " "), re.MULTILINE)[1:]))

    assert tree() == "2\n  3\n    4"
    for pid in (2, 3, 4):
        gdb(f"monitor symbols {pid} {symbols}")
        attach(gdb, pid)
    threads = gdb("info threads")
    assert re.search(r'Thread 2\.1 "guest 2 asid=1 ', threads)
    assert re.search(r'Thread 3\.1 "guest 3 under guest 2 asid=2 ', threads)
    assert re.search(r'Thread 4\.1 "guest 4 under guest 3 asid=3 ', threads)

    # A source line of the leaf, which all copies have at the same address.
    gdb(f"tbreak leaf.c:{line_of('        timer_wait();', 'leaf.c')}")
    printed = gdb("continue")
    assert "Thread 4.1" in printed
    assert "leaf ()" in printed
    assert "#1  0x" in gdb("backtrace")
    address = gdb.value("&level")
    for inferior, level in ((1, 0), (2, 1), (3, 2), (4, 3)):
        gdb(f"inferior {inferior}")
        assert gdb.value("level") == gdb.value(f"*(long *){address:#x}") == level
        if inferior > 1:
            assert f"-> spa {level * GUEST_START + address:#x}" in gdb(f"monitor walk {address:#x} {inferior}")

    # The hypervisors in between wait in their VMRUN.
    gdb("inferior 3")
    assert gdb.value("$pc") == gdb.value("&vmrun_instruction")
    assert gdb.value("guest.nested") == 0
    gdb("inferior 2")
    assert gdb.value("guest.nested->inner->asid") == 1

    # What runs is made of two VMCBs: that of guest 3's hypervisor, which lies in its memory, and the machine's.
    gdb("inferior 3")
    assert f"VMCB at {gdb.value('guest.vmcb') + 2 * GUEST_START:#x}, no guest's so far" in gdb("monitor vmcb 4 inner")
    assert "which VMCB guest 2 has for it is known" in gdb("monitor vmcb 3 inner")  # it runs its other one
    assert "the hypervisor of this machine runs it" in gdb("monitor vmcb 2 inner")

    # The tick travels down all levels: the second level's handler has it before the leaf does.
    gdb("inferior 3")
    gdb("tbreak timer_interrupt thread 3.1")
    assert "Thread 3.1" in gdb("continue")
    gdb("inferior 4")
    assert gdb.value("timer_expired") == 0

    assert "guest 4 is now a guest of the hypervisor" in gdb("monitor guest parent 4 1")
    assert tree() == "2\n  3\n4"
    assert "guest 4 is now a guest of guest 2" in gdb("monitor guest parent 4 2")
    assert tree() == "2\n  3\n  4"
    assert "guest 4 is guest 2, or runs under it" in gdb("monitor guest parent 2 4")
    assert "there is no guest 9" in gdb("monitor guest parent 4 9")

    served.ends_as(gdb, undebugged)


def test_steps_through_every_level(gdb: Gdb, serve: Callable[..., Served], matryoshka: Path, tmp_path: Path) -> None:
    undebugged = run(matryoshka, tmp_path, "--append", "depth=2")
    symbols = matryoshka.with_suffix(".debug")
    served = serve(matryoshka, "--append", "depth=2")
    served.connect(gdb)
    gdb("break tables_create if count == 64")
    gdb("continue")
    gdb("delete 1")
    gdb("monitor stop-on vmexit cpuid")
    assert "#VMEXIT CPUID of guest 3" in gdb("continue")
    for pid in (2, 3):
        gdb(f"monitor symbols {pid} {symbols}")
        attach(gdb, pid)

    # The leaf's CPUID is carried out by the hypervisor in guest 2: a step runs both, and comes back.
    assert "cpuid" in gdb("x/i $pc")
    pc = gdb.value("$pc")
    gdb("stepi")
    assert "Thread 3.1" in gdb("thread")
    assert gdb.value("$pc") == pc + 2

    # Down from the leaf and up again, a world at a time.
    gdb("tbreak put_char thread 3.1")
    gdb("continue")
    gdb("monitor follow host")
    printed, pc = "", 0
    while "[the step has left guest 3 by #VMEXIT IOIO]" not in printed:
        pc = gdb.value("$pc")
        printed = gdb("stepi")
    assert "Thread 1.1" in gdb("thread")
    gdb("monitor step-into-guest 2")
    assert "[VMRUN has entered guest 2]" in gdb("continue")
    assert "Thread 2.1" in gdb("thread")
    gdb("monitor step-into-guest 3")
    assert "[VMRUN has entered guest 3]" in gdb("continue")
    assert "Thread 3.1" in gdb("thread")
    assert pc < gdb.value("$pc") <= pc + 2
    gdb("monitor follow guest")

    served.ends_as(gdb, undebugged)
