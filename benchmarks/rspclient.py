"""A client of GDB's remote serial protocol as thin as can be, so that what is measured is the stub."""

from __future__ import annotations

import socket

from gdbstub.packet import escape, expand_runs, frame

from .measure import PATIENCE, BenchmarkError

_HELLO = (
    b"qSupported:multiprocess+;swbreak+;hwbreak+;qRelocInsn+;fork-events+;vfork-events+;exec-events+;vContSupported+;"
    b"QThreadEvents+;no-resumed+;xmlRegisters=i386;error-message+;binary-upload+"
)
"""What gdb 18 says; without fork events no stub stops for them here."""
_OVERHEAD = 64
"""Bytes of a packet that carries data besides the data, at most."""


class Client:
    """A connection with acknowledgements switched off where the stub can, and one thread of the first process in mind."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), PATIENCE)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._buffer = b""
        self._acknowledges = True
        said = self.ask(_HELLO).decode("latin-1").split(";")
        self.features = {word.rstrip("+-").partition("=")[0]: word.partition("=")[2] or word[-1] for word in said if word}
        self.packet_size = int(self.features.get("PacketSize", "400"), 16)

    def begin(self) -> None:
        """What gdb does next: no more acknowledgements, the registers' description, which thread there is."""
        if self.offers("QStartNoAckMode"):
            self.ask(b"QStartNoAckMode")
            self.socket.sendall(b"+")
            self._acknowledges = False
        self.ask(b"?")
        self.ask(b"qXfer:features:read:target.xml:0,ffb")
        self.actions = self.ask(b"vCont?").split(b";")
        thread = self.ask(b"qC")[2:]
        self.ask(b"Hg" + thread)
        self.step = b"vCont;s:" + thread
        self.thread = thread

    def offers(self, feature: str) -> bool:
        return self.features.get(feature) == "+"

    @property
    def most_in_hex(self) -> int:
        """Bytes of memory that fit a packet as hex digits."""
        return (self.packet_size - _OVERHEAD) // 2

    @property
    def most_binary(self) -> int:
        """The same as binary data, some of it escaped."""
        return (self.packet_size - _OVERHEAD) * 15 // 16

    def send(self, payload: bytes) -> None:
        self.socket.sendall(frame(payload))

    def read(self) -> bytes:
        """The next packet."""
        buffer = self._buffer
        while True:
            end = buffer.find(b"#")
            if end >= 0 and len(buffer) >= end + 3:
                break
            more = self.socket.recv(1 << 18)
            if not more:
                raise BenchmarkError("the stub closed the connection")
            buffer += more
        self._buffer = buffer[end + 3 :]
        if self._acknowledges:
            self.socket.sendall(b"+")
        return buffer[buffer.find(b"$", 0, end) + 1 : end]

    def ask(self, payload: bytes) -> bytes:
        self.socket.sendall(frame(payload))
        return self.read()

    def demand(self, payload: bytes) -> None:
        """A packet that must be answered with OK."""
        reply = self.ask(payload)
        if reply != b"OK":
            raise BenchmarkError(f"{payload[:60]!r} was answered with {reply[:60]!r}, not OK")

    def stop(self) -> bytes:
        """The next stop reply."""
        while True:
            reply = self.read()
            if reply[:1] in b"TS" and reply:
                return reply
            if reply[:1] != b"O":
                raise BenchmarkError(f"{reply[:60]!r} is no stop reply")

    def resume(self, payload: bytes = b"vCont;c") -> bytes:
        """Resume until the next stop."""
        self.socket.sendall(frame(payload))
        return self.stop()

    def interrupt(self) -> bytes:
        self.socket.sendall(b"\x03")
        return self.stop()

    def register(self, number: int) -> int:
        """A 64-bit register out of `g`, where the first ones stand in order."""
        block = expand_runs(self.ask(b"g"))
        return int.from_bytes(bytes.fromhex(block[16 * number : 16 * number + 16].decode()), "little")

    def write_binary(self, address: int, data: bytes) -> bytes:
        """The packet."""
        return b"X%x,%x:%b" % (address, len(data), escape(data))

    def close(self) -> None:
        self.socket.close()
