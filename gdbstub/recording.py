"""What client and stub said, as a text file: to read, and to say again in a test.

A line is what one side sent in one piece: `->` to the stub, `<-` from it, `--` where a client connected. Bytes that do not
print stand as Python writes them in a string. There are no times: a repeatable session makes the same file again.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, TextIO

from gdbstub.session import Point, Session
from gdbstub.target import Target

__all__ = ["RecordedSession", "Recorder", "Said", "read"]

_CONNECTED = "-- a client connected\n"


class Said(NamedTuple):
    """A line: whether it went to the stub, and the bytes."""

    to_stub: bool
    data: bytes


class Recorder:
    """Writes to a text file, line by line."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def connected(self) -> None:
        """A client came."""
        self._file.write(_CONNECTED)

    def received(self, data: bytes) -> None:
        """A client sent this."""
        self._line("->", data)

    def sending(self, write: Callable[[bytes], object]) -> Callable[[bytes], object]:
        """`write`, recorded."""

        def recorded(data: bytes) -> None:
            self._line("<-", data)
            write(data)

        return recorded

    def _line(self, arrow: str, data: bytes) -> None:
        if data:
            self._file.write(f"{arrow} {data.decode('latin-1').encode('unicode_escape').decode('ascii')}\n")
            self._file.flush()  # a machine that is killed leaves all that was said


class RecordedSession(Session):
    """A session that writes down what it hears and says."""

    def __init__(
        self, recorder: Recorder, target: Target, write: Callable[[bytes], object], attach: int | None, kept: Iterable[Point]
    ) -> None:
        self._recorder = recorder
        recorder.connected()
        super().__init__(target, recorder.sending(write), attach, kept)

    def receive(self, data: bytes) -> None:
        self._recorder.received(data)
        super().receive(data)


def read(text: str) -> Iterator[list[Said]]:
    """The connections in a recording, each a list of what was said. ValueError for a line that is none."""
    connection: list[Said] = []
    for number, line in enumerate(text.splitlines(), 1):
        arrow, _, rest = line.partition(" ")
        if arrow == "--":
            if connection:
                yield connection
            connection = []
        elif arrow in ("->", "<-"):
            connection.append(Said(arrow == "->", rest.encode("ascii").decode("unicode_escape").encode("latin-1")))
        elif line and not line.startswith("#"):
            raise ValueError(f"line {number} is no part of a recording: {line[:40]!r}")
    if connection:
        yield connection
