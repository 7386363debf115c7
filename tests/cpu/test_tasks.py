"""Hardware task switches: through task gates by us, by far jumps, calls and IRET by the engine; both must agree."""

from __future__ import annotations

import struct

import pytest

from tests.engine.rig import (
    CODE32,
    CONFORMING32,
    DATA32,
    GDT,
    HANDLERS,
    LDT_SELECTOR,
    STACK,
    TABLES,
    TSS,
    TSS2,
    TSS2_SELECTOR,
    TSS_SELECTOR,
    USER_CODE32,
    USER_DATA,
    Rig,
)  # fmt: skip
from vmdbg.engine.state import CS, DS, ES, FS, GS, HF_IOBPT, LDTR, RSP, SS, TR

NT, TS = 1 << 14, 8
ENTRY, STACK2 = 0x9000, 0x5800
REGISTERS = (0xA0, 0xA1, 0xA2, 0xA3, STACK2, 0xA5, 0xA6, 0xA7)


def new_task(rig: Rig, **change: int) -> None:
    """Fill TSS2: 32-bit (APM2 figure 12-4)."""
    values = {
        "link": 0, "esp0": 0, "ss0": 0, "esp1": 0, "ss1": 0, "esp2": 0, "ss2": 0, "cr3": TABLES, "eip": ENTRY,
        "eflags": 2,
        **{f"r{n}": value for n, value in enumerate(REGISTERS)}, "es": DATA32, "cs": CODE32, "ss": DATA32, "ds": DATA32,
        "fs": 0, "gs": DATA32, "ldt": 0, "trap": 0,
    } | change  # fmt: skip
    rig.ram.write(TSS2, struct.pack("<26I", *values.values()))
    rig.ram.write(ENTRY, b"\x90\xf4")


def kind(rig: Rig, selector: int) -> int:
    return rig.ram.read(GDT + (selector & ~7) + 5, 1)[0] & 0x1F


WAYS = {"gate": "int $0x21", "call": "lcall $0x88, $0", "jump": "ljmp $0x88, $0"}


def switched(way: str, python: bool, **change: int) -> Rig:
    rig = Rig(f"{WAYS[way]}\nback: nop; hlt", "legacy", python=python)
    rig.gate(0x21, kind=5, selector=TSS2_SELECTOR)
    new_task(rig, **change)
    rig.ram.write_u32(TSS + 0x1C, TABLES)  # CR3: read when a task is entered, never written
    for number in range(8):
        if number != RSP:
            rig.state.set_reg(number, 0x11 * number)
    rig.step()
    return rig


@pytest.mark.parametrize("way", WAYS)
def test_switch(way: str, python: bool) -> None:
    rig = switched(way, python)
    s = rig.state
    assert rig.rip == ENTRY
    assert tuple(s.reg(n) & 0xFFFFFFFF for n in range(8)) == REGISTERS
    assert [s.selector(n) for n in (ES, CS, SS, DS, FS, GS)] == [DATA32, CODE32, DATA32, DATA32, 0, DATA32]
    assert s.cpl == 0
    assert s.cr(0) & TS
    assert bool(s.rflags & NT) == (way != "jump")
    assert (s.selector(TR), s.base(TR), kind(rig, TSS2_SELECTOR)) == (TSS2_SELECTOR, TSS2, 11)
    assert kind(rig, TSS_SELECTOR) == (9 if way == "jump" else 11)
    assert rig.ram.read_u32(TSS2) & 0xFFFF == (0 if way == "jump" else TSS_SELECTOR)
    old = struct.unpack("<26I", rig.ram.read(TSS, 104))
    assert old[8] == rig.labels["back"]
    assert old[9] == 2
    assert old[10:18] == tuple(STACK if n == RSP else 0x11 * n for n in range(8))
    assert [value & 0xFFFF for value in old[18:24]] == [DATA32, CODE32, DATA32, DATA32, DATA32, DATA32]
    rig.step()
    assert rig.rip == ENTRY + 1


@pytest.mark.parametrize("way", ["gate", "call"])
def test_return(way: str, python: bool) -> None:
    rig = switched(way, python)
    rig.ram.write(ENTRY, b"\xcf")
    rig.step()
    s = rig.state
    assert rig.rip == rig.labels["back"]
    assert tuple(s.reg(n) & 0xFFFFFFFF for n in range(8)) == tuple(STACK if n == RSP else 0x11 * n for n in range(8))
    assert not s.rflags & NT
    assert (kind(rig, TSS_SELECTOR), kind(rig, TSS2_SELECTOR)) == (11, 9)


def test_other_address_space(python: bool) -> None:
    rig = Rig("int $0x21", "legacy", python=python)
    rig.gate(0x21, kind=5, selector=TSS2_SELECTOR)
    other = TABLES + 0x8000
    rig.ram.write(other, rig.ram.read(TABLES, 0x1000))
    new_task(rig, cr3=other)
    rig.step()
    assert rig.state.cr(3) == other
    rig.step()
    assert rig.rip == ENTRY + 1


def test_error_code_goes_to_the_new_stack(python: bool) -> None:
    rig = Rig("movw $0x1238, %ax; movw %ax, %ds", "legacy", python=python)
    rig.gate(13, kind=5, selector=TSS2_SELECTOR)
    new_task(rig)
    rig.step(2)
    assert rig.rip == ENTRY
    assert rig.reg(RSP) == STACK2 - 4
    assert rig.stack(1, 4) == [0x1238]
    assert rig.ram.read_u32(TSS + 0x20) == 0x8004  # EIP of the fault


def test_double_fault_by_task(python: bool) -> None:
    """The classic use: a stack that is gone."""
    rig = Rig("pushl %eax; hlt", "legacy", python=python)
    rig.gate(8, kind=5, selector=TSS2_SELECTOR)
    new_task(rig)
    rig.state.set_reg(RSP, 0x301000)
    rig.change(0x300000, drop=1)
    rig.run()
    assert rig.rip == ENTRY + 2
    assert rig.stack(1, 4) == [0]


def test_user_task(python: bool) -> None:
    rig = switched("gate", python, cs=USER_CODE32, ss=USER_DATA, ds=USER_DATA, es=USER_DATA, gs=USER_DATA)
    assert rig.state.cpl == 3
    assert rig.rip == ENTRY


def test_local_descriptor_table(python: bool) -> None:
    rig = switched("gate", python, ldt=LDT_SELECTOR)
    assert (rig.state.selector(LDTR), rig.state.limit(LDTR)) == (LDT_SELECTOR, 0xFF)


@pytest.mark.parametrize(("change", "vector", "error"), [
    ({"cs": DATA32}, 10, DATA32), ({"cs": 0x60}, 11, 0x60), ({"ss": CODE32}, 10, CODE32), ({"ss": 0x98}, 12, 0x98),
    ({"ds": 0xFF8}, 10, 0xFF8), ({"es": 0x98}, 11, 0x98), ({"ldt": CODE32}, 10, CODE32),
    ({"cs": USER_CODE32, "ss": DATA32}, 10, DATA32),
])  # fmt: skip
def test_faults_belong_to_the_new_task(change: dict[str, int], vector: int, error: int, python: bool) -> None:
    rig = Rig("int $0x21", "legacy", python=python)
    rig.gate(0x21, kind=5, selector=TSS2_SELECTOR)
    rig.gate(vector, kind=5, selector=0xA8)
    tss3 = 0x3900
    rig.state.set_table(8, GDT, 0xAF)
    rig.ram.write_u64(GDT + 0xA8, 0x0000890000000067 | tss3 << 16)
    new_task(rig, **change)
    rig.ram.write(tss3, rig.ram.read(TSS2, 104))
    for at, value in (
        (0x20, HANDLERS + 16 * vector),
        (0x48, DATA32),
        (0x4C, CODE32),
        (0x50, DATA32),
        (0x54, DATA32),
        (0x60, 0),
    ):
        rig.ram.write_u32(tss3 + at, value)
    rig.step()
    assert rig.handled == vector
    assert rig.stack(1, 4)[0] & ~1 == error
    assert rig.ram.read_u32(tss3) & 0xFFFF == TSS2_SELECTOR  # the back link: it was the new task's fault
    assert rig.ram.read_u32(TSS2 + 0x20) == ENTRY


@pytest.mark.parametrize(("selector", "vector"), [(DATA32, 13), (TSS_SELECTOR, 13), (0xFF8, 13), (0x8C, 13)])
def test_bad_gates_fault_in_the_old_task(selector: int, vector: int, python: bool) -> None:
    """A task gate to what is no TSS, to a busy one, beyond the table, to the LDT."""
    rig = Rig("int $0x21", "legacy", python=python)
    rig.gate(0x21, kind=5, selector=selector)
    rig.step()
    assert rig.handled == vector
    assert rig.stack(2, 4) == [selector & 0xFFFC, 0x8000]
    assert CONFORMING32


def test_short_tss(python: bool) -> None:
    rig = Rig("int $0x21", "legacy", python=python)
    rig.gate(0x21, kind=5, selector=TSS2_SELECTOR)
    rig.ram.write_u64(GDT + TSS2_SELECTOR, 0x0000890000000066 | TSS2 << 16)
    rig.step()
    assert (rig.handled, rig.stack(1, 4)) == (10, [TSS2_SELECTOR])


def test_task_with_a_debug_trap(python: bool) -> None:
    rig = switched("gate", python, trap=1)
    assert rig.handled == 1
    assert rig.cpu.dr[6] & 1 << 15


def test_no_task_gates_in_long_mode(python: bool) -> None:
    rig = Rig("int $0x21", "long", python=python)
    rig.gate(0x21, kind=5, selector=TSS2_SELECTOR)
    rig.step()
    assert (rig.handled, rig.stack(1, 8)) == (13, [0x21 << 3 | 2])


def test_sixteen_bit_task(python: bool) -> None:
    rig = Rig("int $0x21", "legacy", python=python)
    rig.gate(0x21, kind=5, selector=TSS2_SELECTOR)
    rig.ram.write_u64(GDT + TSS2_SELECTOR, 0x000081000000002B | TSS2 << 16)
    values = (
        0,
        0,
        0,
        0,
        0,
        0,
        0,
        ENTRY,
        2,
        *(0xA0 + n if n != RSP else STACK2 for n in range(8)),
        DATA32,
        0x20,
        DATA32,
        DATA32,
        0,
    )
    rig.ram.write(TSS2, struct.pack("<22H", *values))
    rig.step()
    assert rig.rip == ENTRY
    assert [rig.reg(n) & 0xFFFF for n in range(8)] == [0xA0 + n if n != RSP else STACK2 for n in range(8)]
    assert rig.cpu.bits == 16


@pytest.mark.parametrize("way", WAYS)
def test_local_breakpoints_end_with_their_task(way: str, python: bool) -> None:
    """Global ones stay (APM2 13.1.1)."""
    rig = Rig(f"{WAYS[way]}\nback: nop; hlt", "legacy", python=python)
    rig.gate(0x21, kind=5, selector=TSS2_SELECTOR)
    new_task(rig)
    cpu = rig.cpu
    cpu.dr[0], cpu.dr[1], cpu.dr[7] = ENTRY, ENTRY + 1, 0x709
    cpu.debug.update()
    rig.run()
    assert (rig.handled, cpu.dr[6], cpu.dr[7]) == (1, 0xFFFF0FF2, 0x608)


def test_ports_are_exact_behind_a_task_switch(python: bool) -> None:
    """The engine's own task switches clear its local breakpoints: the runtime's for ports is a global one."""
    rig = Rig("ljmp $0x88, $0", "legacy", python=python)
    new_task(rig)
    rig.step()
    assert rig.rip == ENTRY
    assert rig.state.hflags & HF_IOBPT
