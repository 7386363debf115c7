# SPDX-License-Identifier: GPL-2.0-or-later
"""The frame of a snapshot file: sections, each with its length and a digest, so that nothing of a broken file is believed.

    8 bytes   "vmdbg\\r\\n\\x1a"
    sections: tag (4 bytes), length (8, little-endian), digest (16: BLAKE2b of tag, length and contents), contents
    the last is "END ", whose contents is the count of those before (8 bytes); nothing follows it
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from hashlib import blake2b
from typing import BinaryIO

from .tree import SnapshotError

MAGIC = b"vmdbg\r\n\x1a"
_FRAME = struct.Struct("<4sQ16s")
_COUNT = struct.Struct("<Q")
END = b"END "
MOST = 64 << 20
"""Bytes of a section, packed or not."""
LEVEL = 1
"""Of zlib: memory is written as fast as it is packed."""


def _digest(tag: bytes, data: bytes) -> bytes:
    return blake2b(tag + _COUNT.pack(len(data)) + data, digest_size=16).digest()


class Writer:
    """Sections, one behind the other."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._count = file, 0
        file.write(MAGIC)

    def write(self, tag: bytes, data: bytes) -> None:
        """Packed."""
        self._write(tag, zlib.compress(data, LEVEL))

    def _write(self, tag: bytes, data: bytes) -> None:
        self._file.write(_FRAME.pack(tag, len(data), _digest(tag, data)) + data)
        self._count += 1

    def end(self) -> None:
        self._write(END, _COUNT.pack(self._count))


class Reader:
    """Sections of a file, each checked before it is given out.  `SnapshotError` for whatever is not as it was written."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._file, self._name, self._count = file, name, 0
        magic = file.read(len(MAGIC))
        if magic != MAGIC:
            short = MAGIC.startswith(magic) and len(magic) < len(MAGIC)
            what = f"is cut off after {len(magic)} bytes" if short else "is no snapshot: it begins with other bytes than one"
            raise SnapshotError(f"{name} {what}. Name a file that vmdbg has saved")

    def read(self, tag: bytes) -> bytes:
        """The contents of the next section, which must have this tag."""
        found = self.next()
        if found is None or found[0] != tag:
            raise self.broken(f"section {tag.decode()} is not where it must be")
        return found[1]

    def rest(self) -> Iterator[tuple[bytes, bytes]]:
        """(tag, contents) of all sections that follow."""
        while (found := self.next()) is not None:
            yield found

    def next(self) -> tuple[bytes, bytes] | None:
        """(tag, contents); None at the end."""
        at = self._file.tell()
        head = self._file.read(_FRAME.size)
        if len(head) < _FRAME.size:
            raise self._cut(at, "the head of a section")
        tag, length, digest = _FRAME.unpack(head)
        word = tag.decode("ascii", "replace").strip()
        if length > MOST:
            raise self.broken(f"a section of {length:#x} bytes at byte {at:#x}, which no snapshot has")
        data = self._file.read(length)
        if len(data) < length:
            raise self._cut(at, f"section {word!r}, which has {length} bytes")
        if _digest(tag, data) != digest:
            raise self.broken(f"section {word!r} at byte {at:#x} has another digest than it was written with")
        if tag == END:
            if data != _COUNT.pack(self._count) or self._file.read(1):
                raise self.broken("sections are missing, or something follows the end")
            return None
        self._count += 1
        return tag, self._unpack(data, word)

    def _unpack(self, data: bytes, word: str) -> bytes:
        unpacker = zlib.decompressobj()
        try:
            found = unpacker.decompress(data, MOST)
        except zlib.error as error:
            raise self.broken(f"section {word!r} cannot be unpacked: {error}") from None
        if not unpacker.eof or unpacker.unused_data:
            raise self.broken(f"section {word!r} is longer than the {MOST} bytes that one may have")
        return found

    def _cut(self, at: int, what: str) -> SnapshotError:
        return SnapshotError(f"{self._name} is cut off: it ends within {what}, at byte {at:#x}. Save it again, or copy it whole")

    def broken(self, what: str) -> SnapshotError:
        """The error for a file that says what none can."""
        return SnapshotError(f"{self._name} is broken: {what}. Save it again, or copy it whole")
