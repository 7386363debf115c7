"""The machine as a target of the GDB stub: the hypervisor and each guest are inferiors, CPUs and vCPUs are threads."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from gdbstub.description import Description, x86
from gdbstub.target import (
    Action,
    BreakpointKind,
    Created,
    Exited,
    Inferior,
    MemoryRegion,
    Output,
    Reason,
    Signal,
    Stop,
    TargetError,
    Thread,
    ThreadId,
)  # fmt: skip
from gdbstub.target import Event as StubEvent
from introspect.exits import EVENT, exit_name
from vmdbg.boot.elf import is_elf64
from vmdbg.breakpoints import Breakpoint, Breakpoints, Watchpoint
from vmdbg.contexts import Context, LiveContext, SavedContext, locate, read_memory, write_memory
from vmdbg.cpu.faults import Kind
from vmdbg.cpu.processor import Processor
from vmdbg.history import HOST, KnownGuest, Vcpu
from vmdbg.machine import Event, Machine
from vmdbg.monitor import Monitor
from vmdbg.options import UsageError
from vmdbg.spaces import Spaces
from vmdbg.stepping import Place, Stepping

if TYPE_CHECKING:
    from vmdbg.cpu.core import Cpu
    from vmdbg.svm.guest import Guest

WIDE = "i386:x86-64"
PAGE = 4096
LEAST_TICKS, MOST_TICKS = 2_000, 2_000_000
SLICE_SECONDS = 0.001

_REASONS = {
    BreakpointKind.SOFTWARE: Reason.SWBREAK, BreakpointKind.HARDWARE: Reason.HWBREAK,
    BreakpointKind.WRITE: Reason.WATCH, BreakpointKind.READ: Reason.RWATCH, BreakpointKind.ACCESS: Reason.AWATCH,
}  # fmt: skip

_description = cache(x86)

_NO_CODE = b"S0030000FC\r\nS9030000FC\r\n"
"""A file of Motorola S-records without data.  Every gdb takes it for an executable: one of no architecture, which so goes
with the registers of any mode."""


def _title(guest: KnownGuest, vcpu: Vcpu, parent: int) -> str:
    under = f" under guest {parent}" if parent != HOST else ""
    return f"{guest.name}{under} asid={vcpu.asid} vmcb={vcpu.vmcb:#x}"


class Debugger(Spaces):
    """One machine under a stub; also a `Monitor`, `Run`, `Kill`, `ExecFile`, `Files`, `MemoryRegions` and `Spaces` target."""

    def __init__(self, machine: Machine, restart: Callable[[Sequence[str]], Machine] | None = None) -> None:
        """`restart` makes the machine anew for `run`, with these words as the image's command line if there are any."""
        super().__init__()
        self.restart = restart
        self.monitor_commands = Monitor(self)
        self.symbols: dict[int, Path] = {}
        """Symbol files assigned to inferiors, by pid."""
        self.architectures: dict[int, str] = {}
        """Register descriptions chosen by hand, by pid."""
        self._offered: dict[str, Path | None] = {}
        """What clients may read: every name that `exec_file` gave, since gdb opens it later again, and what is there."""
        self._use(machine)

    def _use(self, machine: Machine) -> None:
        self.machine = machine
        self.history = machine.history
        self.history.on_switch = self._on_switch
        self.breakpoints = Breakpoints(machine, self._first_context)
        self.stop_codes: dict[int, int | None] = {}
        """EXITCODEs to stop on next, to the guest they are for (None: any)."""
        self._descriptions: dict[int, Description] = {}
        self._acting: dict[ThreadId, Action] = {}
        """The threads that the client resumed; others run where these could not go on without them, and never stop."""
        self._resting: set[ThreadId] = set()
        """Threads of the same inferiors that it did not resume."""
        self._stepping: Stepping | None = None
        self._events: deque[StubEvent] = deque()
        self._told_of_passing = False
        self._ticks = LEAST_TICKS
        self._known: set[int] = set()
        self._version = -1
        self._exit_stop: Stop | None = None
        self._ended = False

    # Inferiors and threads

    def inferiors(self) -> Sequence[Inferior]:
        if self._ended:
            return []
        return [Inferior(HOST, "hypervisor")] + [
            Inferior(number, guest.name) for number, guest in self.history.guests.items() if not guest.gone
        ]

    def threads(self, pid: int) -> Sequence[Thread]:
        if pid == HOST:
            return [
                Thread(cpu.index + 1, f"CPU {cpu.index}", cpu.index, self._cpu_state(cpu)) for cpu in self.machine.cpus
            ]
        guest = self.guest(pid)
        parent = self.history.parent(guest)
        return [
            Thread(
                vcpu.thread, _title(guest, vcpu, parent), vcpu.running_on,
                "in host" if vcpu.running_on is None else f"running on CPU {vcpu.running_on}",
            )
            for vcpu in guest.vcpus.values()
        ]  # fmt: skip

    def _cpu_state(self, cpu: Processor) -> str:
        if cpu.guest is not None:
            return f"in guest {self.history.by_vmcb[cpu.guest.vmcb][0].number}"
        if cpu.wait_for_sipi:
            return "waiting for SIPI"
        return "halted" if cpu.halted else "running"

    def guest(self, pid: int) -> KnownGuest:
        guest = self.history.guests.get(pid)
        if guest is None or guest.gone:
            raise TargetError(f"there is no guest {pid}; `monitor guests` lists them")
        return guest

    def _vcpu(self, thread: ThreadId) -> Vcpu:
        for vcpu in self.guest(thread.pid).vcpus.values():
            if vcpu.thread == thread.tid:
                return vcpu
        raise TargetError(f"guest {thread.pid} has no vCPU {thread.tid}; `info threads` lists them")

    def context(self, thread: ThreadId) -> Context:
        """Where the thread's registers and memory are now."""
        cpus = self.machine.cpus
        if thread.pid != HOST:
            vcpu = self._vcpu(thread)
            if vcpu.running_on is not None:
                return LiveContext(cpus[vcpu.running_on])
            view = self.machine.ram.view[vcpu.vmcb : vcpu.vmcb + PAGE]
            return SavedContext(self.machine.cpu, view, vcpu, self.history.change)
        if not 1 <= thread.tid <= len(cpus):
            raise TargetError(f"there is no CPU {thread.tid - 1}; `info threads` lists them")
        cpu = cpus[thread.tid - 1]
        return LiveContext(cpu) if cpu.guest is None else SavedContext(cpu, cpu.host_save_area(), None)

    def thread_on(self, cpu: Cpu) -> ThreadId:
        """The thread that a CPU executes now."""
        if cpu.guest is None:
            return ThreadId(HOST, cpu.index + 1)
        guest, vcpu = self.history.by_vmcb[cpu.guest.vmcb]
        return ThreadId(guest.number, vcpu.thread)

    def description(self, pid: int) -> Description:
        """As it was when a client attached: its register block keeps its layout through all changes of mode."""
        return self._descriptions.get(pid) or _description(self._architecture(pid))

    def _architecture(self, pid: int) -> str:
        """Chosen by hand, or of the symbols, or of the mode the inferior is in.

        A hypervisor counts as 64-bit before it gets there, unless it starts in real mode.
        """
        if pid in self.architectures:
            return self.architectures[pid]
        if pid == HOST and self.machine.image.mode != "real":
            return WIDE
        path = self.symbols.get(pid)
        if path is not None and is_elf64(path):
            return WIDE
        context = self.context(self._first_thread(pid))
        if (context.read("efer") or 0) & 0x500:  # LME, LMA
            return WIDE
        return "i386" if (context.read("cr0") or 0) & 1 and context.code32() else "i8086"

    def attach(self, pid: int) -> None:
        if pid != HOST:
            self.guest(pid)
        self._descriptions[pid] = _description(self._architecture(pid))

    def detach(self, pid: int) -> None:
        self._descriptions.pop(pid, None)
        self.forget_space(pid)

    # Registers and memory

    def read_registers(self, thread: ThreadId) -> bytes:
        description = self.description(thread.pid)
        context = self.context(thread)
        return b"".join(
            ((context.read(r.name) or 0) & ((1 << r.bits) - 1)).to_bytes(r.bits // 8, "little")
            for r in description.registers[: description.block_count]
        )

    def write_registers(self, thread: ThreadId, block: bytes) -> None:
        description = self.description(thread.pid)
        context = self.context(thread)
        at = 0
        for register in description.registers[: description.block_count]:
            size = register.bits // 8
            value = int.from_bytes(block[at : at + size], "little")
            at += size
            if value != (context.read(register.name) or 0) & ((1 << register.bits) - 1):
                self._write(context, register.name, value)

    def read_register(self, thread: ThreadId, number: int) -> bytes | None:
        register = self.description(thread.pid).registers[number]
        value = self.context(thread).read(register.name)
        if value is None:
            return None
        return (value & ((1 << register.bits) - 1)).to_bytes(register.bits // 8, "little")

    def write_register(self, thread: ThreadId, number: int, value: bytes) -> None:
        name = self.description(thread.pid).registers[number].name
        self._write(self.context(thread), name, int.from_bytes(value, "little"))

    @staticmethod
    def _write(context: Context, name: str, value: int) -> None:
        if not context.write(name, value):
            raise TargetError(
                f"{name} cannot be set to {value:#x} in this thread: it would need a descriptor, or is not saved; "
                "stop where the thread executes, or let the program load it"
            )

    def read_memory(self, thread: ThreadId, address: int, length: int) -> bytes:
        return read_memory(self.machine.ram, self.context(thread), address, length)

    def write_memory(self, thread: ThreadId, address: int, data: bytes) -> None:
        bad = write_memory(self.machine.ram, self.context(thread), address, data)
        if bad is not None:
            raise TargetError(
                f"{bad:#x} is not mapped to memory in process {thread.pid}, so nothing was written; "
                "`monitor walk` shows why"
            )

    def memory_region(self, thread: ThreadId, address: int) -> MemoryRegion:
        start = address & ~(PAGE - 1)
        mapped = locate(self.machine.ram, self.context(thread), start) is not None
        return MemoryRegion(start, PAGE, "rwx" if mapped else "")

    # Breakpoints

    def insert_breakpoint(self, kind: BreakpointKind, address: int, length: int, thread: ThreadId) -> None:
        self.breakpoints.insert(kind, address, length, thread.pid, self.context(thread))

    def remove_breakpoint(self, kind: BreakpointKind, address: int, length: int, pid: int) -> None:
        self.breakpoints.remove(kind, address, length, pid)

    def _first_context(self, pid: int) -> Context | None:
        return self.context(self._first_thread(pid)) if self._alive(pid) else None

    def _first_thread(self, pid: int) -> ThreadId:
        return ThreadId(pid, self.threads(pid)[0].tid)

    def _alive(self, pid: int) -> bool:
        return pid == HOST or (pid in self.history.guests and not self.history.guests[pid].gone)

    # Running

    def resume(self, actions: Mapping[ThreadId, Action]) -> None:
        self._acting = dict(actions)
        pids = {thread.pid for thread in actions}
        self._resting = {ThreadId(pid, t.tid) for pid in pids for t in self.threads(pid)} - actions.keys()
        self._stepping = next((self._step(t, action) for t, action in actions.items() if action.step), None)
        if self._stepping is None:
            self.breakpoints.forget_removed()
        self.breakpoints.arm()
        self.breakpoints.guard()

    def _acts(self, thread: ThreadId) -> bool:
        """Whether the client expects stops of a thread: it resumed it, or the thread is new in what it resumed."""
        return thread in self._acting or (
            thread not in self._resting and any(other.pid == thread.pid for other in self._acting)
        )

    def _step(self, thread: ThreadId, action: Action) -> Stepping:
        return Stepping(thread, action, self._place(self.context(thread)))

    @staticmethod
    def _place(context: Context) -> Place:
        return Place(context.read("rip") or 0, context.read("rsp") or 0)

    def halt(self) -> ThreadId:
        thread = self._reported(self.thread_on(self.machine.cpu))
        self._stepping = None
        self._events = deque(event for event in self._events if not isinstance(event, Stop))
        return thread

    def _reported(self, thread: ThreadId) -> ThreadId:
        """The thread to tell the client of: a client that let some threads run only expects one of them to stop."""
        acting = [t for t in self._acting if self._alive(t.pid)]
        if self._acts(thread) or not acting:
            return thread
        return next((t for t in acting if t.pid == thread.pid), acting[0])

    def run_slice(self) -> StubEvent | None:
        until = time.perf_counter() + SLICE_SECONDS
        while not self._events:
            event = self._advance()
            self._notice_guests()
            if event is not None:
                self._events.append(event)
            elif time.perf_counter() >= until:
                return None
        event = self._events.popleft()
        if isinstance(event, Stop):
            self._stepping = None
            if self._acting and not self._acts(event.thread):
                return None  # of a resume that another event ended
        return event

    def _advance(self) -> StubEvent | None:
        """Run a little; an event if something happened that the client must know."""
        stepping = self._stepping
        self.history.watching = bool(stepping is not None or self.stop_codes or self.breakpoints.watchpoints)
        if stepping is not None and self._alive(stepping.thread.pid):
            return self._advance_step(stepping)
        self._stepping = None
        return self._run(bool(self.breakpoints))

    def _run(self, breakpoints: bool, watch: Processor | None = None) -> StubEvent | None:
        """Run for about `SLICE_SECONDS`: what that is in guest time, world switches and devices decide."""
        started = time.perf_counter()
        event = self.machine.run(self._ticks, breakpoints=breakpoints, watch=watch)
        factor = SLICE_SECONDS / (time.perf_counter() - started)
        self._ticks = min(max(int(self._ticks * min(factor, 2)), LEAST_TICKS), MOST_TICKS)
        return self._happened(event)

    def _advance_step(self, stepping: Stepping) -> StubEvent | None:
        machine, thread = self.machine, stepping.thread
        cpu = machine.turn(machine.clock.now + self._ticks)
        if isinstance(cpu, Event):
            return self._happened(cpu)
        if self.thread_on(cpu) != thread:
            return self._run_others(stepping)
        here = self._place(LiveContext(cpu))
        if stepping.back is not None:
            if here != stepping.back:
                return self._run_others(stepping)
            stepping.back = None
            self.breakpoints.arm()
        if stepping.ends_at(here.pc):
            return Stop(thread)
        if self._hit(cpu):
            return self._happened(Event.BREAKPOINT)
        stepping.start = here
        started = cpu.wait_for_sipi
        outcome = machine.step(cpu)
        stays = self.thread_on(cpu) == thread
        if outcome == Event.INTERRUPTED and not started:
            # A guest that left by a #VMEXIT is met again at its next VMRUN.
            stepping.back = here if stays else None
            if stays:
                self.breakpoints.arm(here.pc)
        elif outcome != Event.WATCHED:
            stepping.executed |= stays or thread.pid == HOST
        event = self._happened(outcome)
        if event is None and stays and stepping.back is None and stepping.ends_at(cpu.state.linear_rip):
            return Stop(thread)
        return event

    def _run_others(self, stepping: Stepping) -> StubEvent | None:
        """The stepping thread is not at its instruction: go on until it is, or until its CPU has its turn."""
        breakpoints = bool(self.breakpoints) or stepping.back is not None
        waiting = next((c for c in self.machine.cpus if self.thread_on(c) == stepping.thread), None)
        watch = waiting if waiting is not self.machine.cpu else None
        return self._run(breakpoints, watch)

    def _on_switch(self, cpu: Cpu, guest: Guest, code: int | None) -> None:
        """A world switch: pause if somebody waits for what it brings."""
        assert isinstance(cpu, Processor)
        owner, vcpu = self.history.by_vmcb[guest.vmcb]
        thread = ThreadId(owner.number, vcpu.thread)
        stepping = self._stepping
        if code is None:
            if self._version != self.history.version:
                cpu.pause = True
            if stepping is not None and stepping.thread == thread:
                event = guest.eventinj
                injected = Kind(EVENT.get(event, "type")) if event & EVENT.v else None
                stepping.entered(self._place(SavedContext(cpu, guest.view, vcpu)), injected)
                if stepping.back is not None:
                    self.breakpoints.arm(stepping.back.pc)
                cpu.pause = True
            return
        if self.breakpoints.watchpoints:
            self.breakpoints.remap(owner.number)
        if stepping is not None and stepping.thread == (HOST, cpu.index + 1):
            cpu.pause = True
        if self._acting and code in self.stop_codes and self.stop_codes[code] in (None, owner.number):
            del self.stop_codes[code]
            self._exit_stop = Stop(self._reported(thread), text=f"#VMEXIT {exit_name(code)} of {owner.name}")
            cpu.pause = True

    def _hit(self, cpu: Processor) -> Breakpoint | None:
        """The breakpoint at the CPU's RIP that belongs to the thread it executes, and to its address space."""
        thread, pc = self.thread_on(cpu), cpu.state.linear_rip
        points = self.breakpoints.at(pc, thread.pid)
        if not points:
            return None
        context = LiveContext(cpu)
        point = next((point for point in points if self.breakpoints.owns(point, context)), None)
        if point is None:
            for other in points:
                self._pass(other, context.paging().root)
            return None
        if self._acts(thread):
            return point
        if not self._told_of_passing:
            self._told_of_passing = True
            self._events.append(Output(
                f"[inferior {thread.pid} ran past its breakpoint at {pc:#x}: the debugger resumed "
                "others only; `set schedule-multiple on` makes gdb resume all]\n"
            ))  # fmt: skip
        return None

    def _pass(self, point: Breakpoint, root: int | None) -> None:
        """A breakpoint does not hit, for the address space is another; its user is told once."""
        if not point.passes:
            assert point.home is not None
            elsewhere = "with paging off" if root is None else f"under the page tables at {root:#x}"
            self._events.append(Output(
                f"[process {point.pid} passes its breakpoint at {point.address:#x} {elsewhere}: it belongs to those at "
                f"{point.home.root:#x}; `monitor breakpoints any` has it hit in every address space]\n"
            ))  # fmt: skip
        point.passes += 1

    def _happened(self, event: Event) -> StubEvent | None:
        machine = self.machine
        cpu = machine.cpu
        if self._exit_stop is not None:
            stop, self._exit_stop = self._exit_stop, None
            return stop
        if self.history.stopped_for and self._acting:
            text, self.history.stopped_for = self.history.stopped_for, ""
            return Stop(self._reported(self.thread_on(cpu)), text=f"[{text}]")
        if event == Event.BREAKPOINT:
            point = self._hit(cpu)
            if point is not None:
                self.breakpoints.hit(point, LiveContext(cpu))
                return Stop(self.thread_on(cpu), reason=_REASONS[point.kind])
            stepping = self._stepping
            if stepping is not None and stepping.back == self._place(LiveContext(cpu)):
                return None
            return self._happened(machine.step(cpu))
        if event == Event.WATCHED:
            return self._watched(cpu)
        if event == Event.EXIT:
            return self._machine_ended()
        if event == Event.IDLE:
            time.sleep(SLICE_SECONDS)
            machine.poll_input()
        elif self.breakpoints.stored:
            self.breakpoints.stored = False
            return self._fired(self.thread_on(cpu), self.breakpoints.fired([]), "")
        return None

    def _machine_ended(self) -> StubEvent | None:
        machine = self.machine
        if any(cpu.shutdown for cpu in machine.cpus):
            return Stop(self._reported(self.thread_on(machine.cpu)), Signal.SEGV, text=machine.ended)
        if not self._ended:
            self._ended = True
            self._events += [Output(f"[{machine.ended}]\n"), Exited(HOST, (machine.exit_status or 0) & 0xFF)]
            self._events += [Exited(number) for number, guest in self.history.guests.items() if not guest.gone]
            return None
        return Exited(HOST, 0)

    def _watched(self, cpu: Processor) -> StubEvent | None:
        """Execute the instruction that accesses a watched page, and see whether it touched the watched bytes."""
        thread, pc = self.thread_on(cpu), cpu.state.linear_rip
        event, fired = self.breakpoints.execute(cpu)
        stepping = self._stepping
        if stepping is not None and stepping.thread == thread:
            stepping.executed |= thread.pid == HOST or self.thread_on(cpu) == thread
        stop = self._fired(thread, fired, f"by {self._name(thread)} at {pc:#x}")
        return stop or (self._happened(event) if event != Event.WATCHED else None)

    def _fired(self, thread: ThreadId, fired: Sequence[Watchpoint], text: str) -> StubEvent | None:
        """A stop for the first watchpoint whose inferior was told to run."""
        for point in fired:
            owners = [t for t in self._acting if t.pid == point.pid]
            if owners:
                point.hits += 1
                where = thread if thread.pid == point.pid and self._acts(thread) else owners[0]
                text = f"[{point.address:#x} was accessed {text}]" if text and where != thread else ""
                return Stop(where, reason=_REASONS[point.kind], address=point.address, text=text)
        return None

    def _name(self, thread: ThreadId) -> str:
        return f"CPU {thread.tid - 1} of the hypervisor" if thread.pid == HOST else self.guest(thread.pid).name

    def _notice_guests(self) -> None:
        """Tell of guests that appeared and went since the last look."""
        if self._version == self.history.version:
            return
        self._version = self.history.version
        alive = {number for number, guest in self.history.guests.items() if not guest.gone}
        for number in sorted(self._known - alive):
            self.breakpoints.forget(number)
            self.forget_space(number)
            self._events.append(Exited(number))
        for number in sorted(alive - self._known):
            self._events.append(Created(self._first_thread(number), ThreadId(HOST, self.machine.cpu.index + 1)))
        self._known = alive

    # Monitor, run, kill, files

    def monitor(self, command: str, write: Callable[[str], object], thread: ThreadId) -> None:
        self.monitor_commands.run(command, write, thread)

    def run(self, program: str, arguments: Sequence[str]) -> int:
        if self.restart is None:
            raise TargetError("this machine cannot start again; start vmdbg anew")
        if program and Path(program).resolve() not in self._own_files():
            raise TargetError(f"{program} is not the machine's image; `run` without a program starts that one again")
        self.machine.close()
        self._ended = True
        rule = self.breakpoints.rule
        try:
            self._use(self.restart(arguments))
            self.breakpoints.rule = rule
        except UsageError as error:
            raise TargetError(str(error)) from None
        return HOST

    def kill(self, pid: int) -> None:
        if pid != HOST:
            raise TargetError(f"guest {pid} belongs to its hypervisor: kill process 1, or detach from the guest")
        self.machine.exit(0)
        self.machine.ended = "killed by the debugger"
        self._ended = True

    def exec_file(self, pid: int) -> str:
        """The inferior by name, for gdb's `info inferiors` shows no other text of ours: a guest is a folder with the file
        of its symbols, or an empty file."""
        path = self._executable(pid)
        name = "/hypervisor" if pid == HOST else f"/{self.threads(pid)[0].name}"
        if path is not None:
            name = str(path.resolve()) if pid == HOST else f"{name}/{path.name}"
        self._offered[name] = path
        return name

    def _executable(self, pid: int) -> Path | None:
        """A symbol file that goes with the registers: gdb takes the architecture of an executable for that of the thread,
        and refuses a description that contradicts it.  16-bit code goes with none."""
        path, architecture = self._symbol_file(pid), self.description(pid).architecture
        fits = path is not None and architecture != "i8086" and is_elf64(path) == (architecture == WIDE)
        return path if fits else None

    def _own_files(self) -> set[Path]:
        source, symbols = self.machine.source, self._symbol_file(HOST)
        return {Path(f).resolve() for f in (source, symbols, self.exec_file(HOST)) if isinstance(f, str | Path)}

    def _symbol_file(self, pid: int) -> Path | None:
        return self.symbols.get(pid) or (self.machine.image.debug_file if pid == HOST else None)

    def read_file(self, name: str) -> bytes | None:
        if name not in self._offered:
            return None
        path = self._offered[name]
        try:
            return _NO_CODE if path is None else path.read_bytes()
        except OSError:
            return None
