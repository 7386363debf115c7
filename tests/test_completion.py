"""`vmdbg completion`: real shells, typed into."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.console.tmux import Terminal
from vmdbg.cli import parser
from vmdbg.completion import SHELLS, actions, completed_by, script

START = {
    "bash": "env PS1=%% bash --norc --noprofile -i",
    "zsh": "env PS1=%% zsh -f -i",
    "fish": "fish --no-config --interactive",
}
READ = {"bash": ". ./script", "zsh": 'autoload -U compinit; compinit -u; eval "$(cat script)"', "fish": "source ./script"}

Shell = Callable[[str], Terminal]


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    """A shell that has read its script, in a directory with files."""
    made: list[Terminal] = []
    for name in ("hypervisor.elf", "other.txt"):
        (tmp_path / name).touch()
    (tmp_path / "suite").mkdir()

    def start(name: str) -> Terminal:
        if shutil.which(name) is None:
            pytest.skip(f"{name} is not in PATH")
        done = subprocess.run([sys.executable, "-m", "vmdbg", "completion", name], capture_output=True, text=True, check=True)
        (tmp_path / "script").write_text(done.stdout, encoding="utf-8")
        t = Terminal(tmp_path, f"sh -c 'cd {tmp_path}; exec {START[name]}'", columns=200)
        made.append(t)
        t.finds(r"([%>#]) *$")  # it reads lines
        t.type(f"{READ[name]}; echo ready to com''plete", "Enter")
        t.sees("ready to complete")
        return t

    yield start
    for each in made:
        each.close()


@pytest.mark.parametrize("name", SHELLS)
def test_completion(shell: Shell, name: str) -> None:
    t = shell(name)
    for typed, completed in (
        ("vmdbg ru", "vmdbg run "),
        ("vmdbg run --memo", "vmdbg run --memory"),
        ("vmdbg run --runtime na", "vmdbg run --runtime native "),
        ("vmdbg run --runtime=na", "vmdbg run --runtime=native "),
        ("vmdbg run hyper", "vmdbg run hypervisor.elf "),
        ("vmdbg run --initrd oth", "vmdbg run --initrd other.txt "),
        ("vmdbg run --symbols host=hyp", "vmdbg run --symbols host=hypervisor.elf "),
        ("vmdbg console -x ot", "vmdbg console -x other.txt "),
        ("vmdbg inspect --scan hy", "vmdbg inspect --scan hypervisor.elf "),
        ("vmdbg completion fi", "vmdbg completion fish "),
    ):
        t.type("-l", typed)
        t.type("Tab")
        t.sees(completed)
        t.type("C-u")
    t.type("-l", "vmdbg run --de")
    t.type("Tab", "Tab", "Tab")
    t.sees("--device")
    t.sees("--dev ")


@pytest.mark.parametrize("name", SHELLS)
def test_every_option_of_every_command_is_in_the_script(name: str) -> None:
    top = parser()
    made = script(top, name)
    for action in actions(top):
        for option in action.option_strings:
            assert option.lstrip("-") in made
        if isinstance(action, argparse._SubParsersAction):
            assert all(command in made for command in action.choices)


def test_every_file_is_completed() -> None:
    """Metavars say what is a file: a new one that sounds like one has to be known."""
    for action in actions(parser()):
        named = str(action.metavar or "")  # without one it is the name of the argument
        assert (completed_by(action) is not None) == any(word in named for word in ("FILE", "IMAGE", "SCRIPT", "PATH", "DIR")), named


def test_an_unknown_shell_is_one_line() -> None:
    done = subprocess.run([sys.executable, "-m", "vmdbg", "completion", "csh"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "choose from" in done.stderr
