"""What every client has: bytes in, taken apart into packets and acknowledged; replies, console output and errors out."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from binascii import hexlify
from collections.abc import Callable

from gdbstub.packet import PACKET_SIZE, Parser, Token, frame
from gdbstub.target import TargetError

__all__ = ["Channel"]

log = logging.getLogger(__name__)

# Console output goes in pieces that every client's buffer holds.
_OUTPUT_PIECE = 1024
_PLAIN = {ord(c): "_" for c in "$#}*"}


class Channel(ABC):
    """The protocol's connection without its transport: bytes in through `receive`, bytes out through `write`.

    What packets mean is for the class below it.
    """

    def __init__(self, write: Callable[[bytes], object]) -> None:
        self.acknowledge = True
        # What the client announced.
        self.features: frozenset[bytes] = frozenset()
        self.error_strings = False
        # Packets that have come wait.
        self.paused = False
        self._write = write
        self._parser = Parser(PACKET_SIZE)
        self._last = b""
        # What goes out with the next packet, as the acknowledgement of the request at work: two pieces cost twice as much.
        self._due = b""
        self._closed = False

    @abstractmethod
    def dispatch(self, packet: bytes) -> bytes | None:
        """Carry out a packet; the reply, b"" for "not supported", None for no reply (yet)."""

    @abstractmethod
    def interrupt(self) -> None:
        """^C."""

    @abstractmethod
    def settle(self) -> None:
        """Behind each packet and ^C."""

    # -- input

    def receive(self, data: bytes) -> None:
        """Take bytes from the client, and answer at once."""
        self._parser.feed(data)
        self.drain()

    def drain(self) -> None:
        """Answer what has been received, until `paused` or a packet is incomplete."""
        parser = self._parser
        while not self.paused and not self._closed:
            item = parser.next()
            if item is None:
                return
            if isinstance(item, bytes):
                self._due = b"+" if self.acknowledge else b""
                reply = self._answer(item)
                if reply is not None:
                    self.send(reply)
                elif self._due:
                    self._write(self._due)
                    self._due = b""
                self.settle()
            elif item is Token.INTERRUPT:
                self.interrupt()
                self.settle()
            elif item is Token.NAK and self.acknowledge and self._last:
                self._write(self._last)
            elif item is Token.CORRUPT:
                log.warning("a packet with a wrong checksum: asking for it again")
                self._write(b"-")
            elif item is Token.OVERSIZED:
                log.warning("a packet of more than %#x bytes: dropped", PACKET_SIZE)
                if self.acknowledge:
                    self._write(b"+")
                self.send(self.error(f"the packet is longer than {PACKET_SIZE:#x} bytes: heed PacketSize"))

    def _answer(self, packet: bytes) -> bytes | None:
        try:
            return self.dispatch(packet)
        except TargetError as error:
            return self.error(str(error))
        except Exception as error:  # a fault of the target must not take the client's session with it
            log.exception("the packet %r failed", packet[:80])
            return self.error(f"internal error, see the log: {error!r}")

    def stop_acknowledging(self) -> None:
        """QStartNoAckMode has been answered."""
        self.acknowledge = self._parser.verify = False
        self._last = b""

    # -- output

    def send(self, payload: bytes) -> None:
        """Send a reply; binary parts must be escaped."""
        data = frame(payload)
        if self.acknowledge:
            self._last = data
        if self._due:
            data, self._due = self._due + data, b""
        self._write(data)

    def send_plain(self, data: bytes) -> None:
        """Send a notification, which is not acknowledged."""
        self._write(data)

    def output(self, text: str, *, along: bool = False) -> None:
        """Show text on the client's console. Only while it awaits a stop reply or the end of a monitor command.

        `along`: it leaves in one piece with the packet that comes next, so that a client need not wonder how long it takes.
        """
        data = text.encode()
        for start in range(0, len(data), _OUTPUT_PIECE):
            packet = b"O" + hexlify(data[start : start + _OUTPUT_PIECE])
            if along:
                self._due += frame(packet)
            else:
                self.send(packet)

    def error(self, message: str) -> bytes:
        """An error reply in the richest form the client takes."""
        log.debug("error reply: %s", message)
        if b"error-message+" in self.features:
            # The text goes in as it is: leave nothing that frames or runs.
            return b"E." + message.translate(_PLAIN).encode("ascii", "replace")[:512]
        return b"E01;" + hexlify(message.encode()) if self.error_strings else b"E01"
