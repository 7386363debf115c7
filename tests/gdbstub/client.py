"""A client without a socket: what it sends is answered when `send` returns."""

from gdbstub.example import Example
from gdbstub.packet import expand_runs, frame
from gdbstub.session import Session

GDB = b"qSupported:multiprocess+;swbreak+;hwbreak+;fork-events+;exec-events+;error-message+;xmlRegisters=i386"


class Client:
    """Talks to `target` in no-ack mode after `hello`, the qSupported packet."""

    def __init__(self, target: Example | None = None, hello: bytes = GDB, attach: int | None = None) -> None:
        self.target = target or Example()
        self.wire = bytearray()
        self.session = Session(self.target, self.wire.extend, attach)
        self.session.receive(frame(hello) + frame(b"QStartNoAckMode") + b"+")
        self.take()

    def take(self) -> list[bytes]:
        """The packets received, decoded."""
        data, packets = bytes(self.wire), []
        self.wire.clear()
        while (start := data.find(b"$")) >= 0:
            end = data.index(b"#", start)
            packets.append(expand_runs(data[start + 1 : end]))
            data = data[end + 3 :]
        return packets

    def send(self, *payloads: bytes) -> list[bytes]:
        """Send packets in one piece; the replies."""
        self.session.receive(b"".join(frame(payload) for payload in payloads))
        return self.take()

    def ask(self, payload: bytes) -> bytes:
        """The one reply to a packet."""
        (reply,) = self.send(payload)
        return reply

    def wait(self, slices: int = 1000) -> list[bytes]:
        """Run until the machine stops; the packets received."""
        for _ in range(slices):
            if not self.session.running:
                return self.take()
            self.session.slice()
        raise AssertionError("the machine did not stop")
