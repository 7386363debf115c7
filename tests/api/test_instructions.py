# SPDX-License-Identifier: GPL-2.0-or-later
"""`run(instructions=N)` is exact: it ends where N single steps do, on either runtime, whatever the code does."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.api.conftest import ENDLESS, IMAGE
from vmdbg import Machine, Reason

Program = Callable[..., Machine]

LOOPS = {
    "short": (ENDLESS, 64),
    "calls": ("mov $0x7000, %esp; loop: call 1f; mov $3, %ecx; 2: dec %ecx; jnz 2b; jmp loop; 1: push %rax; pop %rbx; ret", 64),
    "strings": ("cld; loop: mov $0x9000, %edi; mov $7, %ecx; rep stosb; mov $0x9000, %esi; mov $0x9100, %edi; mov $5, %ecx;"
                "rep movsl; mov $3, %ecx; xor %eax, %eax; repne scasb; jmp loop", 64),
    "modifies itself": ("loop: inc %eax; mov %al, 1f+1(%rip); nop; nop; 1: mov $0, %bl; add %rbx, %rcx; jmp loop", 64),
    "executed by us": ("mov $0x3f8, %dx; loop: inc %eax; xor %ecx, %ecx; cpuid; rdtsc; mov %cr3, %rbx; mov %rbx, %cr3; out %al, $0x80; jmp loop", 64),
    "faults": ("mov $0x7000, %sp; movw $1f, 0x18; movw $0, 0x1a; loop: inc %ax; int $6; int3; jmp loop; 1: iret", 16),
    "ports by strings": ("cld; loop: mov $0x9000, %si; mov $0x80, %dx; mov $3, %cx; rep outsb; inc %bx; jmp loop", 16),
}  # fmt: skip
COUNTS = (1, 2, 7, 300)


def step(machine: Machine) -> None:
    """One instruction: an event is none, nor is a repeated one whose count is used up."""
    below, host = machine.debugger.machine, machine.host
    counts = False
    while not counts:
        before = below.clock.now
        counts = host.read(host.pc, 1) != b"\xf3" or host.registers.rcx != 0
        below.run(step=True)
        counts &= below.clock.now != before


@pytest.mark.parametrize("runtime", ["native", "python"])
@pytest.mark.parametrize("name", LOOPS)
def test_as_many_as_single_steps(program: Program, name: str, runtime: str) -> None:
    source, bits = LOOPS[name]
    counted, stepped = program(source, bits, runtime=runtime), program(source, bits)
    for count in COUNTS:
        stop = counted.run(instructions=count)
        assert (stop.reason, stop.reached) == (Reason.LIMIT, False)
        assert "instructions are used up" in stop.text
        for _ in range(count):
            step(stepped)
        assert (counted.time, counted.host.pc) == (stepped.time, stepped.host.pc), count
        assert dict(counted.host.registers) == dict(stepped.host.registers)


@pytest.mark.parametrize("options", [{}, {"tlb": "strict"}, {"vmcb_cache": "strict"}, {"cpus": 2}])
def test_in_pieces_as_at_once(options: dict[str, object]) -> None:
    if not IMAGE.exists():
        pytest.skip("the demo hypervisor is not built: no gcc and ld for x86-64")
    with Machine.with_options(IMAGE, options) as one, Machine.with_options(IMAGE, options) as other:
        for machine in (one, other):
            machine.run(until="guest-start")
        one.run(instructions=60_000)
        for _ in range(6):
            other.run(instructions=10_000)
        assert (one.time, one.host.rip, one.exit_count) == (other.time, other.host.rip, other.exit_count)


def test_counting_changes_nothing(machine: Machine, whole: Machine) -> None:
    stop = machine.run(instructions=1 << 50)
    assert (stop.reason, stop.time, machine.serial) == (Reason.ENDED, whole.time, whole.serial)


def test_a_breakpoint_ends_it_before(machine: Machine) -> None:
    stop = machine.run(until="2:tick", instructions=10_000_000)
    assert stop.reached
    assert machine.debugger.machine.instructions_left is None
    assert not machine.debugger.machine.engine.rt.counting
