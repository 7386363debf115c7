"""vCont, vCtrlC, and the older c, C, s, S."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from gdbstub.commands.registry import command, number, thread_id
from gdbstub.target import CONTINUE, STEP, Action, TargetError, ThreadId

if TYPE_CHECKING:
    from gdbstub.session import Session


@command("vCont?")
def offered(session: Session, arguments: bytes) -> bytes:
    """`t` is only meaningful in non-stop mode, but GDB wants to see it."""
    return b"vCont;c;C;s;S;t;r"


@lru_cache(256)
def parse(arguments: bytes) -> tuple[tuple[Action | None, ThreadId], ...]:
    """The actions of a vCont, leftmost first; None is `t`. Raises TargetError."""
    actions = []
    for part in arguments.split(b";"):
        verb, found, thread = part.partition(b":")
        actions.append((_action(verb), thread_id(thread) if found else ThreadId(-1, -1)))
    return tuple(actions)


def _action(verb: bytes) -> Action | None:
    letter, rest = verb[:1], verb[1:]
    if letter in b"cst" and letter and not rest:
        return CONTINUE if letter == b"c" else STEP if letter == b"s" else None
    if letter == b"C":
        return Action(signal=number(rest))
    if letter == b"S":
        return Action(step=True, signal=number(rest))
    if letter == b"r":
        start, _, end = rest.partition(b",")
        return Action(step=True, start=number(start), end=number(end))
    raise TargetError(f"{verb[:20]!r} is no action of vCont: use c, C, s, S, t or r")


@command("vCont")
def vcont(session: Session, arguments: bytes) -> bytes | None:
    """In non-stop mode there is an answer at once, threads that run are left alone, and `t` stops."""
    session.require_stopped()
    parsed = parse(arguments)
    chosen: dict[ThreadId, Action] = {}
    stopped: list[ThreadId] = []
    decided: set[ThreadId] = set()
    for action, (pid, tid) in parsed:
        if pid == 0:
            pid = session.process() if tid > 0 else -1
        if tid > 0:
            matching = [session.resolve(ThreadId(pid, tid))]
        else:
            pids = [pid] if pid > 0 else list(session.attached)
            if pid > 0 and pid not in session.attached:
                raise TargetError(f"process {pid} is not attached: attach to it first")
            matching = [ThreadId(pid, thread.tid) for pid in pids for thread in session.target.threads(pid)]
        for thread in matching:
            if thread not in decided:
                decided.add(thread)
                if action is not None:
                    chosen[thread] = action
                else:
                    stopped.append(thread)
    if session.non_stop is not None:
        session.non_stop.halt(stopped)
        session.resume(chosen)
        return b"OK"
    if not chosen:
        raise TargetError("no thread would run: attach to a process, or name a thread that exists")
    session.resume(chosen)
    return None


@command("vStopped")
def told(session: Session, arguments: bytes) -> bytes:
    return session.non_stop.told() if session.non_stop is not None else b"OK"


@command("vCtrlC")
def interrupt(session: Session, arguments: bytes) -> None:
    session.send(b"OK")
    session.interrupt()


def _classic(session: Session, action: Action, address: bytes) -> None:
    session.require_stopped()
    if session.non_stop is not None:
        raise TargetError("in non-stop mode threads are resumed with vCont")
    if address:
        thread = session.current()
        description = session.attached[thread.pid]
        index = description.numbers[description.pc]
        size = description.size(index)
        session.target.write_register(thread, index, (number(address) % (1 << 8 * size)).to_bytes(size, "little"))
    pid, tid = session.resumed
    if action.step or tid > 0:
        # One thread: the one H c names, else the current one.
        session.resume({session.resolve(session.resumed) if tid > 0 else session.current(): action})
        return
    pids = [pid] if pid > 0 else list(session.attached)
    if not pids or (pid > 0 and pid not in session.attached):
        raise TargetError("no process is attached: attach to one first")
    session.resume({ThreadId(pid, thread.tid): action for pid in pids for thread in session.target.threads(pid)})


@command("c")
def continue_(session: Session, arguments: bytes) -> None:
    _classic(session, CONTINUE, arguments)


@command("s")
def step(session: Session, arguments: bytes) -> None:
    _classic(session, STEP, arguments)


@command("C")
def continue_with_signal(session: Session, arguments: bytes) -> None:
    signal, _, address = arguments.partition(b";")
    _classic(session, Action(signal=number(signal)), address)


@command("S")
def step_with_signal(session: Session, arguments: bytes) -> None:
    signal, _, address = arguments.partition(b";")
    _classic(session, Action(step=True, signal=number(signal)), address)
