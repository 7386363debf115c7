"""What an emulator implements to be debugged: one required protocol and optional capabilities.

The stub looks once which capabilities the target's class has (the protocols below, see `offers`), and announces exactly
those. All calls come from the one thread that runs the event loop, and none while
`run_slice` is active. A method that cannot do what it is asked raises `TargetError`; its message reaches the user.

Addresses are integers of 0 .. 2**64-1 as the client sends them; sizes are bytes; registers are little endian.
"""

import enum
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeGuard, TypeVar, cast, runtime_checkable
from weakref import WeakKeyDictionary

from gdbstub.description import Description

if TYPE_CHECKING:
    from gdbstub.agent import Program
    from gdbstub.trace import Trace

__all__ = [
    "CONTINUE",
    "NOBODY",
    "STEP",
    "Action",
    "Attentive",
    "BreakpointKind",
    "BreakpointPrograms",
    "Created",
    "Event",
    "ExecFile",
    "Exited",
    "Files",
    "Inferior",
    "Kill",
    "Libraries",
    "Library",
    "MemoryMap",
    "MemoryRegion",
    "MemoryRegions",
    "Monitor",
    "NonStop",
    "Output",
    "Programs",
    "Reason",
    "Run",
    "Signal",
    "Space",
    "Spaces",
    "StepFlag",
    "StepFlags",
    "Stop",
    "Target",
    "TargetError",
    "Thread",
    "ThreadEnded",
    "ThreadId",
    "ThreadStarted",
    "Tracepoints",
    "offers",
]


class TargetError(Exception):
    """The target cannot do what the client asked; the message names the value, the rule and the remedy."""


class Signal(enum.IntEnum):
    """Signal numbers of the protocol (GDB's own, which are not every system's)."""

    NONE = 0
    INT = 2
    ILL = 4
    TRAP = 5
    ABRT = 6
    FPE = 8
    KILL = 9
    BUS = 10
    SEGV = 11


class ThreadId(NamedTuple):
    """A thread: both numbers are positive and stable for the thread's life; a tid is unique within its pid only."""

    pid: int
    tid: int


NOBODY = ThreadId(0, 0)
"""No thread: processes are numbered from 1."""


@dataclass(frozen=True, slots=True)
class Inferior:
    """A process: `name` and `state` are what `info os processes` shows (one line each)."""

    pid: int
    name: str
    state: str = ""


@dataclass(frozen=True, slots=True)
class Thread:
    """A thread of an inferior: `name` is short ("vCPU 0"), `state` free text behind it ("halted"), `core` a number."""

    tid: int
    name: str
    core: int | None = None
    state: str = ""


class BreakpointKind(enum.IntEnum):
    """The digit of Z and z packets."""

    SOFTWARE = 0
    HARDWARE = 1
    WRITE = 2
    READ = 3
    ACCESS = 4


@dataclass(frozen=True, slots=True)
class Action:
    """What a thread does when the machine resumes.

    step
        Stop after one instruction; with a range, stop at the first instruction outside `start` <= pc < `end`.
    signal
        Number to deliver first (packets C and S), 0 for none. A machine without signals ignores it.
    """

    step: bool = False
    signal: int = 0
    start: int = 0
    end: int = 0


CONTINUE = Action()
STEP = Action(step=True)


class Reason(enum.Enum):
    """Why a thread stopped; the value is the key in the stop reply."""

    NONE = ""  # a step, a signal, an interrupt
    SWBREAK = "swbreak"
    HWBREAK = "hwbreak"
    WATCH = "watch"
    RWATCH = "rwatch"
    AWATCH = "awatch"


@dataclass(frozen=True, slots=True)
class Stop:
    """A thread stopped. pc is the address of the breakpoint itself, never behind it.

    `address` is the data address that fired a watchpoint. `signal` is SIGTRAP for breakpoints, watchpoints and steps;
    others tell the user what happened (SIGSEGV for a triple fault ...). `text` says more: lldb shows it as
    the reason, other clients on their console.
    """

    thread: ThreadId
    signal: int = Signal.TRAP
    reason: Reason = Reason.NONE
    address: int = 0
    text: str = ""


@dataclass(frozen=True, slots=True)
class Exited:
    """An inferior is gone: `inferiors()` no longer lists it. `signal` killed it, or else it ended with `status`."""

    pid: int
    status: int = 0
    signal: int = 0


@dataclass(frozen=True, slots=True)
class Created:
    """An inferior appeared: `thread` is its first thread, `parent` the thread that made it.

    A client that takes fork events and is attached to the parent is told, as of a fork: GDB prints
    "[Detaching after fork from child process N]", or attaches at once under `set detach-on-fork off`.  What it attached to
    so is told to execute the image of `ExecFile` when it is first resumed.
    """

    thread: ThreadId
    parent: ThreadId


@dataclass(frozen=True, slots=True)
class ThreadStarted:
    """A live inferior has one more thread.  A client that asked for thread events is told; then the thread stands still."""

    thread: ThreadId


@dataclass(frozen=True, slots=True)
class ThreadEnded:
    """A thread of a live inferior is gone: `threads` no longer lists it."""

    thread: ThreadId


@dataclass(frozen=True, slots=True)
class Output:
    """Text for the client's console, sent while the machine runs on."""

    text: str


Event = Stop | Exited | Created | ThreadStarted | ThreadEnded | Output


class Target(Protocol):
    """The machine. It is stopped, between two instructions, whenever `run_slice` is not active."""

    def inferiors(self) -> Sequence[Inferior]:
        """Every live inferior, attached or not; a client that connects is attached to the first one."""

    def threads(self, pid: int) -> Sequence[Thread]:
        """The threads of a live inferior, at least one. Called for every resume: make it cheap."""

    def description(self, pid: int) -> Description:
        """The registers of the inferior's threads and its architecture, as they are when a client attaches to it."""

    def attach(self, pid: int) -> None:
        """From now on the client is told of this inferior's stops. TargetError if that is impossible."""

    def detach(self, pid: int) -> None:
        """The client lets go of a live inferior; its breakpoints have been removed, but for those with commands that are to
        go on without it. From now on it runs freely whenever the machine runs."""

    def read_registers(self, thread: ThreadId) -> bytes:
        """The register block: the description's `block_size` bytes, registers in order without gaps."""

    def write_registers(self, thread: ThreadId, block: bytes) -> None:
        """Set all registers of the block (exactly `block_size` bytes)."""

    def read_register(self, thread: ThreadId, number: int) -> bytes | None:
        """One register, in or outside the block, of the size in the description; None if it has no value now."""

    def write_register(self, thread: ThreadId, number: int, value: bytes) -> None:
        """Set one register (exactly its size). TargetError if it is read-only or the value is not allowed."""

    def read_memory(self, thread: ThreadId, address: int, length: int) -> bytes:
        """Memory as the thread sees it: the longest readable prefix of the range, b"" if its first byte is not
        readable. `address + length` <= 2**64, `length` <= 0x20000. No side effects (accessed bits, device reads)."""

    def write_memory(self, thread: ThreadId, address: int, data: bytes) -> None:
        """Write all of `data`, past write protection, or nothing and raise TargetError."""

    def insert_breakpoint(self, kind: BreakpointKind, address: int, length: int, thread: ThreadId) -> None:
        """Stop any thread of `thread`'s inferior that executes at (or writes, reads, accesses) the address, and none of
        another inferior. The client has this thread selected: where the address means several things, it means what it
        does to that one. `length` is the watched length in bytes (watchpoints) or the instruction kind (1 on x86).
        Never called twice for the same breakpoint without a remove between."""

    def remove_breakpoint(self, kind: BreakpointKind, address: int, length: int, pid: int) -> None:
        """Undo `insert_breakpoint`; only called for an inserted one, of a live inferior."""

    def resume(self, actions: Mapping[ThreadId, Action]) -> None:
        """Set what each thread does in the slices that follow; runs nothing yet.

        A thread of an attached inferior that the mapping omits holds still; threads of inferiors that are not attached
        run. A machine whose inferiors share CPUs (a hypervisor and its guest) runs a thread that should hold still
        where the others could not go on without it. A breakpoint at the pc it resumes from stops a thread at once:
        clients take their breakpoint out and step before they go on, and other threads may have come to it unreported.
        """

    def run_slice(self) -> Event | None:
        """Run for about a millisecond at most, or until something happened; None if nothing did.

        After an event the machine is stopped. Called again without `resume`, it goes on with the same actions (so for
        events the client does not want). A machine that idles sleeps here, no longer than the millisecond.
        """

    def halt(self) -> ThreadId:
        """The client interrupts, between two slices: drop the actions, and name the thread that was executing."""


_Capability = TypeVar("_Capability")
_offered: WeakKeyDictionary[type, dict[object, bool]] = WeakKeyDictionary()


def offers(target: Target, capability: Callable[..., _Capability]) -> TypeGuard[_Capability]:
    """Whether a target has a capability. Targets of one class have the same: `isinstance` looks at every member of a
    protocol each time, which takes longer than most replies."""
    known = _offered.setdefault(type(target), {})
    if capability not in known:
        known[capability] = isinstance(target, cast(type, capability))
    return known[capability]


@runtime_checkable
class Attentive(Protocol):
    """Stops for the client sooner than at the end of a slice."""

    def watch_input(self, descriptor: int) -> None:
        """From now on `run_slice` may return early, with None, where this file descriptor can be read: the client asks
        for something, to stop perhaps. -1: there is no client."""


@runtime_checkable
class NonStop(Protocol):
    """Threads that stop one by one while the others run (`set non-stop on`, QNonStop).

    The first `hold` begins it: then each thread of an attached inferior runs, unless it is held, and what is not attached
    runs. A thread whose `Stop` is returned by `run_slice` is held from then on. `resume` and `halt` end it.
    Registers and memory of threads that run are read, and memory is written, between slices; so are breakpoints put in.
    """

    def hold(self, threads: Collection[ThreadId]) -> None:
        """These stand still from now on. They are not reported."""

    def go(self, actions: Mapping[ThreadId, Action]) -> None:
        """These threads, which are held, run from now on."""

    def moves(self) -> bool:
        """Whether anything could execute now, so that slices are worth running."""


class StepFlag(enum.IntFlag):
    """What a single step is, in QEMU's words (its `sstep` packets)."""

    ENABLE = 1
    NOIRQ = 2
    """The handlers of interrupts are passed over, not stepped into."""
    NOTIMER = 4
    """Timers stand still while the debugger has stopped the machine."""


@runtime_checkable
class StepFlags(Protocol):
    """QEMU's packets for what single steps do (qqemu.sstepbits, qqemu.sstep, Qqemu.sstep)."""

    def step_flags(self) -> StepFlag:
        """Those in force."""

    def set_step_flags(self, flags: StepFlag) -> None:
        """TargetError for a combination that is impossible."""


@runtime_checkable
class Monitor(Protocol):
    """`monitor` commands (qRcmd)."""

    def monitor(self, command: str, write: Callable[[str], object], thread: ThreadId) -> None:
        """Carry out a command line; each `write` reaches the client at once. TargetError for a failed command.

        `thread` is whose command it is, `NOBODY` where there is no inferior any more.
        """


@runtime_checkable
class Run(Protocol):
    """`run` and `start` in extended mode (vRun): restart the machine."""

    def run(self, program: str, arguments: Sequence[str]) -> int:
        """Restart and stop before the first instruction; "" means the current program. The pid to attach to.
        All former inferiors are gone, and their breakpoints with them."""


@runtime_checkable
class Kill(Protocol):
    """`kill` (vKill, k)."""

    def kill(self, pid: int) -> None:
        """End an inferior: afterwards `inferiors()` does not list it."""


@dataclass(frozen=True, slots=True)
class MemoryRegion:
    """`start` <= address < `start` + `length`. `permissions` is of "rwx", "" for a hole; `kind` is ram or rom."""

    start: int
    length: int
    permissions: str = "rwx"
    name: str = ""
    kind: str = "ram"


@runtime_checkable
class MemoryMap(Protocol):
    """`info mem` (qXfer:memory-map). GDB refuses accesses outside the map: offer one only where it is complete."""

    def memory_map(self, pid: int) -> Sequence[MemoryRegion]:
        """Ascending regions without overlap."""


@runtime_checkable
class MemoryRegions(Protocol):
    """lldb's `memory region` (qMemoryRegionInfo)."""

    def memory_region(self, thread: ThreadId, address: int) -> MemoryRegion:
        """The mapping, or the hole, around the address."""


@runtime_checkable
class ExecFile(Protocol):
    """The image that holds an inferior's symbols (qXfer:exec-file)."""

    def exec_file(self, pid: int) -> str:
        """Absolute path, "" if none is known. GDB opens it through `Files` if the target offers that.

        `info inferiors` shows it, with "target:" in front."""


@runtime_checkable
class Files(Protocol):
    """Files that clients may read (vFile); clients reach no others."""

    def read_file(self, name: str) -> bytes | None:
        """The contents of a file the target offers under this name, else None."""


@dataclass(frozen=True, slots=True)
class Space:
    """A space of addresses in which an inferior's memory may be named. `name` is one word.

    thread
        Whether an address means another byte for another thread of the inferior.
    physical
        Whether this is the one that QEMU's physical memory mode means.
    """

    name: str
    thread: bool = False
    physical: bool = False


@runtime_checkable
class Spaces(Protocol):
    """Several address spaces: lldb's extension, QEMU's physical memory mode, and a monitor command of the target's.

    The first space of an inferior is that of `Target.read_memory` and of breakpoints. What memory packets mean without a
    word about it is what was chosen last since a client attached to the inferior, at first the first one.
    """

    def spaces(self, pid: int) -> Sequence[Space]:
        """Those of a live inferior, at least one, always in this order."""

    def chosen_space(self, pid: int) -> int:
        """Index of the chosen one. Called for every memory packet: make it cheap."""

    def choose_space(self, pid: int, index: int) -> None:
        """From now on, until the client detaches or the inferior is gone."""

    def read_space(self, thread: ThreadId, index: int, address: int, length: int) -> bytes:
        """As `Target.read_memory`, in the space of this index."""

    def write_space(self, thread: ThreadId, index: int, address: int, data: bytes) -> None:
        """As `Target.write_memory`, in the space of this index."""


@dataclass(frozen=True, slots=True)
class Programs:
    """What decides whether a breakpoint hits, and what it then does: agent expressions (`agent.Program`)."""

    conditions: "tuple[Program, ...]" = ()
    commands: "tuple[Program, ...]" = ()


@runtime_checkable
class BreakpointPrograms(Protocol):
    """Conditions and commands of breakpoints to execute, without the client's help: `break ... if` with `set breakpoint
    condition-evaluation target`, `dprintf` with `set dprintf-style agent`. `hits.judge` evaluates them for any target."""

    def set_programs(self, kind: BreakpointKind, address: int, length: int, pid: int, programs: Programs) -> None:
        """Give an inserted breakpoint programs, in place of those that it had; removing it removes them.

        It hits if it has no condition, or one that is not zero, or one that cannot be evaluated. A hit stops the thread
        before the instruction; with commands it does not, they are evaluated, and what they print is an `Output`. What does
        not stop is not seen by the inferior.
        """


@runtime_checkable
class Tracepoints(Protocol):
    """Tracepoints: `trace`, `actions`, `tstart`, `tfind`. `trace.Trace` knows what to collect and keeps it; it outlives the
    client. The target calls `Trace.reached` where a thread is about to execute at one of `Trace.armed`, and `Trace.stepped`
    after each instruction of a thread in `Trace.stepping`; or collects in ways of its own."""

    trace: "Trace"

    def trace_owner(self, pids: Sequence[int], address: int) -> int:
        """Whose a tracepoint at an address is.  GDB does not say, and defines those of all inferiors while one is selected:
        that is the first of `pids`, the others are attached."""

    def arm_trace(self) -> None:
        """`trace.armed` may be another set now. Called while the machine is stopped, or between two slices."""

    def flush_trace(self) -> None:
        """Somebody is about to look at `trace`, or to change it and call `arm_trace`: its frames, counters and
        variables must be there."""


@dataclass(frozen=True, slots=True)
class Library:
    """A file with symbols that is not where it was linked to be: its first segment is at `address`."""

    name: str
    address: int


@runtime_checkable
class Libraries(Protocol):
    """Relocated symbols (qXfer:libraries): `info sharedlibrary` lists them."""

    def libraries(self, pid: int) -> Sequence[Library]:
        """Those of a process. GDB opens them by name through `Files`, as it attaches and for the command sharedlibrary."""
