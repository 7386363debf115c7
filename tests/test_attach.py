"""`vmdbg gdb`: which gdb it finds, and what it passes on."""

from __future__ import annotations

import subprocess
import sysconfig
from pathlib import Path

import pytest

from vmdbg import attach, cli
from vmdbg.options import UsageError


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The command lines that would have been run."""
    commands: list[list[str]] = []

    def call(command: list[str]) -> int:
        commands.append(command)
        return 7

    monkeypatch.setattr(subprocess, "call", call)
    monkeypatch.setattr(attach, "find_gdb", lambda: "a gdb")
    return commands


def test_what_follows_two_dashes_goes_to_gdb(called: list[list[str]]) -> None:
    assert cli.main(["gdb", "1234", "--memory", "64M", "--", "-batch", "-ex", "info inferiors", "--", "x"]) == 7
    (command,) = called
    assert command[0] == "a gdb"
    assert command[-7:-5] == ["-ex", "target extended-remote 127.0.0.1:1234"]
    assert command[-5:] == ["-batch", "-ex", "info inferiors", "--", "x"]


def test_every_setting_comes_before_the_connection(called: list[list[str]]) -> None:
    assert cli.main(["gdb", "localhost:99"]) == 7
    (command,) = called
    connect = command.index("target extended-remote localhost:99")
    assert all(command.index(setting) < connect for setting in attach.GDB_SETTINGS)


def test_gdb_of_the_package_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(UsageError, match="there is no gdb; install it"):
        attach.find_gdb()
    gdb = tmp_path / "gdb"
    gdb.write_text("")
    gdb.chmod(0o755)
    assert attach.find_gdb() == str(gdb)
