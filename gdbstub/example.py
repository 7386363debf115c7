"""A target that needs no emulator: it implements every capability, shows how, and is what the tests run.

Each process has two pages of memory and CPUs that know six real x86 instructions:

    90        nop
    fe 07     inc byte [rdi]            a: rdi points at the data page
    eb rel8   jmp
    cc        int3                      the program's own: stops with SIGTRAP
    f4        hlt                       the process ends with status al
    0f 05     syscall                   a process appears, as guests of a hypervisor do

`python -m gdbstub.example [PORT]` serves it; then `gdb -ex 'target extended-remote :PORT'`.
"""

import asyncio
import select
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from gdbstub.description import Description, Feature, Flags, Register, x86
from gdbstub.hits import ThreadEnvironment, judge
from gdbstub.server import Server, new_event_loop
from gdbstub.target import (
    Action,
    BreakpointKind,
    Created,
    Event,
    Exited,
    Inferior,
    Library,
    MemoryRegion,
    Output,
    Programs,
    Reason,
    Signal,
    Space,
    StepFlag,
    Stop,
    TargetError,
    Thread,
    ThreadId,
)
from gdbstub.trace import Trace

__all__ = ["CODE", "DATA", "LOOP", "PAGE", "Example"]

CODE, DATA, PAGE = 0x1000, 0x2000, 0x1000

# nop x 8; inc byte [rdi]; nop x 4; jmp back to the start
LOOP = b"\x90" * 8 + b"\xfe\x07" + b"\x90" * 4 + b"\xeb\xf0"

_SVM = Feature(
    "org.vmdbg.svm",
    (
        Register("exitcode", 64, "uint64", "svm"),
        Register("asid", 32, "uint32", "svm"),
        Register("gif", 8, Flags("svm_gif", 1, {"GIF": 0}), "svm"),
    ),
    block=False,
)
_WATCHES = {
    BreakpointKind.WRITE: Reason.WATCH,
    BreakpointKind.READ: Reason.RWATCH,
    BreakpointKind.ACCESS: Reason.AWATCH,
}


@dataclass
class _Process:
    name: str
    description: Description
    memory: bytearray
    cpus: dict[int, bytearray] = field(default_factory=dict)  # register blocks

    def get(self, tid: int, name: str) -> int:
        number = self.description.numbers[name]
        start = self.description.offsets[number]
        return int.from_bytes(self.cpus[tid][start : start + self.description.size(number)], "little")

    def set(self, tid: int, name: str, value: int) -> None:
        number = self.description.numbers[name]
        start, size = self.description.offsets[number], self.description.size(number)
        self.cpus[tid][start : start + size] = value.to_bytes(size, "little")


class Example:
    """Two processes from the start: 1 with two threads, which run `program`, and 2 with one."""

    slice = 300  # instructions; about a millisecond

    def __init__(self, program: bytes = LOOP) -> None:
        self.program = program
        self.processes: dict[int, _Process] = {}
        self.points: dict[tuple[int, int], set[tuple[BreakpointKind, int]]] = {}
        self.programs: dict[tuple[int, int], dict[tuple[BreakpointKind, int], Programs]] = {}
        self.hits: dict[tuple[int, int], int] = {}  # of breakpoints by pid and address
        self.trace = Trace(self, lambda: self.executed)
        self.attached: set[int] = set()
        self.held: set[ThreadId] | None = None  # in non-stop mode
        self.flags = StepFlag.ENABLE | StepFlag.NOIRQ | StepFlag.NOTIMER
        self.files: dict[str, bytes] = {"/example/program": b"\x7fELF, or would be"}
        self.relocated: list[Library] = []  # by names in `files`
        self.image = ""  # the name, in `files`, of what process 1 runs
        self.chosen: dict[int, int] = {}
        self.executed = 0
        self.input = -1  # where the client's requests arrive
        self.boot()

    def boot(self) -> None:
        """Power on."""
        self.actions: Mapping[ThreadId, Action] = {}
        self.pending: list[Event] = []
        self.together = False  # as on CPUs that a hypervisor and its guests share: nobody can hold still alone
        self._next = 0
        self.processes.clear()
        self.points.clear()
        self.programs.clear()
        self.attached.clear()
        self.chosen.clear()
        self.create(1, "hypervisor", 2, "i386:x86-64", (_SVM,))
        self.processes[1].memory[: len(self.program)] = self.program
        self.create(2, "guest", 1, "i386")

    def create(self, pid: int, name: str, cpus: int, architecture: str, extra: tuple[Feature, ...] = ()) -> None:
        """Add a process."""
        process = _Process(name, x86(architecture, extra), bytearray(LOOP.ljust(PAGE, b"\x90") + bytes(PAGE)))
        self.processes[pid] = process
        letter = process.description.pc[0]
        for tid in range(1, cpus + 1):
            process.cpus[tid] = bytearray(process.description.block_size)
            process.set(tid, process.description.pc, CODE)
            process.set(tid, letter + "di", DATA)
            process.set(tid, letter + "sp", DATA + PAGE)

    # -- Target: inferiors

    def inferiors(self) -> Sequence[Inferior]:
        return [Inferior(pid, process.name, "awake") for pid, process in self.processes.items()]

    def threads(self, pid: int) -> Sequence[Thread]:
        return [Thread(tid, f"cpu{tid - 1}", core=tid - 1, state="awake") for tid in self.processes[pid].cpus]

    def description(self, pid: int) -> Description:
        return self.processes[pid].description

    def attach(self, pid: int) -> None:
        self.attached.add(pid)

    def detach(self, pid: int) -> None:
        self.attached.discard(pid)
        self.chosen.pop(pid, None)
        if self.held is not None:
            self.held = {thread for thread in self.held if thread.pid != pid}

    # -- Target: registers and memory

    def read_registers(self, thread: ThreadId) -> bytes:
        return bytes(self.processes[thread.pid].cpus[thread.tid])

    def write_registers(self, thread: ThreadId, block: bytes) -> None:
        self.processes[thread.pid].cpus[thread.tid][:] = block

    def read_register(self, thread: ThreadId, number: int) -> bytes | None:
        description = self.processes[thread.pid].description
        start, size = description.offsets[number], description.size(number)
        if number < description.block_count:
            return bytes(self.processes[thread.pid].cpus[thread.tid][start : start + size])
        return None if description.registers[number].name == "exitcode" else (1).to_bytes(size, "little")

    def write_register(self, thread: ThreadId, number: int, value: bytes) -> None:
        description = self.processes[thread.pid].description
        if number >= description.block_count:
            raise TargetError(f"register {description.registers[number].name} is read-only")
        start = description.offsets[number]
        self.processes[thread.pid].cpus[thread.tid][start : start + len(value)] = value

    def read_memory(self, thread: ThreadId, address: int, length: int) -> bytes:
        start = address - CODE
        return bytes(self.processes[thread.pid].memory[start : start + length]) if start >= 0 else b""

    def write_memory(self, thread: ThreadId, address: int, data: bytes) -> None:
        if not CODE <= address <= address + len(data) <= DATA + PAGE:
            raise TargetError(f"{len(data)} bytes at {address:#x} are outside memory: {CODE:#x} .. {DATA + PAGE:#x}")
        self.processes[thread.pid].memory[address - CODE : address - CODE + len(data)] = data

    # -- Target: breakpoints and running

    def insert_breakpoint(self, kind: BreakpointKind, address: int, length: int, thread: ThreadId) -> None:
        if not CODE <= address < DATA + PAGE:
            raise TargetError(f"no breakpoint fits at {address:#x}: memory is {CODE:#x} .. {DATA + PAGE:#x}")
        self.points.setdefault((thread.pid, address), set()).add((kind, length))

    def remove_breakpoint(self, kind: BreakpointKind, address: int, length: int, pid: int) -> None:
        here = self.points[pid, address]
        here.remove((kind, length))
        self.programs.get((pid, address), {}).pop((kind, length), None)
        if not here:
            del self.points[pid, address]

    def resume(self, actions: Mapping[ThreadId, Action]) -> None:
        self.actions, self.held = actions, None

    def halt(self) -> ThreadId:
        self.actions, self.held = {}, None
        pid = next(iter(self.attached or self.processes))
        return ThreadId(pid, next(iter(self.processes[pid].cpus)))

    def hold(self, threads: Collection[ThreadId]) -> None:
        self.held = (self.held or set()).union(threads)

    def go(self, actions: Mapping[ThreadId, Action]) -> None:
        self.held = (self.held or set()).difference(actions)
        running = {thread: action for thread, action in self.actions.items() if thread not in self.held}
        self.actions = {**running, **actions}

    def moves(self) -> bool:
        return bool(self.pending) or any(self._runnable())

    def step_flags(self) -> StepFlag:
        return self.flags

    def set_step_flags(self, flags: StepFlag) -> None:
        if not flags & StepFlag.ENABLE:
            raise TargetError("single steps cannot be switched off: set ENABLE (1)")
        self.flags = flags

    def run_slice(self) -> Event | None:
        if not self.pending:
            event = self._run_slice()
            if event is not None:
                self.pending.append(event)  # behind what its breakpoints have printed
        event = self.pending.pop(0) if self.pending else None
        if isinstance(event, Stop) and self.held is not None:
            self.hold([event.thread])
        return event

    def _run_slice(self) -> Event | None:
        steps = self.actions and all(action.step and not action.end for action in self.actions.values())
        if steps and self.held is None:
            # Stepping one thread need not be fair to the others.
            for thread in self.actions:
                return self._execute(thread) or Stop(thread)
        for _ in range(self.slice):
            if self.input >= 0 and select.select((self.input,), (), (), 0)[0]:
                return None
            threads = list(self._runnable())
            if not threads:
                return None
            self._next = (self._next + 1) % len(threads)
            thread, action = threads[self._next]
            event = self._execute(thread)
            if event is not None:
                return event
            if action.step and not action.start <= self._pc(thread) < action.end:
                return Stop(thread)
        return None

    def _runnable(self) -> Iterator[tuple[ThreadId, Action]]:
        for pid, process in self.processes.items():
            for tid in process.cpus:
                thread = ThreadId(pid, tid)
                if self.held is not None:
                    runs = thread not in self.held
                else:
                    runs = thread in self.actions or self.together or pid not in self.attached
                if runs:
                    yield thread, self.actions.get(thread, Action())

    def _pc(self, thread: ThreadId) -> int:
        process = self.processes[thread.pid]
        return process.get(thread.tid, process.description.pc)

    def _execute(self, thread: ThreadId) -> Event | None:
        """One instruction, unless there is a breakpoint on it."""
        pid, tid = thread
        process = self.processes[pid]
        pc_name = process.description.pc
        pc = process.get(tid, pc_name)
        for kind, reason in ((BreakpointKind.SOFTWARE, Reason.SWBREAK), (BreakpointKind.HARDWARE, Reason.HWBREAK)):
            for point in sorted(point for point in self.points.get((pid, pc), ()) if point[0] == kind):
                programs = self.programs.get((pid, pc), {}).get(point, Programs())
                verdict = judge(programs, ThreadEnvironment(self, thread, self._print), pc)
                self.hits[pid, pc] = self.hits.get((pid, pc), 0) + verdict.hit
                if verdict.stops:
                    return Stop(thread, reason=reason, text=verdict.text)
        self.trace.reached(thread, pc)
        event = self._carry_out(thread, process, pc)
        if thread in self.trace.stepping and pid in self.processes:
            self.trace.stepped(thread)
        return event

    def _print(self, text: str) -> None:
        self.pending.append(Output(text))

    def _carry_out(self, thread: ThreadId, process: _Process, pc: int) -> Event | None:
        """The instruction at pc."""
        pid, tid = thread
        pc_name = process.description.pc
        self.executed += 1
        code = bytes(process.memory[pc - CODE : pc - CODE + 2]) if pc >= CODE else b""
        if code[:1] == b"\x90":
            process.set(tid, pc_name, pc + 1)
        elif code == b"\xfe\x07":
            process.set(tid, pc_name, pc + 2)
            return self._increment(thread, process, process.get(tid, pc_name[0] + "di"))
        elif code[:1] == b"\xeb" and len(code) == 2:
            process.set(tid, pc_name, pc + 2 + int.from_bytes(code[1:], "little", signed=True))
        elif code[:1] == b"\xcc":
            process.set(tid, pc_name, pc + 1)
            return Stop(thread, text="the program's own int3")
        elif code[:1] == b"\xf4":
            status = process.get(tid, pc_name[0] + "ax") & 0xFF
            self.kill(pid)
            return Exited(pid, status)
        elif code == b"\x0f\x05":
            process.set(tid, pc_name, pc + 2)
            child = max(self.processes) + 1
            self.create(child, "guest", 1, process.description.architecture)
            return Created(ThreadId(child, 1), thread)
        else:
            return Stop(thread, Signal.ILL, text=f"no instruction of the example at {pc:#x}")
        return None

    def _increment(self, thread: ThreadId, process: _Process, address: int) -> Event | None:
        if not CODE <= address < DATA + PAGE:
            return Stop(thread, Signal.SEGV, text=f"no memory at {address:#x}")
        process.memory[address - CODE] = (process.memory[address - CODE] + 1) & 0xFF
        for (pid, start), here in self.points.items():
            for kind, length in here:
                if pid == thread.pid and kind in _WATCHES and start <= address < start + length:
                    return Stop(thread, reason=_WATCHES[kind], address=address)
        return None

    # -- optional capabilities

    def watch_input(self, descriptor: int) -> None:
        self.input = descriptor

    def set_programs(self, kind: BreakpointKind, address: int, length: int, pid: int, programs: Programs) -> None:
        self.programs.setdefault((pid, address), {})[kind, length] = programs

    def trace_owner(self, pids: Sequence[int], address: int) -> int:
        return next((pid for pid in pids if self.read_memory(ThreadId(pid, 1), address, 1)), pids[0])

    def arm_trace(self) -> None:
        """Nothing to prepare: `_execute` asks `trace` at each instruction."""

    def flush_trace(self) -> None:
        """Nothing is collected elsewhere."""

    def monitor(self, command: str, write: Callable[[str], object], thread: ThreadId) -> None:
        word, _, rest = command.partition(" ")
        if word == "help":
            write("echo TEXT  say it\nlines N  say N lines\n")
            write("say TEXT  say it when the machine next runs\ntogether  run every process with any\n")
            write("space [NAME]  what memory packets mean: virtual or physical\n")
        elif word == "echo":
            write(rest + "\n")
        elif word == "space" and rest in ("", *(space.name for space in self._SPACES)):
            if thread.pid not in self.attached:
                raise TargetError(f"process {thread.pid} is not attached: attach to it first, for its client's packets are meant")
            names = [space.name for space in self._SPACES]
            self.chosen[thread.pid] = names.index(rest) if rest else self.chosen_space(thread.pid)
            write(names[self.chosen[thread.pid]] + "\n")
        elif word == "lines" and rest.isdecimal() and len(rest) < 6:
            for number in range(int(rest)):
                write(f"line {number}\n")
        elif word == "together":
            self.together = True
        elif word == "say":
            self.pending.append(Output(rest + "\n"))
        else:
            raise TargetError(f"there is no command {command!r}: try help")

    def run(self, program: str, arguments: Sequence[str]) -> int:
        self.boot()
        return 1

    def kill(self, pid: int) -> None:
        del self.processes[pid]
        self.attached.discard(pid)
        self.chosen.pop(pid, None)
        self.actions = {thread: action for thread, action in self.actions.items() if thread.pid != pid}
        self.points = {key: here for key, here in self.points.items() if key[0] != pid}
        self.programs = {key: kinds for key, kinds in self.programs.items() if key[0] != pid}

    def memory_region(self, thread: ThreadId, address: int) -> MemoryRegion:
        regions = (
            MemoryRegion(0, CODE, ""),
            MemoryRegion(CODE, PAGE, "rx", "code"),
            MemoryRegion(DATA, PAGE, "rw", "data"),
            MemoryRegion(DATA + PAGE, (1 << 64) - DATA - PAGE, ""),
        )
        return next(region for region in regions if region.start <= address < region.start + region.length)

    # Physical memory is the pages of all processes, one behind the other.
    _SPACES = (Space("virtual"), Space("physical", physical=True))

    def spaces(self, pid: int) -> Sequence[Space]:
        return self._SPACES

    def chosen_space(self, pid: int) -> int:
        return self.chosen.get(pid, 0)

    def choose_space(self, pid: int, index: int) -> None:
        self.chosen[pid] = index

    def read_space(self, thread: ThreadId, index: int, address: int, length: int) -> bytes:
        if not index:
            return self.read_memory(thread, address, length)
        return b"".join(bytes(p.memory) for p in self.processes.values())[address : address + length]

    def write_space(self, thread: ThreadId, index: int, address: int, data: bytes) -> None:
        if not index:
            self.write_memory(thread, address, data)
            return
        memories = [process.memory for process in self.processes.values()]
        if address + len(data) > 2 * PAGE * len(memories):
            raise TargetError(f"{len(data)} bytes at {address:#x} are outside physical memory: {2 * PAGE * len(memories):#x}")
        for at, byte in enumerate(data, address):
            memories[at // (2 * PAGE)][at % (2 * PAGE)] = byte

    def memory_map(self, pid: int) -> Sequence[MemoryRegion]:
        return [MemoryRegion(CODE, 2 * PAGE)]

    def exec_file(self, pid: int) -> str:
        return self.image if pid == 1 else ""

    def libraries(self, pid: int) -> Sequence[Library]:
        return self.relocated if pid == 1 else []

    def read_file(self, name: str) -> bytes | None:
        return self.files.get(name)


async def _serve(port: int) -> None:
    server = Server(Example())
    print(f"gdb -ex 'target extended-remote :{await server.listen_tcp(port)}'", flush=True)
    await asyncio.get_running_loop().create_future()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(_serve(int(sys.argv[1]) if len(sys.argv) > 1 else 0))
