"""The machine as a target of the GDB stub: the hypervisor is inferior 1, each guest one more, CPUs and vCPUs are threads."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gdbstub.description import Description, x86
from gdbstub.target import (
    CONTINUE, Action, BreakpointKind, Created, Exited, Inferior, MemoryRegion, Output, Reason, Signal, Stop, TargetError,
    Thread, ThreadId,
)  # fmt: skip
from gdbstub.target import Event as StubEvent
from introspect.exits import exit_name
from introspect.vmcb import VMCB
from vmdbg.contexts import Context, LiveContext, SavedContext, locate, read_memory, write_memory
from vmdbg.cpu.operands import accesses
from vmdbg.cpu.processor import Processor
from vmdbg.engine.physical import WATCH_READ, WATCH_WRITE
from vmdbg.history import KnownGuest, Vcpu
from vmdbg.machine import Event, Machine
from vmdbg.monitor import Monitor

if TYPE_CHECKING:
    from vmdbg.cpu.core import Cpu
    from vmdbg.svm.guest import Guest

HOST = 1
PAGE = 4096
SLICE_TICKS = 1_000_000
SLICE_SECONDS = 0.001

_EXECUTE = (BreakpointKind.SOFTWARE, BreakpointKind.HARDWARE)
_FLAGS = {
    BreakpointKind.WRITE: WATCH_WRITE, BreakpointKind.READ: WATCH_READ, BreakpointKind.ACCESS: WATCH_READ | WATCH_WRITE,
}  # fmt: skip
_REASONS = {
    BreakpointKind.SOFTWARE: Reason.SWBREAK, BreakpointKind.HARDWARE: Reason.HWBREAK, BreakpointKind.WRITE: Reason.WATCH,
    BreakpointKind.READ: Reason.RWATCH, BreakpointKind.ACCESS: Reason.AWATCH,
}  # fmt: skip


@dataclass(slots=True)
class Watchpoint:
    """A watched range of one inferior; `spas` are the (spa, length) pieces it lies in now, empty while unmapped."""

    kind: BreakpointKind
    address: int
    length: int
    pid: int
    spas: list[tuple[int, int]]
    value: bytes = b""


@dataclass(slots=True)
class Stepping:
    """A step under way: `thread` executes, perhaps after and before others had to run."""

    thread: ThreadId
    action: Action
    executed: bool = False


class Debugger:
    """One machine under a stub.  Implements `Target`, `Monitor`, `Run`, `Kill`, `ExecFile`, `Files` and `MemoryRegions`."""

    def __init__(self, machine: Machine, restart: Callable[[], Machine] | None = None) -> None:
        self.restart = restart
        self.monitor_commands = Monitor(self)
        self.symbols: dict[int, Path] = {}
        """Symbol files assigned to inferiors, by pid."""
        self.architectures: dict[int, str] = {}
        """Register descriptions chosen by hand, by pid."""
        self._use(machine)

    def _use(self, machine: Machine) -> None:
        self.machine = machine
        self.history = machine.history
        self.history.on_switch = self._on_switch
        self.breakpoints: dict[int, set[tuple[BreakpointKind, int]]] = {}
        """Linear address to the (kind, pid) that stop there."""
        self.watchpoints: list[Watchpoint] = []
        self.attached: set[int] = set()
        self.stop_codes: dict[int, int | None] = {}
        """EXITCODEs to stop on next, to the guest they are for (None: any)."""
        self._stepping: Stepping | None = None
        self._awaited: ThreadId | None = None
        self._skip: tuple[int, int] | None = None
        self._events: deque[StubEvent] = deque()
        self._known: dict[int, KnownGuest] = {}
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
        return [
            Thread(
                vcpu.thread, f"{guest.name} asid={vcpu.asid} vmcb={vcpu.vmcb:#x}", vcpu.running_on,
                "in host" if vcpu.running_on is None else f"running on CPU {vcpu.running_on}",
            )
            for guest in [self.guest(pid)] for vcpu in guest.vcpus.values()
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
            return SavedContext(self.machine.cpu, view, vcpu)
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
        return x86(self.architectures.get(pid) or self._architecture(pid))

    def _architecture(self, pid: int) -> str:
        """From the mode the inferior is in; a hypervisor from a 64-bit image counts as 64-bit before it gets there."""
        if pid == HOST:
            long = self.machine.image.mode != "real"
            return "i386:x86-64" if long else "i8086"
        context = self.context(ThreadId(pid, self.threads(pid)[0].tid))
        efer, cr0 = context.read("efer") or 0, context.read("cr0") or 0
        if efer & 0x500:
            return "i386:x86-64"
        return "i386" if cr0 & 1 and self._code32(context) else "i8086"

    @staticmethod
    def _code32(context: Context) -> bool:
        if isinstance(context, LiveContext):
            return context.cpu.bits != 16
        assert isinstance(context, SavedContext)
        return bool(VMCB.read(context.view, "cs.attrib") & 0x400)

    def attach(self, pid: int) -> None:
        if pid != HOST:
            self.guest(pid)
        self.attached.add(pid)

    def detach(self, pid: int) -> None:
        self.attached.discard(pid)

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
        self._write(self.context(thread), self.description(thread.pid).registers[number].name, int.from_bytes(value, "little"))

    @staticmethod
    def _write(context: Context, name: str, value: int) -> None:
        if not context.write(name, value):
            raise TargetError(f"{name} cannot be set to {value:#x} in this thread; its segment or save area does not allow it")

    def read_memory(self, thread: ThreadId, address: int, length: int) -> bytes:
        return read_memory(self.machine.ram, self.context(thread), address, length)

    def write_memory(self, thread: ThreadId, address: int, data: bytes) -> None:
        bad = write_memory(self.machine.ram, self.context(thread), address, data)
        if bad is not None:
            raise TargetError(f"{bad:#x} is not mapped to memory in {thread.pid}; nothing was written. `monitor walk` shows why")

    def memory_region(self, thread: ThreadId, address: int) -> MemoryRegion:
        start = address & ~(PAGE - 1)
        mapped = locate(self.machine.ram, self.context(thread), start) is not None
        return MemoryRegion(start, PAGE, "rwx" if mapped else "")

    # Breakpoints

    def insert_breakpoint(self, kind: BreakpointKind, address: int, length: int, pid: int) -> None:
        if kind in _EXECUTE:
            self.breakpoints.setdefault(address, set()).add((kind, pid))
            return
        if not 1 <= length <= PAGE:
            raise TargetError(f"a watchpoint of {length} bytes is not possible; watch 1 to {PAGE} bytes")
        self.watchpoints.append(Watchpoint(kind, address, length, pid, []))

    def remove_breakpoint(self, kind: BreakpointKind, address: int, length: int, pid: int) -> None:
        if kind in _EXECUTE:
            owners = self.breakpoints[address]
            owners.discard((kind, pid))
            if not owners:
                del self.breakpoints[address]
            return
        for watchpoint in self.watchpoints:
            if (watchpoint.kind, watchpoint.address, watchpoint.length, watchpoint.pid) == (kind, address, length, pid):
                self.watchpoints.remove(watchpoint)
                break
        self._guard_pages()

    def _guard_pages(self) -> None:
        """Have the engine stop at accesses to exactly the pages that hold watched bytes."""
        machine = self.machine
        wanted: dict[int, int] = {}
        for watchpoint in self.watchpoints:
            watchpoint.spas = self._pieces(watchpoint)
            for spa, _ in watchpoint.spas:
                wanted[spa // PAGE] = wanted.get(spa // PAGE, 0) | _FLAGS[watchpoint.kind]
            watchpoint.value = b"".join(bytes(machine.ram.view[spa : spa + size]) for spa, size in watchpoint.spas)
        physical = machine.engine.physical
        for page in self._guarded.keys() | wanted.keys():
            flags = wanted.get(page, 0)
            if self._guarded.get(page, 0) != flags:
                physical.watch(page, WATCH_READ | WATCH_WRITE, False)
                if flags:
                    physical.watch(page, flags, True)
        self._guarded = wanted

    _guarded: dict[int, int] = {}  # noqa: RUF012 - replaced as a whole, never changed

    def _pieces(self, watchpoint: Watchpoint) -> list[tuple[int, int]]:
        threads = [t for t in self.threads(watchpoint.pid)] if self._alive(watchpoint.pid) else []
        if not threads:
            return []
        context = self.context(ThreadId(watchpoint.pid, threads[0].tid))
        pieces = []
        address, left = watchpoint.address, watchpoint.length
        while left:
            size = min(left, PAGE - address % PAGE)
            spa = locate(self.machine.ram, context, address)
            if spa is not None:
                pieces.append((spa, size))
            address += size
            left -= size
        return pieces

    def _alive(self, pid: int) -> bool:
        return pid == HOST or (pid in self.history.guests and not self.history.guests[pid].gone)

    # Running

    def resume(self, actions: Mapping[ThreadId, Action]) -> None:
        self._stepping = next(
            (Stepping(thread, action) for thread, action in actions.items() if action.step), None
        )
        if self._stepping is None and actions and CONTINUE not in actions.values():
            raise TargetError("no thread was told to run")
        machine = self.machine
        machine.engine.arm(set(self.breakpoints))
        if self.watchpoints:
            self._guard_pages()
        self._skip = (machine.cpu.index, machine.clock.now)

    def halt(self) -> ThreadId:
        self._stepping = None
        self._awaited = None
        return self._reported(self.thread_on(self.machine.cpu))

    def _reported(self, thread: ThreadId) -> ThreadId:
        """A thread of an attached inferior to tell the client of: the one that executes, if it is one."""
        if thread.pid in self.attached or not self.attached:
            return thread
        pid = min(self.attached)
        return ThreadId(pid, self.threads(pid)[0].tid)

    def run_slice(self) -> StubEvent | None:
        if self._events:
            return self._events.popleft()
        until = time.perf_counter() + SLICE_SECONDS
        while True:
            event = self._advance()
            self._notice_guests()
            if event is not None:
                if self._events:
                    self._events.append(event)
                    return self._events.popleft()
                return event
            if self._events:
                return self._events.popleft()
            if time.perf_counter() >= until:
                return None

    def _advance(self) -> StubEvent | None:
        """Run a little; an event if something happened that the client must know."""
        machine = self.machine
        stepping = self._stepping
        if stepping is None:
            return self._happened(machine.run(SLICE_TICKS, breakpoints=bool(self.breakpoints)))
        turn = machine.turn(machine.clock.now + SLICE_TICKS)
        if isinstance(turn, Event):
            return self._happened(turn)
        if not self._alive(stepping.thread.pid):
            self._stepping = None
            return None
        if self.thread_on(turn) != stepping.thread:
            self._await(stepping.thread)
            return self._happened(machine.run(SLICE_TICKS, breakpoints=bool(self.breakpoints), watch=self._watched_cpu()))
        if stepping.executed and not self._in_range(stepping, turn):
            self._stepping = None
            return Stop(stepping.thread)
        if self._hit(turn) and not self._skipped(turn):
            return self._happened(Event.BREAKPOINT)
        stepping.executed = True
        event = self._happened(machine.step(turn))
        if event is None and self._stepping is stepping and self.thread_on(turn) == stepping.thread:
            if not self._in_range(stepping, turn):
                self._stepping = None
                return Stop(stepping.thread)
        return event

    def _in_range(self, stepping: Stepping, cpu: Processor) -> bool:
        return stepping.action.start <= cpu.state.linear_rip < stepping.action.end

    def _await(self, thread: ThreadId) -> None:
        """Pause as soon as this thread is on a CPU whose turn it is."""
        self._awaited = thread

    def _watched_cpu(self) -> Processor | None:
        """The CPU that holds the awaited thread already, but has not its turn."""
        if self._awaited is None:
            return None
        for cpu in self.machine.cpus:
            if cpu is not self.machine.cpu and self.thread_on(cpu) == self._awaited:
                return cpu
        return None

    def _on_switch(self, cpu: Cpu, guest: Guest, code: int | None) -> None:
        """A world switch: pause if somebody waits for what it brings."""
        assert isinstance(cpu, Processor)
        owner, vcpu = self.history.by_vmcb[guest.vmcb]
        if code is None:
            if self._version != self.history.version:
                cpu.pause = True
            if self._awaited == (owner.number, vcpu.thread):
                cpu.pause = True
            return
        if self._awaited == (HOST, cpu.index + 1):
            cpu.pause = True
        if code in self.stop_codes and self.stop_codes[code] in (None, owner.number):
            del self.stop_codes[code]
            thread = ThreadId(owner.number, vcpu.thread)
            if thread.pid not in self.attached:
                thread = self._reported(ThreadId(HOST, cpu.index + 1))
            self._exit_stop = Stop(thread, text=f"#VMEXIT {exit_name(code)} of {owner.name}")
            cpu.pause = True

    def _hit(self, cpu: Processor) -> BreakpointKind | None:
        """The breakpoint of the present inferior at the CPU's RIP."""
        owners = self.breakpoints.get(cpu.state.linear_rip)
        if not owners:
            return None
        pid = self.thread_on(cpu).pid
        return next((kind for kind, owner in owners if owner == pid and owner in self.attached), None)

    def _skipped(self, cpu: Processor) -> bool:
        """Whether the client resumed at this very instruction: then its breakpoint does not hit again."""
        return self._skip == (cpu.index, self.machine.clock.now)

    def _happened(self, event: Event) -> StubEvent | None:
        machine = self.machine
        if self._exit_stop is not None:
            stop, self._exit_stop = self._exit_stop, None
            self._stepping = None
            return stop
        if event == Event.BREAKPOINT:
            cpu = machine.cpu
            kind = self._hit(cpu)
            if kind is None or self._skipped(cpu):
                return self._happened(machine.step(cpu))
            self._stepping = None
            return Stop(self.thread_on(cpu), reason=_REASONS[kind])
        if event == Event.WATCHED:
            return self._watched(machine.cpu)
        if event == Event.EXIT:
            return self._machine_ended()
        if event == Event.IDLE:
            time.sleep(SLICE_SECONDS)
            machine.poll_input()
        return None

    def _machine_ended(self) -> StubEvent:
        if self._ended:
            return Exited(HOST, 0)
        self._ended = True
        for number, guest in self.history.guests.items():
            if not guest.gone:
                self._events.append(Exited(number))
        status = self.machine.exit_status or 0
        if "shut down" in self.machine.ended:
            self._ended = False
            self._events.clear()
            return Stop(self._reported(self.thread_on(self.machine.cpu)), Signal.SEGV, text=self.machine.ended)
        self._events.append(Output(f"vmdbg: {self.machine.ended}\n"))
        self._events.append(Exited(HOST, status & 0xFF))
        return self._events.popleft()

    def _watched(self, cpu: Processor) -> StubEvent | None:
        """Execute the instruction that accesses a watched page, and see whether it touched the watched bytes."""
        machine = self.machine
        ram, physical = machine.ram, machine.engine.physical
        thread = self.thread_on(cpu)
        pc = cpu.state.linear_rip
        touched = [(cpu.translate_quietly(a), size, r, w) for a, size, r, w in accesses(cpu)]
        lifted: dict[int, int] = {}
        event: Event = Event.WATCHED
        while event == Event.WATCHED:
            assert cpu.watched is not None
            page = cpu.watched.watched // PAGE
            if page in lifted:
                break
            lifted[page] = ram.pages[page] & (WATCH_READ | WATCH_WRITE)
            physical.watch(page, WATCH_READ | WATCH_WRITE, False)
            event = machine.step(cpu)
        for page, flags in lifted.items():
            physical.watch(page, flags, True)
        hit: Watchpoint | None = None
        for watchpoint in self.watchpoints:
            value = b"".join(bytes(ram.view[spa : spa + size]) for spa, size in watchpoint.spas)
            changed = value != watchpoint.value
            watchpoint.value = value
            read = watchpoint.kind != BreakpointKind.WRITE and any(
                spa is not None and reads and spa < at + length and at < spa + size
                for spa, size, reads, _ in touched for at, length in watchpoint.spas
            )  # fmt: skip
            if (changed and watchpoint.kind != BreakpointKind.READ) or read:
                hit = hit or watchpoint
        if hit is None or hit.pid not in self.attached:
            return self._happened(event) if event != Event.WATCHED else None
        self._stepping = None
        text = "" if thread.pid == hit.pid else f"accessed by inferior {thread.pid} at {pc:#x}"
        stopped = thread if thread.pid == hit.pid else ThreadId(hit.pid, self.threads(hit.pid)[0].tid)
        return Stop(stopped, reason=_REASONS[hit.kind], address=hit.address, text=text)

    def _notice_guests(self) -> None:
        """Tell of guests that appeared and went since the last look."""
        if self._version == self.history.version:
            return
        self._version = self.history.version
        alive = {number: guest for number, guest in self.history.guests.items() if not guest.gone}
        for number in self._known.keys() - alive.keys():
            self._events.append(Exited(number))
            self.attached.discard(number)
        for number in alive.keys() - self._known.keys():
            parent = ThreadId(HOST, self.machine.cpu.index + 1)
            self._events.append(Created(ThreadId(number, self.threads(number)[0].tid), parent))
        self._known = alive

    # Monitor, run, kill, files

    def monitor(self, command: str, write: Callable[[str], object], thread: ThreadId) -> None:
        self.monitor_commands.run(command, write, thread)

    def run(self, program: str, arguments: Sequence[str]) -> int:
        if self.restart is None:
            raise TargetError("this machine cannot start again; start vmdbg anew")
        if program and Path(program) not in (self.machine.source, self.machine.image.debug_file):
            raise TargetError(f"{program} is not the machine's image; `run` without a program starts that one again")
        self.machine.close()
        self._use(self.restart())
        return HOST

    def kill(self, pid: int) -> None:
        if pid != HOST:
            raise TargetError(f"guest {pid} belongs to its hypervisor and cannot be killed alone; kill inferior 1, or detach")
        self.machine.exit(0)
        self.machine.ended = "killed by the debugger"
        self._ended = True

    def exec_file(self, pid: int) -> str:
        path = self.symbols.get(pid)
        if path is None and pid == HOST:
            path = self.machine.image.debug_file
        return str(path.resolve()) if path is not None else ""

    def read_file(self, name: str) -> bytes | None:
        offered = {str(path.resolve()) for path in self.symbols.values()}
        if self.machine.image.debug_file is not None:
            offered.add(str(self.machine.image.debug_file.resolve()))
        if name not in offered:
            return None
        try:
            return Path(name).read_bytes()
        except OSError:
            return None

