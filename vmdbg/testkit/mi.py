# SPDX-License-Identifier: GPL-2.0-or-later
"""A real gdb in a test or script, driven through its machine interface (GDB/MI) with pygdbmi."""

from __future__ import annotations

import json
import re
import signal
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pygdbmi.gdbcontroller import GdbController

from vmdbg.api.errors import Error
from vmdbg.attach import GDB_SETTINGS, find_gdb

__all__ = ["Frame", "Gdb", "GdbError", "GdbStop", "Mi"]

TIMEOUT = 60.0
POLL_SECONDS, WAIT_SECONDS = 0.0005, 0.05
LAST_CHARACTERS = 4000
"""Of what gdb has printed, in a message."""


class GdbError(Error):
    """gdb refused a command, did not answer, or has ended: its own words, and the command."""


class Mi:
    """A gdb without a program, and what it prints.

    `idle` is called whenever there is nothing from gdb, if it is in this process that the machine runs that gdb waits for.
    """

    def __init__(self, program: str = "gdb", *, idle: Callable[[], None] | None = None, timeout: float = TIMEOUT) -> None:
        # The second argument is how long pygdbmi waits for more behind an answer: each command takes that long.
        self.controller = GdbController([program, "--nx", "--quiet", "--interpreter=mi3"], POLL_SECONDS)
        self.idle, self.timeout = idle, timeout
        self.text = ""
        """All that it has printed."""
        self.stops: deque[dict[str, Any]] = deque()
        """Records of stops that nobody has looked at."""
        self._responses: deque[dict[str, Any]] = deque()

    @staticmethod
    def console(command: str) -> str:
        """A command of gdb's command line as one of MI."""
        quoted = command.replace("\\", "\\\\").replace('"', '\\"')
        return f'-interpreter-exec console "{quoted}"'

    def send(self, command: str | None, *ends: str) -> tuple[str, dict[str, Any]]:
        """Write a command, and wait for a record of one of these classes: what was printed, and the record.  GdbError."""
        if command is not None:
            if "\n" in command:
                raise GdbError(f"{command!r}: gdb takes a command a line; give them one by one")
            self._alive()
            self.controller.write(command, read_response=False)
        printed, deadline = "", time.monotonic() + self.timeout
        while True:
            if not self._responses:
                patience = WAIT_SECONDS if self.idle is None else 0
                self._responses.extend(self.controller.get_gdb_response(patience, raise_error_on_timeout=False))
                if not self._responses:
                    self._alive()
                    if time.monotonic() > deadline:
                        said = (self.text + printed)[-LAST_CHARACTERS:]
                        asked = "" if command is None else f" to {command!r}"
                        raise GdbError(f"gdb has not answered{asked} within {self.timeout:g} s; it printed {said!r}")
                    if self.idle is not None:
                        self.idle()
                continue
            response = self._responses.popleft()
            if response["type"] in ("console", "target", "log") and response["payload"]:
                printed += response["payload"]
            if response["type"] == "notify" and response["message"] == "stopped":
                self.stops.append(response["payload"] or {})
            if response["type"] in ("result", "notify") and response["message"] in ends:
                if response["message"] == "error":
                    printed += response["payload"]["msg"]
                self.text += printed
                return printed, response

    def _alive(self) -> None:
        process = self.controller.gdb_process
        if process is None or process.poll() is not None:
            status = "" if process is None else f" with status {process.returncode}"
            raise GdbError(f"gdb has ended{status}; it printed {self.text[-LAST_CHARACTERS:]!r}")

    def interrupt(self) -> None:
        """^C, as the terminal sends it."""
        self._alive()
        process = self.controller.gdb_process
        assert process is not None
        process.send_signal(signal.SIGINT)

    def close(self) -> None:
        """End gdb, whatever it does."""
        process = self.controller.gdb_process
        if process is not None:
            process.kill()
        self.controller.exit()


@dataclass(frozen=True, slots=True)
class Frame:
    """A frame of a stack."""

    level: int
    address: int
    function: str = ""
    file: str = ""
    line: int | None = None

    @classmethod
    def of(cls, found: Mapping[str, str]) -> Frame:
        line = found.get("line")
        return cls(
            int(found.get("level", 0)), int(found.get("addr", "0"), 0), found.get("func", ""), found.get("file", ""),
            int(line) if line is not None else None,
        )  # fmt: skip

    def __str__(self) -> str:
        place = f" at {self.file}:{self.line}" if self.file else ""
        return f"#{self.level} {self.address:#x} {self.function or '??'}{place}"


@dataclass(frozen=True, slots=True)
class GdbStop:
    """Why gdb has the prompt again."""

    reason: str
    """As MI has it: "breakpoint-hit", "end-stepping-range", "exited", "signal-received" ...; "fork" when a guest appears."""
    text: str
    """What gdb printed."""
    thread: int | None = None
    """Its number in gdb."""
    breakpoint: int | None = None
    frame: Frame | None = None
    exit_status: int | None = None
    """As that of `vmdbg run`, if the machine has ended."""

    @property
    def ended(self) -> bool:
        return self.exit_status is not None

    @property
    def function(self) -> str:
        """Where it is; empty if gdb knows no function."""
        return self.frame.function if self.frame is not None else ""

    @property
    def line(self) -> int | None:
        return self.frame.line if self.frame is not None else None


class Gdb:
    """gdb on a machine; commands that gdb refuses raise `GdbError`.

    The hypervisor is inferior 1.  `attach` makes a guest one, `select` chooses whose names and registers are meant.
    """

    def __init__(
        self, program: str | None = None, *, settings: Sequence[str] = GDB_SETTINGS, idle: Callable[[], None] | None = None,
        timeout: float = TIMEOUT,
    ) -> None:  # fmt: skip
        self.mi = Mi(program or find_gdb(), idle=idle, timeout=timeout)
        for setting in (*settings, "set width 0", "set style enabled off", "set debuginfod enabled off"):
            self.mi.send(self.mi.console(setting), "done", "error")  # an old gdb lacks some
        self.breakpoints: dict[int, str] = {}
        """Those made by `break_at`: where."""

    def __repr__(self) -> str:
        set_ = ", ".join(f"{number} at {where}" for number, where in self.breakpoints.items())
        return f"<gdb, breakpoints: {set_ or 'none'}>"

    @property
    def transcript(self) -> str:
        """All that gdb has printed."""
        return self.mi.text

    def close(self) -> None:
        self.mi.close()

    # Commands

    def execute(self, command: str) -> str:
        """A command of gdb's command line: what it printed.  One that resumes waits for the stop."""
        self.mi.text += f"(gdb) {command}\n"
        printed, record = self.mi.send(self.mi.console(command), "done", "error", "running", "connected")
        if record["message"] == "error":
            raise GdbError(f"{command}: {record['payload']['msg']}")
        if record["message"] == "running":
            printed += self.mi.send(None, "stopped")[0]
        return printed

    def _ask(self, command: str) -> dict[str, Any]:
        """A command of the machine interface: its result."""
        self.mi.text += f"(mi) {command}\n"
        _, record = self.mi.send(command, "done", "error")
        if record["message"] == "error":
            raise GdbError(f"{command}: {record['payload']['msg']}")
        return record["payload"] or {}

    def monitor(self, line: str) -> Any:
        """A command of vmdbg's: its text, or with --json the result as Python has JSON."""
        printed = self.execute(f"monitor {line}")
        if "--json" not in line.split():
            return printed
        try:
            return json.loads(printed)["result"]
        except (ValueError, KeyError, TypeError):
            raise GdbError(f"monitor {line}: {printed.strip()}") from None

    def connect(self, where: str) -> None:
        """To a stub: "127.0.0.1:1234", or the path of a socket."""
        self.execute(f"target extended-remote {where}")

    # Values

    def eval(self, expression: str) -> int | float | str:
        """An expression's value: a number for integers, characters, truth values and pointers, else gdb's text."""
        return _value(self._ask(f"-data-evaluate-expression {_quoted(expression)}")["value"])

    def read(self, address: int | str, length: int) -> bytes:
        """Memory of who is selected, at an address or a symbol."""
        where = f"&{address}" if isinstance(address, str) else hex(address)
        blocks = self._ask(f"-data-read-memory-bytes {_quoted(where)} {length}")["memory"]
        return b"".join(bytes.fromhex(block["contents"]) for block in blocks)

    def backtrace(self) -> tuple[Frame, ...]:
        """The stack, innermost first."""
        return tuple(Frame.of(frame) for frame in self._ask("-stack-list-frames")["stack"])

    # Who

    def attach(self, guest: int, symbols: str | None = None) -> None:
        """Make a guest an inferior, and select it.  `symbols`: its file, unless the machine has offered one."""
        added = re.search(r"Added inferior (\d+)", self.execute("add-inferior"))
        if added is None:
            raise GdbError("add-inferior: gdb does not say which inferior it added")
        self.execute(f"inferior {added[1]}")
        if symbols is not None:
            self.execute(f"file {symbols}")
        self.execute(f"attach {guest}")

    def select(self, number: int) -> None:
        """Whose names and registers are meant: 1 is the hypervisor, others are attached guests."""
        for line in self.execute("info inferiors").splitlines():
            found = re.match(r"[* ]+(\d+)\s+process (\d+)\b", line)
            if found is not None and int(found[2]) == number:
                self.execute(f"inferior {found[1]}")
                return
        raise GdbError(f"{number}: gdb is not attached to this guest; attach it first")

    # Running

    def break_at(self, location: str, when: str = "", *, once: bool = False) -> int:
        """A breakpoint: "guest.c:42", "tick", "*0x100000"; `when`: a condition.  Its number."""
        words = ["-break-insert", *(["-t"] if once else []), *(["-c", _quoted(when)] if when else []), _quoted(location)]
        number = int(self._ask(" ".join(words))["bkpt"]["number"])
        self.breakpoints[number] = location
        return number

    def delete(self, number: int | None = None) -> None:
        """A breakpoint, or all of them."""
        self._ask("-break-delete" + ("" if number is None else f" {number}"))
        if number is None:
            self.breakpoints.clear()
        else:
            self.breakpoints.pop(number, None)

    def resume(self) -> GdbStop:
        """Continue to the next stop."""
        return self._go("continue")

    def run_to(self, location: str, when: str = "") -> GdbStop:
        """Continue to a location, over stops at which guests appear.  GdbError if something else comes first."""
        number = self.break_at(location, when, once=True)
        while (stop := self.resume()).reason == "fork":
            pass
        if stop.breakpoint != number:
            if not stop.ended:
                self.delete(number)
            raise GdbError(f"{location} was not reached: {stop.text.strip() or stop.reason}")
        self.breakpoints.pop(number, None)
        return stop

    def step(self, count: int = 1) -> GdbStop:
        return self._go(f"step {count}")

    def next(self, count: int = 1) -> GdbStop:
        return self._go(f"next {count}")

    def stepi(self, count: int = 1) -> GdbStop:
        return self._go(f"stepi {count}")

    def nexti(self, count: int = 1) -> GdbStop:
        return self._go(f"nexti {count}")

    def finish(self) -> GdbStop:
        return self._go("finish")

    def start(self, command: str = "continue") -> None:
        """Resume by a command, and do not wait for the stop: `wait` does.  Until then gdb takes no other commands."""
        self.mi.stops.clear()
        self.mi.text += f"(gdb) {command}\n"
        _, record = self.mi.send(self.mi.console(command), "running", "error")
        if record["message"] == "error":
            raise GdbError(f"{command}: {record['payload']['msg']}")

    def wait(self) -> GdbStop:
        """For the stop of what was started; a machine in this process runs meanwhile."""
        text, _ = self.mi.send(None, "stopped")
        return _stop(self.mi.stops.pop(), text)

    def interrupt(self) -> None:
        """^C, between `start` and `wait`."""
        self.mi.interrupt()

    def _go(self, command: str) -> GdbStop:
        self.mi.stops.clear()
        text = self.execute(command)
        if not self.mi.stops:
            raise GdbError(f"{command}: nothing ran; gdb says {text.strip()!r}")
        return _stop(self.mi.stops.pop(), text)


def _stop(record: Mapping[str, Any], text: str) -> GdbStop:
    reason = record.get("reason", "")
    status = int(record["exit-code"], 8) if "exit-code" in record else 0 if reason == "exited-normally" else None
    number, thread, frame = record.get("bkptno"), record.get("thread-id", ""), record.get("frame")
    return GdbStop(
        str(reason), text, int(thread) if str(thread).isdigit() else None, int(number) if number is not None else None,
        Frame.of(frame) if frame else None, status,
    )  # fmt: skip


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _value(text: str) -> int | float | str:
    if re.fullmatch(r"-?\d+", text):
        return int(text)
    found = re.match(r"(?:\([^()]*\) )?(0x[0-9a-f]+)(?: |$)|(-?\d+) '", text)
    if found is not None:
        return int(found[1], 16) if found[1] else int(found[2])
    if text in ("true", "false"):
        return int(text == "true")
    try:
        return float(text)
    except ValueError:
        return text
