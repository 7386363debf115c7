"""g, G, p, P."""

from __future__ import annotations

from binascii import Error, hexlify, unhexlify
from typing import TYPE_CHECKING

from gdbstub.commands.registry import command, number
from gdbstub.target import TargetError

if TYPE_CHECKING:
    from gdbstub.session import Session


def value(text: bytes, size: int, name: str) -> bytes:
    """The hex digits of a register or block, checked. Raises TargetError."""
    try:
        data = unhexlify(text)
    except Error:
        raise TargetError(f"the value of {name} is not hex digits in pairs") from None
    if len(data) != size:
        raise TargetError(f"{name} has {size} bytes, not {len(data)}: the register description is target.xml")
    return data


@command("g")
def read_registers(session: Session, arguments: bytes) -> bytes:
    _, thread = session.suffixed(arguments)
    return hexlify(session.target.read_registers(thread))


@command("G")
def write_registers(session: Session, arguments: bytes) -> bytes:
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
    data = session.target.read_register(thread, index)
    return b"xx" * session.attached[thread.pid].size(index) if data is None else hexlify(data)


@command("P")
def write_register(session: Session, arguments: bytes) -> bytes:
    arguments, thread = session.suffixed(arguments)
    text, _, digits = arguments.partition(b"=")
    index = known(session, thread.pid, text)
    register = session.attached[thread.pid].registers[index]
    session.target.write_register(thread, index, value(digits, register.bits // 8, register.name))
    return b"OK"
