"""gdb's debug adapter, as editors speak to it (VS Code, Emacs, Neovim)."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.served import Served, run, same
from tests.gdbstub.gdb import GDBS
from vmdbg.attach import GDB_SETTINGS, MODULE

Serve = Callable[..., Served]


class Adapter:
    """`gdb -i dap`, with one request at a time."""

    def __init__(self, program: str) -> None:
        settings = [word for setting in (*GDB_SETTINGS, f"source {MODULE}") for word in ("-iex", setting)]
        self.process = subprocess.Popen(
            [program, "--nx", "-q", *settings, "-i", "dap"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self.number = 0
        self.events: list[dict[str, Any]] = []

    def send(self, command: str, **arguments: object) -> int:
        self.number += 1
        message = {"seq": self.number, "type": "request", "command": command, "arguments": arguments}
        data = json.dumps(message).encode()
        assert self.process.stdin is not None
        self.process.stdin.write(b"Content-Length: %d\r\n\r\n%b" % (len(data), data))
        self.process.stdin.flush()
        return self.number

    def read(self) -> dict[str, Any]:
        stream, length = self.process.stdout, 0
        assert stream is not None
        while (line := stream.readline()) != b"\r\n":
            assert line, "gdb has ended"
            if line.lower().startswith(b"content-length:"):
                length = int(line.split(b":")[1])
        message: dict[str, Any] = json.loads(stream.read(length))
        return message

    def answer(self, number: int) -> dict[str, Any]:
        """The body of the response to a request."""
        while True:
            message = self.read()
            if message["type"] == "event":
                self.events.append(message)
            elif message.get("request_seq") == number:
                assert message["success"], message
                return message.get("body") or {}

    def ask(self, command: str, **arguments: object) -> dict[str, Any]:
        return self.answer(self.send(command, **arguments))

    def event(self, name: str) -> dict[str, Any]:
        """The next event of this name."""
        while True:
            for index, message in enumerate(self.events):
                if message["event"] == name:
                    del self.events[: index + 1]
                    return message.get("body") or {}
            message = self.read()
            if message["type"] == "event":
                self.events.append(message)


@pytest.fixture
def adapter() -> Iterator[Adapter]:
    able = [one for one in GDBS if subprocess.run([one, "-nx", "-batch", "-i", "dap"], stdin=subprocess.DEVNULL,
                                                        capture_output=True, check=False).returncode == 0]  # fmt: skip
    if not able:
        pytest.skip(f"no gdb here has a debug adapter (14 and newer; pip install gdb-for-pwndbg): {GDBS}")
    one = Adapter(able[-1])
    yield one
    one.process.kill()
    one.process.communicate()


def test_an_editor_debugs_the_hypervisor(adapter: Adapter, serve: Serve, hypervisor: Path, tmp_path: Path) -> None:
    undebugged = run(hypervisor, tmp_path)
    served = serve(hypervisor)
    capabilities = adapter.ask("initialize", adapterID="gdb", linesStartAt1=True, columnsStartAt1=True)
    assert capabilities["supportsConditionalBreakpoints"]
    attaching = adapter.send(
        "attach", target=f"127.0.0.1:{served.port}", program=str(hypervisor.parent / "hypervisor.debug")
    )
    adapter.event("initialized")
    source = hypervisor.parents[1] / "exits.c"
    line = next(n for n, text in enumerate(source.read_text().splitlines(), 1) if text.startswith("int handle_exit("))
    adapter.ask(
        "setBreakpoints", source={"path": "exits.c"}, breakpoints=[{"line": line, "condition": "guest->number == 1"}]
    )
    adapter.ask("configurationDone")
    adapter.answer(attaching)

    threads = adapter.ask("threads")["threads"]
    assert len(threads) == 1
    adapter.ask("continue", threadId=threads[0]["id"])
    while adapter.event("stopped")["reason"] != "breakpoint":
        pass
    frames = adapter.ask("stackTrace", threadId=threads[0]["id"])["stackFrames"]
    assert [frame["name"] for frame in frames[:2]] == ["handle_exit", "run"]
    scopes = {scope["name"]: scope for scope in adapter.ask("scopes", frameId=frames[0]["id"])["scopes"]}
    arguments = adapter.ask("variables", variablesReference=scopes["Arguments"]["variablesReference"])["variables"]
    assert arguments[0]["name"] == "guest"
    registers = adapter.ask("variables", variablesReference=scopes["Registers"]["variablesReference"])["variables"]
    assert {"rip", "cr3", "efer"} <= {register["name"] for register in registers}
    assert adapter.ask("evaluate", expression="guest->number", frameId=frames[0]["id"])["result"] == "1"
    # The editor's console is gdb's, with the commands of the module.
    assert "VMCB" in adapter.ask("evaluate", expression="vmcb guest->vmcb", context="repl", frameId=frames[0]["id"])["result"]
    read = adapter.ask("readMemory", memoryReference=hex(int(frames[0]["instructionPointerReference"], 16)), count=4)
    assert read["data"]
    code = adapter.ask("disassemble", memoryReference=frames[0]["instructionPointerReference"], instructionCount=3)
    assert len(code["instructions"]) == 3

    adapter.ask("next", threadId=threads[0]["id"])
    assert adapter.event("stopped")["reason"] == "step"
    adapter.ask("setBreakpoints", source={"path": "exits.c"}, breakpoints=[])
    adapter.ask("continue", threadId=threads[0]["id"])
    assert adapter.event("exited")["exitCode"] == 1
    adapter.ask("disconnect")
    same(served.finish(), undebugged)
