"""Hostile guests: whatever bytes they execute, the machine neither crashes nor hangs nor raises."""

from __future__ import annotations

from random import Random

import pytest

from tests.engine.rig import CODE, DATA, GDT, IDT, MODES, TABLES, TSS, Mode, Rig
from vmdbg.machine import Event

INTERESTING = (
    b"\x0f\x20\xc0", b"\x0f\x22\xc0", b"\x0f\x22\xe0", b"\x0f\x22\xd8", b"\x0f\x30", b"\x0f\x32", b"\x0f\x01\x10",
    b"\x0f\x01\x18", b"\x0f\x00\xd8", b"\x0f\x00\xd0", b"\xcf", b"\x48\xcf", b"\xca\x00\x00",
    b"\xea\x00\x90\x00\x00\x18\x00",
    b"\x9d", b"\x8e\xd0", b"\x8e\xd8", b"\x17", b"\xfb", b"\xf4", b"\xcd\x80", b"\xcc", b"\xce", b"\xf1", b"\xe6\x80",
    b"\xec", b"\xf3\x6e", b"\xf3\x6d", b"\xf3\xa4", b"\xf2\xae", b"\x0f\x01\xd8", b"\x0f\x01\xd9", b"\x0f\x01\xda",
    b"\x0f\x01\xdb", b"\x0f\x01\xdc", b"\x0f\x01\xdd", b"\x0f\x01\xde", b"\x0f\x01\xdf", b"\x0f\x05", b"\x0f\x07",
    b"\x0f\x34", b"\x0f\x35", b"\x0f\xa2", b"\x0f\x31", b"\x0f\x21\xc0", b"\x0f\x23\xf8", b"\x0f\x06", b"\x0f\x09",
    b"\x0f\xae\x00", b"\x0f\xae\x08", b"\xc7\x05\xe0\x00\xe0\xfe\xff\xff\xff\xff", b"\xa3\x00\x00\xe0\xfe",
    b"\x0f\xc7\x08",
    b"\xf0\x0f\xb1\x08", b"\x0f\x02\xc0", b"\x0f\x03\xc0", b"\xc8\xff\xff\x1f", b"\x0f\xaa", b"\x0f\x37", b"\x66" * 16,
)  # fmt: skip
"""Instructions that reach deep: random bytes alone seldom do."""


def random_code(random: Random, size: int) -> bytes:
    code = bytearray()
    while len(code) < size:
        if random.random() < 0.3:
            code += random.choice(INTERESTING)
        else:
            code += random.randbytes(random.randrange(1, 6))
    return bytes(code[:size])


def hostile(seed: int, mode: Mode, python: bool, *, fingerprint: bool = False) -> Rig:
    random = Random(seed * 31 + MODES.index(mode))
    rig = Rig(random_code(random, 0x800), mode, python=python, user=random.random() < 0.2, cpus=1 + (seed % 4 == 0),
              fingerprint=fingerprint)  # fmt: skip
    places = (
        CODE,
        CODE + 0x100,
        DATA,
        GDT,
        IDT,
        TSS,
        TABLES,
        0xFEE00000,
        0xFEE00300,
        0xFFFFFFFF,
        1 << 47,
        0xC0000080,
        0xF4,
        1,
    )
    for number in range(16):
        rig.state.set_reg(number, random.choice(places) if random.random() < 0.7 else random.getrandbits(64))
    rig.state.set_reg(4, 0x7000)
    for _ in range(random.randrange(4)):
        rig.ram.write(random.choice((GDT, IDT, TSS, TABLES)) + random.randrange(0x800), random.randbytes(8))
    for vector in range(256):  # handlers that are as wild
        rig.ram.write(0xA000 + 16 * vector, random_code(random, 16))
    if random.random() < 0.5:
        rig.state.efer |= 0x1000
        rig.state.set_field("vm_hsave", random.choice((0, 0x90000, 1 << 39)))
        rig.state.refresh()
    return rig


@pytest.mark.parametrize("mode", MODES)
def test_random_code(mode: Mode) -> None:
    for seed in range(25):
        rig = hostile(seed, mode, False)
        for _ in range(4):
            if rig.machine.run(2000) == Event.EXIT:
                break


@pytest.mark.parametrize("mode", ["real", "pae", "long"])
def test_random_code_runs_the_same_twice_and_in_python(mode: Mode) -> None:
    for seed in range(5):
        ends = []
        for python in (False, False, True):
            rig = hostile(seed, mode, python)
            rig.machine.run(3000)
            s = rig.state
            ends.append(
                (
                    rig.now,
                    s.rip,
                    s.rflags,
                    [s.reg(n) for n in range(16)],
                    rig.cpu.shutdown,
                    bytes(rig.ram.view[:0x10000]),
                )
            )
        assert ends[0] == ends[1], f"seed {seed}: two runs differ"
        assert ends[0] == ends[2], f"seed {seed}: the runtimes differ"


@pytest.mark.parametrize("mode", ["real", "protected32", "long"])
def test_random_code_in_single_steps_takes_the_same_time(mode: Mode) -> None:
    for seed in range(5):
        run, stepped = hostile(seed, mode, False), hostile(seed, mode, False)
        stepped.machine._quantum_end = run.machine._quantum_end = 1 << 60
        for _ in range(300):
            if stepped.machine.run(step=True) == Event.EXIT:
                break
        while run.now < stepped.now and run.machine.run(stepped.now - run.now) != Event.EXIT:
            pass
        assert (run.now, run.rip, run.reg(0)) == (stepped.now, stepped.rip, stepped.reg(0)), f"seed {seed}"
