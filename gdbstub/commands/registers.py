"""g, G, p, P."""

from __future__ import annotations

from binascii import Error, hexlify, unhexlify
from typing import TYPE_CHECKING

from gdbstub.commands.registry import command, number
from gdbstub.target import TargetError, ThreadId, Tracepoints, offers

if TYPE_CHECKING:
    from gdbstub.session import Session
    from gdbstub.trace import Frame


def value(text: bytes, size: int, name: str) -> bytes:
    """The hex digits of a register or block, checked. Raises TargetError."""
    try:
        data = unhexlify(text)
    except Error:
        raise TargetError(f"the value of {name} is not hex digits in pairs") from None
    if len(data) != size:
        raise TargetError(f"{name} has {size} bytes, not {len(data)}: the register description is target.xml")
    return data


def _unchangeable(session: Session) -> None:
    if session.frame is not None:
        raise TargetError("a trace frame cannot be changed: leave it with tfind none")


@command("g")
def read_registers(session: Session, arguments: bytes) -> bytes:
    _, thread = session.suffixed(arguments)
    session.block_read = True
    if session.frame is not None:
        description = session.attached[thread.pid]
        return b"".join(_collected(session, session.frame, thread, n) for n in range(description.block_count))
    return hexlify(session.target.read_registers(thread))


def _collected(session: Session, frame: Frame, thread: ThreadId, index: int) -> bytes:
    """A register of a trace frame."""
    description, target = session.attached[thread.pid], session.target
    value = target.trace.register(frame, description, index) if offers(target, Tracepoints) else None
    return b"xx" * description.size(index) if value is None else hexlify(value)


@command("G")
def write_registers(session: Session, arguments: bytes) -> bytes:
    _unchangeable(session)
    text, thread = session.suffixed(arguments)
    size = session.attached[thread.pid].block_size
    session.target.write_registers(thread, value(text, size, "the register block"))
    return b"OK"


def known(session: Session, pid: int, text: bytes) -> int:
    """The number of a register that exists. Raises TargetError."""
    index, count = number(text), len(session.attached[pid].registers)
    if index >= count:
        raise TargetError(f"register {index} does not exist: there are {count}")
    return index


@command("p")
def read_register(session: Session, arguments: bytes) -> bytes:
    text, thread = session.suffixed(arguments)
    index = known(session, thread.pid, text)
    if session.frame is not None:
        return _collected(session, session.frame, thread, index)
    data = session.target.read_register(thread, index)
    return b"xx" * session.attached[thread.pid].size(index) if data is None else hexlify(data)


@command("P")
def write_register(session: Session, arguments: bytes) -> bytes:
    _unchangeable(session)
    arguments, thread = session.suffixed(arguments)
    text, _, digits = arguments.partition(b"=")
    index = known(session, thread.pid, text)
    register = session.attached[thread.pid].registers[index]
    session.target.write_register(thread, index, value(digits, register.bits // 8, register.name))
    return b"OK"
