"""QT and qT: tracepoints, trace state variables, the run of a trace, and its frames (GDB manual, appendix E.6)."""

from __future__ import annotations

from binascii import hexlify
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING

from gdbstub.commands.registry import address_length, command, expression, number, text
from gdbstub.frames import SIZE, Frame
from gdbstub.packet import PACKET_SIZE
from gdbstub.target import TargetError, Tracepoints, offers
from gdbstub.trace import MOST, TIMESTAMP, Action, Memory, Registers, Trace, Tracepoint, Variable

if TYPE_CHECKING:
    from gdbstub.session import Session

MOST_NUMBER = 0xFFFF
"""What a frame has room for."""
LARGEST = 256 << 20
"""Bytes of a buffer that a client may ask for."""
_Handler = Callable[["Session", Trace, bytes], bytes]


def packet(*names: str) -> Callable[[_Handler], _Handler]:
    """Register a handler that works on the target's trace; targets without one do not support the packet."""

    def register(handler: _Handler) -> _Handler:
        @command(*names)
        @wraps(handler)
        def answer(session: Session, arguments: bytes) -> bytes:
            target = session.target
            if not offers(target, Tracepoints):
                return b""
            target.flush_trace()
            reply = handler(session, target.trace, arguments)
            if names[0].startswith("Q"):
                target.arm_trace()
            return reply

        return handler

    return register


# -- definitions


@packet("QTinit")
def initialize(session: Session, trace: Trace, arguments: bytes) -> bytes:
    session.frame = None
    trace.clear()
    return b"OK"


@packet("QTDP")
def define(session: Session, trace: Trace, arguments: bytes) -> bytes:
    """A tracepoint, or actions of the one that was defined last; a hyphen at the end says that more follow."""
    more = arguments.endswith(b"-")
    if arguments.startswith(b"-"):
        point = _add_actions(trace, arguments[1:].removesuffix(b"-"))
    else:
        point = _define(session, trace, arguments.removesuffix(b"-"))
    trace.incomplete = point if more else None
    return b"OK"


def _define(session: Session, trace: Trace, arguments: bytes) -> Tracepoint:
    fields = arguments.split(b":")
    if len(fields) < 5:
        raise TargetError(f"{arguments[:40]!r} is no tracepoint: send NUMBER:ADDRESS:E|D:STEPS:PASSES")
    which, address, steps, passes = (number(fields[index]) for index in (0, 1, 3, 4))
    if (which, address) in trace.points:
        raise TargetError(f"tracepoint {which} at {address:#x} exists already")
    if len(trace.points) >= MOST or which > MOST_NUMBER:
        raise TargetError(f"tracepoint {which} is one too many: use {MOST} at most, with numbers up to {MOST_NUMBER}")
    condition = None
    for option in fields[5:]:
        if option[:1] != b"X":
            raise TargetError("fast and static tracepoints are not offered: use trace, which is as fast here")
        condition, _ = expression(option)
    own = session.process()
    target = session.target
    assert offers(target, Tracepoints)
    pid = target.trace_owner([own, *(pid for pid in session.attached if pid != own)], address)
    point = Tracepoint(which, address, pid, fields[2] == b"E", steps, passes, condition)
    trace.points[which, address] = point
    return point


def _add_actions(trace: Trace, arguments: bytes) -> Tracepoint:
    which, address, actions = [*arguments.split(b":", 2), b"", b""][:3]
    point = _existing(trace, which + b":" + address)
    steps = any(step for step, _ in point.texts)
    while actions:
        if actions[:1] == b"S":
            steps, actions = True, actions[1:]
            continue
        action, rest = _action(actions)
        (point.step_actions if steps else point.actions).append(action)
        point.texts.append((steps, actions[: len(actions) - len(rest)]))
        actions = rest
    return point


def _action(packet: bytes) -> tuple[Action, bytes]:
    """The first action of some, and the others."""
    if packet[:1] == b"R":
        digits = packet[1:]
        end = next((at for at, digit in enumerate(digits) if digit not in b"0123456789abcdefABCDEF"), len(digits))
        return Registers(int(digits[:end] or b"0", 16)), digits[end:]
    if packet[:1] == b"M":
        base, offset, rest = [*packet[1:].split(b",", 2), b"", b""][:3]
        end = next((at for at, digit in enumerate(rest) if digit not in b"0123456789abcdefABCDEF"), len(rest))
        register = None if base in (b"-1", b"ffffffff", b"FFFFFFFF") else number(base)
        return Memory(register, number(offset), number(rest[:end])), rest[end:]
    if packet[:1] == b"X":
        return expression(packet)
    raise TargetError(f"{packet[:20]!r} is no action that is offered: use M, R or X")


def _existing(trace: Trace, arguments: bytes) -> Tracepoint:
    which, address = (number(part) for part in (*arguments.split(b":"), b"")[:2])
    point = trace.points.get((which, address))
    if point is None:
        raise TargetError(f"there is no tracepoint {which} at {address:#x}")
    return point


@packet("QTDPsrc")
def source(session: Session, trace: Trace, arguments: bytes) -> bytes:
    """What the user typed, in pieces: a piece that does not begin at 0 continues the one before."""
    which, address, kind, start, _, piece = [*arguments.split(b":", 5), *[b""] * 6][:6]
    point, name, words = _existing(trace, which + b":" + address), kind.decode("ascii", "replace"), text(piece)
    if number(start) and point.sources and point.sources[-1][0] == name:
        words = point.sources.pop()[1] + words
    point.sources.append((name, words))
    return b"OK"


@packet("QTDV")
def define_variable(session: Session, trace: Trace, arguments: bytes) -> bytes:
    which, initial, builtin, name = [*arguments.split(b":"), b"", b"", b"", b""][:4]
    if number(builtin) or (number(which) in trace.variables and trace.variables[number(which)].builtin):
        return b"OK"  # the target's own, as it told the client
    if len(trace.variables) >= MOST:
        raise TargetError(f"there are {MOST} trace state variables already: delete some")
    trace.variables[number(which)] = Variable(text(name), number(initial), number(initial))
    return b"OK"


@packet("QTro")
def read_only(session: Session, trace: Trace, arguments: bytes) -> bytes:
    trace.read_only = [address_length(part) for part in arguments.split(b":") if part]
    return b"OK"


@packet("QTEnable")
def enable(session: Session, trace: Trace, arguments: bytes) -> bytes:
    _existing(trace, arguments).enabled = True
    return b"OK"


@packet("QTDisable")
def disable(session: Session, trace: Trace, arguments: bytes) -> bytes:
    _existing(trace, arguments).enabled = False
    return b"OK"


# -- the run


@packet("QTStart")
def start(session: Session, trace: Trace, arguments: bytes) -> bytes:
    session.frame = None
    trace.start()
    return b"OK"


@packet("QTStop")
def stop(session: Session, trace: Trace, arguments: bytes) -> bytes:
    trace.stop()
    return b"OK"


@packet("QTDisconnected")
def disconnected(session: Session, trace: Trace, arguments: bytes) -> bytes:
    trace.disconnected = bool(number(arguments))
    return b"OK"


@packet("QTBuffer")
def configure(session: Session, trace: Trace, arguments: bytes) -> bytes:
    what, _, value = arguments.partition(b":")
    if what == b"circular":
        trace.buffer.circular = bool(number(value))
    elif what == b"size":
        size = SIZE if value == b"-1" else number(value)
        if trace.running or not 0 < size <= LARGEST:
            raise TargetError(f"the trace buffer can have 1 to {LARGEST} bytes, while no trace runs")
        trace.buffer.size = size
        trace.buffer.clear()
        session.frame = None
    else:
        raise TargetError(f"a trace buffer has no {what[:20]!r}: set its size, or whether it is circular")
    return b"OK"


@packet("QTNotes")
def notes(session: Session, trace: Trace, arguments: bytes) -> bytes:
    for part in filter(None, arguments.split(b";")):
        kind, _, value = part.partition(b":")
        if kind == b"user":
            trace.user = text(value)
        elif kind == b"notes":
            trace.notes = text(value)
        elif kind == b"tstop":
            trace.stop_note = text(value)
    return b"OK"


@packet("QTSave")
def save(session: Session, trace: Trace, arguments: bytes) -> bytes:
    raise TargetError("the stub writes no files: use tsave without -r, which saves on the client's side")


@packet("qTStatus")
def status(session: Session, trace: Trace, arguments: bytes) -> bytes:
    buffer, reason = trace.buffer, trace.reason.encode()
    words = trace.stop_note if trace.reason == "tstop" else trace.error
    if trace.reason in ("tstop", "terror"):
        reason += b":" + hexlify(words.encode())
    times = trace.started // trace.rate, trace.ended // trace.rate
    room = len(buffer), buffer.created, buffer.free, buffer.size
    return b";".join((
        b"T%d;%b:%x" % (trace.running, reason, trace.stopping),
        b"tframes:%x;tcreated:%x;tfree:%x;tsize:%x" % room,
        b"circular:%d;disconn:%d" % (buffer.circular, trace.disconnected),
        b"starttime:%x;stoptime:%x" % times,
        b"username:%b;notes:%b" % (hexlify(trace.user.encode()), hexlify(trace.notes.encode())),
    ))  # fmt: skip


@packet("qTP")
def point_status(session: Session, trace: Trace, arguments: bytes) -> bytes:
    point = _existing(trace, arguments)
    return b"V%x:%x" % (point.hits, point.usage)


# -- what is asked back


@packet("qTfP")
def first_definition(session: Session, trace: Trace, arguments: bytes) -> bytes:
    session.pieces = []
    for point in trace.points.values():
        where = b"%x:%x" % (point.number, point.address)
        condition = point.condition
        tail = b":X%x,%b" % (len(condition.code), hexlify(condition.code)) if condition is not None else b""
        enabled = b"E" if point.enabled else b"D"
        session.pieces.append(b"T%b:%b:%x:%x%b" % (where, enabled, point.steps, point.passes, tail))
        session.pieces += [b"%b%b:%b" % (b"S" if step else b"A", where, action) for step, action in point.texts]
        for kind, words in point.sources:
            data = words.encode()
            session.pieces.append(b"Z%b:%b:0:%x:%b" % (where, kind.encode(), len(data), hexlify(data)))
    return more_definitions(session, trace, arguments)


@packet("qTsP", "qTsV")
def more_definitions(session: Session, trace: Trace, arguments: bytes) -> bytes:
    return session.pieces.pop(0) if session.pieces else b"l"


@packet("qTfV")
def first_variable(session: Session, trace: Trace, arguments: bytes) -> bytes:
    session.pieces = [
        b"%x:%x:%d:%b" % (which, variable.initial, variable.builtin, hexlify(variable.name.encode()))
        for which, variable in trace.variables.items()
    ]
    return more_definitions(session, trace, arguments)


@packet("qTV")
def variable(session: Session, trace: Trace, arguments: bytes) -> bytes:
    """In a frame what was collected there, else what it is now; unknown before the first run."""
    which = number(arguments)
    if session.frame is not None:
        found = session.frame.variables.get(which)
    else:
        found = trace.value(which) if which in trace.variables and (trace.started or which == TIMESTAMP) else None
    return b"U" if found is None else b"V%x" % found


# -- frames


@packet("QTFrame")
def select(session: Session, trace: Trace, arguments: bytes) -> bytes:
    """A frame by number, or the next one that a form of the packet describes; none when there is none any more."""
    kind, found, rest = arguments.partition(b":")
    if not found:
        index = number(arguments)
        if index & 0xFFFFFFFF == 0xFFFFFFFF:
            session.frame = None
            return b"OK"
        return _look_at(session, trace.buffer[index] if index < len(trace.buffer) else None)
    low, _, high = rest.partition(b":")
    first, last = number(low), number(high or low)
    searches: dict[bytes, Callable[[Frame], bool]] = {
        b"tdp": lambda frame: frame.tracepoint == first,
        b"pc": lambda frame: trace.pc(frame) == first,
        b"range": lambda frame: first <= trace.pc(frame) <= last,
        b"outside": lambda frame: not first <= trace.pc(frame) <= last,
    }
    if kind not in searches:
        raise TargetError(f"{kind[:20]!r} finds no frames: use pc, tdp, range or outside")
    return _look_at(session, trace.find(-1 if session.frame is None else session.frame.number, searches[kind]))


def _look_at(session: Session, frame: Frame | None) -> bytes:
    if frame is None:
        return b"F-1"
    session.frame = frame
    return b"F%xT%x" % (frame.number, frame.tracepoint)


@packet("qTBuffer")
def read_buffer(session: Session, trace: Trace, arguments: bytes) -> bytes:
    """The frames as trace files have them; made when the beginning is read.

    GDB writes into the file that a register block is as long as `g` was, or as all registers if it has not asked for `g`.
    """
    offset, length = address_length(arguments)
    if not offset or b"trace" not in session.documents:
        session.documents[b"trace"] = b"".join(trace.export(whole=not session.block_read))
    document = session.documents[b"trace"]
    if offset >= len(document):
        del session.documents[b"trace"]
        return b"l"
    return hexlify(document[offset : offset + min(length, PACKET_SIZE // 2 - 1)])

