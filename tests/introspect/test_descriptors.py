"""Descriptor tables in every mode: the table of types, and the commands on a world of bytes."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from introspect.commands import CommandError, HostView, run_line
from introspect.descriptors import GATE, SEGMENT, TSS16, TSS32, TSS64, decode, io_ports, table, task_state, vectors
from introspect.paging import PagingState
from introspect.sources import BytesMemory
from introspect.symbols import Symbol, Symbols

from .world import World

PRESENT = 1 << 47
LME_LMA = 0x500


def segment(base: int, limit: int, kind: int, *, code: bool = True, dpl: int = 0, **flags: int) -> int:
    return SEGMENT.make(
        limit_low=limit & 0xFFFF, limit_high=limit >> 16, base_low=base & 0xFFFFFF, base_high=base >> 24 & 0xFF, type=kind, S=code,
        DPL=dpl, P=1, base_upper=base >> 32, **flags,
    )  # fmt: skip


def gate(offset: int, selector: int, kind: int, dpl: int = 0, **more: int) -> int:
    return GATE.make(offset_low=offset & 0xFFFF, offset_high=offset >> 16 & 0xFFFF, offset_upper=offset >> 32, selector=selector,
                     type=kind, DPL=dpl, P=1, **more)  # fmt: skip


@pytest.mark.parametrize(
    ("raw", "long", "name", "size", "parts"),
    [
        (0, True, "null", 8, {}),
        (segment(0, 0xFFFFF, 11, L=1, G=1), True, "64-bit code rx", 8, {"base": None, "limit": None, "dpl": 0}),
        (segment(0x12345678, 0xFFFFF, 10, DB=1, G=1, dpl=3), True, "32-bit code rx", 8, {"base": 0x12345678, "limit": 0xFFFFFFFF, "dpl": 3}),
        (segment(0x1000, 0xFFF, 14), False, "16-bit conforming code rx", 8, {"base": 0x1000, "limit": 0xFFF}),
        (segment(0, 0x1234, 7, DB=1), False, "32-bit expand-down data rw", 8, {"limit": 0x1234}),
        (segment(0xFFFF8000_12345678, 0x67, 9, code=False), True, "64-bit TSS", 16, {"base": 0xFFFF8000_12345678, "limit": 0x67}),
        (segment(0x12345678, 0x67, 11, code=False), False, "busy TSS", 8, {"base": 0x12345678}),
        (segment(0x1000, 0x2B, 1, code=False), False, "16-bit TSS", 8, {"limit": 0x2B}),
        (segment(0x1000, 0x2B, 1, code=False), True, "reserved type 1", 8, {"base": None}),
        (segment(0x2000, 0xF, 2, code=False), False, "LDT", 8, {"base": 0x2000}),
        (gate(0xFFFFFFFF_80001234, 0x10, 14, 3, ist=2), True, "interrupt gate", 16,
         {"offset": 0xFFFFFFFF_80001234, "selector": 0x10, "ist": 2, "dpl": 3}),
        (gate(0xC0001234, 8, 15), False, "trap gate", 8, {"offset": 0xC0001234, "selector": 8, "ist": None}),
        (gate(0xC0001234, 8, 12, count=3), False, "call gate", 8, {"parameters": 3}),
        (gate(0x12345678_9ABC, 8, 12), True, "call gate", 16, {"parameters": None, "ist": None}),
        (gate(0x1234, 8, 6), False, "16-bit interrupt gate", 8, {"offset": 0x1234}),
        (gate(0, 0x28, 5), False, "task gate", 8, {"selector": 0x28, "offset": None}),
        (gate(0, 0x28, 5), True, "reserved type 5", 8, {"selector": None}),
    ],
)  # fmt: skip
def test_descriptors(raw: int, long: bool, name: str, size: int, parts: dict[str, Any]) -> None:
    found = decode(raw, long)
    assert (found.name, found.size) == (name, size)
    assert {part: getattr(found, part) for part in parts} == parts


@given(st.integers(0, (1 << 128) - 1), st.booleans())
def test_anything_decodes(raw: int, long: bool) -> None:
    found = decode(raw, long)
    assert found.size in (8, 16)
    assert found.name
    assert found.present == (bool(raw & PRESENT) and bool(raw & (1 << 64) - 1))


@given(st.binary(max_size=256), st.booleans())
def test_a_table_of_anything_is_walked_to_its_end(data: bytes, long: bool) -> None:
    end = 0
    for at, found in table(data, long):
        assert at >= end
        end = at + found.size
        assert end <= len(data)
    assert all(one.number < 256 for real in (False, True) for one in vectors(data, long, real))


@given(st.integers(0, (1 << 64) - 1), st.integers(0, 0xFFFFF), st.booleans())
def test_bases_and_limits_come_back(base: int, limit: int, pages: bool) -> None:
    found = decode(segment(base, limit, 9, code=False, G=pages), True)
    assert found.base == base
    assert found.limit == (limit << 12 | 0xFFF if pages else limit)


@pytest.mark.parametrize("layout", [TSS64, TSS32, TSS16])
def test_task_states_round_trip(layout: Any) -> None:
    values = {field.name: n * 3 + 1 for n, field in enumerate(layout)}
    assert layout.decode(layout.encode(values)) == values


def test_which_task_state() -> None:
    assert task_state(0x8B, True) is TSS64
    assert task_state(0x8B, False) is TSS32
    assert task_state(0x83, False) is TSS16


def test_io_ports() -> None:
    bitmap = bytearray(b"\xff" * 0x80)
    bitmap[0x60 // 8] &= ~0b1
    bitmap[0x3F8 // 8] = 0
    assert io_ports(bytes(bitmap)) == [(0x60, 0x60), (0x3F8, 0x3FF)]
    assert io_ports(b"") == []


def world(registers: dict[str, int], memory: BytesMemory) -> World:
    """A host without paging, in the mode that the registers say."""
    state = PagingState(registers.get("cr0", 0), 0, 0, 0)
    known = {"cr0": 0, "efer": 0, "rflags": 2, **registers}
    symbols = Symbols([Symbol("page_fault", 0x5000, 0x20), Symbol("stack_end", 0x7000, 8)])
    return World(memory, host=HostView(number=0, paging=state), known_registers={0: known}, known_symbols={0: symbols})


def lines(where: World, line: str) -> list[str]:
    return run_line(where, line).text().split("\n")


def long_mode(**more: int) -> World:
    memory = BytesMemory(0x10000)
    gdt = struct.pack("<3Q", 0, segment(0, 0xFFFFF, 11, L=1, G=1), segment(0, 0xFFFFF, 3, DB=1, G=1, dpl=3))
    gdt += segment(0x3000, 0x87, 11, code=False).to_bytes(16, "little")
    memory.write(0x1000, gdt)
    idt = bytearray(0x1000)
    idt[14 * 16 : 15 * 16] = gate(0x5000, 8, 14, ist=1).to_bytes(16, "little")
    idt[8 * 16 : 9 * 16] = (gate(0x5010, 8, 14) & ~PRESENT).to_bytes(16, "little")
    idt[3 * 16 : 4 * 16] = gate(0x1 << 60, 8, 15, 3).to_bytes(16, "little")
    for vector in range(0x20, 0x30):
        idt[vector * 16 : vector * 16 + 16] = gate(0x6000 + 0x10 * vector, 8, 14).to_bytes(16, "little")
    memory.write(0x2000, bytes(idt))
    tss = TSS64.encode({"rsp0": 0x7000, "ist1": 0x7004, "iopb": 0x68})
    memory.write(0x3000, bytes(tss) + b"\xff" * 0xC + b"\xfe" + b"\xff" * 0x13)
    registers = {
        "cr0": 1, "efer": LME_LMA, "cs.selector": 8, "cs.attrib": 0xA9B, "ss.selector": 0x13, "tr.selector": 0x18,
        "gdtr.base": 0x1000, "gdtr.limit": 0x27, "idtr.base": 0x2000, "idtr.limit": 0xFFF, "tr.base": 0x3000, "tr.limit": 0x87,
        "tr.attrib": 0x8B, "ldtr.base": 0, "ldtr.limit": 0, "ldtr.selector": 0, "ldtr.attrib": 0, **more,
    }  # fmt: skip
    return world(registers, memory)


def test_gdt_in_long_mode() -> None:
    assert lines(long_mode(), "gdt") == [
        "GDT of the host at 0x1000, limit 0x27 (64-bit mode)",
        "  0x0008  64-bit code rx   DPL 0                                cs",
        "  0x0010  32-bit data rw   DPL 3  base 0x0, limit 0xffffffff    ss",
        "  0x0018  64-bit busy TSS  DPL 0  base 0x3000, limit 0x87       tr",
    ]
    assert "there is none" in run_line(long_mode(), "ldt").text()


def test_idt_in_long_mode() -> None:
    assert [" ".join(line.split()) for line in lines(long_mode(), "idt")] == [
        "IDT of the host at 0x2000, limit 0xfff (64-bit mode)",
        "0x03 #BP trap gate DPL 3 0x8:0x1000000000000000 ! the offset is not canonical",
        "0x08 #DF interrupt gate DPL 0 0x8:0x5010 <page_fault+0x10> ! not present: #NP",
        "0x0e #PF interrupt gate DPL 0 0x8:0x5000 <page_fault> IST 1",
        "0x20-0x2f interrupt gate DPL 0 0x8:0x6200 then 0x10 on for each",
    ]
    shown = run_line(long_mode(), "idt --vector 14").json()
    assert isinstance(shown, dict)
    assert shown["vectors"][0]["vector"]["descriptor"]["ist"] == 1
    with pytest.raises(CommandError, match="nothing there"):
        run_line(long_mode(), "idt --vector 99")


def test_tss_in_long_mode() -> None:
    shown = lines(long_mode(), "tss")
    assert shown[0] == "TSS of the host, selector 0x18, at 0x3000, limit 0x87 (64-bit, busy TSS, DPL 0)"
    assert "  rsp0  0x7000  stack_end" in shown
    assert "  ist1  0x7004  stack_end+0x4" in shown
    assert shown[-1] == "I/O permission bitmap: lets through 0x60"
    assert lines(long_mode(**{"tr.limit": 0x67}), "tss")[-1] == "I/O permission bitmap: none: it would begin at 0x68, behind the limit"


def legacy() -> World:
    memory = BytesMemory(0x10000)
    memory.write(0x1000, struct.pack("<4Q", 0, segment(0, 0xFFFFF, 11, DB=1, G=1), segment(0x4000, 0xFFFF, 11), segment(0x1800, 0xF, 2, code=False)))
    memory.write(0x1800, struct.pack("<2Q", gate(0x5008, 8, 12, count=2), segment(0, 0x10, 3, DB=1)))
    memory.write(0x2000, struct.pack("<3Q", gate(0x5000, 8, 14), gate(0x1004, 0x10, 6), gate(0, 0x28, 5)))
    memory.write(0x3000, bytes(TSS32.encode({"esp0": 0x7000, "ss0": 0x10, "eflags": 0x202, "iopb": 0x200})))
    return world({
        "cr0": 1, "cs.selector": 8, "cs.attrib": 0xC9B, "ds.selector": 0xC, "gdtr.base": 0x1000, "gdtr.limit": 0x1F,
        "idtr.base": 0x2000, "idtr.limit": 0x17, "ldtr.selector": 0x18, "ldtr.attrib": 0x82, "ldtr.base": 0x1800, "ldtr.limit": 0xF,
        "tr.selector": 0x20, "tr.attrib": 0x8B, "tr.base": 0x3000, "tr.limit": 0x67,
    }, memory)  # fmt: skip


def test_tables_in_protected_mode() -> None:
    assert lines(legacy(), "gdt")[1:] == [
        "  0x0008  32-bit code rx  DPL 0  base 0x0, limit 0xffffffff    cs",
        "  0x0010  16-bit code rx  DPL 0  base 0x4000, limit 0xffff",
        "  0x0018  LDT             DPL 0  base 0x1800, limit 0xf        ldtr",
    ]
    assert lines(legacy(), "ldt")[1:] == [
        "  0x0004  call gate       DPL 0  -> 0x8:0x5008 <page_fault+0x8>, 2 parameters",
        "  0x000c  32-bit data rw  DPL 0  base 0x0, limit 0x10                            ds",
    ]
    shown = run_line(legacy(), "idt").json()
    assert isinstance(shown, dict)
    assert [(one["address"], one["symbol"]) for one in shown["vectors"]] == [(0x5000, "page_fault"), (0x5004, "page_fault+0x4"), (None, "")]
    text = lines(legacy(), "tss")
    assert "  eflags  0x202   IF" in text
    assert text[-1] == "I/O permission bitmap: none: it would begin at 0x200, behind the limit"


def test_real_mode_has_vectors() -> None:
    memory = BytesMemory(0x10000)
    memory.write(0x10 * 4, struct.pack("<HH", 0x0010, 0x500))
    where = world({"cr0": 0, "idtr.base": 0, "idtr.limit": 0x3FF}, memory)
    assert lines(where, "idt") == [
        "interrupt vector table of the host at 0x0, limit 0x3ff (real mode)", "  0x10  #MF      0x500:0x10  <page_fault+0x10>",
    ]  # fmt: skip


def test_where_knowledge_ends() -> None:
    cut = long_mode(**{"idtr.base": 0xFFF0})
    assert lines(cut, "idt")[-1].endswith("gva:0x10000: no memory at spa 0x10000")
    with pytest.raises(CommandError, match="no memory at spa"):
        run_line(long_mode(**{"gdtr.base": 0x20000}), "gdt")
    with pytest.raises(CommandError, match="open the source with registers"):
        run_line(World(BytesMemory(0x1000)), "gdt")
