"""One client: what was negotiated, what it is attached to, how packets reach their handlers, what becomes of events."""

import logging
from binascii import hexlify
from collections.abc import Callable, Iterable, Mapping

from gdbstub.channel import Channel
from gdbstub.commands import COMMANDS
from gdbstub.commands.registry import thread_id
from gdbstub.description import Description
from gdbstub.nonstop import NonStopMode
from gdbstub.replies import exit_reply, safe_stop_reply, thread_end_reply
from gdbstub.target import (
    NOBODY,
    Action,
    BreakpointKind,
    Created,
    Event,
    ExecFile,
    Exited,
    NonStop,
    Output,
    Reason,
    Signal,
    Spaces,
    Stop,
    Target,
    TargetError,
    Thread,
    ThreadEnded,
    ThreadId,
    ThreadStarted,
    Tracepoints,
    offers,
)
from gdbstub.trace import Frame

__all__ = ["Session"]

log = logging.getLogger(__name__)

# A breakpoint: kind, address, length, pid.
Point = tuple[BreakpointKind, int, int, int]

_SEPARATORS = {ord("v"): (b";", b":"), ord("q"): (b":", b","), ord("Q"): (b":", b"=", b";"), ord("j"): (b":",)}


class Session(Channel):
    """A client and what it debugs.

    Whoever owns it calls `slice` for as long as `running`, and `receive` between slices. `attach` is the pid the
    client is attached to from the start: the target's first inferior if None, nothing if 0. `kept` are breakpoints that an
    earlier client left behind. Nothing raises but a `write` that does.
    """

    def __init__(
        self, target: Target, write: Callable[[bytes], object], attach: int | None = None, kept: Iterable[Point] = ()
    ) -> None:
        super().__init__(write)
        self.target = target
        self.attached: dict[int, Description] = {}
        # Those that are inserted, and whether they go on without a client.
        self.breakpoints: dict[Point, bool] = dict.fromkeys(kept, True)
        # The trace frame that registers and memory are read from, while the client looks at one.
        self.frame: Frame | None = None
        self.block_read = False  # it knows how long `g` is
        # Definitions of tracepoints or variables that it has not asked for yet.
        self.pieces: list[bytes] = []
        # The threads that later packets mean: H g (registers, memory) and H c (c, s).
        self.general = ThreadId(0, 0)
        self.resumed = ThreadId(-1, -1)
        # What the client announced or switched on.
        self.extended = False
        self.multiprocess = False
        self.thread_suffix = False
        self.list_threads = False
        self.bare_reads = False
        self.thread_events = False
        self.non_stop: NonStopMode | None = None
        self._one_by_one = False  # also where nothing is attached, and the mode has nothing to do
        self.files: dict[int, bytes] = {}
        self.documents: dict[bytes, bytes] = {}
        self.saved_registers: dict[int, tuple[ThreadId, bytes]] = {}
        self.spaces = target if offers(target, Spaces) else None
        # The client awaits a stop reply; or nobody is attached any more and the machine runs on by itself.
        self.running = False
        self.detached = False
        self.stopped: Stop | None = None
        # The threads of the last resume: GDB takes no event of another.
        self.acting: frozenset[ThreadId] = frozenset()
        # Inferiors told as forks, which GDB takes for copies of their parents, executable and breakpoints included.
        self._copies: set[int] = set()
        self._pending_interrupt = False
        if attach is None:
            attach = next((inferior.pid for inferior in target.inferiors()), None)
        if attach:
            try:
                self.attach(attach)
            except Exception as error:
                log.warning("the client starts attached to nothing: %s", error)

    # -- packets

    def dispatch(self, packet: bytes) -> bytes | None:
        handler = COMMANDS.get(packet)
        if handler is not None:
            return handler(self, b"")
        if not packet:
            return b""
        separators = _SEPARATORS.get(packet[0])
        if separators is None:
            handler = COMMANDS.get(packet[:1])
            return b"" if handler is None else handler(self, packet[1:])
        for separator in separators:
            name, found, arguments = packet.partition(separator)
            if found:
                handler = COMMANDS.get(name)
                if handler is not None:
                    return handler(self, arguments)
        for name in (b"qThreadStopInfo", b"qRegisterInfo"):  # the names that run into their arguments
            if packet.startswith(name):
                return COMMANDS[name](self, packet[len(name) :])
        return b""

    def settle(self) -> None:
        """In non-stop mode there may be a stop to tell, or something to run."""
        if self.non_stop is not None:
            self.non_stop.answered()
            self.non_stop.settle()

    # -- threads

    def thread(self, text: bytes) -> ThreadId:
        """The thread a client's thread-id means, the first one for "any" and "all". TargetError if there is none."""
        return self.resolve(thread_id(text))

    def resolve(self, wanted: ThreadId) -> ThreadId:
        """As `thread`, for an id taken apart."""
        pid, tid = wanted
        if pid <= 0:
            pid = self.process()
        if pid not in self.attached:
            raise TargetError(f"process {pid} is not attached: attach to it first")
        threads = self.target.threads(pid)
        if tid <= 0:
            return ThreadId(pid, threads[0].tid)
        for thread in threads:
            if thread.tid == tid:
                return ThreadId(pid, tid)
        raise TargetError(f"process {pid} has no thread {tid}")

    def process(self) -> int:
        """The pid that packets without one mean. TargetError if nothing is attached."""
        if self.general.pid in self.attached:
            return self.general.pid
        for pid in self.attached:
            return pid
        raise TargetError("no process is attached: attach to one first")

    def current(self) -> ThreadId:
        """The thread that registers and memory packets mean. TargetError if nothing is attached."""
        if self.general.pid not in self.attached:
            self.general = self.resolve(ThreadId(0, 0))
        return self.general

    def spoken_for(self) -> ThreadId:
        """The thread that a monitor command means: where nothing is attached, the first there is, or `NOBODY`."""
        if self.attached:
            return self.current()
        for inferior in self.target.inferiors():
            return ThreadId(inferior.pid, self.target.threads(inferior.pid)[0].tid)
        return NOBODY

    def suffixed(self, arguments: bytes) -> tuple[bytes, ThreadId]:
        """A packet's arguments and thread: lldb appends `;thread:ID;` instead of sending H."""
        if self.thread_suffix:
            arguments, found, thread = arguments.partition(b";thread:")
            if found:
                return arguments, self.thread(thread.rstrip(b";"))
            arguments = arguments.rstrip(b";")
        return arguments, self.current()

    def thread_name(self, thread: ThreadId) -> bytes:
        """A thread-id as this client reads it."""
        return b"p%x.%x" % thread if self.multiprocess else b"%x" % thread.tid

    def threads(self) -> list[tuple[ThreadId, Thread]]:
        """The threads of every attached inferior."""
        return [(ThreadId(pid, thread.tid), thread) for pid in self.attached for thread in self.target.threads(pid)]

    # -- inferiors

    def attach(self, pid: int) -> None:
        """Attach the client to an inferior. TargetError if it has none of this pid, or is attached already."""
        if pid in self.attached:
            raise TargetError(f"process {pid} is attached already")
        if all(inferior.pid != pid for inferior in self.target.inferiors()):
            known = ", ".join(f"{inferior.pid} ({inferior.name})" for inferior in self.target.inferiors())
            raise TargetError(f"there is no process {pid}: choose of {known or 'none, the machine is empty'}")
        if self.detached:
            self.detached = False
            self.target.halt()
        description = self.target.description(pid)
        self.target.attach(pid)
        self.attached[pid] = description
        self.general = self.resolve(ThreadId(pid, 0))
        if self.non_stop is not None:
            self.non_stop.hold(ThreadId(pid, thread.tid) for thread in self.target.threads(pid))
        elif self._one_by_one and offers(self.target, NonStop):
            self.non_stop = NonStopMode(self, self.target)

    def attach_copy(self, pid: int) -> None:
        """Attach to a child that is told as a fork: to GDB it is a copy of its parent until it executes its own image."""
        self.attach(pid)
        if b"exec-events+" in self.features:
            self._copies.add(pid)

    def detach(self, pid: int, stay: bool = False) -> None:
        """Let go of an attached inferior; with the last one, the machine runs on by itself, unless it is to `stay`."""
        self._remove_breakpoints(pid)
        self.forget(pid)
        self.target.detach(pid)
        if not self.attached:
            self._without_client()
            self.non_stop = None
            self.running = False
        if not self.attached and not stay:
            self.target.resume({})
            self.detached = True

    def forget(self, pid: int) -> None:
        """An inferior is gone, and its breakpoints with it."""
        self.attached.pop(pid, None)
        self._copies.discard(pid)
        self.breakpoints = {point: persists for point, persists in self.breakpoints.items() if point[3] != pid}
        if self.non_stop is not None:
            self.non_stop.forget(pid)
        if self.stopped is not None and self.stopped.thread.pid == pid:
            self.stopped = None
        self.saved_registers = {key: saved for key, saved in self.saved_registers.items() if saved[0].pid != pid}

    def _remove_breakpoints(self, pid: int) -> None:
        for point in [point for point, persists in self.breakpoints.items() if point[3] == pid and not persists]:
            del self.breakpoints[point]
            self.target.remove_breakpoint(*point)

    def close(self) -> None:
        """The client is gone. The machine stays as it was found: it runs on only if the client has detached from everything,
        or had it running with something to do without a client, a trace or commands of breakpoints."""
        self._closed = True
        running = goes_on = False
        try:
            running = self.halt()
            goes_on = self._without_client()
        except Exception:
            log.exception("the machine did not halt when the client left")
        for pid in list(self.attached):
            try:
                self._remove_breakpoints(pid)
            except Exception:
                log.exception("a breakpoint of process %d stays: the target did not remove it", pid)
            del self.attached[pid]
            try:
                self.target.detach(pid)
            except Exception:
                log.exception("the target did not let go of process %d", pid)
        if running and goes_on:
            self.target.resume({})
            self.detached = True

    def _without_client(self) -> bool:
        """End a trace that is not to go on without a client; whether anything is."""
        target = self.target
        traces = False
        if offers(target, Tracepoints) and target.trace.running:
            target.flush_trace()
            traces = target.trace.leave()
            target.arm_trace()
        return traces or any(self.breakpoints.values())

    # -- running

    def require_stopped(self) -> None:
        """TargetError while the client awaits a stop reply."""
        if self.running and self.non_stop is None:
            raise TargetError("the machine is running: interrupt it first")

    def set_non_stop(self, on: bool) -> None:
        """Change between stopping one by one and all together: everything stands still then."""
        self._one_by_one = on
        if not on and self.non_stop is not None:
            self.halt()
        elif on and self.non_stop is None and offers(self.target, NonStop):
            self.halt()
            self.non_stop = NonStopMode(self, self.target)

    def halt(self) -> bool:
        """Stop without telling; whether the client was awaiting a stop reply."""
        running = self.running and self.non_stop is None
        if self.running or self.non_stop is not None:
            self.running = False
            self.non_stop = None
            if self.target.inferiors():
                self.target.halt()
        return running

    def resume(self, actions: Mapping[ThreadId, Action]) -> None:
        """Resume, and run the first slice at once: a step has been answered when this returns."""
        self.frame = None
        if self.non_stop is not None:
            self.non_stop.resume(actions)
            return
        self.stopped = None
        if self._pending_interrupt:
            self._pending_interrupt = False
            self._report(Stop(self.resolve(next(iter(actions), self.current())), Signal.INT))
            return
        if self._executes(actions):
            return
        self.target.resume(actions)
        self.acting = frozenset(actions)
        self.running = True
        self.slice()

    def _executes(self, actions: Mapping[ThreadId, Action]) -> bool:
        """Whether a child that is resumed for the first time was told to execute its own image instead of its parent's."""
        child = next((thread for thread in actions if thread.pid in self._copies), None)
        image = self.image_of_copy(child.pid, actions) if child is not None else ""
        if child is not None and image:
            self._report(Stop(child), b"exec:%b;" % hexlify(image.encode()))
        return bool(image)

    def image_of_copy(self, pid: int, actions: Mapping[ThreadId, Action]) -> str:
        """The image to execute before an inferior is resumed so; "" for one that needs not.

        Not while a thread steps: GDB would forget the step over the event.
        """
        if pid not in self._copies or any(action.step for action in actions.values()):
            return ""
        self._copies.discard(pid)
        return self.target.exec_file(pid) if offers(self.target, ExecFile) else ""

    def interrupt(self) -> None:
        """^C: stop; or, if the machine has just stopped by itself, stop at once when it is next resumed.

        The client may have sent it before it saw that stop, and may resume without showing it (a condition was false).
        """
        if self.non_stop is not None:
            self.non_stop.interrupt()
        elif self.running:
            try:
                thread = self.target.halt()
            except Exception:
                log.exception("the machine did not halt")
                thread = self._somewhere()
            self._report(Stop(thread if thread.pid in self.attached else self._somewhere(), Signal.INT))
        elif self.stopped is not None:
            self._pending_interrupt = True

    def slice(self) -> None:
        """Run for about a millisecond; tell the client if that ended in something it asked for."""
        try:
            event = self.target.run_slice()
        except Exception as error:
            log.error("the machine failed while running: %s", error, exc_info=not isinstance(error, TargetError))
            if not self.running:
                self.detached = False
                return
            event = Stop(self._somewhere(), Signal.ABRT, text=f"the machine failed while running: {error}")
            if self.non_stop is not None:
                self.non_stop.hold(thread for thread, _ in self.threads())
        if event is not None:
            try:
                self._event(event)
            except Exception:
                log.exception("%s could not be told", event)
        if self.non_stop is not None:
            self.non_stop.settle()

    def _event(self, event: Event) -> None:
        if self.non_stop is not None:
            self.non_stop.event(event)
        elif isinstance(event, Stop):
            if event.thread.pid in self.attached:
                # lldb takes it in the stop reply, but shows that of exceptions only, at which its batch mode ends.
                if event.text and (not self.list_threads or event.reason is Reason.NONE):
                    self.output(event.text + "\n", along=True)
                self._report(event)
        elif isinstance(event, Output):
            if self.running:
                self.output(event.text)
            elif self.detached:
                log.info("%s", event.text.rstrip())
        elif isinstance(event, Exited):
            if event.pid in self.attached:
                self.forget(event.pid)
                self.running = False
                self.send(exit_reply(self, event))
            elif self.detached and not self.target.inferiors():
                self.detached = False
        elif isinstance(event, ThreadStarted):
            if self.running and self.thread_events and event.thread.pid in self.attached:
                self._report(Stop(event.thread), b"create:;")
        elif isinstance(event, ThreadEnded):
            if self.running and self.thread_events and event.thread.pid in self.attached:
                self.running = False
                self.send(thread_end_reply(self, event))
        elif self.running:
            self._created(event)

    def _created(self, event: Created) -> None:
        """Tell of a new inferior: as of a fork where that can work, else in words."""
        if event.thread.pid in self.attached:
            return  # found among the processes and attached to before this was told
        if event.parent in self.acting and self.forks(event):
            self.attach_copy(event.thread.pid)
            self._report(Stop(event.parent), b"fork:%b;" % self.thread_name(event.thread))
        else:
            self.output(self.appearance(event))

    def forks(self, event: Created) -> bool:
        """Whether a new inferior can be told as a fork.

        After a fork GDB takes the child's registers to be laid out like the parent's, without asking.
        """
        parent, pid = self.attached.get(event.parent.pid), event.thread.pid
        new = pid not in self.attached and any(inferior.pid == pid for inferior in self.target.inferiors())
        return parent is not None and new and b"fork-events+" in self.features and parent.alike(self.target.description(pid))

    def appearance(self, event: Created) -> str:
        """A new inferior, in words."""
        names = {inferior.pid: inferior.name for inferior in self.target.inferiors()}
        pid = event.thread.pid
        return f"[process {pid} ({names.get(pid, 'gone already')}) appeared: attach {pid}]\n"

    def _report(self, stop: Stop, extra: bytes = b"") -> None:
        self.running = False
        self.stopped = stop
        self.general = stop.thread
        self.send(safe_stop_reply(self, stop, extra))

    def _somewhere(self) -> ThreadId:
        """A thread to report when the target names none."""
        try:
            return self.current()
        except Exception:
            log.exception("the target names no thread")
            return self.general
