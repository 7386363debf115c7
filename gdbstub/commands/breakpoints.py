"""Z and z."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gdbstub.agent import Program
from gdbstub.commands.registry import address_length, command, expression
from gdbstub.target import BreakpointKind, BreakpointPrograms, Programs, TargetError, offers

if TYPE_CHECKING:
    from gdbstub.session import Session

_EXECUTE = (BreakpointKind.SOFTWARE, BreakpointKind.HARDWARE)
_DIGITS = {b"%d" % kind: kind for kind in BreakpointKind}


def _point(session: Session, arguments: bytes) -> tuple[BreakpointKind, int, int, int] | None:
    digit, _, rest = arguments.partition(b",")
    if digit not in _DIGITS:
        return None
    address, length = address_length(rest)
    return _DIGITS[digit], address, length, session.process()


def _expressions(text: bytes) -> tuple[Program, ...]:
    found = []
    while text:
        program, text = expression(text)
        found.append(program)
    return tuple(found)


def _programs(options: bytes) -> tuple[Programs, bool]:
    """Conditions (`X...`, several in a row) and commands (`cmds:PERSIST,X...`); whether these go on without a client."""
    conditions: tuple[Program, ...] = ()
    commands: tuple[Program, ...] = ()
    persist = False
    for option in filter(None, options.split(b";")):
        if option.startswith(b"cmds:"):
            flag, _, text = option[5:].partition(b",")
            commands += _expressions(text)
            persist |= flag == b"1"
        else:
            conditions += _expressions(option)
    return Programs(conditions, commands), persist and bool(commands)


@command("Z")
def insert(session: Session, arguments: bytes) -> bytes:
    """Idempotent, as the protocol demands: the session knows what is there. Programs take the place of former ones."""
    head, _, options = arguments.partition(b";")
    point = _point(session, head)
    if point is None:
        return b""
    programs, persist = _programs(options)
    target = session.target
    if options and not (offers(target, BreakpointPrograms) and point[0] in _EXECUTE):
        raise TargetError("conditions and commands of such breakpoints are not offered: let the client evaluate them")
    if point not in session.breakpoints:
        target.insert_breakpoint(*point[:3], session.current())
        session.breakpoints[point] = False
    if offers(target, BreakpointPrograms) and point[0] in _EXECUTE:
        target.set_programs(*point, programs)
    session.breakpoints[point] = persist
    return b"OK"


@command("z")
def remove(session: Session, arguments: bytes) -> bytes:
    point = _point(session, arguments.partition(b";")[0])
    if point is None:
        return b""
    if session.breakpoints.pop(point, None) is not None:
        session.target.remove_breakpoint(*point)
    return b"OK"
