"""Translations are held until the guest flushes them, whatever becomes of the engine's TLB."""

from __future__ import annotations

import gc
import random
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from gdbstub.target import ThreadId
from tests.engine.rig import DATA, TABLES, P, Rig, W
from tests.svm.hypervisor import HLT, Hypervisor
from tests.timetravel.cases import CASES, digest
from vmdbg.debugger import Debugger
from vmdbg.engine.engine import Engine
from vmdbg.engine.runtime import native
from vmdbg.engine.state import RAX, RBX, RDX
from vmdbg.engine.translations import PAIR, Translations, _trampolines, resize_without_clock
from vmdbg.machine import Machine
from vmdbg.platform.clock import Clock

pytestmark = pytest.mark.skipif(native is None, reason="the twin alone holds no translations")
LEAF = TABLES + 0x10000 + (DATA >> 12) * 8
"""Leads to DATA, where there is a 1; it is led to the next page, where there is a 2."""
CHANGE = f"movq {DATA}, %rax; xorq $0x1000, {LEAF}; movq {DATA}, %rbx"
MOST = 1 << 20


def rig(source: str, *, python: bool = False) -> Rig:
    one = Rig(source, python=python)
    one.ram.write_u64(DATA, 1)
    one.ram.write_u64(DATA + 0x1000, 2)
    one.ram.write_u64(TABLES + 511 * 8, TABLES + 0x1000 | P | W)  # the last GiB of addresses is the fourth, too
    one.ram.write_u64(TABLES + 0x1000 + 511 * 8, TABLES + 0x2000 | P | W)
    return one


def seen(one: Rig) -> tuple[int, int, int]:
    return one.reg(RAX), one.reg(RBX), one.reg(RDX)


@pytest.mark.parametrize("python", [False, True], ids=["native", "python"])
@pytest.mark.parametrize(
    ("between", "last"),
    [
        ("nop", 1),
        (f"invlpg {DATA}", 2),
        (f"invlpg {DATA + 0x1000}", 1),
        (f"invlpg {DATA + 0xFFF}", 2),
        ("mov %cr3, %rcx; mov %rcx, %cr3", 2),
        ("mov %cr4, %rcx; xorl $0x80, %ecx; mov %rcx, %cr4", 2),
        ("pushq %rax; pushq %rbx; cpuid; popq %rbx; popq %rax", 1),  # the engine stops
        ("movl $0x1000, %ecx; 1: movb (%rcx), %dl; addl $0x1000, %ecx; cmpl $0x100000, %ecx; jb 1b", 1),
        ("movl $0x110000, %ecx; 1: movb (%rcx), %dl; addl $0x1000, %ecx; cmpl $0x400000, %ecx; jb 1b", 1),
        (f"movb {DATA + 0x8000}, %dl; movb $0x90, {DATA + 0x8000}; movb $0xc3, {DATA + 0x8001}; call {DATA + 0x8000}", 1),
        ("movb 0x600000, %cl; invlpg 0x700000", 2),  # a large page, of which the engine knows no more than its region
        (f"movb 0x600000, %cl; movb 0xffffffffffc00000, %cl; invlpg {DATA + 0x1000}", 2),  # the region is all there is
        (f"movb 0x600000, %cl; invlpg {DATA + 0x1000}", 1),
    ],
)  # fmt: skip
def test_what_a_guest_does_not_flush_stays(between: str, last: int, python: bool) -> None:
    one = rig(f"{CHANGE}; {between}; movq {DATA}, %rdx; hlt", python=python)
    one.run()
    assert seen(one) == (1, 1, last)


def test_a_right_that_is_missing_is_looked_up() -> None:
    """A translation for reading says nothing of writing: the entry's dirty bit is to be set (APM2 5.4.2)."""
    one = rig(f"{CHANGE}; movq $3, {DATA}; movq {DATA}, %rdx; hlt")
    one.run()
    assert seen(one) == (1, 1, 3)
    assert [one.ram.read_u64(DATA + at) for at in (0, 0x1000)] == [1, 3]


@pytest.mark.parametrize("np", [False, True], ids=["shadow", "nested"])
def test_a_guest_stays_with_its_own_until_it_exits(np: bool) -> None:
    h = Hypervisor(f"{CHANGE}; vmmcall; movq {DATA}, %rdx; hlt", host="vmrun; addq $3, 0x90578; vmrun; hlt", np=np)
    h.guest_write(DATA, (1).to_bytes(8, "little"))
    h.guest_write(DATA + 0x1000, (2).to_bytes(8, "little"))
    assert h.enter() == HLT
    assert (h["rax"], h.reg(RBX), h.reg(RDX)) == (1, 1, 2)


@pytest.mark.parametrize(("count", "last"), [(MOST - 100, 1), (MOST, 2)])
def test_no_more_than_a_million_are_held(count: int, last: int) -> None:
    """512 GiB of addresses that are one page each, until the first is led elsewhere."""
    tables, page = 0x300000, 1 << 39
    one = rig(
        f"movabsq ${page}, %rsi; movq (%rsi), %rax; xorq $0x1000, {tables + 0x2000}; movq (%rsi), %rbx; movl ${count}, %ecx; "
        "leaq 0x1000(%rsi), %rdi; 1: movb (%rdi), %dl; addq $0x1000, %rdi; decl %ecx; jnz 1b; movq (%rsi), %rdx; hlt"
    )
    one.ram.write_u64(TABLES + 8, tables | P | W)
    for at, to in ((tables, tables + 0x1000), (tables + 0x1000, tables + 0x2000), (tables + 0x2000, DATA)):
        one.ram.write(at, (to | P | W).to_bytes(8, "little") * 512)
    one.run(60_000_000)
    assert seen(one) == (1, 1, last)


def undisturbed(_machine: Machine, _chance: random.Random) -> int:
    return 1 << 40


def delayed(_machine: Machine, _chance: random.Random) -> int:
    """The engine's TLB would become smaller for that."""
    time.sleep(0.11)
    return 150_000


def in_steps(machine: Machine, chance: random.Random) -> int:
    for _ in range(chance.randrange(40)):
        machine.run(step=True)
    return chance.randrange(1, 60_000)


def flushed(machine: Machine, chance: random.Random) -> int:
    """What a debugger's breakpoints and watchpoints, and the want of room, do to the engine."""
    engine = machine.engine
    chance.choice((engine.flush, engine.flush_code, engine.physical.make_room, lambda: engine.arm({chance.randrange(1 << 30)})))()
    return chance.randrange(1, 60_000)


def written(machine: Machine, chance: random.Random) -> int:
    """A debugger that saves registers and restores them."""
    registers, thread = Debugger(machine).registers, ThreadId(1, 1)
    for name in ("rax", "eflags", "cr0", "cr3", "cr4", "efer", "star", "gdtr_base"):
        value = registers.read(thread, name)
        assert value is not None
        registers.write(thread, name, value)
    return chance.randrange(1, 400_000)


@pytest.mark.parametrize("case", ["stale translations", "stale translations, Python"])
def test_a_guest_that_uses_stale_ones_runs_the_same_however_it_is_run(case: str) -> None:
    found: dict[str, set[str]] = {}
    ways: list[Callable[[Machine, random.Random], int]] = [undisturbed, delayed, in_steps, in_steps, flushed, flushed, written]
    for number, way in enumerate(ways):
        machine, chance = CASES[case].machine(), random.Random(number)
        while machine.exit_status is None:
            machine.run(way(machine, chance))
        assert machine.cpu.state.reg(RBX), "it has seen something"
        found.setdefault(digest(machine), set()).add(way.__name__)
        machine.close()
    assert len(found) == 1, found


def test_the_trampolines_are_there() -> None:
    engine = Engine(1 << 20, Clock())
    assert engine.translations.address
    assert not engine.lacks
    assert not _trampolines.__wrapped__(), "the engine's fill is not the wheel's any more"


def test_other_engines_flush_nothing() -> None:
    """As when Python's collector closes one while another runs."""
    one, other = rig("hlt"), rig(f"movq {DATA}, %rax; hlt")
    other.run()
    table = one.machine.engine.translations
    table.load(bytes(16) + PAIR.pack(DATA, DATA | 7))
    held = table.pairs()
    assert native is not None
    outer = native.translations_enter(table.address)
    try:
        other.machine.close()
        del other
        gc.collect()
    finally:
        native.translations_enter(outer)
    assert table.pairs() == held != []


def test_only_translations_are_loaded() -> None:
    one = rig(f"{CHANGE}; hlt")
    one.run()
    held, dump = one.machine.engine.translations, one.machine.engine.held()
    assert {at & -0x1000: to & -0x1000 for at, to in held.pairs()}[DATA] == DATA
    held.load(dump)
    assert held.dump() == dump
    for wrong in (b"x", *(bytes(16) + PAIR.pack(*pair) for pair in ((3, 0), (0, 1 << 40), (0, 8), (0, 0x40)))):
        with pytest.raises(ValueError, match="none"):
            held.load(wrong)
    held.load(b"")
    assert held.pairs() == []


def test_a_table_that_does_not_work_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Translations, "_works", lambda *_: False)
    engine = Engine(1 << 20, Clock())
    assert not engine.translations.address
    assert engine.lacks == ["a TLB that loses nothing by itself"]


WITHOUT = """
import re, time
from vmdbg.engine import translations
translations.FILL = re.compile(b"never")
from tests.timetravel.cases import CASES, digest
found = set()
for delay in (0, 0.11):
    machine = CASES["stale translations"].machine()
    assert machine.engine.lacks == [translations.LACKED]
    while machine.exit_status is None:
        machine.run(150_000)
        time.sleep(delay)
    found.add(digest(machine))
assert len(found) == 1
"""


def test_where_they_cannot_be_held_no_run_depends_on_the_hosts_clock() -> None:
    """In a process of its own, since the library is mended once for all."""
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert resize_without_clock()
