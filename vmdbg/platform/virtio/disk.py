"""Disk images: raw files, qcow2 through dissect.hypervisor, and the overlay that keeps a guest's writes off them."""

from __future__ import annotations

import hashlib
import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, Protocol

SECTOR = 512
BLOCK = 4096
"""Of the overlay."""
STEP = 1 << 20
"""Bytes that are hashed in a piece."""
QCOW2_MAGIC = b"QFI\xfb"


class DiskError(Exception):
    """An image that cannot be used, with what to do instead."""


class Disk(Protocol):
    """What holds the sectors; `size` in bytes.  OSError where the file fails."""

    @property
    def size(self) -> int: ...

    def read(self, offset: int, length: int) -> bytes: ...

    def write(self, offset: int, data: bytes) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


class RawFile:
    """The bytes of a file.  What a last, broken sector lacks reads as zeros."""

    def __init__(self, path: str, *, writable: bool) -> None:
        self._file = os.open(path, os.O_RDWR if writable else os.O_RDONLY)
        status = os.fstat(self._file)
        if not stat.S_ISREG(status.st_mode) and not stat.S_ISBLK(status.st_mode):
            os.close(self._file)
            raise DiskError(f"{path} is neither a file nor a block device; name a disk image")
        self.size = -(-os.lseek(self._file, 0, os.SEEK_END) // SECTOR) * SECTOR

    def read(self, offset: int, length: int) -> bytes:
        return os.pread(self._file, length, offset).ljust(length, b"\0")

    def write(self, offset: int, data: bytes) -> None:
        while data:
            done = os.pwrite(self._file, data, offset)
            data, offset = data[done:], offset + done

    def flush(self) -> None:
        os.fsync(self._file)

    def close(self) -> None:
        with suppress(OSError):
            os.close(self._file)


class Qcow2File:
    """A qcow2 image that stands alone; it is only read."""

    def __init__(self, path: str) -> None:
        try:
            from dissect.hypervisor.disk.qcow2 import QCow2
        except ImportError:
            raise DiskError(
                f"{path} is a qcow2 image, and reading one needs dissect.hypervisor: pip install 'vmdbg[qcow2]', or convert it: "
                "qemu-img convert -O raw"
            ) from None
        self._file: BinaryIO = open(path, "rb")  # noqa: SIM115 - closed by close()
        try:
            # Given a file and not its path, the library opens no other file that the image names.
            image = QCow2(self._file, allow_no_data_file=True, allow_no_backing_file=True)
            if image.needs_data_file or image.auto_backing_file is not None:
                raise DiskError(f"{path} needs another file, {image.auto_backing_file or 'of data'}; qemu-img convert -O raw "
                                "makes one of both")  # fmt: skip
            self._stream: Any = image.open()
            self.size = int(image.size) // SECTOR * SECTOR
            self.read(0, min(SECTOR, self.size))
        except DiskError:
            self._file.close()
            raise
        except Exception as error:  # the file may be anything, and the library says so in many ways
            self._file.close()
            raise DiskError(f"{path} is no qcow2 image that can be read: {error}; qemu-img check says more") from None

    def read(self, offset: int, length: int) -> bytes:
        try:
            self._stream.seek(offset)
            data: bytes = self._stream.read(length)
        except Exception as error:  # as above
            raise OSError(f"qcow2: {error}") from None
        return data.ljust(length, b"\0")

    def write(self, offset: int, data: bytes) -> None:
        raise OSError("a qcow2 image is only read")

    def flush(self) -> None:
        """Nothing is ever written."""

    def close(self) -> None:
        self._file.close()


class Overlay:
    """Keeps what is written in memory, and reads the rest from the disk below."""

    def __init__(self, below: Disk) -> None:
        self.below = below
        self.size = below.size
        self._blocks: dict[int, bytearray] = {}

    def read(self, offset: int, length: int) -> bytes:
        data = bytearray()
        while length:
            number, skip = divmod(offset, BLOCK)
            piece = min(length, BLOCK - skip)
            block = self._blocks.get(number)
            if block is not None:
                data += block[skip : skip + piece]
            else:
                while piece < length and (offset + piece) // BLOCK not in self._blocks:
                    piece = min(piece + BLOCK, length)
                data += self.below.read(offset, piece)
            offset, length = offset + piece, length - piece
        return bytes(data)

    def write(self, offset: int, data: bytes) -> None:
        while data:
            number, skip = divmod(offset, BLOCK)
            piece = data[: BLOCK - skip]
            block = self._blocks.get(number)
            if block is None:
                first = number * BLOCK
                old = self.below.read(first, min(BLOCK, self.size - first))
                block = self._blocks[number] = bytearray(old.ljust(BLOCK, b"\0"))
            block[skip : skip + len(piece)] = piece
            data, offset = data[len(piece) :], offset + len(piece)

    def flush(self) -> None:
        """Memory has no cache."""

    def close(self) -> None:
        self.below.close()


def open_disk(path: str, *, write: bool = False) -> Disk:
    """The image in a file, raw or qcow2 by its first bytes.  Without `write` the file stays as it is.  Raises `DiskError`."""
    try:
        with Path(path).open("rb") as file:
            qcow2 = file.read(4) == QCOW2_MAGIC
        if qcow2 and write:
            raise DiskError(f"{path} is a qcow2 image, which is only read; leave write=on out, or qemu-img convert -O raw")
        found: Disk = Qcow2File(path) if qcow2 else RawFile(path, writable=write)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise DiskError(f"{path}: {reason}; name a disk image that can be {'written' if write else 'read'}") from None
    if not found.size:
        found.close()
        raise DiskError(f"{path} is empty; give the image a size: truncate -s 64M")
    return found if write else Overlay(found)


def contents(disk: Disk) -> str:
    """A hash of what a disk held when the machine began, as far as that can still be read: whatever the file's format is."""
    below = disk.below if isinstance(disk, Overlay) else disk
    whole = hashlib.sha256(str(below.size).encode())
    for offset in range(0, below.size, STEP):
        data = below.read(offset, min(STEP, below.size - offset))
        if data.count(0) != len(data):
            whole.update(offset.to_bytes(8, "little") + data)
    return whole.hexdigest()
