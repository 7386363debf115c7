"""Conditions and tracepoints on machines: what they see and count, alike in C and in Python, and that nothing is changed."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import pytest

from gdbstub.agent import Program, parse
from gdbstub.frames import Frame
from gdbstub.target import CONTINUE, STEP, BreakpointKind, Exited, Output, Programs, Stop, ThreadId
from gdbstub.target import Action as Act
from gdbstub.trace import Action, Memory, Registers, Tracepoint, Variable
from tests.gdbstub.agents import assemble
from vmdbg import judge
from vmdbg.debugger import Debugger
from vmdbg.machine import Config, Machine

Image = Callable[[str], Path]

KINDS = ["native"] * (judge.native is not None) + ["python", "twin"]
"""C deals with hits, if it was built; Python does; there is no C at all."""


def symbols(elf: Path) -> dict[str, int]:
    lines = subprocess.run(["nm", elf], check=True, capture_output=True, text=True).stdout.splitlines()
    return {name: int(address, 16) for address, _, name in (line.split() for line in lines if len(line.split()) == 3)}


def program(text: str) -> Program:
    return parse(assemble(text))


class Bench:
    """A machine under a debugger, without a client."""

    def __init__(self, image: Path, kind: str, **config: Any) -> None:
        self.machine = Machine(image, Config(memory=64 << 20, python_runtime=kind == "twin", **config))
        self.debugger = Debugger(self.machine)
        self.judge = self.debugger.running.agents.judge
        if kind == "python":
            self.judge.available = False
        self.native = kind == "native"
        self.debugger.attach(1)
        self.printed = ""

    def trace(self, *points: Tracepoint) -> None:
        trace = self.debugger.trace
        trace.points = {(point.number, point.address): point for point in points}
        trace.start()
        self.debugger.arm_trace()

    def breakpoint(self, address: int, conditions: Sequence[str], commands: Sequence[str] = (), pid: int = 1) -> None:
        thread = self.debugger.who.first_thread(pid)
        self.debugger.insert_breakpoint(BreakpointKind.SOFTWARE, address, 1, thread)
        programs = Programs(tuple(map(program, conditions)), tuple(map(program, commands)))
        self.debugger.set_programs(BreakpointKind.SOFTWARE, address, 1, pid, programs)

    def step_over(self, address: int) -> None:
        """Past a breakpoint, as clients do it."""
        point = BreakpointKind.SOFTWARE, address, 1
        programs = next(p.programs for p in self.debugger.breakpoints if p.address == address)
        self.debugger.remove_breakpoint(*point, 1)
        self.run(action=STEP)
        self.debugger.insert_breakpoint(*point, ThreadId(1, 1))
        self.debugger.set_programs(*point, 1, programs)

    def run(self, pids: Collection[int] = (1,), action: Act = CONTINUE) -> Stop | Exited:
        """To the next stop of these inferiors, or to the end."""
        debugger = self.debugger
        debugger.resume({ThreadId(pid, thread.tid): action for pid in pids for thread in debugger.threads(pid)})
        while True:
            event = debugger.run_slice()
            if isinstance(event, Output):
                self.printed += event.text
            elif isinstance(event, Exited):
                if event.pid == 1:
                    debugger.flush_trace()
                    return event
            elif isinstance(event, Stop):
                debugger.flush_trace()
                return event

    @property
    def frames(self) -> list[Frame]:
        return list(self.debugger.trace.buffer)


def undebugged(image: Path) -> tuple[int, int | None]:
    machine = Machine(image, Config(memory=64 << 20))
    while machine.exit_status is None:
        machine.run()
    return machine.clock.now, machine.exit_status


def point(number: int, address: int, *actions: Action, pid: int = 1, condition: str | None = None, **more: int) -> Tracepoint:
    own = None if condition is None else program(condition)
    return Tracepoint(number, address, pid, True, more.get("steps", 0), more.get("passes", 0), own, list(actions))


EVERYTHING = Registers((1 << 16) - 1)


@pytest.mark.parametrize("kind", KINDS)
def test_each_instruction_counts_once(image: Image, kind: str) -> None:
    """Though the engine begins it again: for a page of its own tables, a device, or code that is written to."""
    elf = image("hits")
    at = symbols(elf)
    bench = Bench(elf, kind)
    names = ("at_store", "at_device", "at_code", "at_rep", "at_loop")
    points = [point(number + 1, at[name], EVERYTHING) for number, name in enumerate(names)]
    bench.trace(*points)
    assert isinstance(bench.run(), Exited)
    assert [point.hits for point in points] == [50, 20, 10, points[3].hits, 2000]
    assert points[3].hits in (6, 7)  # each iteration, and perhaps the look at the zero
    assert (bench.machine.clock.now, bench.machine.exit_status) == undebugged(elf)
    assert len(bench.frames) == sum(point.hits for point in points)
    assert (bench.judge.hits > 2000) == bench.native


def test_c_and_python_collect_the_same(hypervisor: Path) -> None:
    """In the hypervisor and its guests of all modes, registers and memory and variables, byte by byte."""
    build = hypervisor.parent
    host, long, pae, real = (
        symbols(build / name) for name in ("hypervisor.debug", "guest64.elf", "guestpae.elf", "guestreal.elf")
    )
    found = []
    for kind in KINDS[:2]:
        bench = Bench(hypervisor, kind)
        trace = bench.debugger.trace
        trace.buffer.size = 64 << 20
        trace.variables[2] = Variable("count", 5, 5)
        stack = program("reg 7; trace_quick 64; const 8; add; ref64; const 24; trace; tracev 2; end")
        count = program("getv 2; const 3; mul; setv 2; tracev 2; tracev 1; end")
        points = [
            point(1, host["handle_exit"], EVERYTHING, stack, count),
            point(2, host["handle_exit"], Memory(None, host["guests"], 200), condition="reg 5; const 7; bit_and; log_not; end"),
            point(3, long["work"], EVERYTHING, stack, pid=2),
            point(4, long["tick"], program(f"const {long['counter']}; ref64; pop; tracev 1; const {long['counter']}; trace_quick 8; end"), pid=2),
            *(point(5 + n, address, EVERYTHING, Memory(None, 0x1000, 64), pid=3)
              for n, address in enumerate(sorted(pae.values())[:40])),
            *(point(50 + n, address, EVERYTHING, pid=pid)
              for pid in (4, 5) for n, address in enumerate(sorted(real.values())[:40])),
        ]  # fmt: skip
        bench.trace(*points)
        assert isinstance(bench.run(), Exited)
        assert trace.running
        found.append((bench.frames, [(p.number, p.hits, p.usage) for p in points], trace.value(2), bench.machine.clock.now))
        hits = bench.judge.hits
        assert (hits > 50) == bench.native
    assert found[0] == found[1]
    assert {frame.pid for frame in found[0][0]} >= {1, 2, 3}


@pytest.mark.parametrize("kind", KINDS)
def test_conditions(image: Image, kind: str) -> None:
    elf = image("hits")
    at = symbols(elf)
    bench = Bench(elf, kind)
    bench.breakpoint(at["at_loop"], ["reg 2; const 77; equal; end", f"const {at['counter']}; ref64; const 1000; equal; end"])
    for counter, rcx in ((1000, 1050), (50 + 2000 - 77, 77)):
        assert isinstance(bench.run(), Stop)
        assert int.from_bytes(bench.debugger.read_memory(ThreadId(1, 1), at["counter"], 8), "little") == counter
        assert bench.debugger.context(ThreadId(1, 1)).read("rcx") == rcx
        assert bench.debugger.context(ThreadId(1, 1)).read("rip") == at["at_loop"]
        bench.step_over(at["at_loop"])
    bench.debugger.remove_breakpoint(BreakpointKind.SOFTWARE, at["at_loop"], 1, 1)
    assert isinstance(bench.run(), Exited)
    assert (bench.machine.clock.now, bench.machine.exit_status) == undebugged(elf)
    assert (bench.judge.hits > 1500) == bench.native


@pytest.mark.parametrize("kind", KINDS)
def test_where_a_thread_stops_is_collected_too(image: Image, kind: str) -> None:
    """And variables that a condition sets are the tracepoint's."""
    elf = image("hits")
    at = symbols(elf)
    bench = Bench(elf, kind)
    trace = bench.debugger.trace
    trace.variables[2] = Variable("count", 0, 0)
    traced = point(1, at["at_loop"], EVERYTHING, program("tracev 2; end"))
    bench.trace(traced)
    bench.breakpoint(at["at_loop"], ["getv 2; const 1; add; setv 2; const 6; equal; end"])
    for stop in range(2):
        assert isinstance(bench.run(), Stop)
        assert bench.debugger.context(ThreadId(1, 1)).read("rcx") == 1995 - stop
        assert (traced.hits, len(bench.frames), trace.value(2)) == (6 + stop, 6 + stop, 6)
        bench.step_over(at["at_loop"])
        trace.set_value(2, 5)
        bench.debugger.arm_trace()
    rcx = [int.from_bytes(frame.registers[16:24], "little") for frame in bench.frames if frame.registers is not None]
    assert rcx == list(range(2000, 1993, -1))
    assert [frame.variables[2] for frame in bench.frames] == [0, 1, 2, 3, 4, 5, 5]


@pytest.mark.parametrize("kind", KINDS)
def test_one_by_one(image: Image, kind: str) -> None:
    """In non-stop mode, with breakpoints and tracepoints that come while the thread runs."""
    elf = image("hits")
    at = symbols(elf)
    bench = Bench(elf, kind)
    debugger, thread = bench.debugger, ThreadId(1, 1)
    debugger.hold([thread])
    bench.breakpoint(at["at_device"], ["const 0; end"])
    debugger.go({thread: CONTINUE})
    assert debugger.run_slice() is None
    traced = point(1, at["at_loop"], EVERYTHING)
    bench.trace(traced)
    bench.breakpoint(at["at_loop"], ["reg 2; const 1000; equal; end"])
    while not isinstance(event := debugger.run_slice(), Stop):
        assert not isinstance(event, Exited)
    debugger.flush_trace()
    assert debugger.context(thread).read("rcx") == 1000
    assert traced.hits == len(bench.frames) == 1001
    debugger.hold([])
    debugger.remove_breakpoint(BreakpointKind.SOFTWARE, at["at_loop"], 1, 1)
    debugger.go({thread: CONTINUE})
    while not isinstance(debugger.run_slice(), Exited):
        pass
    debugger.flush_trace()
    assert traced.hits == 2000
    assert (bench.machine.clock.now, bench.machine.exit_status) == undebugged(elf)


def test_what_c_has_dealt_with_is_done(image: Image) -> None:
    """Should the engine stop before the instruction after all, and Python come to it, it is the same execution."""
    elf = image("hits")
    at = symbols(elf)
    bench = Bench(elf, KINDS[0])
    traced = point(1, at["at_loop"], EVERYTHING)
    bench.breakpoint(at["at_loop"], [])
    bench.run()
    bench.trace(traced)
    cpu, state = bench.machine.cpu, bench.judge.state
    reached = bench.debugger.running.agents.reached
    state.last_now, state.last_address, state.last_context = bench.machine.clock.now, at["at_loop"], cpu.state.address
    reached(cpu, ThreadId(1, 1))
    assert traced.hits == 0
    state.last_now -= 1
    reached(cpu, ThreadId(1, 1))
    reached(cpu, ThreadId(1, 1))
    assert traced.hits == 1


@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_be_evaluated_stops(image: Image, kind: str) -> None:
    elf = image("hits")
    at = symbols(elf)
    bench = Bench(elf, kind)
    bench.breakpoint(at["at_loop"], ["reg 2; const 1990; less_unsigned; log_not; if_goto on; const 0x7fffffff0000; ref8; end; on:; const 0; end"])
    stop = bench.run()
    assert isinstance(stop, Stop)
    assert "no memory is readable at 0x7fffffff0000" in stop.text
    assert bench.debugger.context(ThreadId(1, 1)).read("rcx") == 1989


@pytest.mark.parametrize("kind", KINDS)
def test_commands(image: Image, kind: str) -> None:
    elf = image("hits")
    at = symbols(elf)
    bench = Bench(elf, kind)
    bench.breakpoint(at["at_device"], ["reg 2; const 3; rem_unsigned; log_not; end"], [f"const {at['text']}; reg 2; const 0; const 0; printf 2 %d %.8s\\n; end"])
    assert isinstance(bench.run(), Exited)
    lines = [line for line in bench.printed.splitlines() if "string" in line or "a st" in line]
    assert lines == [f"{n} a string" for n in range(18, 0, -3)]
    assert (bench.machine.clock.now, bench.machine.exit_status) == undebugged(elf)


@pytest.mark.parametrize("kind", KINDS)
def test_steps_pass_counts_and_errors(image: Image, kind: str) -> None:
    elf = image("hits")
    at = symbols(elf)
    bench = Bench(elf, kind)
    steps = point(1, at["at_store"], EVERYTHING, steps=3)
    steps.step_actions = [EVERYTHING]
    bench.trace(steps)
    assert isinstance(bench.run(), Exited)
    trace = bench.debugger.trace
    pcs = [trace.pc(frame) for frame in bench.frames]
    assert len(pcs) == 4 * 50
    assert pcs[:4] == pcs[4:8]
    assert pcs[0] < pcs[1] < pcs[2] < pcs[3]
    assert (bench.machine.clock.now, bench.machine.exit_status) == undebugged(elf)

    bench = Bench(elf, kind)
    passing = point(1, at["at_loop"], EVERYTHING, passes=1234)
    bench.trace(passing)
    assert isinstance(bench.run(), Exited)
    trace = bench.debugger.trace
    assert (trace.running, trace.reason, trace.stopping, passing.hits, len(bench.frames)) == (False, "tpasscount", 1, 1234, 1234)

    bench = Bench(elf, kind)
    dividing = point(1, at["at_loop"], EVERYTHING, program("const 1; reg 2; const 1500; sub; div_signed; end"))
    bench.trace(dividing)
    assert isinstance(bench.run(), Exited)
    trace = bench.debugger.trace
    assert (trace.reason, trace.error, len(bench.frames)) == ("terror", "the expression divides by zero", 500)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("circular", [False, True])
def test_the_buffer(image: Image, kind: str, circular: bool) -> None:
    elf = image("hits")
    at = symbols(elf)
    bench = Bench(elf, kind)
    trace = bench.debugger.trace
    trace.buffer.size, trace.buffer.circular = 10_000, circular
    bench.trace(point(1, at["at_loop"], program("reg 7; trace_quick 8; end"), Memory(None, at["counter"], 8)))
    assert isinstance(bench.run(), Exited)
    size = 12 + 2 * (11 + 8)
    assert len(bench.frames) == 10_000 // size
    last = int.from_bytes(bench.frames[-1].blocks[1][1], "little")
    assert last == (50 + 1999 if circular else 50 + 10_000 // size - 1)
    assert (trace.running, trace.buffer.created) == ((True, 2000) if circular else (False, 10_000 // size))


@pytest.mark.parametrize("kind", KINDS)
def test_a_guest_in_several_processes(image: Image, kind: str) -> None:
    """A breakpoint of one process is passed in another whose page at the address is another, which is told once and counted;
    a tracepoint of the guest collects in all of them."""
    elf = image("processes")
    at = symbols(elf)
    bench = Bench(elf, kind)
    user = 0x40000000
    bench.breakpoint(at["after_vmexit"], [])
    bench.run()
    bench.debugger.remove_breakpoint(BreakpointKind.SOFTWARE, at["after_vmexit"], 1, 1)
    bench.debugger.attach(2)
    point = Tracepoint(1, at["kernel"], 2, True, 0, 0, None, [EVERYTHING, Memory(None, user + 16, 8)])
    bench.trace(point)
    bench.breakpoint(at["kernel"], [f"reg 29; const {at['process1']}; equal; end"], pid=2)
    stop = bench.run({2})
    assert isinstance(stop, Stop)
    assert stop.thread.pid == 2
    assert bench.debugger.context(stop.thread).read("cr3") == at["process1"]
    bench.debugger.remove_breakpoint(BreakpointKind.SOFTWARE, at["kernel"], 1, 2)
    bench.breakpoint(user, ["reg 3; const 1; equal; end"], pid=2)  # of process 1, whose page process 3 has, too
    assert isinstance(bench.run({2}), Exited)
    (own,) = bench.debugger.breakpoints
    assert bench.printed.count("passes its breakpoint") == 1
    assert own.passes == 59
    assert [frame.blocks[0][1][1] >> 4 for frame in bench.frames[-3:]] == [1, 2, 1]
    assert point.hits == len(bench.frames) == 177
    assert (bench.machine.clock.now, bench.machine.exit_status) == undebugged(elf)
