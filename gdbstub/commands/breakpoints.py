"""Z and z."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gdbstub.commands.registry import address_length, command
from gdbstub.target import BreakpointKind, TargetError

if TYPE_CHECKING:
    from gdbstub.session import Session


def _parse(session: Session, arguments: bytes) -> tuple[BreakpointKind, int, int, int] | None:
    digit, _, rest = arguments.partition(b",")
    if digit not in (b"0", b"1", b"2", b"3", b"4"):
        return None
    # Conditions and commands (`;X...`, `;cmds:`) are not announced: a client that sends them must not think they work.
    if b";" in rest:
        raise TargetError("conditions and commands of breakpoints are not offered: let the client evaluate them")
    address, length = address_length(rest)
    return BreakpointKind(int(digit)), address, length, session.process()


@command("Z")
def insert(session: Session, arguments: bytes) -> bytes:
    """Idempotent, as the protocol demands: the set knows what is there."""
    point = _parse(session, arguments)
    if point is None:
        return b""
    if point not in session.breakpoints:
        session.target.insert_breakpoint(*point[:3], session.current())
        session.breakpoints.add(point)
    return b"OK"


@command("z")
def remove(session: Session, arguments: bytes) -> bytes:
    point = _parse(session, arguments)
    if point is None:
        return b""
    if point in session.breakpoints:
        session.breakpoints.remove(point)
        session.target.remove_breakpoint(*point)
    return b"OK"
