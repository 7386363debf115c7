"""Framing of the GDB remote serial protocol: packets, checksums, escapes, run-lengths (GDB manual, appendix E.1)."""

import enum
from zlib import adler32

__all__ = ["PACKET_SIZE", "Parser", "Token", "checksum", "escape", "expand_runs", "frame", "notification", "unescape"]

_HASH, _DOLLAR, _PLUS, _MINUS, _ETX, _BRACE, _STAR = b"#$+-\x03}*"

# The longest packet, in bytes between '$' and '#', in either direction.
PACKET_SIZE = 0x20000

# The largest piece whose byte sum is below adler32's modulus: 256 * 255 < 65521.
_PIECE = 256

_UNESCAPED = [bytes((byte ^ 0x20,)) for byte in range(256)]


class Token(enum.Enum):
    """What a parser yields besides packets."""

    ACK = "+"
    NAK = "-"
    INTERRUPT = "\x03"
    CORRUPT = "a packet whose checksum is wrong"
    OVERSIZED = "a packet longer than the limit"


def checksum(payload: bytes) -> int:
    """The sum of the bytes modulo 256; adler32 seeded with 0 sums at the speed of C, piece by piece."""
    if len(payload) <= _PIECE:
        return adler32(payload, 0) & 0xFF if len(payload) == _PIECE else sum(payload) & 0xFF
    view = memoryview(payload)
    return sum([adler32(view[i : i + _PIECE], 0) & 0xFFFF for i in range(0, len(view), _PIECE)]) & 0xFF


def frame(payload: bytes) -> bytes:
    """A packet ready to send. The payload must be escaped where it is binary."""
    return b"$%b#%02x" % (payload, checksum(payload))


def notification(payload: bytes) -> bytes:
    """A packet that answers none, and is not acknowledged."""
    return b"%%%b#%02x" % (payload, checksum(payload))


def escape(data: bytes) -> bytes:
    """Binary data as it may stand in a packet."""
    return data.replace(b"}", b"}]").replace(b"#", b"}\x03").replace(b"$", b"}\x04").replace(b"*", b"}\n")


def unescape(data: bytes) -> bytes:
    """Undo `escape`; any byte may be escaped. An escape with nothing behind it is dropped."""
    first, *rest = data.split(b"}")
    out, pieces = [first], iter(rest)
    for piece in pieces:
        if piece:
            out.append(_UNESCAPED[piece[0]] + piece[1:])
        else:  # the escaped byte is the brace behind which the next piece stands
            following = next(pieces, None)
            out.append(b"" if following is None else b"]" + following)
    return b"".join(out)


def expand_runs(data: bytes) -> bytes:
    """Undo escapes and run-lengths: what a client does to a reply (requests never hold runs).

    This stub sends none itself: over loopback, finding the runs costs more than sending them.
    Raises ValueError for a run with nothing to repeat or without a count.
    """
    out, i = bytearray(), 0
    while i < len(data):
        byte = data[i]
        if byte in (_BRACE, _STAR):
            if i + 1 == len(data) or (byte == _STAR and (not out or data[i + 1] < 29)):
                raise ValueError(f"a dangling {chr(byte)!r} at offset {i} of a reply")
            out += bytes((data[i + 1] ^ 0x20,)) if byte == _BRACE else out[-1:] * (data[i + 1] - 29)
            i += 1
        else:
            out.append(byte)
        i += 1
    return bytes(out)


class Parser:
    """Cuts a byte stream into packets; takes any split, and pulls, so that a caller may pause between packets.

    `limit` is the longest payload accepted, in bytes on the wire. `verify` is cleared in no-ack mode, where a
    checksum could only be ignored (GDB does the same).
    """

    __slots__ = ("_buffer", "_discarding", "_limit", "_position", "_scanned", "verify")

    def __init__(self, limit: int) -> None:
        self.verify = True
        self._limit = limit
        self._buffer: bytes | bytearray = b""
        self._position = 0
        self._scanned = 0  # up to here an unfinished packet holds no '#'
        self._discarding = False

    def feed(self, data: bytes) -> None:
        """Add input."""
        if self._position == len(self._buffer):
            self._buffer = data  # the usual case: no copy
            self._scanned = 0
        else:
            if not isinstance(self._buffer, bytearray):
                self._buffer = bytearray(self._buffer)
            del self._buffer[: self._position]
            self._scanned = max(0, self._scanned - self._position)
            self._buffer += data
        self._position = 0

    def next(self) -> bytes | Token | None:
        """The next unescaped payload or token; None when more input is needed."""
        buffer, position = self._buffer, self._position
        if self._discarding:
            found = buffer.find(b"#", position)
            self._discarding = found < 0
            position = len(buffer) if found < 0 else found + 1
        while position < len(buffer):
            byte = buffer[position]
            if byte == _DOLLAR:
                return self._packet(position)
            position += 1
            if byte in (_PLUS, _MINUS, _ETX):
                self._position = position
                return Token.ACK if byte == _PLUS else Token.NAK if byte == _MINUS else Token.INTERRUPT
        self._position = position
        return None

    def _packet(self, start: int) -> bytes | Token | None:
        buffer = self._buffer
        end = buffer.find(b"#", max(start, self._scanned))
        if end < 0 or end + 2 >= len(buffer):
            self._position = start
            self._scanned = len(buffer) if end < 0 else end
            if self._scanned - start - 1 <= self._limit:
                return None
            self._discarding = True
            self._position = self._scanned
            return Token.OVERSIZED
        # '$' never stands inside a packet: what precedes the last one is a packet that was cut short.
        start = buffer.rfind(b"$", start, end)
        self._position = end + 3
        if end - start - 1 > self._limit:
            return Token.OVERSIZED
        payload = bytes(buffer[start + 1 : end])
        if self.verify and b"%02x" % checksum(payload) != bytes(buffer[end + 1 : end + 3]).lower():
            return Token.CORRUPT
        return unescape(payload) if _BRACE in payload else payload
