"""Hostile hypervisors and guests: random VMCBs and nested tables neither crash, hang nor raise."""

from __future__ import annotations

from random import Random

import pytest

from introspect.vmcb import VMCB
from tests.engine.rig import CODE, MODES
from tests.engine.test_hostile import random_code
from tests.svm.hypervisor import HSAVE, IOPM, MSRPM, NESTED, VMCB_PAGE, Hypervisor
from vmdbg.cpu.reset import power_on
from vmdbg.machine import Event

FIELDS = [field for field in VMCB if field.size <= 8 and not field.name.startswith("insn")]
PLACES = (
    0,
    1,
    0xFFF,
    VMCB_PAGE,
    HSAVE,
    IOPM,
    MSRPM,
    NESTED,
    1 << 31,
    1 << 39,
    1 << 40,
    (1 << 47) - 1,
    1 << 63,
    (1 << 64) - 1,
)
LOW = 0x100000
"""All that the hypervisor has made lies below."""
HOST = "movl $0x90000, %ebp; 1: movl %ebp, %eax; vmload; vmrun; vmsave; stgi; addq $1, 0x578(%rbp); clgi; jmp 1b"


def scramble(h: Hypervisor, random: Random) -> None:
    """Make a sound VMCB and its nested tables hostile."""
    keep = random.random() < 0.6  # most random VMCBs are refused at once: keep some of it sound
    for field in random.sample(FIELDS, random.choice((0, 1, 2, 5, 20))):
        value = random.choice(PLACES) if random.random() < 0.5 else random.getrandbits(8 * field.size)
        if keep and field.name in ("efer", "cr0", "cr4", "guest_asid", "eventinj", "dr6", "dr7", "intercept_misc2"):
            value = VMCB.read(h.view, field.name) ^ (
                1 << random.randrange(8 * field.size) if random.random() < 0.3 else 0
            )
        VMCB.write(h.view, field.name, value & (1 << 8 * field.size) - 1)
    for _ in range(random.randrange(6)):
        h.view[random.randrange(0x18)] = random.getrandbits(8)
    if keep:
        h.view[0x10] |= 1
    for _ in range(random.randrange(8)):
        h.ram.write_u64(
            NESTED + 8 * random.randrange(0x5000 // 8), random.choice((0, random.getrandbits(64), NESTED | 7))
        )
    if random.random() < 0.1:
        h.state.set_field("vm_hsave", random.choice(PLACES) & ~0xFFF)
    for number in range(1, 16):
        if number != 5:
            h.state.set_reg(number, random.choice((*PLACES, 0x8000, 0x100000, 0xFEE00000, 0xC0000080)))


def hostile(random: Random, python: bool = False, *, strict_tlb: bool = False) -> Hypervisor:
    mode = random.choice(MODES)
    code, np = random_code(random, 0x400), random.random() < 0.7
    h = Hypervisor(code, mode, host=HOST, python=python, np=np, strict_tlb=strict_tlb)
    scramble(h, random)
    return h


def run(seed: int, count: int = 1) -> set[int]:
    """Run `count` hostile VMCBs for a while, one after the other on one machine; the exit codes that came up."""
    random = Random(seed)
    mode, np = random.choice(MODES), random.random() < 0.7
    h = Hypervisor(random_code(random, 0x400), mode, host=HOST, np=np)
    memory, state = h.ram.read(0, LOW), bytes(h.state.bytes)
    for number in range(count):
        if number:  # the host and a sound VMCB again, on a machine that has seen much
            power_on(h.cpu)
            h.ram.write(0, memory)
            h.guest_write(CODE, random_code(random, 0x400))
            h.state.bytes[:] = state
            h.machine.exit_status = None
        scramble(h, random)
        for _ in range(3):
            if h.machine.run(500) == Event.EXIT:
                break
    return {record.code for guest in h.machine.history.guests.values() for record in guest.exits}


def test_random_vmcbs() -> None:
    """`python -m tests.thorough` runs 100,000 of them."""
    exits = set().union(*(run(seed) for seed in range(900, 1200)))
    assert len(exits) >= 12, sorted(map(hex, exits))


@pytest.mark.parametrize("seed", range(8))
def test_the_same_in_two_runs_and_in_python(seed: int) -> None:
    ends = []
    for python in (False, False, True):
        h = hostile(Random(1000 + seed), python)
        h.machine.run(600)
        s = h.state
        exits = [record.line() for guest in h.machine.history.guests.values() for record in guest.exits]
        ends.append((h.now, s.rip, [s.reg(n) for n in range(16)], exits))
    assert ends[0] == ends[1]
    assert ends[0] == ends[2]
