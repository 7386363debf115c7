"""The machine as a target of the GDB stub: the hypervisor and each guest are inferiors, CPUs and vCPUs are threads."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

from gdbstub.description import Description
from gdbstub.target import (
    NOBODY,
    Action,
    BreakpointKind,
    Event,
    Inferior,
    Library,
    MemoryRegion,
    Programs,
    StepFlag,
    TargetError,
    Thread,
    ThreadId,
)  # fmt: skip
from gdbstub.trace import Trace
from vmdbg.block import Block
from vmdbg.boot.elf import is_elf64
from vmdbg.breakpoints import EXECUTE, Breakpoints
from vmdbg.catchpoints import Catchpoints
from vmdbg.contexts import Context, LiveContext, read_memory, write_memory
from vmdbg.executables import WIDE, Executables
from vmdbg.history import HOST, KnownGuest
from vmdbg.inferiors import Inferiors
from vmdbg.machine import Machine
from vmdbg.monitor import Monitor
from vmdbg.options import UsageError
from vmdbg.platform.clock import TICKS_PER_SECOND
from vmdbg.regions import region
from vmdbg.registers import Registers, description
from vmdbg.running import Running
from vmdbg.spaces import Spaces
from vmdbg.timetravel.file import IMPOSSIBLE, impossible
from vmdbg.timetravel.snapshot import Snapshot, put_back, take
from vmdbg.watchpoints import Watchpoints

log = logging.getLogger(__name__)
_SNAPSHOTS = frozenset(("snapshot", "snapshots", "restore"))
"""What may be asked behind the machine's end."""


class Debugger(Spaces):
    """One machine under a stub; also a `Monitor`, `Run`, `Kill`, `ExecFile`, `Files`, `MemoryRegions`, `Spaces`,
    `BreakpointPrograms` and `Tracepoints` target."""

    def __init__(
        self, machine: Machine, restart: Callable[[Sequence[str]], Machine] | None = None, file: str | None = None
    ) -> None:  # fmt: skip
        """`restart` makes the machine anew for `run`, with these words as the image's command line if there are any; `file` is
        the snapshot that it was made of."""
        self.restart, self.file = restart, file
        self.monitor_commands = Monitor(self)
        self.executables = Executables()
        self.architectures: dict[int, str] = {}
        """Register descriptions chosen by hand, by pid."""
        self._input = -1
        self.snapshots: dict[str, Snapshot] = {}
        """By name, in the order in which they were taken."""
        self.restoring: list[Callable[[], AbstractContextManager[None]]] = []
        """Who has to do something before a snapshot is restored, and behind it."""
        self.starting_over: list[Callable[[], None]] = []
        """Who is told when another machine has taken this one's place, before its first instruction."""
        self.trace = Trace(self, lambda: self.machine.clock.now, TICKS_PER_SECOND // 1_000_000)
        self._use(machine)

    def _use(self, machine: Machine, former: Catchpoints | None = None) -> None:
        """`former`: the catchpoints of the machine before, which stay."""
        self.machine = machine
        self.history = machine.history
        self.who = Inferiors(machine)
        self.registers = Registers(self.who)
        self.breakpoints = Breakpoints(machine)
        self.watchpoints = Watchpoints(machine, self.breakpoints, self.who.first_context)
        self.catchpoints = Catchpoints(self.registers, former)
        self.running = Running(machine, self.who, self.breakpoints, self.watchpoints, self.catchpoints, self, self.trace)
        self.running.input = self._input
        self.executables.image = machine.image.debug_file
        self._descriptions: dict[int, Description] = {}
        self._blocks: dict[int, Block] = {}
        self.chosen_spaces = {}
        for told in self.starting_over:
            told()

    # Inferiors and threads

    def inferiors(self) -> Sequence[Inferior]:
        return [] if self.running.ended else self.who.living()

    def threads(self, pid: int) -> Sequence[Thread]:
        return self.who.threads(pid)

    def guest(self, pid: int) -> KnownGuest:
        return self.who.guest(pid)

    def context(self, thread: ThreadId) -> Context:
        """Where the thread's registers and memory are now."""
        return self.who.context(thread)

    def description(self, pid: int) -> Description:
        """As it was when a client attached: its register block keeps its layout through all changes of mode."""
        return self._descriptions.get(pid) or description(self._architecture(pid))

    def _architecture(self, pid: int) -> str:
        """Chosen by hand, or of the symbols, or of the mode the inferior is in.

        A hypervisor counts as 64-bit before it gets there, unless it starts in real mode.
        """
        if pid in self.architectures:
            return self.architectures[pid]
        if pid == HOST and self.machine.image.mode != "real":
            return WIDE
        path = self.executables.symbols.get(pid)
        if path is not None and is_elf64(path):
            return WIDE
        context = self.context(self.who.first_thread(pid))
        if (context.read("efer") or 0) & 0x500:  # LME, LMA
            return WIDE
        return "i386" if (context.read("cr0") or 0) & 1 and context.code32() else "i8086"

    def attach(self, pid: int) -> None:
        if pid != HOST:
            self.guest(pid)
        self._descriptions[pid] = description(self._architecture(pid))
        self._blocks.pop(pid, None)
        self.running.resumed.attached.add(pid)

    def detach(self, pid: int) -> None:
        self._descriptions.pop(pid, None)
        self._blocks.pop(pid, None)
        self.chosen_spaces.pop(pid, None)
        self.running.let_go(pid)

    # Registers and memory

    def read_registers(self, thread: ThreadId) -> bytes:
        described = self.description(thread.pid)
        context = self.context(thread)
        if isinstance(context, LiveContext):
            block = self._blocks.get(thread.pid)
            if block is None:
                block = self._blocks[thread.pid] = Block(described)
            return block.read(context)
        return b"".join(
            ((context.read(r.name) or 0) & ((1 << r.bits) - 1)).to_bytes(r.bits // 8, "little")
            for r in described.registers[: described.block_count]
        )

    def write_registers(self, thread: ThreadId, block: bytes) -> None:
        described = self.description(thread.pid)
        at = 0
        for register in described.registers[: described.block_count]:
            size = register.bits // 8
            value = int.from_bytes(block[at : at + size], "little")
            at += size
            if value != (self.registers.read(thread, register.name) or 0) & ((1 << register.bits) - 1):
                self.registers.write(thread, register.name, value)

    def read_register(self, thread: ThreadId, number: int) -> bytes | None:
        register = self.description(thread.pid).registers[number]
        value = self.registers.read(thread, register.name)
        if value is None:
            return None
        return (value & ((1 << register.bits) - 1)).to_bytes(register.bits // 8, "little")

    def write_register(self, thread: ThreadId, number: int, value: bytes) -> None:
        name = self.description(thread.pid).registers[number].name
        self.registers.write(thread, name, int.from_bytes(value, "little"))

    def read_memory(self, thread: ThreadId, address: int, length: int) -> bytes:
        return read_memory(self.machine.ram, self.context(thread), address, length)

    def write_memory(self, thread: ThreadId, address: int, data: bytes) -> None:
        if self.read_memory(thread, address, len(data)) == data:
            return  # nothing changes, and the run stays what it was
        bad = write_memory(self.machine.ram, self.context(thread), address, data)
        if bad is not None:
            raise TargetError(
                f"{bad:#x} is not mapped to memory in process {thread.pid}, so nothing was written; "
                "`monitor walk` shows why"
            )
        self.machine.outside("debugger", f"memory {thread.pid}.{thread.tid} {address:#x} ".encode() + data)

    def memory_region(self, thread: ThreadId, address: int) -> MemoryRegion:
        return region(self.machine.ram, self.context(thread), address)

    def memory_map(self, pid: int) -> Sequence[MemoryRegion]:
        """Every linear address: what lies behind it is for the page tables to say, and they change."""
        half = 1 << 63
        return [MemoryRegion(0, half), MemoryRegion(half, half)]

    # Breakpoints

    def insert_breakpoint(self, kind: BreakpointKind, address: int, length: int, thread: ThreadId) -> None:
        self.running.agents.forget()
        points = self.breakpoints if kind in EXECUTE else self.watchpoints
        points.insert(kind, address, length, thread.pid, self.context(thread))
        self._changed()

    def remove_breakpoint(self, kind: BreakpointKind, address: int, length: int, pid: int) -> None:
        self.running.agents.forget()
        points = self.breakpoints if kind in EXECUTE else self.watchpoints
        points.remove(kind, address, length, pid)
        self._changed()

    def _changed(self) -> None:
        """A breakpoint came or went: while threads run, that counts at once."""
        if self.running.holds.active:
            self.running.rearm()

    def set_programs(self, kind: BreakpointKind, address: int, length: int, pid: int, programs: Programs) -> None:
        self.running.agents.forget()
        points = self.breakpoints if kind in EXECUTE else self.watchpoints
        points.set_programs(kind, address, length, pid, programs)

    def trace_owner(self, pids: Sequence[int], address: int) -> int:
        """One whose file has something there, else one without a file, and at last one whose file has not; of equal ones the
        first.  A hypervisor may map its guests' addresses, too."""
        mapped = [pid for pid in pids if self.read_memory(self.who.first_thread(pid), address, 1)] or list(pids)
        return min(mapped, key=lambda pid: {True: 0, None: 1, False: 2}[self.executables.holds(pid, address)])

    def arm_trace(self) -> None:
        self.running.agents.judge.clear()
        self.breakpoints.traced = frozenset(address for _, address in self.trace.armed)
        self.breakpoints.arm()

    def flush_trace(self) -> None:
        self.running.agents.judge.flush()

    # Running

    def resume(self, actions: Mapping[ThreadId, Action]) -> None:
        self.running.resume(actions)

    def watch_input(self, descriptor: int) -> None:
        self.running.input = self._input = descriptor

    def run_slice(self) -> Event | None:
        """TargetError where the machine of a file comes to what somebody must have invented."""
        try:
            return self.running.run_slice()
        except IMPOSSIBLE as error:
            if self.file is None:
                raise
            log.info("what happened:", exc_info=True)
            raise TargetError(impossible(self.file, error)) from None

    def halt(self) -> ThreadId:
        return self.running.halt()

    def hold(self, threads: Collection[ThreadId]) -> None:
        self.running.hold(threads)

    def go(self, actions: Mapping[ThreadId, Action]) -> None:
        self.running.go(actions)

    def moves(self) -> bool:
        return self.running.moves()

    def step_flags(self) -> StepFlag:
        return self.running.resumed.manner.flags

    def set_step_flags(self, flags: StepFlag) -> None:
        if not flags & StepFlag.ENABLE:
            raise TargetError("single steps cannot be switched off here: set ENABLE (1), too")
        self.running.resumed.manner.flags = flags

    # Snapshots

    def snapshot(self, name: str) -> Snapshot:
        """Keep the machine as it is under a name.  Raises `SnapshotError`."""
        latest = next(reversed(self.snapshots.values()), None)
        taken = take(self.machine, latest)
        self.snapshots.pop(name, None)
        self.snapshots[name] = taken
        return taken

    def restore(self, snapshot: Snapshot) -> None:
        """Make the machine what it was at a snapshot of it.  Breakpoints and the like stay; clients are told of nothing."""
        with ExitStack() as stack:
            for each in self.restoring:
                stack.enter_context(each())
            self._restore(snapshot)

    def _restore(self, snapshot: Snapshot) -> None:
        put_back(self.machine, snapshot)
        self._descriptions = {pid: one for pid, one in self._descriptions.items() if self.who.alive(pid)}
        self._blocks.clear()
        self.running.restored()

    # Monitor, run, kill, files

    def monitor(self, command: str, write: Callable[[str], object], thread: ThreadId) -> None:
        if thread == NOBODY:
            if not self.snapshots:
                raise TargetError("the machine has ended: there is nothing to ask")
            if not _SNAPSHOTS & {*command.split()}:
                raise TargetError("the machine has ended: `snapshots` lists where `restore NAME` can go back to")
            thread = ThreadId(HOST, 1)
        self.monitor_commands.run(command, write, thread)

    def run(self, program: str, arguments: Sequence[str]) -> int:
        if self.restart is None:
            raise TargetError("this machine cannot start again; start vmdbg anew")
        if program and not self._is_own_file(program):
            raise TargetError(f"{program} is not the machine's image; `run` without a program starts that one again")
        self.trace.stop()
        self.machine.close()
        self.running.ended = True
        rule, manner = self.breakpoints.rule, self.running.resumed.manner
        try:
            former = self.machine
            self._use(self.restart(arguments), self.catchpoints)
            if not former.is_like(self.machine):
                self.snapshots.clear()
            self.breakpoints.rule, self.running.resumed.manner = rule, manner
        except UsageError as error:
            raise TargetError(str(error)) from None
        return HOST

    def kill(self, pid: int) -> None:
        if pid != HOST:
            raise TargetError(f"guest {pid} belongs to its hypervisor: kill process 1, or detach from the guest")
        self.machine.outside("debugger", b"kill")
        self.machine.exit(0)
        self.machine.ended = "killed by the debugger"
        self.running.ended = True

    def exec_file(self, pid: int) -> str:
        return self.executables.offer(pid, self._title(pid), self.description(pid).architecture)

    def libraries(self, pid: int) -> Sequence[Library]:
        return self.executables.libraries(pid, self._title(pid))

    def _title(self, pid: int) -> str:
        return "hypervisor" if pid == HOST else self.threads(pid)[0].name

    def read_file(self, name: str) -> bytes | None:
        return self.executables.read(name)

    def _is_own_file(self, program: str) -> bool:
        try:
            return Path(program).resolve() in self._own_files()
        except (ValueError, OSError, RuntimeError):
            return False  # no name of a file

    def _own_files(self) -> set[Path]:
        image, symbols = self.machine.files[0].path, self.executables.of(HOST)
        return {Path(f).resolve() for f in (image, symbols, self.exec_file(HOST)) if f}
