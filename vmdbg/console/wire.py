"""A machine behind a stub of vmdbg's, as a driver: the console is one more client of the protocol."""

from __future__ import annotations

import json
import re
import select
import socket
import time
from binascii import unhexlify
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from gdbstub.packet import PACKET_SIZE, Parser, expand_runs, frame
from gdbstub.target import (
    CONTINUE,
    Action,
    BreakpointKind,
    Created,
    Event,
    Exited,
    Inferior,
    Output,
    Reason,
    Signal,
    Stop,
    TargetError,
    Thread,
    ThreadId,
)
from introspect.execution import linear_pc
from vmdbg.history import HOST
from vmdbg.monitor import MARK
from vmdbg.options import UsageError

__all__ = ["Wire", "WireDriver"]

SECONDS = 60.0
"""So long an answer may take: a command may walk all tables."""
_POLL = 0.01
_TOGETHER = 0.02
"""Text that a stop follows within this time says why. A stub of vmdbg's sends both in one piece."""
_HELLO = b"qSupported:multiprocess+;swbreak+;hwbreak+;error-message+"
_APPEARED = re.compile(r"\[process (\d+) \((.*)\) appeared")
_REASONS = {reason.value: reason for reason in Reason if reason.value}


class Wire:
    """Packets out, packets in."""

    def __init__(self, where: str) -> None:
        """UsageError if nobody listens there."""
        try:
            self.socket = _connect(where)
        except (OSError, ValueError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UsageError(f"{where}: {reason}; start `vmdbg run IMAGE --gdb` there, or give its port or socket") from None
        self._parser = Parser(4 * PACKET_SIZE)
        self._acknowledge = True
        self.events: deque[bytes] = deque()
        """What came while an answer was awaited that is none: stops, and the console's text of a run."""

    def send(self, *payloads: bytes) -> None:
        self._raw(b"".join(map(frame, payloads)))

    def _raw(self, data: bytes) -> None:
        try:
            self.socket.sendall(data)
        except OSError as error:
            raise TargetError(f"the stub has closed the connection ({error.strerror}); connect anew") from None

    def interrupt(self) -> None:
        self._raw(b"\x03")

    def receive(self, seconds: float) -> bytes | None:
        """The next packet; None if none comes in time."""
        until = time.monotonic() + seconds
        while True:
            item = self._parser.next()
            if isinstance(item, bytes):
                if self._acknowledge:
                    self._raw(b"+")
                try:
                    return expand_runs(item)
                except ValueError:
                    continue
            if item is not None:
                continue
            left = until - time.monotonic()
            if not select.select([self.socket], [], [], max(left, 0))[0]:
                return None
            try:
                data = self.socket.recv(1 << 16)
            except OSError:
                data = b""
            if not data:
                raise TargetError("the stub has closed the connection; connect anew")
            self._parser.feed(data)

    def ask(self, payload: bytes) -> bytes:
        """The answer to a packet.  TargetError for an error, or none."""
        self.send(payload)
        return self.answer()

    def answer(self) -> bytes:
        """The next answer.  TargetError for an error, or none."""
        while True:
            reply = self.receive(SECONDS)
            if reply is None:
                raise TargetError(f"the stub did not answer within {SECONDS:g} s; is it vmdbg's?")
            if _is_event(reply):
                self.events.append(reply)
                continue
            if reply.startswith(b"E"):
                text = reply.removeprefix(b"E.").decode("utf-8", "replace")
                raise TargetError(text if text != reply.decode("utf-8", "replace") else f"the stub refused it: {text}")
            return reply

    def command(self, line: str) -> str:
        """What a monitor command prints. Text of the machine, which may run, comes before the mark."""
        self.send(b"qRcmd," + f"--marked {line}".encode().hex().encode())
        said, failed = bytearray(), False
        while True:
            reply = self.receive(SECONDS)
            if reply is None:
                raise TargetError(f"the stub did not answer within {SECONDS:g} s")
            if reply.startswith(b"O") and reply != b"OK":
                said += _unhex(reply[1:])
            elif reply[:1] in b"TSWXw" and reply:
                self.events.append(reply)
            else:
                failed = reply != b"OK"
                break
        if failed and not said:
            raise TargetError(
                "the stub has no monitor commands: it is none of vmdbg's" if not reply else reply.decode("utf-8", "replace")
            )
        before, mark, answer = said.decode("utf-8", "replace").partition(MARK)
        if not mark:
            return before
        if before:
            self.events.append(b"O" + before.encode().hex().encode())
        return answer

    def stop_acknowledging(self) -> None:
        self.ask(b"QStartNoAckMode")
        self._acknowledge = self._parser.verify = False

    def close(self) -> None:
        self.socket.close()


def _is_event(reply: bytes) -> bool:
    return reply[:1] in (b"T", b"S", b"W", b"X", b"w") or (reply[:1] == b"O" and reply != b"OK")


def _connect(where: str) -> socket.socket:
    """Of a port, HOST:PORT, or the path of a Unix socket."""
    host, colon, port = where.removeprefix("unix:").rpartition(":")
    if where.isdigit() or (colon and port.isdigit() and not where.startswith("unix:")):
        return socket.create_connection((host.strip("[]") or "127.0.0.1", int(port if colon else where)), 5)
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(5)
    connection.connect(where.removeprefix("unix:"))
    return connection


def _unhex(data: bytes) -> bytes:
    try:
        return unhexlify(data)
    except ValueError:
        return b""


class WireDriver:
    """The machine at the other end. Another client that debugs the hypervisor holds it; then it is only looked at."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self.holder = ""
        self.ended = ""
        self._running = False
        self._actions: Mapping[ThreadId, Action] = {}
        self._events: deque[Event] = deque()
        """What happened while something else was waited for."""
        self._stray = False
        """^C came when the machine had stopped by itself: the stub stops at once when it is resumed."""
        self._hello()

    def _hello(self) -> None:
        wire = self.wire
        wire.send(_HELLO, b"QObserve")
        try:
            wire.answer()
            wire.answer()  # a client that debugs is not understood
        except TargetError:  # every process is debugged by somebody: look on
            wire.answer()
            wire.ask(_HELLO)
        wire.stop_acknowledging()
        self.holder = "" if HOST in self._attached() else "another client"
        if self.holder:
            self._let_go()
            return
        self._attach_guests()

    def _let_go(self) -> None:
        """Of what the stub gave us: the one who holds the hypervisor must not wait for us."""
        if self._attached():
            self.wire.ask(b"D1")

    def claim(self) -> None:
        """Take the machine, if it is free now."""
        if self.holder:
            try:
                self.wire.send(b"vAttach;%x" % HOST)
                reply = self.wire.receive(SECONDS)
            except TargetError:
                return
            if reply is not None and reply[:1] == b"T":
                self.holder = ""
                self._attach_guests()

    def _attach_guests(self) -> None:
        for number in self._guests():
            if number not in self._attached():
                self._attach(number)

    def _attach(self, pid: int) -> None:
        self.wire.send(b"vAttach;%x" % pid)
        self.wire.receive(SECONDS)  # a stop reply, or why it cannot be

    def _guests(self) -> dict[int, str]:
        found = self.ask_json(ThreadId(HOST, 1), "guests")
        return {int(guest["number"]): str(guest["name"]) for guest in found["data"]["guests"]}

    def ask_json(self, thread: ThreadId, line: str) -> Any:
        """A command's answer for programs, {"text", "data"}.  TargetError for one that failed."""
        text = self.wire.command(f"--json {thread.pid}.{thread.tid} {line}")
        try:
            found = json.loads(text)
        except ValueError:
            raise TargetError(text.strip() or "the stub answered nothing") from None
        if "error" in found:
            raise TargetError(str(found["error"]))
        return found

    def _attached(self) -> dict[int, list[int]]:
        """Threads by pid."""
        found: dict[int, list[int]] = {}
        for name in self.wire.ask(b"qfThreadInfo")[1:].decode().split(","):
            pid, dot, tid = name.removeprefix("p").partition(".")
            if dot:
                found.setdefault(int(pid, 16), []).append(int(tid, 16))
        return found

    # Driver

    def inferiors(self) -> Sequence[Inferior]:
        if self.ended:
            return []
        guests = self._guests()
        return [Inferior(HOST, "hypervisor"), *(Inferior(number, name) for number, name in guests.items())]

    def threads(self, pid: int) -> Sequence[Thread]:
        tids = self._attached().get(pid, [1])
        return [Thread(tid, f"CPU {tid - 1}" if pid == HOST else f"vCPU {tid - 1}") for tid in tids]

    def adopt(self, pid: int) -> None:
        """It must stand still for that."""
        self.halt()
        self._attach(pid)

    def go_on(self) -> None:
        self.resume(self._actions)

    def resume(self, actions: Mapping[ThreadId, Action]) -> None:
        self.halt()
        self._actions = dict(actions)
        if any(isinstance(event, Stop) for event in self._events):
            return  # it has stopped meanwhile: that comes first
        parts = [b"s:p%x.%x" % thread for thread, action in actions.items() if action.step]
        if any(action == CONTINUE for action in actions.values()):
            parts.append(b"c")
        packet = b"vCont;" + b";".join(parts)
        self.wire.send(packet)
        if self._stray:
            self._stray = False
            self.wire.receive(SECONDS)
            self.wire.send(packet)
        self._running = True

    def run_slice(self) -> Event | None:
        return self._events.popleft() if self._events else self._next()

    def _next(self) -> Event | None:
        packet = self.wire.events.popleft() if self.wire.events else self.wire.receive(_POLL)
        if packet is None:
            return None
        if packet[:1] != b"O" or packet == b"OK":
            return self._event(packet, "")
        text = _unhex(packet[1:]).decode("utf-8", "replace")
        appeared = _APPEARED.match(text)
        if appeared is not None:
            return Created(ThreadId(int(appeared[1]), 1), ThreadId(HOST, 1))
        following = self.wire.events.popleft() if self.wire.events else self.wire.receive(_TOGETHER)
        if following is not None:
            if following[:1] in (b"T", b"S"):
                return self._event(following, text)
            self.wire.events.appendleft(following)
        return Output(text)

    def _event(self, packet: bytes, text: str) -> Event | None:
        kind = packet[:1]
        if kind in (b"T", b"S"):
            self._running = False
            return self._stop(packet, text)
        if kind in (b"W", b"X"):
            fields = packet.decode().split(";")
            pid = next((int(field.partition(":")[2], 16) for field in fields if field.startswith("process:")), HOST)
            if pid == HOST:
                self._running, self.ended = False, "the machine has ended"
            elif self._running:
                self._running = False
                self.resume({thread: action for thread, action in self._actions.items() if thread.pid != pid})
            return Exited(pid, int(fields[0][1:] or "0", 16))
        if kind == b"E":
            self._running = False
            raise TargetError(packet.removeprefix(b"E.").decode("utf-8", "replace"))
        return None

    def _stop(self, packet: bytes, text: str) -> Stop:
        fields = dict(part.partition(":")[::2] for part in packet[3:].decode("ascii", "replace").split(";") if part)
        pid, _, tid = fields.get("thread", "p1.1").removeprefix("p").partition(".")
        reason = next((_REASONS[key] for key in fields if key in _REASONS), Reason.NONE)
        address = int(fields[reason.value], 16) if reason.value and fields[reason.value] else 0
        return Stop(ThreadId(int(pid, 16), int(tid or "1", 16)), int(packet[1:3], 16), reason, address, text)

    def halt(self) -> ThreadId:
        if self._running:
            self.wire.interrupt()
            until = time.monotonic() + SECONDS
            while self._running and time.monotonic() < until:
                event = self._next()
                if isinstance(event, Stop) and event.signal == Signal.INT:
                    return event.thread
                if event is not None:
                    self._stray = isinstance(event, Stop)
                    self._events.append(event)
        return ThreadId(HOST, 1)

    def stop_at(self, time: int | None) -> None:
        self.wire.command(f"stop-at {'never' if time is None else time}")

    def _select(self, thread: ThreadId) -> None:
        self.wire.ask(b"Hgp%x.%x" % thread)

    def insert(self, kind: BreakpointKind, address: int, length: int, thread: ThreadId) -> None:
        self._select(thread)
        self.wire.ask(b"Z%x,%x,%x" % (kind, address, length))

    def remove(self, kind: BreakpointKind, address: int, length: int, pid: int) -> None:
        self._select(ThreadId(pid, self._attached().get(pid, [1])[0]))
        self.wire.ask(b"z%x,%x,%x" % (kind, address, length))

    def judge(self, address: int, pid: int, conditions: Sequence[str]) -> None:
        """The stub has no such conditions: it stops always."""

    def registers(self, thread: ThreadId) -> Mapping[str, int]:
        found: Mapping[str, int] = self.ask_json(thread, "context regs")["data"]["registers"]
        return found

    def pc(self, thread: ThreadId) -> int | None:
        return linear_pc(self.registers(thread))

    def read(self, thread: ThreadId, address: int, length: int) -> bytes:
        self._select(thread)
        try:
            return _unhex(self.wire.ask(b"m%x,%x" % (address, length)))
        except TargetError:
            return b""

    def restart(self) -> ThreadId:
        self.wire.send(b"vRun;")
        reply = self.wire.receive(SECONDS)
        if reply is None or reply[:1] not in (b"T", b"S"):
            raise TargetError((reply or b"no answer").removeprefix(b"E.").decode("utf-8", "replace"))
        self.ended = ""
        return self._stop(reply, "").thread

    @property
    def now(self) -> int:
        return int(self.ask_json(ThreadId(HOST, 1), "here host")["data"]["time"])
