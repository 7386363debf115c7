"""The engine's translation and `introspect.paging.translate` agree on random page tables, in every mode, nested or not.

Both stand for the same processor: the engine translates what guests execute, `translate` what we access for them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from random import Random

import pytest

from introspect.paging import Access, Fault, Nested, PagingState, Translation, translate
from introspect.registers import CR0, CR4, EFER, RFLAGS
from introspect.sources import BytesMemory
from tests.engine.rig import CODE, TABLES, Rig
from vmdbg.cpu.exits import classify
from vmdbg.engine.engine import VMEXIT
from vmdbg.engine.layout import PHYSICAL_BITS
from vmdbg.engine.runtime import Reason
from vmdbg.engine.state import RAX, RBX

P, W, U, A, D, PS, G, NX = 1, 2, 4, 0x20, 0x40, 0x80, 0x100, 1 << 63
LEVELS = {"legacy": (22, 12), "pae": (30, 21, 12), "long": (39, 30, 21, 12)}
MODES = tuple(LEVELS)
GUEST_TABLES, NESTED_TABLES, TARGET = 0x200000, 0x210000, 0x345678
SPANS = ((TABLES, 0x14000), (GUEST_TABLES, 0x20000))
"""Where page tables are: (start, bytes)."""
LOAD, STORE = b"\x8a\x03", b"\x88\x03"  # mov (%rbx), %al; mov %al, (%rbx)


STRICT = pytest.mark.parametrize("strict", [False, True], ids=["coherent", "strict"])
"""A strict TLB that is empty says what the tables say."""


def address_of(mode: str) -> int:
    """A linear address whose tables are random; those for the code are not.  Its low 30 bits are TARGET."""
    return {"legacy": 0x40000000 | TARGET, "pae": 0x40000000 | TARGET, "long": 0x8040000000 | TARGET}[mode]


def random_entry(random: Random, target: int, leaf_here: bool, level: int, mode: str) -> int:
    entry = target
    for flag, chance in (
        (P, 0.95),
        (W, 0.75),
        (U, 0.75),
        (A, 0.5),
        (D, 0.5),
        (G, 0.3 if leaf_here or level < 4 else 0.02),
    ):
        if random.random() < chance:
            entry |= flag
    if mode == "pae" and level == 3:
        return entry & ~0x1E6 | (1 << random.choice((1, 2, 5, 6, 7, 8)) if random.random() < 0.05 else 0)
    if mode != "legacy":
        if random.random() < 0.15:
            entry |= NX
        if random.random() < 0.03:
            entry |= 1 << random.randrange(40, 52)
        if mode == "pae" and random.random() < 0.02:
            entry |= 1 << random.randrange(52, 63)
    if leaf_here and level > 1:
        entry |= PS
        if random.random() < 0.05:
            entry |= 1 << (random.randrange(13, 20) if mode != "legacy" else 21)
    return entry


def random_tables(rig: Rig, random: Random, mode: str, at: int, address: int, root: int, final: int = TARGET) -> None:
    """A path of random entries for `address`, from the table `root` to `final`; deeper tables at `at` and above."""
    shifts = LEVELS[mode]
    size, index_mask = (4, 0x3FF) if mode == "legacy" else (8, 0x1FF)
    leaf_level = random.choice((1, 1, 2) if mode != "long" else (1, 1, 2, 3))
    table = root
    for number, shift in enumerate(shifts):
        level = len(shifts) - number
        leaf = level == leaf_level
        target = final >> shift << shift if leaf else at
        entry = random_entry(random, target, leaf, level, mode)
        where = table + (address >> shift & index_mask) * size
        rig.ram.write(where, (entry & (1 << 8 * size) - 1).to_bytes(size, "little"))
        if leaf:
            return
        table, at = at, at + 0x1000


def registers(rig: Rig, random: Random, mode: str) -> PagingState:
    s = rig.state
    cr0 = CR0.PE | CR0.PG | 0x10 | (CR0.WP if random.random() < 0.7 else 0)
    cr4 = (
        CR4.OSFXSR
        | (CR4.PSE if mode == "legacy" or random.random() < 0.5 else 0)
        | (CR4.PAE if mode != "legacy" else 0)
    )
    cr4 |= (CR4.SMEP if random.random() < 0.3 else 0) | (CR4.SMAP if random.random() < 0.3 else 0)
    nxe = EFER.NXE if mode != "legacy" and random.random() < 0.8 else 0
    efer = nxe | (EFER.LME | EFER.LMA if mode == "long" else 0)
    user = random.random() < 0.5
    ac = random.random() < 0.5
    s.set_cr(0, cr0)
    s.set_cr(4, cr4)
    s.efer = efer
    s.rflags = 2 | (RFLAGS.AC if ac else 0)
    rig.set_level(3 if user else 0)
    s.shadow = False
    return PagingState(cr0, s.cr(3), cr4, efer, s.cpl, ac, PHYSICAL_BITS)


class Bench:
    """A rig whose tables change, and how one access through them ends."""

    def __init__(self, mode: str, python: bool, strict_tlb: bool) -> None:
        self.mode = mode
        self.rig = rig = Rig("nop", mode, python=python, strict_tlb=strict_tlb)  # type: ignore[arg-type]
        self.root = TABLES + (0x1000 if mode == "pae" else 0)
        rig.ram.write(TARGET, b"\x90" * 32)
        for page in (CODE, CODE + 0x1000):
            rig.ram.write(page, LOAD)
            rig.ram.write(page + 16, STORE)
        rig.change(CODE, drop=U)  # of CODE + 1000: supervisors may not fetch it under SMEP
        for page in (CODE, CODE + 0x1000):
            rig.cpu.translate(page, execute=True)  # accessed already

    def access(self, kind: str, npt: object = None) -> tuple[object, ...]:
        rig, s = self.rig, self.rig.state
        user = s.cpl == 3
        s.set_reg(RBX, address_of(self.mode))
        s.set_reg(RAX, 0x90)
        code = CODE + 0x1000 if user else CODE
        s.rip = address_of(self.mode) if kind == "fetch" else code + (16 if kind == "store" else 0)
        rig.cpu.flush()
        if rig.cpu.tlb is not None:
            rig.cpu.tlb.forget_all()
        before = rig.now
        stop = rig.cpu.executor.step(s, npt or rig.cpu.npt)  # type: ignore[arg-type]
        if stop.npf is not None:
            return "NPF", *classify(rig.cpu, stop)
        if stop.reason == Reason.EXIT and stop.code == VMEXIT + 0x4E:
            assert rig.now == before
            return "PF", s.error_code, rig.machine.engine.fault_address()
        assert stop.reason == Reason.STEPPED, stop
        return ("done",)


ACCESSES = {"load": Access(), "store": Access(write=True), "fetch": Access(execute=True)}


def expected(
    memory: BytesMemory, state: PagingState, mode: str, kind: str, nested: Nested | None
) -> Translation | Fault:
    access = ACCESSES[kind]
    access = Access(access.write, access.execute, state.cpl == 3)
    return translate(memory, state, address_of(mode), access, nested, set_ad=True)


def snapshot(rig: Rig) -> dict[int, bytes]:
    return {start: rig.ram.read(start, length) for start, length in SPANS}


def copy(tables: dict[int, bytes]) -> BytesMemory:
    return BytesMemory({start: bytearray(data) for start, data in tables.items()})


def compare_marks(rig: Rig, before: dict[int, bytes], model: BytesMemory, refused: bool, what: str) -> None:
    """Accessed and dirty bits.  A refused access may leave accessed bits on its way (APM2 5.4.2), never dirty ones."""
    for (start, after), (_, old) in zip(snapshot(rig).items(), before.items(), strict=True):
        if not refused:
            assert after == model.read(start, len(after)), what
        elif after != old:
            difference = int.from_bytes(after, "little") ^ int.from_bytes(old, "little")
            data = difference.to_bytes(len(after), "little")
            assert set(memoryview(data).cast("I")) <= {0, A}, what


def one_dimension(mode: str, seeds: Iterable[int], *, python: bool = False, strict: bool = False) -> Counter[object]:
    """One access through random tables for each seed, by the engine and by `translate`; how often each outcome came."""
    bench = Bench(mode, python, strict)
    rig = bench.rig
    outcomes: Counter[object] = Counter()
    for seed in seeds:
        random = Random(seed)
        state = registers(rig, random, mode)
        random_tables(rig, random, mode, GUEST_TABLES, address_of(mode), bench.root)
        kind = random.choice(("load", "store", "fetch"))
        before = snapshot(rig)
        model = copy(before)
        verdict = expected(model, state, mode, kind, None)
        got = bench.access(kind)
        what = f"seed {seed}: {kind} at CPL {state.cpl}: translate says {verdict}, the engine {got}"
        assert got == (tuple(verdict) if isinstance(verdict, Fault) else ("done",)), what
        compare_marks(rig, before, model, isinstance(verdict, Fault), what)
        outcomes[got[0]] += 1
    return outcomes


@STRICT
@pytest.mark.parametrize("mode", MODES)
def test_one_dimension(mode: str, strict: bool, python: bool) -> None:
    outcomes = one_dimension(mode, range(100 if python else 700), python=python, strict=strict)
    assert outcomes["done"] > 20
    assert outcomes["PF"] > 20


# Nested: the guest's tables lie at guest-physical addresses that the nested tables map with random rights.

HOST = {"legacy": (CR4.PSE, 0), "pae": (CR4.PAE, EFER.NXE), "long": (CR4.PAE, EFER.NXE | EFER.LME | EFER.LMA)}


def nested_tables(rig: Rig, random: Random, host: str) -> Nested:
    """Identity in 4 MiB; random rights for the pages of the guest's random tables and for the target, and GMET at random."""
    cr4, efer = HOST[host]
    size = 4 if host == "legacy" else 8
    count = 4096 // size
    rig.ram.write(NESTED_TABLES, bytes(0x8000))
    leaves, at = NESTED_TABLES + 0x4000, NESTED_TABLES
    every = P | W | U | A

    def put(where: int, value: int) -> None:
        rig.ram.write(where, (value & (1 << 8 * size) - 1).to_bytes(size, "little"))

    for _ in range(len(LEVELS[host]) - 2):
        put(at, at + 0x1000 | (P if host == "pae" else every))
        at += 0x1000
    for table in range(1024 // count):
        put(at + table * size, leaves + table * 0x1000 | every)
    for page in range(1024):
        put(leaves + page * size, page << 12 | every)
    chosen = [GUEST_TABLES >> 12, (GUEST_TABLES >> 12) + 1, (GUEST_TABLES >> 12) + 2, TARGET >> 12]
    for page in chosen:
        if random.random() < 0.6:
            entry = random_entry(random, page << 12, True, 1, host)
            put(leaves + page * size, entry)
    gmet = random.random() < 0.3
    if gmet:
        put(leaves + (CODE >> 12) * size, CODE | every & ~U)  # of supervisors; what users execute is in the next page
    return Nested(NESTED_TABLES, cr4, efer, PHYSICAL_BITS, gmet=gmet)


def two_dimensions(mode: str, host: str, seeds: Iterable[int], *, python: bool = False, strict: bool = False) -> Counter[object]:
    """The same for a guest in `mode` under the nested tables of a host in the mode `host`."""
    bench = Bench(mode, python, strict)
    rig, cpu = bench.rig, bench.rig.cpu
    outcomes: Counter[object] = Counter()
    for seed in seeds:
        random = Random(seed)
        state = registers(rig, random, mode)
        random_tables(rig, random, mode, GUEST_TABLES, address_of(mode), bench.root)
        nested = nested_tables(rig, random, host)
        kind = random.choice(("load", "store", "fetch"))
        code = CODE + 0x1000 if state.cpl == 3 else CODE
        cpu.npt = rig.machine.engine.physical.shadow(nested.ncr3, nested.host_cr4, nested.host_efer, gmet=nested.gmet)
        translate(rig.ram, state, code, Access(execute=True, user=state.cpl == 3), nested, set_ad=True)
        before = snapshot(rig)
        model = copy(before)
        verdict = expected(model, state, mode, kind, nested)
        got = bench.access(kind, cpu.npt)
        what = f"seed {seed}: {kind} at CPL {state.cpl}: translate says {verdict}, the engine {got}"
        assert got == (tuple(verdict) if isinstance(verdict, Fault) else ("done",)), what
        if not isinstance(verdict, Fault):
            compare_marks(rig, before, model, False, what)
        outcomes[got[0]] += 1
    return outcomes


@STRICT
@pytest.mark.parametrize("host", MODES)
@pytest.mark.parametrize("mode", MODES)
def test_two_dimensions(mode: str, host: str, strict: bool, python: bool) -> None:
    outcomes = two_dimensions(mode, host, range(40 if python else 250), python=python, strict=strict)
    assert outcomes["done"] > 0
    assert outcomes["PF"] > 0
    assert outcomes["NPF"] > 0
