"""Thousands of stops at catchpoints, and the run that is the same: timers, turns of CPUs and switches in C included."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from gdbstub.target import CONTINUE, Created, Exited, Stop, ThreadId
from tests.engine.assembler import assemble
from tests.engine.test_smp import AP, BOOT
from tests.svm.hypervisor import Hypervisor
from vmdbg.debugger import Debugger
from vmdbg.machine import Config, Event, Machine

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
DEMO, NESTED = EXAMPLES / "hypervisor/build/hypervisor.elf", EXAMPLES / "nested/build/matryoshka.elf"


DEMO_CONFIG = Config(command_line="guests=1,2")


class Run(NamedTuple):
    """Guest time at the end, and every exit that is remembered."""

    ticks: int
    total: int
    exits: list[str]


def result(machine: Machine) -> Run:
    exits = sorted((exit.number, exit.line()) for guest in machine.history.guests.values() for exit in guest.exits)
    return Run(machine.clock.now, machine.history.total.value, [line for _, line in exits])


@cache
def undebugged(image: Path, config: Config) -> Run:
    if not image.exists():
        pytest.skip("the examples are not built (make examples)")
    machine = Machine(image, config)
    try:
        while machine.run() != Event.EXIT:
            pass
        return result(machine)
    finally:
        machine.close()


def debugged(image: Path, config: Config, lines: Sequence[str]) -> tuple[Run, Counter[str]]:
    """Resumed after each stop; how many stops there were, by the first word of what happened."""
    machine = Machine(image, config)
    try:
        debugger = Debugger(machine)
        for line in lines:
            debugger.monitor(f"catch {line}", str, ThreadId(1, 1))
        stops: Counter[str] = Counter()
        everybody = {ThreadId(1, tid + 1): CONTINUE for tid in range(config.cpus)}
        debugger.resume(everybody)
        while not isinstance(event := debugger.run_slice(), Exited):
            if isinstance(event, Stop):
                assert event.text.startswith("catchpoint"), event
                stops[event.text.split(": ")[1].split()[0]] += 1
                debugger.resume(everybody)
        return result(machine), stops
    finally:
        machine.close()


@pytest.mark.parametrize("python", [False, True], ids=["native", "python"])
def test_every_event_of_the_demo(python: bool) -> None:
    config = replace(DEMO_CONFIG, command_line="guests=1,2 tick=20000", python_runtime=python)
    expected = undebugged(DEMO, config)
    found, stops = debugged(DEMO, config, ["vmexit", "vmrun", "inject", "exception", "io", "msr", "cr"])
    assert found == expected
    assert stops["#VMEXIT"] == expected.total
    assert stops["VMRUN"] >= expected.total
    assert {"OUT", "IN", "RDMSR", "WRMSR", "write", "read"} <= stops.keys(), stops


@pytest.mark.parametrize(
    ("lines", "first"),
    [
        (["vmexit cpuid"], "#VMEXIT"), (["vmexit vmmcall if guest == 3"], "#VMEXIT"), (["vmrun"], "VMRUN"), (["msr r"], "RDMSR"),
        (["io 0x3f8-0x3ff guest 2"], "OUT"), (["cr 3 w"], "write"), (["cr 0 r"], "read"),
    ],
)  # fmt: skip
def test_what_switches_in_c_leave_to_python(lines: list[str], first: str) -> None:
    """Each waits for something that is C's while nobody does: all of it is seen, as without C, and nothing else stops."""
    expected = undebugged(DEMO, DEMO_CONFIG)
    found, stops = debugged(DEMO, DEMO_CONFIG, lines)
    twin, others = debugged(DEMO, replace(DEMO_CONFIG, native_switch=False), lines)
    assert found == twin == expected
    assert stops == others
    assert set(stops) <= {first, "IN", "OUT"}


def test_native_switches_go_on_beside_a_catchpoint() -> None:
    """What it does not wait for is made in C as ever."""
    machine = Machine(DEMO, DEMO_CONFIG)
    try:
        debugger = Debugger(machine)
        debugger.monitor("catch vmexit npf if gpa == 1", str, ThreadId(1, 1))
        debugger.monitor("catch exception 14 if cr2 == 1", str, ThreadId(1, 1))
        debugger.resume({ThreadId(1, 1): CONTINUE})
        while not isinstance(debugger.run_slice(), Exited):
            pass
        assert machine.cpu.switcher is None or machine.cpu.switcher.made > machine.history.total.value
    finally:
        machine.close()


def test_a_hypervisor_in_a_hypervisor() -> None:
    config = Config(command_line="depth=2")
    expected = undebugged(NESTED, config)
    found, stops = debugged(NESTED, config, ["exception", "vmexit vmrun", "inject", "cr 3", "triple-fault", "guest-start"])
    assert found == expected
    assert stops["guest"] == 2


def test_without_any_nobody_is_asked() -> None:
    machine = Machine(DEMO, Config())
    try:
        debugger = Debugger(machine)
        for line in ("vmexit any", "cr 3", "delete all"):
            debugger.monitor(f"catch {line}", str, ThreadId(1, 1))
        assert machine.cpu.catches is None
        assert machine.cpu.state.cr_reads == 0
        assert machine.cpu.switcher is None or not any(machine.cpu.switcher.state.watched)
    finally:
        machine.close()


TWO_CPUS = f"""{BOOT}
    movl $0x300030, %edi; leaq handler(%rip), %rax
    movw %ax, (%rdi); movw $8, 2(%rdi); movw $0x8e00, 4(%rdi); shrl $16, %eax; movw %ax, 6(%rdi); movq $0, 8(%rdi)
    call work
    1: pause; cmpl $2, 0x400008; jb 1b
    xorl %eax, %eax; outl %eax, $0xf4; hlt
handler: iretq
pointer: .word 0xfff; .quad 0x300000
work: lidt pointer(%rip)
    movl $400, %ebp
    2: int3; rdtsc; lock xaddl %eax, 0x400000; imull $3, 0x400000, %eax; movl %eax, 0x400000; decl %ebp; jnz 2b
    lock incl 0x400008; ret
{AP}
    call work; 3: hlt; jmp 3b
"""
"""Two CPUs that mix the time after each of their breakpoint exceptions into one number."""


def test_turns_of_cpus_end_where_they_end_anyway() -> None:
    """An exception that is held back belongs to the turn that it came in, also at its last tick."""
    code = assemble(TWO_CPUS, 0x200000).code
    numbers = []
    for lines in ([], ["exception 3"]):
        machine = Machine(code, Config(memory=16 << 20, cpus=2, flat_address=0x200000, mode="long"))
        machine._quantum = machine._quantum_end = 98  # turns that end right behind INT3
        debugger = Debugger(machine)
        for line in lines:
            debugger.monitor(f"catch {line}", str, ThreadId(1, 1))
        stops, everybody = 0, {ThreadId(1, 1): CONTINUE, ThreadId(1, 2): CONTINUE}
        debugger.resume(everybody)
        while not isinstance(event := debugger.run_slice(), Exited):
            if isinstance(event, Stop):
                stops += 1
                debugger.resume(everybody)
        assert stops == (800 if lines else 0)
        numbers.append((machine.ram.read_u32(0x400000), machine.clock.now))
        machine.close()
    assert numbers[0] == numbers[1]


@pytest.mark.parametrize("native", [True, False])
def test_reads_of_control_registers_between_switches(native: bool) -> None:
    """The engine stops at them in the hypervisor and in its guest, whichever way they are switched."""
    h = Hypervisor("1: movq %cr4, %rcx; cpuid; jmp 1b", host="""
        movl $0x90000, %ebp; movl $50, %ebx
        1: movq %rbp, %rax; vmrun; movq 0xc8(%rbp), %rcx; movq %rcx, 0x578(%rbp); movq %cr4, %rdx; decl %ebx; jnz 1b; hlt
    """)  # fmt: skip
    h.intercept(0x72)
    if not native:
        h.cpu.switcher = None
    debugger = Debugger(h.machine)
    for line in ("cr 4 r if guest == 1", "cr 4 r guest 2", "ignore 1 1000", "ignore 2 1000"):
        debugger.monitor(f"catch {line}", str, ThreadId(1, 1))
    debugger.resume({ThreadId(1, 1): CONTINUE})
    while h.cpu.guest is not None or not h.cpu.halted:
        assert not isinstance(debugger.run_slice(), Stop)
    assert [point.hits for point in debugger.catchpoints.points.values()] == [50, 50]
    if native and h.cpu.switcher is not None:
        assert h.cpu.switcher.made >= 90
    h.machine.close()


def test_a_thread_that_is_caught_stands_still_while_it_is_held() -> None:
    """Stopping one by one: nothing comes between what is postponed and the instruction, until the thread goes on."""
    h = Hypervisor("1: movq %cr4, %rcx; cpuid; jmp 1b", host="""
        movl $0x90000, %ebp
        1: movq %rbp, %rax; vmrun; movq 0xc8(%rbp), %rcx; movq %rcx, 0x578(%rbp); jmp 1b
    """)  # fmt: skip
    h.intercept(0x61, 0x72)
    debugger = Debugger(h.machine)
    host, guest = ThreadId(1, 1), ThreadId(2, 1)
    debugger.attach(1)
    debugger.hold([host])
    debugger.go({host: CONTINUE})
    while not isinstance(debugger.run_slice(), Created):
        pass
    debugger.attach(2)
    debugger.monitor("catch cr 4 r guest 2", str, host)
    for hits in (1, 2):
        while not isinstance(event := debugger.run_slice(), Stop):
            pass
        assert event.thread == guest
        if hits == 2:
            h.cpu.nmi()  # which its hypervisor intercepts
        now, rip = h.now, h.rip
        assert all(debugger.run_slice() is None for _ in range(5))
        assert (h.now, h.rip) == (now, rip)
        assert debugger.catchpoints.points[1].hits == hits
        debugger.go({guest: CONTINUE})
    h.machine.close()
