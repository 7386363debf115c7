"""Recorded connections, said again to a session of today; how much of its replies must be as they were."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from gdbstub.example import Example
from gdbstub.packet import expand_runs
from gdbstub.recording import Said, read
from gdbstub.session import Session

FOLDER = Path(__file__).parent / "recorded"
NAMES = sorted(path.stem for path in FOLDER.glob("*.txt"))
_MOST_SLICES = 2000
_PACKET = re.compile(rb"\$([^#]*)#|(%[^#]*)#", re.DOTALL)


def connections(name: str) -> list[list[Said]]:
    """The connections of one recording."""
    return list(read((FOLDER / f"{name}.txt").read_text(encoding="ascii")))


def packets(data: bytes) -> list[bytes]:
    """The payloads in a stream of replies, as on the wire but for run-lengths; notifications, too, with their %."""
    return [found[1] if found[1] is not None else found[2] for found in _PACKET.finditer(data)]


def exchanges(said: Sequence[Said]) -> Iterator[tuple[bytes, bytes]]:
    """What went to the stub without a pause, and what came back until the next."""
    to_stub, back = b"", b""
    for line in said:
        if line.to_stub:
            if back:
                yield to_stub, back
                to_stub = back = b""
            to_stub += line.data
        else:
            back += line.data
    yield to_stub, back


def replay(said: Sequence[Said], target: Example) -> Iterator[tuple[bytes, list[bytes], list[bytes]]]:
    """Each request, the replies it had, and those it has now."""
    wire = bytearray()
    session = Session(target, wire.extend)
    for request, back in exchanges(said):
        expected = packets(back)
        session.receive(request)
        for _ in range(_MOST_SLICES):
            if not session.running or len(packets(bytes(wire))) >= len(expected):
                break
            session.slice()
        yield request, expected, packets(bytes(wire))
        wire.clear()
    session.close()


def alike(request: bytes, before: bytes, now: bytes) -> bool:
    """Whether a reply still says what it said.  It may say more, and refuse in other words."""
    if not before:
        return True  # not known then
    if before[:1] == b"E":
        return now[:1] == b"E"
    if before[:1] == b"O" and before != b"OK":
        return now[:1] == b"O"
    for start, separator in ((b"$qSupported", b";"), (b"$vCont?", b";")):
        if request.lstrip(b"+").startswith(start):
            return set(before.split(separator)) <= set(now.split(separator))
    for start in (b"T", b"%Stop:T"):
        if before.startswith(start):
            at = len(start) + 2
            return before[:at] == now[:at] and set(before[at:].split(b";")) <= set(now[at:].split(b";"))
    return expand_runs(before) == expand_runs(now)
