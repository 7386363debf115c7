"""Inferiors come and go: vAttach, D, vKill, k, vRun, R."""

from __future__ import annotations

from binascii import Error, unhexlify
from typing import TYPE_CHECKING

from gdbstub.commands.registry import command, number
from gdbstub.replies import exit_reply, stop_reply
from gdbstub.target import Exited, Kill, Run, Signal, Stop, TargetError, offers

if TYPE_CHECKING:
    from gdbstub.session import Session


@command("vAttach")
def attach(session: Session, arguments: bytes) -> bytes:
    session.require_stopped()
    pid = number(arguments)
    if not session.multiprocess:
        # Such a client knows one process at a time: the new one takes the place of the others.
        others = [other for other in session.attached if other != pid]
        session.attach(pid)
        for other in others:
            session.detach(other)
    else:
        session.attach(pid)
    if session.non_stop is not None:
        session.non_stop.tell(pid)
        return b"OK"
    session.stopped = Stop(session.current())
    return stop_reply(session, session.stopped)


@command("D")
def detach(session: Session, arguments: bytes) -> bytes:
    """With a 1, lldb's `process detach --keep-stopped`, the machine stays as it is."""
    session.require_stopped()
    stay = arguments[:1] == b"1"
    arguments = arguments[stay:]
    pids = [number(arguments[1:])] if arguments[:1] == b";" else list(session.attached)
    for pid in pids:
        if pid not in session.attached:
            raise TargetError(f"process {pid} is not attached")
        session.detach(pid, stay)
    return b"OK"


@command("qSupportsDetachAndStayStopped")
def detach_and_stay_stopped(session: Session, arguments: bytes) -> bytes:
    return b"OK"


@command("vKill")
def kill(session: Session, arguments: bytes) -> bytes:
    if not offers(session.target, Kill):
        return b""
    session.require_stopped()
    pid = number(arguments)
    if pid not in session.attached:
        raise TargetError(f"process {pid} is not attached: attach to it first")
    session.target.kill(pid)
    session.forget(pid)
    return b"OK"


@command("k")
def kill_all(session: Session, arguments: bytes) -> bytes | None:
    """Has no reply but, in extended mode, the end of what was running."""
    running = session.halt()
    pids = list(session.attached)
    for pid in pids:
        if offers(session.target, Kill):
            session.target.kill(pid)
            session.forget(pid)
        else:
            session.detach(pid)
    return exit_reply(session, Exited(pids[0], signal=Signal.KILL)) if running and pids else None


@command("vRun")
def run(session: Session, arguments: bytes) -> bytes:
    if not offers(session.target, Run):
        return b""
    session.require_stopped()
    try:
        program, *words = [unhexlify(part).decode() for part in arguments.split(b";")]
    except (Error, UnicodeDecodeError):
        raise TargetError("the program and its arguments must be UTF-8 in hex") from None
    return _restart(session, session.target, program, words)


@command("R")
def restart(session: Session, arguments: bytes) -> None:
    """Has no reply: the client asks `?` afterwards."""
    if offers(session.target, Run):
        session.halt()
        _restart(session, session.target, "", [])


def _restart(session: Session, target: Run, program: str, words: list[str]) -> bytes:
    try:
        pid = target.run(program, words)
    except TargetError:
        if not session.target.inferiors():
            _forget(session)
        raise
    _forget(session)
    session.attach(pid)
    session.stopped = Stop(session.current())
    return stop_reply(session, session.stopped)


def _forget(session: Session) -> None:
    for pid in list(session.attached):
        session.forget(pid)
