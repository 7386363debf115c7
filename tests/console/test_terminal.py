"""The console on a real terminal: keys, colours, panes, a window that changes its size, and what is left behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.console.talking import ROOT
from tests.console.tmux import Terminal
from tests.patience import PATIENCE, until

Console = Callable[..., Terminal]


@pytest.fixture
def console(hypervisor: Path, tmp_path: Path) -> Iterator[Console]:
    """`vmdbg console` on the demo; ended with the test."""
    made: list[Terminal] = []

    def start(*arguments: str, columns: int = 120, lines: int = 40, **environment: str) -> Terminal:
        symbols = f"--symbols guest2={hypervisor.with_name('guest64.elf')}"
        command = f"{sys.executable} -m vmdbg console {hypervisor} {symbols} {' '.join(arguments)}"
        made.append(Terminal(tmp_path, command, columns=columns, lines=lines, PYTHONPATH=str(ROOT), **environment))
        return made[-1]

    yield start
    for each in made:
        each.close()


def test_a_session(console: Console) -> None:
    t = console()
    t.sees("host> ")
    t.type("tb 2:work", "Enter")
    t.sees("Temporary breakpoint 1 waits for guest 2")
    t.type("F5")
    t.sees("guest 2> ")
    t.sees("── guest 2: 64-bit, 4-level over 4-level, CPL 0 ──")
    t.sees("=>  0xffffffff80100228  <work>")
    t.sees(" stopped  guest 2 │ 64-bit 4-level/4-level │ CPL 0 │ work │ guest64.c:50 │ VMMCALL │ ASID 1")
    t.type("walk 2:ctr")
    t.sees("2:counter")
    t.sees("walk GVA [GUEST|host] [ACCESS]")
    t.type("Tab", "Enter")
    t.sees("-> gpa 0x109000 -> spa 0x10f6000, in a 4 KiB page")
    t.type("exits 2 1 | grep VMMCALL | wc -l", "Enter")
    t.sees("| wc -l\n1\n")
    t.type("C-d")
    t.sees("left with 0")


def test_colours(console: Console, tmp_path: Path) -> None:
    t = console()
    t.sees("host> ")
    t.type("step", "Enter")
    t.sees("=>  0x10000d")
    coloured = t.screen(colours=True)
    assert "\x1b[33m" in coloured or "\x1b[1m\x1b[33m" in coloured
    t.type("set colour off", "Enter")
    t.type("clear-nothing", "Enter")
    t.sees("no such command")
    t.close()
    plain = console(NO_COLOR="1")
    plain.sees("host> ")
    plain.type("step", "Enter")
    plain.sees("=>  0x10000d")
    assert "\x1b[3" not in plain.screen(colours=True)


def test_interrupting_the_guest(console: Console) -> None:
    t = console()
    t.sees("host> ")
    # A loop that does not end: jmp to itself, where main begins.
    t.type("tb main", "Enter", "c", "Enter")
    t.sees("=>  0x1013d9")
    t.type("py context.debugger.write_memory(context.thread, 0x1013d9, b'\\xeb\\xfe')", "Enter")
    t.type("c", "Enter")
    t.sees(" running ")
    t.type("guests", "Enter")
    t.sees("No guest has been entered by VMRUN yet.")
    t.sees(" running ")
    t.type("C-c")
    t.sees("interrupted")
    t.sees(" stopped ")


def sleeps_long(t: Terminal, folder: Path) -> None:
    """A command that takes long is at work."""
    begun = folder / "begun"
    t.type(f"py open({str(begun)!r}, 'w').close(); __import__('time').sleep(1000)", "Enter")
    until(begun.exists, t.screen)


def test_long_output_is_paged_and_long_commands_are_cancelled(console: Console, tmp_path: Path) -> None:
    t = console()
    t.sees("host> ")
    t.type("help", "Enter")
    t.sees("\n:")  # less waits
    t.type("q")
    t.sees("host> ")
    sleeps_long(t, tmp_path)
    t.type("C-c")
    t.sees("cancelled")
    t.type("time", "Enter")
    t.sees("0 ticks")


def test_the_full_screen(console: Console, tmp_path: Path) -> None:
    t = console(columns=150, lines=44)
    t.sees("host> ")
    t.type("tb 2:work", "Enter", "tui", "Enter")
    t.sees("── console ──")
    t.shows_full_screen(True)
    t.type("c", "Enter")
    t.sees("=>  0xffffffff80100228")
    for pane in ("── code at work ──", "│── registers ──", "│── stack ──", "│── VMCB at 0x800000 ──", "│── last exits ──", "── console ──"):
        t.sees(pane)
    t.type("w 2:ctr")
    t.sees("2:counter")
    t.type("C-c")
    t.resize(90, 30)
    t.type("echo narrow", "Enter")
    narrow = t.sees("\nnarrow", "\n── registers ──")
    assert "VMCB at" not in narrow.replace("nVMCB", "")
    for number, size in enumerate(((120, 24), (80, 24), (50, 12))):
        t.resize(*size)
        t.type(f"echo size {number}", "Enter")
        t.sees(f"\nsize {number}", "── registers ──", "\nguest 2>")
    t.resize(150, 44)
    t.sees("│── registers ──")
    t.type("n", "Enter")
    t.sees("=>  0xffffffff80100229")
    t.type("exits 2 1 | grep -c VMMCALL", "Enter")
    t.sees("\n1 ")
    sleeps_long(t, tmp_path)
    t.type("C-c")
    t.sees("cancelled")
    t.type("!echo out of the panes", "Enter")
    t.sees("[Enter: back to the panes]")
    t.shows_full_screen(False)
    t.type("Enter")
    t.shows_full_screen(True)
    t.type("tui", "Enter")
    t.shows_full_screen(False)
    t.sees("guest 2> ")
    t.type("tui", "Enter")
    t.sees("── console ──")
    t.type("quit", "Enter")
    t.sees("left with 0")
    t.shows_full_screen(False)


def test_history_is_kept_by_project(console: Console) -> None:
    t = console()
    t.sees("host> ")
    t.type("echo first of all", "Enter", "C-d")
    t.sees("left with 0")
    t.close()
    t = console()
    t.sees("host> ")
    t.type("Up")
    t.sees("host> echo first of all")


@pytest.mark.parametrize("panes", [False, True])
def test_a_signal_leaves_the_terminal_as_it_was(console: Console, panes: bool) -> None:
    t = console()
    t.sees("host> ")
    t.type("py print('I am', __import__('os').getpid())", "Enter")
    process = int(t.finds(r"^I am (\d+)$"))
    if panes:
        t.type("tui", "Enter")
        t.shows_full_screen(True)
    os.kill(process, signal.SIGTERM)
    t.sees("left with 0")
    t.shows_full_screen(False)


def test_editor(console: Console, tmp_path: Path) -> None:
    editor = tmp_path / "editor"
    editor.write_text("#!/bin/sh\necho 'echo edited' > \"$1\"\n")
    editor.chmod(0o755)
    t = console(EDITOR=str(editor))
    t.sees("host> ")
    t.type("edit", "Enter")
    t.sees("\nedited\n")
    t.type("C-x", "C-e")
    t.sees("host> echo edited")


def script(*arguments: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vmdbg", "console", *arguments], cwd=ROOT, input=text, stdin=subprocess.DEVNULL if text is None else None,
        capture_output=True, text=True, timeout=PATIENCE, check=False,
    )  # fmt: skip


def test_scripts(hypervisor: Path, tmp_path: Path) -> None:
    file = tmp_path / "script"
    file.write_text("tbreak main\ncontinue\n")
    image = [str(hypervisor), "--serial", "null"]
    done = script(*image, "-x", str(file), "-c", "here", "-c", "nonsense", "-c", "py 6 * 7")
    assert [re.sub(r"0x[0-9a-f]+|\d+(?= ticks)", "N", re.sub(r"c:\d+", "c:L", line)) for line in done.stdout.splitlines()] == [
        "Temporary breakpoint 1 at N <main> of the host", "Temporary breakpoint 1", "the host at N <main>, main.c:L, 64-bit, CPL 0",
        "the host, 64-bit, 4-level, CPL 0, CR3 N, RIP N <main>, main.c:L, N ticks", "42 (N)",
    ]  # fmt: skip
    assert done.stderr.startswith("vmdbg: nonsense: no such command; try ")
    assert done.returncode == 1
    assert "\x1b" not in done.stdout
    piped = script(*image, text="time\nquit\nnonsense\n")
    assert (piped.returncode, piped.stdout, piped.stderr) == (0, "0 ticks\n", "")


def test_what_the_guest_prints(hypervisor: Path) -> None:
    done = script(str(hypervisor), "-c", "continue")
    assert "hypervisor: all well" in done.stdout
    assert "[the guest ended the run with status 1]" in done.stdout
    quiet = script(str(hypervisor), "-c", "set serial off", "-c", "continue")
    assert "hypervisor: all well" not in quiet.stdout


def test_usage_errors(tmp_path: Path) -> None:
    missing = script(str(tmp_path / "nothing"), "-c", "time")
    assert missing.returncode == 2
    assert missing.stderr.startswith("vmdbg: ")
    nobody = script("127.0.0.1:1", "-c", "time")
    assert nobody.returncode == 2
    assert nobody.stderr.startswith("vmdbg: 127.0.0.1:1: Connection refused; start `vmdbg run IMAGE --gdb` there")


def test_a_dump(hypervisor: Path, tmp_path: Path) -> None:
    core = tmp_path / "core"
    symbols = f"guest2={hypervisor.with_name('guest64.elf')}"
    saved = script(str(hypervisor), "--symbols", symbols, "--serial", "null", "-c", "tb 2:work", "-c", "c", "-c", f"save core {core}")
    assert saved.returncode == 0, saved.stderr
    done = script(str(core), "--symbols", symbols, "-c", "guests", "-c", "inferior 2", "-c", "context code", "-c", "continue")
    assert "=>  0xffffffff80100228  <work>       push rbp" in done.stdout
    assert done.stderr.splitlines()[-1] == "vmdbg: continue: a dump does not run; start vmdbg console on an image, or on a stub"
    assert done.returncode == 1
    inspected = subprocess.run(
        [sys.executable, "-m", "vmdbg", "inspect", "--symbols", symbols, core], cwd=ROOT, input="inferior 2\nhere\n", capture_output=True,
        text=True, timeout=PATIENCE, check=False,
    )  # fmt: skip
    assert inspected.stdout.splitlines()[-1].startswith("guest 2, 64-bit, 4-level over 4-level, CPL 0, ASID 1, ")
