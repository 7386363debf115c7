"""m, M, x, X, qCRC, qSearch:memory."""

from __future__ import annotations

from binascii import Error, hexlify, unhexlify
from typing import TYPE_CHECKING

from gdbstub.commands.registry import address_length, command, number
from gdbstub.packet import PACKET_SIZE, escape
from gdbstub.target import TargetError, ThreadId, Tracepoints, offers

if TYPE_CHECKING:
    from gdbstub.session import Session

_TOP = 1 << 64
# A reply of m has two digits a byte.
_LONGEST = PACKET_SIZE // 2
_PIECE = 0x10000
# Searches and checksums of more would stall ^C for seconds.
_LARGEST = 1 << 28


def read(session: Session, thread: ThreadId, address: int, length: int, space: int | None = None) -> bytes:
    """The readable prefix, in the chosen space or this one. Raises TargetError if the first byte is not readable."""
    length = min(length, _TOP - address)
    spaces = session.spaces
    if spaces is not None and space is None:
        space = spaces.chosen_space(thread.pid)
    if session.frame is not None:
        data = session.frame.memory(address, length) or _unchanging(session, thread, address, length)
    elif spaces is None or not space:
        data = session.target.read_memory(thread, address, length)
    else:
        data = spaces.read_space(thread, space, address, length)
    if length and not data:
        raise TargetError(f"no memory is readable at {address:#x}")
    return data


def _unchanging(session: Session, thread: ThreadId, address: int, length: int) -> bytes:
    """Memory that no trace frame holds, but that the client says does not change."""
    target = session.target
    ranges = target.trace.read_only if offers(target, Tracepoints) else []
    fits = any(start <= address and address + length <= end for start, end in ranges)
    return target.read_memory(thread, address, length) if fits else b""


def write(session: Session, address: int, length: int, data: bytes) -> bytes:
    """Carry out M or X."""
    if length != len(data):
        raise TargetError(f"the packet holds {len(data)} bytes for a length of {length}")
    if address + length > _TOP:
        raise TargetError(f"{length} bytes at {address:#x} reach past the end of the address space")
    if session.frame is not None:
        raise TargetError("a trace frame cannot be changed: leave it with tfind none")
    if data:
        thread, spaces = session.current(), session.spaces
        space = spaces.chosen_space(thread.pid) if spaces is not None else 0
        if spaces is None or not space:
            session.target.write_memory(thread, address, data)
        else:
            spaces.write_space(thread, space, address, data)
    return b"OK"


def _place(session: Session, arguments: bytes) -> tuple[int, int, ThreadId, int | None]:
    """`ADDRESS,LENGTH`, and what lldb may put behind it: `;thread:ID;` and `;address_space:ID;`. Raises TargetError."""
    range_, *fields = arguments.split(b";")
    thread, space = session.current(), None
    for key, _, value in (field.partition(b":") for field in fields):
        if key == b"thread":
            thread = session.thread(value)
        elif key == b"address_space":
            # Their numbers begin at 1: 0 is lldb's own space.
            space = number(value) - 1
    if space is not None:
        known = session.spaces.spaces(thread.pid) if session.spaces is not None else ()
        if not 0 <= space < len(known):
            raise TargetError(f"there is no address space {space + 1}: jAddressSpacesInfo lists {len(known)}")
    return *address_length(range_), thread, space


@command("m")
def read_hex(session: Session, arguments: bytes) -> bytes:
    address, length, thread, space = _place(session, arguments)
    return hexlify(read(session, thread, address, min(length, _LONGEST), space))


@command("x")
def read_binary(session: Session, arguments: bytes) -> bytes:
    """Data is marked with `b`, as binary-upload+ says.

    An lldb that does not know that mark asks `x0,0` first, takes OK for a yes, and then wants bare data; GDB, which
    announces nothing of its own about `x`, never asks so.
    """
    address, length, thread, space = _place(session, arguments)
    if not length:
        session.bare_reads = True
        return b"OK"
    data = read(session, thread, address, min(length, PACKET_SIZE - 1), space)
    escaped = escape(data)
    if len(escaped) >= PACKET_SIZE:
        escaped = escape(data[: PACKET_SIZE // 2 - 1])
    return escaped if session.bare_reads else b"b" + escaped


@command("M")
def write_hex(session: Session, arguments: bytes) -> bytes:
    head, _, digits = arguments.partition(b":")
    try:
        data = unhexlify(digits)
    except Error:
        raise TargetError("the data of M is not hex digits in pairs") from None
    return write(session, *address_length(head), data)


@command("X")
def write_binary(session: Session, arguments: bytes) -> bytes:
    head, _, data = arguments.partition(b":")
    return write(session, *address_length(head), data)


def _check_length(length: int) -> None:
    if length > _LARGEST:
        raise TargetError(f"a range of {length:#x} bytes would stop everything for seconds: use at most {_LARGEST:#x}")


@command("qSearch")
def search(session: Session, arguments: bytes) -> bytes:
    if not arguments.startswith(b"memory:"):
        return b""
    head, _, rest = arguments[7:].partition(b";")
    digits, _, pattern = rest.partition(b";")
    address, length = address_length(head + b"," + digits)
    _check_length(length)
    if not pattern:
        raise TargetError("the pattern to search for is empty")
    thread, end = session.current(), min(address + length, _TOP)
    window, start = b"", address  # `window` is memory at `start`
    while start + len(window) < end:
        data = read(session, thread, start + len(window), min(_PIECE, end - start - len(window)))
        window += data
        found = window.find(pattern)
        if found >= 0:
            return b"1,%x" % (start + found)
        keep = min(len(window), len(pattern) - 1)
        start += len(window) - keep
        window = window[len(window) - keep :]
    return b"0"


@command("qCRC")
def crc(session: Session, arguments: bytes) -> bytes:
    address, length = address_length(arguments)
    _check_length(length)
    if address + length > _TOP:
        raise TargetError(f"{length} bytes at {address:#x} reach past the end of the address space")
    thread, value, end = session.current(), 0xFFFFFFFF, address + length
    while address < end:
        data = read(session, thread, address, min(_PIECE, end - address))
        value = _crc32(data, value)
        address += len(data)
    return b"C%x" % value


def _table_entry(value: int) -> int:
    value <<= 24
    for _ in range(8):
        value = (value << 1) ^ (0x04C11DB7 if value & 0x80000000 else 0)
    return value & 0xFFFFFFFF


_TABLE = [_table_entry(value) for value in range(256)]


def _crc32(data: bytes, value: int) -> int:
    """GDB's CRC: the Ethernet polynomial, most significant bit first (zlib's is reflected), no final complement."""
    for byte in data:
        value = (value << 8) & 0xFFFFFFFF ^ _TABLE[value >> 24 ^ byte]
    return value
