"""Every example runs: the commands in its README.md, as they are printed there, where they are printed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.served import ROOT
from tests.gdbstub.gdb import GDBS
from tests.patience import PATIENCE

EXAMPLES = sorted(path.parent for path in (ROOT / "examples").glob("*/Makefile"))
PROGRAMS = ("make", "vmdbg", "pytest")
GOOD = 1
"""What the images write to port F4 when all went well makes this exit status: (0 << 1) | 1."""


def commands(example: Path) -> list[str]:
    """Lines of code in its README.md that begin with a program's name."""
    text = (example / "README.md").read_text(encoding="utf-8") if (example / "README.md").exists() else ""
    lines = [line.removeprefix("    ").partition(" #")[0].strip() for line in text.splitlines() if line.startswith("    ")]
    return [line for line in lines if line.split(" ")[0] in PROGRAMS]


def run(example: Path, command: str) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        command, shell=True, cwd=example, env={**os.environ, "PATH": path}, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        timeout=PATIENCE,
    )  # fmt: skip


def test_each_directory_is_one() -> None:
    assert {path for path in (ROOT / "examples").iterdir() if path.is_dir() and any(path.rglob("*.c"))} <= set(EXAMPLES)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_its_readme_tells_how_to_run_it(example: Path) -> None:
    runs = [command for command in commands(example) if command.split()[0] != "make"]
    assert runs, f"{example.name}/README.md has no line of code that begins with vmdbg or pytest"


@pytest.mark.parametrize(
    ("example", "command"), [pytest.param(example, command, id=f"{example.name}: {command}") for example in EXAMPLES for command in commands(example)]
)
def test_command(example: Path, command: str, examples: Path) -> None:
    if command.startswith("make qemu") and shutil.which("qemu-system-x86_64") is None:
        pytest.skip("qemu-system-x86_64 is not in PATH")
    if command.startswith("vmdbg gdb"):
        if not GDBS:
            pytest.skip("there is no gdb here")
        done = run(example, f"{command}{'' if ' -- ' in command else ' --'} -batch")
        assert "Breakpoint 1 at" in done.stdout
    elif "--gdb" in command:  # who attaches is for other tests; the port may be taken here
        done = run(example, re.sub(r"--gdb( \d+)?", "--gdb 0", command) + " --timeout 0.1")
        assert done.returncode == 124
        assert "extended-remote 127.0.0.1:" in done.stderr
    elif command.startswith("vmdbg run"):
        done = run(example, command)
        assert done.returncode == GOOD, done.stdout + done.stderr
    else:
        done = run(example, command)
        assert done.returncode == 0, done.stdout + done.stderr
