"""Files of captured frames in the classic pcap format (pcap-savefile), whose time is guest time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from struct import Struct
from typing import BinaryIO, NamedTuple

from vmdbg.platform.clock import TICKS_PER_SECOND

_FILE, _FRAME = "IHHiIII", "IIII"
MICROSECONDS, NANOSECONDS = 0xA1B2C3D4, 0xA1B23C4D
ETHERNET = 1
MOST = 1 << 16
"""Bytes of a frame."""
NANO = 1_000_000_000


class PcapError(Exception):
    """A file that cannot be used, with what to do instead."""


class Frame(NamedTuple):
    """A frame, and the tick it was seen at."""

    tick: int
    data: bytes


class PcapWriter:
    """Writes frames with nanoseconds of guest time."""

    def __init__(self, path: str) -> None:
        try:
            self._file: BinaryIO = open(path, "wb", buffering=0)  # noqa: SIM115 - closed by close()
        except (OSError, ValueError) as error:
            raise PcapError(f"{path}: {error}; name a file that can be written") from None
        self._file.write(Struct("<" + _FILE).pack(NANOSECONDS, 2, 4, 0, 0, MOST, ETHERNET))

    def write(self, tick: int, data: bytes) -> None:
        nanoseconds = tick * NANO // TICKS_PER_SECOND
        seen = data[:MOST]
        head = Struct("<" + _FRAME).pack(nanoseconds // NANO & 0xFFFFFFFF, nanoseconds % NANO, len(seen), len(data))
        self._file.write(head + seen)

    def close(self) -> None:
        self._file.close()


def read_pcap(path: str) -> Iterator[Frame]:
    """The frames of a file, their times counted from the first.  Raises `PcapError`; a broken last frame is left out."""
    try:
        data = Path(path).read_bytes()
    except (OSError, ValueError) as error:
        raise PcapError(f"{path}: {error}; name a pcap file") from None
    for order in "<>":
        head = Struct(order + _FILE)
        if len(data) >= head.size and head.unpack_from(data)[0] in (MICROSECONDS, NANOSECONDS):
            break
    else:
        raise PcapError(f"{path} is no pcap file: it begins with neither {MICROSECONDS:#x} nor {NANOSECONDS:#x}; "
                        "convert a pcapng file with editcap -F pcap")  # fmt: skip
    values = head.unpack_from(data)
    if values[6] != ETHERNET:
        raise PcapError(f"{path} holds frames of link type {values[6]}, not Ethernet's 1; capture at another interface")
    unit = 1 if values[0] == NANOSECONDS else 1000
    entry, at, first = Struct(order + _FRAME), head.size, None
    while at + entry.size <= len(data):
        seconds, fraction, length, _ = entry.unpack_from(data, at)
        at += entry.size
        if length > MOST or at + length > len(data):
            return
        nanoseconds = seconds * NANO + fraction * unit
        first = nanoseconds if first is None else first
        yield Frame(max(nanoseconds - first, 0) * TICKS_PER_SECOND // NANO, data[at : at + length])
        at += length
