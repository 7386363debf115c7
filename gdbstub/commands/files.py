"""vFile: the files a target offers, read-only, so that GDB fetches symbols through the stub."""

from __future__ import annotations

import struct
from binascii import Error, unhexlify
from collections.abc import Callable
from typing import TYPE_CHECKING

from gdbstub.commands.registry import address_length, command, number
from gdbstub.packet import PACKET_SIZE, escape
from gdbstub.target import Files, offers

if TYPE_CHECKING:
    from gdbstub.session import Session

# Numbers of the File-I/O extension (GDB manual, appendix E.13.8.3), not the system's.
_ENOENT, _EBADF, _EACCES, _EINVAL, _EMFILE = 2, 9, 13, 22, 24
_ACCESS_MODE = 3  # O_RDONLY is 0
_MOST_OPEN = 64


_Operation = Callable[["Session", Files, bytes], bytes]
_OPERATIONS: dict[bytes, _Operation] = {}


def _operation(name: str) -> Callable[[_Operation], _Operation]:
    def register(handler: _Operation) -> _Operation:
        _OPERATIONS[name.encode()] = handler
        return handler

    return register


@command("vFile")
def file(session: Session, arguments: bytes) -> bytes:
    name, _, rest = arguments.partition(b":")
    operation = _OPERATIONS.get(name)
    return operation(session, session.target, rest) if operation and offers(session.target, Files) else b""


def _fail(errno: int) -> bytes:
    return b"F-1,%x" % errno


def _name(digits: bytes) -> str | None:
    try:
        return unhexlify(digits).decode()
    except (Error, UnicodeDecodeError):
        return None


@_operation("setfs")
def set_file_system(session: Session, target: Files, arguments: bytes) -> bytes:
    return b"F0"


@_operation("open")
def open_(session: Session, target: Files, arguments: bytes) -> bytes:
    digits, _, rest = arguments.partition(b",")
    flags, _mode = address_length(rest)
    name = _name(digits)
    if name is None:
        return _fail(_EINVAL)
    if flags & _ACCESS_MODE:
        return _fail(_EACCES)
    if len(session.files) >= _MOST_OPEN:
        return _fail(_EMFILE)
    data = target.read_file(name)
    if data is None:
        return _fail(_ENOENT)
    descriptor = next(n for n in range(3, _MOST_OPEN + 4) if n not in session.files)
    session.files[descriptor] = data
    return b"F%x" % descriptor


@_operation("pread")
def pread(session: Session, target: Files, arguments: bytes) -> bytes:
    descriptor, _, rest = arguments.partition(b",")
    count, offset = address_length(rest)
    data = session.files.get(number(descriptor))
    if data is None:
        return _fail(_EBADF)
    piece = data[offset : offset + min(count, PACKET_SIZE // 2 - 32)]
    return b"F%x;%b" % (len(piece), escape(piece))


def _status(data: bytes) -> bytes:
    # struct stat of the File-I/O protocol, big endian: a regular file of mode 0400.
    head, sizes, times = (0, 0, 0o100400, 1, 0, 0, 0), (len(data), 4096, -(-len(data) // 512)), (0, 0, 0)
    packed = struct.pack(">7I3Q3I", *head, *sizes, *times)
    return b"F%x;%b" % (len(packed), escape(packed))


@_operation("fstat")
def fstat(session: Session, target: Files, arguments: bytes) -> bytes:
    data = session.files.get(number(arguments))
    return _fail(_EBADF) if data is None else _status(data)


@_operation("stat")
def stat(session: Session, target: Files, arguments: bytes) -> bytes:
    """By name, as newer clients ask."""
    name = _name(arguments)
    data = None if name is None else target.read_file(name)
    return _fail(_ENOENT) if data is None else _status(data)


_OPERATIONS[b"lstat"] = stat


@_operation("close")
def close(session: Session, target: Files, arguments: bytes) -> bytes:
    return _fail(_EBADF) if session.files.pop(number(arguments), None) is None else b"F0"
