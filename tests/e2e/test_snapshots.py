# SPDX-License-Identifier: GPL-2.0-or-later
"""Snapshots as users make them: on the command line, from gdb, in the console."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.served import ROOT, Outcome, Served, attach, run, vmdbg
from tests.gdbstub.gdb import Gdb

Serve = Callable[..., Served]
TICK = 12_345_678


@pytest.fixture(scope="module")
def undebugged(hypervisor: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return run(hypervisor, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def saved(hypervisor: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    path = folder / "machine.snapshot"
    assert run(hypervisor, folder, "--save-at", f"{TICK},{path}", "--save-at", f"end,{folder}/end.snapshot").status == 1
    return path


def one_line(*arguments: str) -> str:
    """What is said of arguments that are refused."""
    done = vmdbg(*arguments)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    return done.stderr


def test_the_rest_of_a_run_is_the_rest(saved: Path, undebugged: Outcome, tmp_path: Path) -> None:
    done = vmdbg(
        "run", "--snapshot", str(saved), "-v", "--serial", f"file:{tmp_path}/serial", "--trace-exits", f"{tmp_path}/exits",
        "--runtime", "python",
    )  # fmt: skip
    assert done.returncode == undebugged.status
    assert f"the run ended after {undebugged.ticks} ticks" in done.stderr
    exits, serial = (tmp_path / "exits").read_text(), (tmp_path / "serial").read_bytes()
    assert len(undebugged.exits) > len(exits) > 1000
    assert undebugged.exits.endswith(exits)
    assert undebugged.serial.endswith(serial)


def test_a_run_that_has_ended_is_at_its_end(saved: Path, undebugged: Outcome) -> None:
    done = vmdbg("run", str(saved.with_name("end.snapshot")), "-v", "--serial", "null")
    assert done.returncode == undebugged.status
    assert f"the run ended after {undebugged.ticks} ticks" in done.stderr


def test_what_contradicts_is_refused_by_both_names(saved: Path, hypervisor: Path, tmp_path: Path) -> None:
    for option, words in {
        ("--memory", "1G"): ("--memory 1 GiB contradicts", "has 512 MiB; leave --memory out"),
        ("--cpus", "2"): ("--cpus 2 contradicts", "has 1;"), ("--tlb", "strict"): ("--tlb strict contradicts", "has coherent;"),
        ("--append", "x"): ("--append 'x' contradicts", "has '';"), ("--tpm",): ("--tpm True contradicts", "has False;"),
        ("--device", "edu"): ("--device edu contradicts", "has no --device."),
    }.items():  # fmt: skip
        text = one_line("run", "--snapshot", str(saved), *option)
        assert str(saved) in text
        assert all(word in text for word in words), text
    other = tmp_path / "other.elf"
    other.write_bytes(hypervisor.read_bytes() + b"\0")
    text = one_line("run", str(other), "--snapshot", str(saved))
    assert f"{other} contradicts {saved}" in text
    assert vmdbg("run", str(hypervisor), "--snapshot", str(saved), "--memory", "512M", "--serial", "null").returncode == 1
    assert "nothing to run" in one_line("run")
    assert "the run ended before that tick" in one_line("run", str(hypervisor), "--serial", "null", "--save-at", f"99999999999,{other}")
    assert "Is a directory" in one_line("run", str(hypervisor), "--serial", "null", "--save-at", f"1000,{tmp_path}")
    unwritable = one_line("run", str(hypervisor), "--serial", "stdio", "--save-at", f"end,{tmp_path}/none/x")
    assert "--save-at end,/" in unwritable, "told before anything runs"
    assert "No such file or directory; name a file that can be written" in unwritable
    assert "is not TICK,FILE" in one_line("run", str(hypervisor), "--save-at", "1000")
    assert "snapshot save" in one_line("run", str(hypervisor), "--save-at", "1000,x", "--gdb", "0")


def test_gdb_goes_back_and_on(gdb: Gdb, serve: Serve, hypervisor: Path, undebugged: Outcome, tmp_path: Path) -> None:
    """Twice through the same stretch, with guests that appear in it; the run in the end is the undebugged one."""
    served = serve(hypervisor, "--symbols", f"guest2={hypervisor.parent / 'guest64.elf'}")
    served.connect(gdb)
    gdb(f"source {ROOT / 'vmdbg/gdbside.py'}")
    gdb("break on_nested_page_fault")
    gdb("continue")
    time, there = gdb("monitor time"), gdb.value("$pc")
    assert "restore here` comes back here" in gdb("snapshot here")
    rip, count = gdb("info registers"), gdb("monitor guests")
    seen = []
    for _ in range(2):
        gdb("delete")
        gdb("tbreak power_off")
        gdb("break on_nested_page_fault")
        gdb("ignore $bpnum 20")
        gdb("continue")
        assert gdb("monitor time") != time
        seen.append((gdb("monitor time"), gdb("monitor guests"), gdb("monitor exits 2 5"), gdb.value("$rsp")))
        restored = gdb("snapshot restore here")
        assert "restored here: guest time" in restored
        assert "on_nested_page_fault" in restored  # gdb has looked anew
        assert (gdb("monitor time"), gdb("info registers"), gdb("monitor guests")) == (time, rip, count)
        assert gdb.value("$pc") == there
    assert seen[0] == seen[1]
    assert "here" in gdb("monitor snapshots")
    path = tmp_path / "of-gdb.snapshot"
    assert f"{path}: guest time" in gdb(f"monitor snapshot save {path} here")
    assert "there is no such snapshot" in gdb("monitor restore nowhere")
    gdb("delete")
    text = gdb("continue")
    assert f"exited with code 0{undebugged.status:o}" in text
    # From behind its end, too: gdb attaches again.
    assert "restored here" in gdb("monitor restore here")
    gdb.close()
    again = run(path, tmp_path)
    assert (again.status, again.ticks) == (undebugged.status, undebugged.ticks)
    assert undebugged.exits.endswith(again.exits)


def test_breakpoints_and_watchpoints_outlive_it(gdb: Gdb, serve: Serve, hypervisor: Path) -> None:
    served = serve(hypervisor, "--symbols", f"guest2={hypervisor.parent / 'guest64.elf'}")
    served.connect(gdb)
    gdb("tbreak on_nested_page_fault")
    gdb("continue")
    attach(gdb, 2, hypervisor.parent / "guest64.elf", "symbol-file")
    gdb("tbreak work")
    gdb("continue")
    gdb("monitor snapshot begun")
    gdb("watch counter")
    first = gdb("continue")
    assert "watchpoint" in first
    values = [gdb.value("counter")]
    gdb("continue")
    values.append(gdb.value("counter"))
    gdb("monitor restore begun")
    gdb("maintenance flush register-cache")
    gdb("maintenance flush dcache")
    for value in values:
        assert "watchpoint" in gdb("continue")
        assert gdb.value("counter") == value


def test_the_console_opens_a_snapshot(saved: Path, undebugged: Outcome) -> None:
    done = vmdbg("console", str(saved), "-c", "time", "-c", "snapshot here", "-c", "continue", "-c", "restore here", "-c", "time")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert [line for line in lines if re.fullmatch(r"\d+ ticks", line)] == [lines[0]] * 2
    assert int(lines[0].split()[0]) >= TICK
    assert any(line.startswith("restored here: guest time") for line in lines)
    assert undebugged.serial.decode().splitlines()[-1] in done.stdout
