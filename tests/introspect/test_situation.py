"""`context` and `here` on bytes alone: every section, every mode, and what is not known."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from introspect.commands import ExitRecord, GuestView, HostView, default_registry
from introspect.commands.registry import as_json
from introspect.commands.situation import SECTIONS, Situation, situation, where
from introspect.exits import ExitCode
from introspect.paging import PagingState
from introspect.sources import BytesMemory
from introspect.symbols import Symbol, Symbols
from introspect.vmcb import VMCB
from tests.introspect.world import World

PC, STACK, VMCB_AT = 0x1000, 0x2000, 0x3000
CODE = bytes.fromhex("55 48 89 e5 0f a2 e8 f5 ff ff ff c3 0f 0b")  # push; mov; cpuid; call f; ret; ud2
LONG = {
    "cr0": 0x80000011, "cr3": 0x9000, "cr4": 0x20, "efer": 0xD00, "rflags": 0x202, "cs.attrib": 0xA9B, "cs.selector": 8, "rip": PC + 4,
    "rsp": STACK, "rax": 1, "rbx": 0xFFFFFFFFFFFFFFFF, "cpl": 0,
}  # fmt: skip
FLAT = {"cr0": 0x11, "rflags": 2, "cs.attrib": 0xC9B, "ss.attrib": 0xC93, "cs.base": 0, "rip": PC + 4, "rsp": STACK, "cpl": 0}
REAL = {"cr0": 0x10, "rflags": 2, "cs.base": 0x800, "ss.base": 0x1000, "cs.attrib": 0x9B, "rip": 0x804, "rsp": 0x1000, "cpl": 0}


def world(registers: Mapping[str, int], *, guest: bool = True, intercepts: int = 0) -> World:
    memory = bytearray(0x5000)
    memory[PC : PC + len(CODE)] = CODE
    memory[STACK : STACK + 16] = (PC + 4).to_bytes(8, "little") + (7).to_bytes(8, "little")
    VMCB.write(memoryview(memory)[VMCB_AT:], "exitcode", int(ExitCode.NPF))
    VMCB.write(memoryview(memory)[VMCB_AT:], "exitinfo2", 0x40000)
    VMCB.write(memoryview(memory)[VMCB_AT:], "guest_asid", 3)
    VMCB.write(memoryview(memory)[VMCB_AT:], "intercept_misc1", intercepts)
    paging = PagingState(0x11, 0, 0, 0)
    view = GuestView(number=2, name="linux", vmcbs=(VMCB_AT,), asid=3, ncr3=None, paging=paging)
    return World(
        BytesMemory({0: bytes(memory)}), guests=[view] if guest else [], selected=view if guest else None,
        host=HostView(number=1, paging=paging), known_registers={2: registers, 1: registers},
        known_symbols={2: Symbols([Symbol("f", PC, len(CODE))])},
        ring=[ExitRecord(n, 2, 100 * n, PC, int(ExitCode.CPUID), 0, 0) for n in range(5)],
    )  # fmt: skip


def look(world: World, *sections: str, width: int = 100, rows: int | None = None) -> Situation:
    return situation(world, world.selected or world.host, sections or SECTIONS, width, rows)


def test_long_mode() -> None:
    found = look(world(LONG, intercepts=1 << 18))
    assert found.where.text().startswith("guest 2 (linux), 64-bit, no paging, CPL 0, ASID 3, RIP 0x1004 <f+0x4>, last exit CPUID")
    assert [line.partition("  !")[0] for line in found.lines("code")[:6]] == [
        "    0x1000  <f>      push rbp",
        "    0x1001  <f+0x1>  mov rbp, rsp",
        "=>  0x1004  <f+0x4>  cpuid",
        "    0x1006  <f+0x6>  call 0x1000  <f>",
        "    0x100b  <f+0xb>  ret",
        "    0x100c  <f+0xc>  ud2",
    ]
    assert found.lines("stack")[:2] == ["0x2000  0x0000000000001004  <f+0x4>", "0x2008  0x0000000000000007"]
    assert found.lines("vmcb")[0].startswith("#VMEXIT NPF")
    assert found.lines("vmcb")[1] == "guest_asid 0x3"
    assert len(found.lines("exit")) == 3
    assert found.lines("exit")[-1].split()[:3] == ["400", "0x1000", "CPUID"]
    registers = found.lines("regs")
    assert registers[0].split() == ["rax", "0x1", "rbx", "0xffffffffffffffff", "rsp", "0x2000"]
    assert registers[1] == " rip 0x1004 <f+0x4>   flags 0x202 [IF]"


def test_what_would_exit_is_marked() -> None:
    assert "=>  0x1004  <f+0x4>  cpuid  ! exit CPUID" in look(world(FLAT, intercepts=1 << 18)).lines("code")
    assert "=>  0x1004  <f+0x4>  cpuid" in look(world(FLAT)).lines("code")


def test_protected_and_real_mode() -> None:
    found = look(world(FLAT), "regs", "stack", "code")
    assert found.where.mode == "protected mode, 32-bit"
    assert found.lines("stack")[0] == "0x2000  0x00001004  <f+0x4>"
    assert found.lines("regs")[0].split() == ["esp", "0x2000"]
    found = look(world(REAL), "regs", "stack", "code")
    assert found.where.mode == "real mode"
    assert found.where.pc == PC + 4
    assert found.lines("stack")[0] == "0x2000  0x1004  <f+0x4>"
    assert any(line.startswith("=>  0x1004  <f+0x4>  cpuid") for line in found.lines("code"))


def test_nothing_is_known() -> None:
    found = look(world({}))
    assert found.lines("regs") == found.lines("code") == found.lines("stack") == []
    assert found.where.mode == ""
    alone = look(world({}, guest=False), "regs", "code", "stack", "vmcb")
    assert alone.text() == "Nothing of the host is known here."


def test_of_a_hypervisor_the_guest_that_left_last() -> None:
    w = world(LONG)
    found = situation(w, w.host, ("vmcb", "exit"))
    assert found.vmcb is not None
    assert found.vmcb.spa == VMCB_AT
    assert len(found.exits) == 3


def test_changes_are_marked() -> None:
    class Remembering(World):
        def registers_before(self, number: int) -> Mapping[str, int]:
            return {**LONG, "rax": 2, "rip": PC}

    w = world(LONG)
    before = Remembering(**{name: getattr(w, name) for name in ("memory", "guests", "selected", "host", "known_registers")})
    found = situation(before, before.selected or before.host)
    assert set(found.changed) == {"rax", "rip"}
    assert found.lines("regs")[0].startswith("*rax 0x1")
    assert "*rip 0x1004" in "\n".join(found.lines("regs"))


@pytest.mark.parametrize("width", [30, 40, 60, 80, 100, 150, 300])
def test_lines_fit(width: int) -> None:
    found = look(world(LONG), width=width)
    assert all(len(line) <= width for section in SECTIONS for line in found.lines(section))
    assert found.text().split("\n")[0].startswith("-- guest 2 (linux): 64-bit, no paging, CPL 0 ")


@pytest.mark.parametrize("rows", [1, 2, 5, 40])
def test_rows(rows: int) -> None:
    found = look(world(LONG), rows=rows)
    assert len(found.lines("code")) <= rows
    assert len(found.lines("stack")) == min(rows, 0x3000 // 8)
    assert len(found.lines("exit")) == min(rows, 5)


def test_the_command() -> None:
    registry = default_registry()
    w = world(LONG)
    text, result = registry.answer(w, "context stack exit --width 60 --rows 2")
    assert [line for line in text.split("\n") if line.startswith("-- ")] == ["-- stack ".ljust(60, "-"), "-- last exits ".ljust(60, "-")]
    data = json.loads(as_json("context", result))["result"]
    assert data["where"]["pc"] == PC + 4
    assert data["registers"]["rax"] == 1
    assert registry.answer(w, "here")[0].startswith("guest 2 (linux), 64-bit")
    assert json.loads(registry.answer(w, "context code --json")[0])["result"]["code"][0]["text"] == "push rbp"


@given(st.dictionaries(st.sampled_from(sorted({*LONG, *FLAT, "ss.base", "gs.base", "r8", "cr2", "fs.selector"})), st.integers(0, (1 << 64) - 1)))
def test_any_registers(registers: dict[str, int]) -> None:
    w = world(registers)
    found = look(w, width=80)
    found.text()
    json.dumps(found.json())
    where(replace(w, selected=None), w.host).text()
