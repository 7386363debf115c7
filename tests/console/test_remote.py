"""`vmdbg console ADDR`: one more client of a stub; and the console beside gdb on one machine."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gdbstub.target import Event
from tests.console.talking import ROOT, Kept
from tests.console.tmux import Terminal
from tests.gdbstub.gdb import GDBS, Gdb
from vmdbg.attach import GDB_SETTINGS
from vmdbg.console.remote import RemoteSource, connect
from vmdbg.console.shell import Shell
from vmdbg.options import UsageError

Stub = Callable[..., str]


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that are ended with the test."""
    found: list[subprocess.Popen[str]] = []
    yield found
    for process in found:
        process.kill()
        process.communicate()


@pytest.fixture
def stub(hypervisor: Path, started: list[subprocess.Popen[str]]) -> Stub:
    """`vmdbg run --gdb` on the demo, by its port."""

    def start(*arguments: str) -> str:
        command = [sys.executable, "-m", "vmdbg", "run", str(hypervisor), "--gdb", "0", "--serial", "null", "--timeout", "1000",
                   "--symbols", f"guest2={hypervisor.with_name('guest64.elf')}", *arguments]  # fmt: skip
        started.append(subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True))
        errors = started[-1].stderr
        assert errors is not None
        found = None
        while found is None:
            line = errors.readline()
            assert line, "the machine did not start"
            found = re.search(r"extended-remote 127.0.0.1:(\d+)", line)
        threading.Thread(target=errors.read, daemon=True).start()  # what it says must not fill the pipe
        return found[1]

    return start


class Remote:
    """A shell on a connection: `remote("here")` is what a line shows."""

    def __init__(self, where: str) -> None:
        self.source: RemoteSource = connect(where)
        self.output = Kept()
        self.shell = Shell(self.source, self.output)

    def __call__(self, line: str) -> str:
        self.output.said.clear()
        self.shell.execute(line)
        return "\n".join(text for _, text in self.output.said)

    def close(self) -> None:
        self.source.close()


@pytest.fixture
def remote(stub: Stub) -> Iterator[Remote]:
    """On a machine that stands before its first instruction."""
    made = Remote(stub("--wait"))
    yield made
    made.close()


def test_reading(remote: Remote) -> None:
    assert remote("here").startswith("the host, protected mode, 32-bit, no paging, CPL 0, RIP 0x10000c <_start>")
    assert remote("time") == "0 ticks"
    assert remote("walk nothing").startswith("nothing (column 1 of nothing): there is no such name; ")
    assert remote("py vm.rules().json()[0]['name']") == remote("py rules().json()[0]['name']") != ""
    assert "walk GVA" in remote("help walk")


def test_running(remote: Remote) -> None:
    assert "<main> of the host" in remote("tbreak main")
    assert "Temporary breakpoint 1\nthe host at " in remote("continue")
    assert "<main>" in remote("here")
    remote("step")
    assert "<main+0x1>" in remote("here")
    remote("next 2")
    assert "[guest 2 has appeared]" in remote("continue 6000000")
    assert "<work> of guest 2" in remote("tbreak 2:work if rdi == 2")
    assert "Temporary breakpoint 2 if rdi == 2\nguest 2 at " in remote("continue")
    assert remote("print rdi").startswith("2")
    remote("finish")
    assert "<main+" in remote("here")
    assert "reached" in remote("continue 100000")
    assert remote("inferior 2").splitlines()[2].startswith("*  2 ")
    assert remote("walk counter | cat") == ""
    assert "[the machine has ended]" in remote("continue")
    assert "there is nothing to run" in remote("step")
    assert remote("restart").startswith("the machine stands before its first instruction")
    assert "<_start>" in remote("here")


def test_the_same_run_as_here(remote: Remote, talk: Callable[..., Callable[[str], str]]) -> None:
    lines = ("continue 6000000", "inferior 2", "tbreak work", "continue", "step 20", "here", "next 5", "here", "continue 1000000", "here", "exits 2 3")
    local = talk()
    there, here = [remote(line) for line in lines], [local(line) for line in lines]
    there[1] = here[1] = ""  # what the inferiors do is not asked over the wire
    assert there == here


def test_panes_and_completion(remote: Remote) -> None:
    remote("tbreak 2:work")
    remote("c")
    panes = remote.source.panes(("regs", "code", "vmcb"), 80)
    assert panes["code"][0] == "code at work"
    assert panes["code"][1][0] == "=>  0xffffffff80100228  <work>       push rbp"
    assert panes["vmcb"][0] == "VMCB at 0x800000"
    assert "2:counter" in [one.text for one in remote.source.complete("walk 2:cou").candidates]
    assert "2:counter" in [one.text for one in remote.source.complete("break 2:cou").candidates]
    assert "walk" in [one.text for one in remote.source.complete("wa").candidates]
    assert remote.source.complete("set nothing ").candidates == remote.source.complete("nonsense x").candidates == []


def test_the_stub_goes(remote: Remote, started: list[subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """While the console has the machine run, which would do so for ever."""
    remote("tbreak main")
    remote("continue")
    driver = remote.source.driver
    driver.wire.ask(b"M%x,2:ebfe" % (driver.pc(remote.source.control.selected) or 0))
    run_slice = driver.run_slice

    def last() -> Event | None:
        started[0].terminate()
        return run_slice()

    monkeypatch.setattr(driver, "run_slice", last)
    assert "the stub has closed the connection" in remote("continue")
    for _ in range(2):
        assert "the stub has closed the connection" in remote("guests")
    assert not remote.source.control.running


def test_no_stub() -> None:
    with pytest.raises(UsageError, match="Connection refused; start `vmdbg run IMAGE --gdb` there"):
        connect("127.0.0.1:1")
    with pytest.raises(UsageError):
        connect("/nonexistent/socket")


@pytest.fixture
def gdb() -> Iterator[Gdb]:
    if not GDBS:
        pytest.skip("gdb is not in PATH")
    made = Gdb(GDBS[0])
    for setting in GDB_SETTINGS:
        made(setting)
    yield made
    made.close()


def test_beside_gdb_it_looks_on(stub: Stub, gdb: Gdb, hypervisor: Path) -> None:
    port = stub("--wait")
    gdb(f"file {hypervisor.with_name('hypervisor.debug')}")
    gdb(f"target extended-remote 127.0.0.1:{port}")
    gdb("break main")
    assert "main" in gdb("continue")
    remote = Remote(port)  # there is no process left for it to debug
    assert remote.source.driver.holder == "another client"
    assert "<main>" in remote("here")
    assert remote("continue") == "continue: another client holds the machine; use its commands, or disconnect it; reading works"
    gdb("break handle_exit")
    gdb("delete 1")
    assert "handle_exit" in gdb("continue")
    assert "<handle_exit>" in remote("here")
    second = Remote(port)  # now guests are free, which must not hold gdb's machine
    assert second.source.driver.holder == "another client"
    assert "handle_exit" in gdb("continue")
    assert "guest 2" in second("guests")
    gdb("delete")
    gdb("disconnect")
    assert "Breakpoint 1 at " in remote("break handle_exit")
    assert "Breakpoint 1" in remote("continue")
    second.close()
    remote.close()


def test_gdb_takes_over_from_the_console_beside_it(hypervisor: Path, gdb: Gdb, tmp_path: Path) -> None:
    command = f"{sys.executable} -m vmdbg run {hypervisor} --console --gdb 0 --wait --serial null"
    terminal = Terminal(tmp_path, command, PYTHONPATH=str(ROOT))
    try:
        port = terminal.finds(r"extended-remote 127.0.0.1:(\d+)$")
        terminal.type("b main", "Enter", "c", "Enter")
        terminal.sees("── code at main ")
        gdb(f"file {hypervisor.with_name('hypervisor.debug')}")
        assert "main" in gdb(f"target extended-remote 127.0.0.1:{port}")
        terminal.sees("[gdb has connected, and holds the machine now]")
        terminal.sees(" gdb holds it ")
        terminal.type("step", "Enter")
        terminal.sees("step: gdb holds the machine; use its commands, or disconnect it; reading works")
        gdb("break handle_exit")
        assert "handle_exit" in gdb("continue")
        terminal.type("here", "Enter")
        terminal.sees("<handle_exit>")
        gdb("delete")
        gdb("disconnect")
        terminal.sees("[gdb has disconnected]")
        terminal.sees(" stopped ")
        terminal.type("tb handle_exit", "Enter", "F5")
        terminal.sees("Temporary breakpoint 2")
    finally:
        terminal.close()
