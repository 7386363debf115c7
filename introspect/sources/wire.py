"""A client of the GDB remote serial protocol: as much as reading the memory and registers of a machine needs.

Everything that comes from the stub is checked and bounded: it may be hostile, or hang.
"""

import re
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

from introspect.sources.memory import SourceError

__all__ = ["Register", "Wire", "WireError"]

SECONDS = 30.0
"""What the stub may take for one answer."""
MAX_REPLY = 1 << 22
IN_ADVANCE = 32
"""Requests that are sent before the first is answered."""
MAX_XML = 1 << 20
MAX_THREADS = 4096
_STOP = re.compile(rb"[TS][0-9a-f]{2}")
_ELEMENT = re.compile(r"<(reg|xi:include)\b([^>]*)>")
_ATTRIBUTE = re.compile(r"([\w:]+)\s*=\s*[\"']([^\"']*)[\"']")


class WireError(SourceError):
    """The stub is gone, or does not answer as the protocol has it."""


@dataclass(frozen=True, slots=True)
class Register:
    """A register in the reply to `g`: where it is, in bytes."""

    name: str
    offset: int
    size: int


class Wire:
    """A connection to a stub. Opening it stops the machine."""

    def __init__(self, where: str) -> None:
        """`where`: "HOST:PORT", "PORT", or the path of a Unix socket ("unix:PATH", or with a slash)."""
        self.where = where
        self._data = bytearray()
        self._acknowledge = True
        self.in_advance = False
        """Whether the stub takes packets before it has answered others: QEMU does."""
        self._socket = _connect(where)
        self._features = self.ask(b"qSupported:xmlRegisters=i386").split(b";")
        size = next((part[11:] for part in self._features if part.startswith(b"PacketSize=")), b"400")
        self.packet_size = min(max(int(size, 16) if re.fullmatch(rb"[0-9A-Fa-f]{1,8}", size) else 0x400, 0x100), 1 << 20)
        if b"QStartNoAckMode+" in self._features and self.ask(b"QStartNoAckMode") == b"OK":
            self._acknowledge = False
        self.stopped = self.ask(b"?")

    def close(self) -> None:
        self._socket.close()

    # Packets

    def ask(self, packet: bytes) -> bytes:
        """Send a packet and give the answer. WireError if there is none."""
        try:
            self._send(packet)
            return self._receive() if packet == b"?" else self._answer()
        except OSError as error:
            raise self._gone(error) from error

    def _gone(self, error: OSError) -> WireError:
        return WireError(f"gdb:{self.where}: the stub does not answer ({error}); start it again, then this")

    def _answer(self) -> bytes:
        """The next packet that is an answer: QEMU tells that it stopped for us when it likes, also behind one."""
        while True:
            reply = self._receive()
            if not _STOP.match(reply):
                return reply

    def _send(self, packet: bytes) -> None:
        self._socket.sendall(b"$%b#%02x" % (packet, sum(packet) & 0xFF))

    def _receive(self) -> bytes:
        """The next packet that is no notification."""
        end = time.monotonic() + SECONDS
        while True:
            start = self._data.find(b"$")
            if start >= 0:
                stop = self._data.find(b"#", start)
                if 0 <= stop <= len(self._data) - 3:
                    packet = bytes(self._data[start + 1 : stop])
                    del self._data[: stop + 3]
                    if self._acknowledge:
                        self._socket.sendall(b"+")
                    return _expand(packet)
            elif len(self._data) > 64:
                del self._data[:]  # acknowledgements and what else is no packet
            if len(self._data) > MAX_REPLY:
                raise OSError("its answer has no end")
            self._socket.settimeout(max(end - time.monotonic(), 0.001))
            part = self._socket.recv(1 << 18)
            if not part:
                raise OSError("it has closed the connection")
            self._data += part

    def monitor(self, line: str) -> str:
        """What the stub's own monitor says; empty where it has none."""
        output = bytearray()
        try:
            self._send(b"qRcmd," + line.encode().hex().encode())
            for _ in range(1 << 16):
                reply = self._receive()
                if reply.startswith(b"O") and reply != b"OK":
                    output += _unhex(reply[1:])
                    if len(output) > MAX_REPLY:
                        raise WireError(f"gdb:{self.where}: `{line}` has no end; start the stub again")
                    continue
                return (output + (b"" if reply == b"OK" or reply.startswith(b"E") else _unhex(reply))).decode("latin1")
        except OSError as error:
            raise self._gone(error) from error
        return ""

    # Memory and registers

    def read(self, address: int, length: int) -> bytes:
        """Up to `length` bytes, as many as fit a packet; none where there is no memory."""
        length = min(length, (self.packet_size - 8) // 2)
        reply = self.ask(b"m%x,%x" % (address, length))
        return _unhex(reply)[:length] if not reply.startswith(b"E") else b""

    def read_span(self, address: int, length: int) -> bytes:
        """The readable beginning of a stretch."""
        step, data = (self.packet_size - 8) // 2, bytearray()
        while len(data) < length:
            at, end = address + len(data), address + length
            sizes = [min(step, end - start) for start in range(at, end, step)][: IN_ADVANCE if self.in_advance else 1]
            replies = self._ask_all([b"m%x,%x" % (at + step * number, size) for number, size in enumerate(sizes)])
            for reply, size in zip(replies, sizes, strict=True):
                part = _unhex(reply)[:size] if not reply.startswith(b"E") else b""
                data += part
                if len(part) < size:
                    return bytes(data)
        return bytes(data)

    def _ask_all(self, packets: list[bytes]) -> list[bytes]:
        """Send them all, then take the answers."""
        if len(packets) == 1:
            return [self.ask(packets[0])]
        try:
            self._socket.sendall(b"".join(b"$%b#%02x" % (packet, sum(packet) & 0xFF) for packet in packets))
            return [self._answer() for _ in packets]
        except OSError as error:
            raise self._gone(error) from error

    def write(self, address: int, data: bytes) -> bool:
        step = (self.packet_size - 32) // 2
        for at in range(0, len(data), step):
            part = data[at : at + step]
            if self.ask(b"M%x,%x:%b" % (address + at, len(part), part.hex().encode())) != b"OK":
                return False
        return True

    def threads(self) -> Iterator[bytes]:
        """Their numbers, as the stub writes them."""
        reply, count = self.ask(b"qfThreadInfo"), 0
        while reply.startswith(b"m") and count < MAX_THREADS:
            for thread in reply[1:].split(b","):
                count += 1
                yield thread
            reply = self.ask(b"qsThreadInfo")

    def registers(self, description: list[Register], thread: bytes) -> dict[str, int]:
        """Those of a thread, without such as it has no value for."""
        if not re.fullmatch(rb"[0-9A-Fa-fp.]+", thread) or self.ask(b"Hg" + thread) != b"OK":
            return {}
        reply = self.ask(b"g")
        if reply.startswith(b"E"):
            return {}
        found = {}
        for register in description:
            digits = reply[2 * register.offset : 2 * (register.offset + register.size)]
            if len(digits) == 2 * register.size and b"x" not in digits:
                found[register.name] = int.from_bytes(_unhex(digits), "little")
        return found

    def description(self) -> list[Register]:
        """The registers of `g` as the stub describes them; none if it does not."""
        if b"qXfer:features:read+" not in self._features:
            return []
        numbered: dict[int, tuple[str, int]] = {}
        number = 0
        for name, attributes in self._elements("target.xml", set()):
            if name != "reg":
                continue
            with suppress(ValueError, KeyError):
                number = int(attributes.get("regnum", number))
                if 0 <= number < 4096:
                    numbered[number] = attributes["name"], int(attributes["bitsize"])
                number += 1
        found, offset = [], 0
        for number in sorted(numbered):
            register, bits = numbered[number]
            if not 8 <= bits <= 1024:
                break
            found.append(Register(register, offset, bits // 8))
            offset += bits // 8
        return found

    def _elements(self, document: str, seen: set[str]) -> Iterator[tuple[str, dict[str, str]]]:
        """reg and xi:include of a document and of those that it includes, in order. Read without an XML parser: no entities."""
        if document in seen or len(seen) > 64:
            return
        seen.add(document)
        for element, text in _ELEMENT.findall(self._transfer(document)):
            attributes = dict(_ATTRIBUTE.findall(text))
            if element == "reg":
                yield element, attributes
            else:
                yield from self._elements(attributes.get("href", document), seen)

    def _transfer(self, document: str) -> str:
        whole = bytearray()
        while len(whole) < MAX_XML:
            reply = self.ask(b"qXfer:features:read:%b:%x,%x" % (document.encode(), len(whole), self.packet_size - 8))
            if not reply.startswith((b"m", b"l")):
                break
            whole += _unescape(reply[1:])
            if reply.startswith(b"l") or len(reply) == 1:
                break
        return whole.decode("latin1")


def _connect(where: str) -> socket.socket:
    try:
        if where.startswith("unix:") or "/" in where:
            made = socket.socket(socket.AF_UNIX)
            made.settimeout(SECONDS)
            made.connect(where.removeprefix("unix:"))
            return made
        host, _, port = where.rpartition(":")
        if not port.isdigit() or not 0 < int(port) < 65536:
            raise SourceError(f"gdb:{where}: no address; write gdb:HOST:PORT, gdb:PORT or gdb:unix:PATH")
        return socket.create_connection((host.strip("[]") or "localhost", int(port)), SECONDS)
    except OSError as error:
        raise SourceError(f"gdb:{where}: {error.strerror or error}; start the stub first, as with `qemu -s`") from error


def _unhex(digits: bytes) -> bytes:
    try:
        return bytes.fromhex(digits.decode("ascii"))
    except ValueError:
        return b""


def _unescape(data: bytes) -> bytes:
    return re.sub(rb"\}(.)", lambda found: bytes((found[1][0] ^ 0x20,)), data, flags=re.DOTALL)


def _expand(packet: bytes) -> bytes:
    """Undo run-length encoding: `*` and a count repeat the character before."""
    if b"*" not in packet:
        return packet
    whole = bytearray()
    parts = packet.split(b"*")
    whole += parts[0]
    for part in parts[1:]:
        if part and whole:
            whole += whole[-1:] * max(part[0] - 29, 0)
        whole += part[1:]
        if len(whole) > MAX_REPLY:
            raise OSError("its answer has no end")
    return bytes(whole)
