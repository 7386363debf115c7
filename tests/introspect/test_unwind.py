"""Frames: call frame information against pyelftools' reading of it, frame pointers, and stacks of anything."""

from __future__ import annotations

import contextlib
import shutil
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest
from elftools.dwarf.callframe import FDE
from elftools.elf.elffile import ELFFile
from hypothesis import given, settings
from hypothesis import strategies as st

from introspect.cfi import Cfi, CfiError, Row, _Section
from introspect.unwind import MAX_FRAMES, unwind

EXAMPLES = Path(__file__).resolve().parents[2] / "examples/hypervisor/build"
LONG = {"cr0": 1, "efer": 0x500, "cs.attrib": 0xA9B}
NAMES = ("rax", "rdx", "rcx", "rbx", "rsi", "rdi", "rbp", "rsp", *(f"r{n}" for n in range(8, 16)), "rip")


def oracle(path: Path) -> list[tuple[int, int, dict[str, Any], dict[str, tuple[str, int]]]]:
    """(first, end, CFA, rules) of every row of every function, as pyelftools decodes them."""
    rows = []
    with path.open("rb") as file:
        elf = ELFFile(file)
        dwarf = elf.get_dwarf_info()
        entries = dwarf.CFI_entries() if dwarf.has_CFI() else dwarf.EH_CFI_entries()
        for entry in entries:
            if not isinstance(entry, FDE):
                continue
            table = entry.get_decoded().table
            last = entry["initial_location"] + entry["address_range"]
            for line, following in zip(table, [*table[1:], {"pc": last}], strict=True):
                rules = {
                    NAMES[n]: (rule.type, rule.arg) for n, rule in line.items() if isinstance(n, int) and n < len(NAMES)
                }
                rows.append((line["pc"], following["pc"], line["cfa"], rules))
    return rows


KINDS = {"OFFSET": "offset", "VAL_OFFSET": "value", "UNDEFINED": "undefined", "SAME_VALUE": "same"}


def check(path: Path) -> int:
    cfi, checked = Cfi.load(path), 0
    for first, end, cfa, rules in oracle(path):
        for address in {first, (first + end) // 2, end - 1} if end > first else ():
            found = cfi.row(address)
            assert found is not None, hex(address)
            row, back, _ = found
            assert back == "rip"
            if cfa.expr is not None:  # type: ignore[attr-defined]
                assert row.register == ""
            else:
                assert (row.register, row.offset) == (NAMES[cfa.reg], cfa.offset)  # type: ignore[attr-defined]
            mine = {name: (rule.kind, rule.value) for name, rule in row.rules.items() if rule.kind != "expression"}
            theirs = {name: (KINDS[kind], value or 0) for name, (kind, value) in rules.items() if kind in KINDS}
            assert mine == theirs, hex(address)
            checked += 1
    return checked


@pytest.mark.parametrize("name", ["hypervisor.debug", "guest64.elf"])
def test_rows_are_pyelftools(name: str) -> None:
    """.debug_frame."""
    path = EXAMPLES / name
    if not path.exists():
        pytest.skip("the examples are not built (make examples)")
    assert check(path) > 50


def test_rows_of_a_program_are_pyelftools(tmp_path: Path) -> None:
    """.eh_frame, with saved registers, a frame that grows and states that are remembered."""
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not in PATH")
    source = tmp_path / "program.c"
    source.write_text("""
        int g(int, ...);
        int f(int a, int b) { int x[a]; for (int i = 0; i < b; i++) { if (g(i, x)) return g(2, x, a, b, i, 1, 2, 3, 4); } return g(a, x); }
        int h(int a, int b, int c, int d) { if (!a) return 0; return g(1, a, b, c, d, a + b, c + d, a * d, b * c) + f(a, b) + g(a, b, c, d); }
    """)
    for number, options in enumerate((["-O2"], ["-O0"], ["-O2", "-fomit-frame-pointer", "-mno-red-zone"])):
        path = tmp_path / f"program{number}.so"
        subprocess.run(["gcc", "-shared", "-nostdlib", "-fPIC", "-fasynchronous-unwind-tables", *options, "-o", path, source], check=True)
        assert check(path) > 5


def test_a_file_without_is_empty(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no ELF")
    assert len(Cfi.load(tmp_path / "text")) == 0
    assert Cfi.load(tmp_path / "none").row(0x1000) is None


# A program of frames by hand

CODE, STACK, TOP = 0x400000, 0x7000, 0x8000


class Memory:
    """Linear memory: code of `nop`s with what is put there, a stack."""

    def __init__(self) -> None:
        self.code, self.stack = bytearray(b"\x90" * 0x1000), bytearray(TOP - STACK)

    def read(self, address: int, size: int) -> bytes:
        for base, data in ((CODE, self.code), (STACK, self.stack)):
            if base <= address < base + len(data):
                return bytes(data[address - base : address - base + size])
        return b""

    def put(self, address: int, *words: int) -> None:
        struct.pack_into(f"<{len(words)}Q", self.stack, address - STACK, *words)


def chain(depth: int) -> tuple[Memory, dict[str, int]]:
    """`depth` frames of 0x40 bytes by frame pointers; the outermost one's is 0."""
    memory = Memory()
    frame = TOP - 0x10 - 0x40 * depth
    registers = {**LONG, "rip": CODE + 0x10, "rsp": frame - 0x20, "rbp": frame}
    for n in range(depth):
        last = n == depth - 1
        memory.put(frame + 0x40 * n, 0 if last else frame + 0x40 * (n + 1), CODE + 0x100 * (n + 1))
    return memory, registers


@given(st.integers(1, 60))
def test_frame_pointers(depth: int) -> None:
    memory, registers = chain(depth)
    found = unwind(registers, memory.read)
    assert [frame.pc for frame in found.frames] == [CODE + 0x10, *(CODE + 0x100 * (n + 1) for n in range(depth))]
    assert {frame.how for frame in found.frames[:-1]} == {"frame pointer"}
    assert found.end == "the frame pointer is 0: the outermost frame"


def test_limit() -> None:
    memory, registers = chain(60)
    found = unwind(registers, memory.read, limit=5)
    assert len(found.frames) == 5
    assert found.end == "there are more than 5 frames"


@pytest.mark.parametrize(
    ("change", "end"),
    [
        ({"rbp": STACK - 0x100}, "does not lie in the stack above"),
        ({"rbp": TOP - 0x11}, "does not lie in the stack above"),
        ({"rbp": 1 << 40}, "does not lie in the stack above"),
        ({"rbp": TOP + 0x100}, "cannot be read"),
        ({"rsp": TOP + 8, "rbp": TOP + 0x1000}, "cannot be read"),
    ],
)
def test_where_it_ends(change: dict[str, int], end: str) -> None:
    memory, registers = chain(3)
    assert end in unwind({**registers, **change}, memory.read).end


def test_a_circle_ends() -> None:
    memory, registers = chain(3)
    memory.put(registers["rbp"], registers["rbp"], CODE + 0x100)
    found = unwind(registers, memory.read)
    assert len(found.frames) <= 3
    assert "does not lie" in found.end
    assert "is not in memory that is code" in unwind(registers, memory.read, executable=lambda pc: False).end
    assert "not known" in unwind({"cr0": 1}, memory.read).end


@pytest.mark.parametrize(("code", "at", "depth"), [("5590", 0, 0), ("5590", 1, 8), ("f30f1efa5590", 4, 0), ("f30f1efa5590", 5, 8), ("90c3", 1, 0)])
def test_the_innermost_function_has_no_frame_yet(code: str, at: int, depth: int) -> None:
    """At its start, behind its push of the frame pointer, and at its return."""
    memory, registers = chain(2)
    memory.code[:8] = bytes.fromhex(code).ljust(8, b"\x90")
    sp = registers["rbp"] - 0x20
    memory.put(sp, *([registers["rbp"]] if depth else []), CODE + 0x800)
    found = unwind({**registers, "rip": CODE + at, "rsp": sp}, memory.read, function=lambda pc: CODE)
    assert [frame.how for frame in found.frames[:2]] == ["prologue", "frame pointer"]
    assert [frame.pc for frame in found.frames] == [CODE + at, CODE + 0x800, CODE + 0x100, CODE + 0x200]


def test_sixteen_and_thirty_two_bit_stacks() -> None:
    memory = Memory()
    base = {"cr0": 1, "cs.attrib": 0xC9B, "ss.attrib": 0xC93, "cs.base": 0x10, "ss.base": 0x20}
    struct.pack_into("<4I", memory.stack, 0x100, 0, CODE - 0x10 + 0x80, 0, 0)
    found = unwind({**base, "rip": CODE - 0x10, "rsp": STACK + 0xF0 - 0x20, "rbp": STACK + 0x100 - 0x20}, memory.read)
    assert [frame.pc for frame in found.frames] == [CODE, CODE + 0x80]
    struct.pack_into("<4H", memory.stack, 0x200, 0, 0x34, 0, 0)
    real = {"cr0": 0, "cs.base": 0x400000, "ss.base": STACK, "rip": 0x12, "rsp": 0x1F0, "rbp": 0x200}
    assert [frame.pc for frame in unwind(real, memory.read).frames] == [CODE + 0x12, CODE + 0x34]


@settings(max_examples=200)
@given(st.data())
def test_stacks_of_anything_end(data: st.DataObject) -> None:
    memory = Memory()
    words = data.draw(st.lists(st.one_of(st.integers(STACK, TOP), st.integers(CODE, CODE + 0xFFF), st.integers(0, (1 << 64) - 1)), max_size=200))
    memory.put(STACK, *words)
    registers = {name: data.draw(st.integers(STACK - 16, TOP + 16)) for name in ("rsp", "rbp")}
    found = unwind({**LONG, "rip": CODE + data.draw(st.integers(0, 0xFFF)), **registers}, memory.read)
    assert 1 <= len(found.frames) <= MAX_FRAMES
    assert found.end
    frames = [frame.cfa for frame in found.frames if frame.cfa is not None]
    assert frames == sorted(frames)


@settings(max_examples=300)
@given(st.binary(max_size=400), st.booleans(), st.integers(0, (1 << 64) - 1))
def test_information_of_anything_is_read_to_its_end(data: bytes, eh: bool, address: int) -> None:
    section = _Section(data, 0x1000, eh, NAMES, 8)
    cfi = Cfi([section])
    for at in range(0, len(data), 7):
        with contextlib.suppress(CfiError):
            section.row(at, address)
    for first, _, _, _ in cfi._entries:
        try:
            found = cfi.row(first)
        except CfiError:
            continue
        assert found is None or isinstance(found[0], Row)


@given(st.binary(min_size=1, max_size=8), st.integers(0, 2000))
@settings(max_examples=200, deadline=None)
def test_damaged_files(patch: bytes, at: int) -> None:
    """One of the examples, with bytes changed in its call frame information."""
    path = EXAMPLES / "guest64.elf"
    if not path.exists():
        pytest.skip("the examples are not built (make examples)")
    with path.open("rb") as file:
        section = ELFFile(file).get_section_by_name(".debug_frame")
        assert section is not None
        data = bytearray(section.data())
    data[at % len(data) : at % len(data) + len(patch)] = patch
    cfi = Cfi([_Section(bytes(data), 0, False, NAMES, 8)])
    memory, registers = chain(5)
    for first, _, _, _ in cfi._entries:
        found = unwind({**registers, "rip": first}, memory.read, cfi)
        assert found.end


def test_what_was_interrupted_is_at_its_instruction() -> None:
    """A signal's frame (augmentation S): its caller is at the first instruction of a function, not behind a call in the one before."""
    body = struct.pack("<I", 0) + b"\x01" + b"zRS\0" + b"\x01\x78\x10\x01\x00" + b"\x0c\x07\x08\x90\x01"
    body = body.ljust(-(-len(body) // 4) * 4, b"\0")
    cie = struct.pack("<I", len(body)) + body

    def section(first: bytes) -> bytes:
        entry = struct.pack("<IQQB", len(first) + 4, CODE, 0x10, 0) + b"\0\0\0"
        return first + struct.pack("<I", len(entry)) + entry

    memory = Memory()
    memory.put(STACK + 0x100, CODE + 0x200)
    registers = {**LONG, "rip": CODE, "rsp": STACK + 0x100, "rbp": 0}
    found = unwind(registers, memory.read, Cfi([_Section(section(cie), 0, True, NAMES, 8)]))
    assert [(frame.pc, frame.inside) for frame in found.frames] == [(CODE, CODE), (CODE + 0x200, CODE + 0x200)]


# Interrupts

HANDLER, OTHER = CODE + 0x400, CODE + 0x900
"""The entry of a handler, which pushes a number and registers; the function that is interrupted, with a frame pointer."""


def known(pc: int) -> int | None:
    return next((start for start in (OTHER, HANDLER, CODE) if start <= pc < CODE + 0x1000), None)


def interrupted(pushed: int, registers: dict[str, int], *frame: int) -> tuple[Memory, dict[str, int]]:
    """Amid the entry of a handler, which has pushed so many words over what the processor has."""
    memory = Memory()
    memory.code[0x400:0x402] = b"\x6a\x03"  # push 3
    memory.code[0x900:0x904] = bytes.fromhex("554889e5")
    word = 8 if registers is LONG else 4
    base = STACK + 0x200
    form = "<{}Q" if word == 8 else "<{}I"
    words = [*range(pushed), *frame]
    struct.pack_into(form.format(len(words)), memory.stack, base - STACK, *words)
    struct.pack_into(form.format(2), memory.stack, 0x800, 0, CODE + 0x80)
    return memory, {**registers, "cs.selector": 8, "rip": HANDLER + 2, "rsp": base, "rbp": STACK + 0x800}


@pytest.mark.parametrize("pushed", [0, 1, 17, 40])
@pytest.mark.parametrize("flags", [0x2, 0x246, 0x200246])
def test_what_was_interrupted(pushed: int, flags: int) -> None:
    memory, registers = interrupted(pushed, LONG, OTHER + 9, 8, flags, STACK + 0x700, 0)
    found = unwind(registers, memory.read, function=known)
    assert [(frame.pc, frame.how) for frame in found.frames] == [
        (HANDLER + 2, "interrupt"), (OTHER + 9, "frame pointer"), (CODE + 0x80, ""),
    ]  # fmt: skip
    assert found.frames[1].inside == OTHER + 9
    assert found.frames[0].cfa == STACK + 0x700


def test_users_are_interrupted_with_another_stack() -> None:
    memory, registers = interrupted(3, LONG, CODE + 0x33, 0x33, 0x202, STACK + 0x100, 0x2B)
    registers["rbp"] = STACK + 0x80
    found = unwind(registers, memory.read, function=lambda pc: known(pc) if pc != CODE + 0x33 else None)
    assert [frame.pc for frame in found.frames][:2] == [HANDLER + 2, CODE + 0x33]


def test_in_32_bit_code_the_stack_pointer_is_pushed_for_users_alone() -> None:
    narrow = {"cr0": 1, "cs.attrib": 0xC9B, "ss.attrib": 0xC93}
    memory, registers = interrupted(5, narrow, OTHER + 9, 8, 0x246, 0, 0)
    found = unwind(registers, memory.read, function=known)
    assert found.frames[0].cfa == STACK + 0x200 + 8 * 4
    assert [frame.pc for frame in found.frames] == [HANDLER + 2, OTHER + 9, CODE + 0x80]


@pytest.mark.parametrize(
    "frame",
    [
        (OTHER + 9, 8, 0x244, STACK + 0x700, 0), (OTHER + 9, 8, 0x8246, STACK + 0x700, 0), (OTHER + 9, 16, 0x246, STACK + 0x700, 0),
        (0x1234, 8, 0x246, STACK + 0x700, 0), (OTHER + 9, 8, 0x246, STACK + 0x700, 0x10000), (0x1234, 0x33, 0x202, STACK + 0x700, 0x2B),
        (OTHER + 9, 0x33, 0x202, STACK + 0x700, 0x10),
    ],
)  # fmt: skip
def test_what_no_processor_has_pushed(frame: tuple[int, ...]) -> None:
    memory, registers = interrupted(4, LONG, *frame)
    assert all(one.how != "interrupt" for one in unwind(registers, memory.read, function=known).frames)


def test_interrupts_that_lead_back_to_each_other_end() -> None:
    memory, registers = interrupted(2, LONG, HANDLER + 2, 8, 0x246, STACK + 0x200, 0)
    found = unwind(registers, memory.read, function=known)
    assert len(found.frames) < 20
    assert "does not lie above" in found.end
