"""How stops and ends are told: the replies that `?`, a resume and lldb's questions are answered with."""

from __future__ import annotations

import logging
from binascii import hexlify
from typing import TYPE_CHECKING

from gdbstub.target import Exited, Reason, Signal, Stop, ThreadEnded

if TYPE_CHECKING:
    from gdbstub.session import Session

__all__ = ["exit_reply", "lldb_reason", "safe_stop_reply", "stop_reply", "thread_end_reply"]

log = logging.getLogger(__name__)

_WATCHPOINTS = {reason: reason.value.encode() for reason in (Reason.WATCH, Reason.RWATCH, Reason.AWATCH)}


def exit_reply(session: Session, event: Exited) -> bytes:
    """W or X."""
    reply = b"X%02x" % (event.signal & 0xFF) if event.signal else b"W%02x" % (event.status & 0xFF)
    return reply + b";process:%x" % event.pid if session.multiprocess else reply


def thread_end_reply(session: Session, event: ThreadEnded) -> bytes:
    """w."""
    return b"w00;%b" % session.thread_name(event.thread)


def stop_reply(session: Session, stop: Stop, extra: bytes = b"", registers: bool = True) -> bytes:
    """T. The thread comes first: GDB needs it to know whose registers follow, where it is told any."""
    pid, tid = stop.thread
    parts = [b"T%02xthread:%b;" % (stop.signal & 0xFF, session.thread_name(stop.thread)), extra]
    reason = stop.reason
    if reason in _WATCHPOINTS:
        parts.append(b"%b:%x;" % (_WATCHPOINTS[reason], stop.address))
    elif reason is not Reason.NONE:
        key = reason.value.encode()
        if key + b"+" in session.features:
            parts.append(key + b":;")
    for thread in session.target.threads(pid):
        if thread.tid == tid and thread.core is not None:
            parts.append(b"core:%x;" % thread.core)
    if session.list_threads:
        parts += _lldb_details(session, stop, extra.partition(b":")[0])
    read = session.target.read_register
    for index, _, _ in session.attached[pid].expedited if registers else ():
        value = read(stop.thread, index)
        if value is not None:
            parts.append(b"%02x:%b;" % (index, hexlify(value)))
    return b"".join(parts)


def safe_stop_reply(session: Session, stop: Stop, extra: bytes = b"", registers: bool = True) -> bytes:
    """As `stop_reply`, without registers where the target fails to give them."""
    try:
        return stop_reply(session, stop, extra, registers)
    except Exception:
        log.exception("the stop is told without registers: the target did not give them")
        return b"T%02xthread:%b;" % (stop.signal & 0xFF, session.thread_name(stop.thread))


def lldb_reason(stop: Stop) -> str:
    """The reason in lldb's words. A watchpoint's address is in the key of its own."""
    if stop.reason in _WATCHPOINTS:
        return "watchpoint"
    if stop.reason is not Reason.NONE:
        return "breakpoint"
    return "trace" if stop.signal == Signal.TRAP else "signal" if stop.signal else "none"


def _lldb_details(session: Session, stop: Stop, event: bytes) -> list[bytes]:
    """What lldb asks stop replies to carry (QListThreadsInStopReply), and the reason in its words.

    `event` is fork or exec: with another reason lldb stops at what it would pass.
    """
    names = [session.thread_name(thread) for thread, _ in session.threads() if thread.pid == stop.thread.pid]
    parts = [b"threads:%b;" % b",".join(names), b"reason:%b;" % (event or lldb_reason(stop).encode())]
    if stop.text:
        parts.append(b"description:%b;" % hexlify(stop.text.encode()))
    return parts
