"""What the connection can do, and the general state: qSupported, modes, H, ?, qAttached."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gdbstub.commands.registry import command, number, thread_id
from gdbstub.packet import PACKET_SIZE
from gdbstub.replies import stop_reply
from gdbstub.target import (
    BreakpointPrograms,
    ExecFile,
    Libraries,
    MemoryMap,
    NonStop,
    Spaces,
    Stop,
    TargetError,
    ThreadId,
    Tracepoints,
    offers,
)

if TYPE_CHECKING:
    from gdbstub.session import Session

_SUPPORTED: tuple[tuple[bytes, type | None], ...] = (
    (b"PacketSize=%x" % PACKET_SIZE, None),
    (b"QStartNoAckMode+", None),
    (b"swbreak+", None),
    (b"hwbreak+", None),
    (b"vContSupported+", None),
    (b"QNonStop+", NonStop),
    (b"QThreadEvents+", None),
    (b"fork-events+", None),
    (b"exec-events+", ExecFile),
    (b"error-message+", None),
    (b"binary-upload+", None),
    (b"qXfer:features:read+", None),
    (b"qXfer:threads:read+", None),
    (b"qXfer:osdata:read+", None),
    (b"qXfer:memory-map:read+", MemoryMap),
    (b"qXfer:exec-file:read+", ExecFile),
    (b"qXfer:libraries:read+", Libraries),
    (b"address-spaces+", Spaces),
    (b"ConditionalBreakpoints+;BreakpointCommands+", BreakpointPrograms),
    (
        b"TracepointSource+;ConditionalTracepoints+;TraceStateVariables+;InstallInTrace+;EnableDisableTracepoints+;tracenz+;"
        b"DisconnectedTracing+;QTBuffer:size+;qXfer:traceframe-info:read+",
        Tracepoints,
    ),
)


@command("qSupported")
def supported(session: Session, arguments: bytes) -> bytes:
    session.features = frozenset(arguments.split(b";"))
    session.multiprocess = b"multiprocess+" in session.features
    target = session.target
    offered = [name for name, capability in _SUPPORTED if capability is None or offers(target, capability)]
    return b";".join(offered + [b"multiprocess+"] * session.multiprocess)


@command("QStartNoAckMode")
def start_no_ack_mode(session: Session, arguments: bytes) -> None:
    session.send(b"OK")
    session.stop_acknowledging()


@command("!")
def extended_mode(session: Session, arguments: bytes) -> bytes:
    session.extended = True
    return b"OK"


@command("QNonStop")
def non_stop(session: Session, arguments: bytes) -> bytes:
    if arguments not in (b"0", b"1"):
        raise TargetError(f"{arguments[:20]!r} is no mode: 1 for non-stop, 0 for all-stop")
    if arguments == b"1" and not offers(session.target, NonStop):
        raise TargetError("non-stop mode is not offered: set non-stop off")
    session.set_non_stop(arguments == b"1")
    return b"OK"


@command("QThreadEvents")
def thread_events(session: Session, arguments: bytes) -> bytes:
    if arguments not in (b"0", b"1"):
        raise TargetError(f"{arguments[:20]!r} is neither 1 for thread events nor 0 for none")
    session.thread_events = arguments == b"1"
    return b"OK"


@command("?")
def reason(session: Session, arguments: bytes) -> bytes:
    if session.non_stop is not None:
        return session.non_stop.reason()
    session.require_stopped()
    if not session.attached:
        return b"W00"
    return stop_reply(session, session.stopped or Stop(session.current()))


@command("H")
def set_thread(session: Session, arguments: bytes) -> bytes:
    wanted = thread_id(arguments[1:])
    if arguments[:1] == b"g":
        session.general = session.resolve(wanted) if session.attached or wanted.pid > 0 else ThreadId(0, 0)
    elif arguments[:1] == b"c":
        session.resumed = wanted
    else:
        raise TargetError(f"H{arguments[:1]!r} is no operation: use g or c")
    return b"OK"


@command("T")
def thread_alive(session: Session, arguments: bytes) -> bytes:
    session.thread(arguments)
    return b"OK"


@command("qC")
def current_thread(session: Session, arguments: bytes) -> bytes:
    return b"QC" + session.thread_name(session.current())


@command("qAttached")
def attached(session: Session, arguments: bytes) -> bytes:
    """1: GDB then detaches when it quits, and does not kill."""
    if arguments and number(arguments) not in session.attached:
        raise TargetError(f"process {number(arguments)} is not attached")
    return b"1"


@command("qfThreadInfo")
def first_threads(session: Session, arguments: bytes) -> bytes:
    names = [session.thread_name(thread) for thread, _ in session.threads()]
    return b"m" + b",".join(names) if names else b"l"


@command("qsThreadInfo")
def more_threads(session: Session, arguments: bytes) -> bytes:
    return b"l"


@command("qThreadExtraInfo")
def thread_extra_info(session: Session, arguments: bytes) -> bytes:
    wanted = session.thread(arguments)
    for thread in session.target.threads(wanted.pid):
        if thread.tid == wanted.tid:
            return f"{thread.name} {thread.state}".strip().encode().hex().encode()
    raise TargetError(f"process {wanted.pid} has no thread {wanted.tid}")
