"""Instructions: where they begin, what they name, and which exits they may cause."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from introspect.disassembly import instruction_text, instructions
from introspect.execution import execution_mode, linear_pc, linear_sp

EXAMPLES = Path(__file__).resolve().parents[2] / "examples/hypervisor/build"

def test_targets_and_memory() -> None:
    jump, load, absolute = instructions(bytes.fromhex("e8fb0f0000" "488b0510000000" "a00010000000000000"), 0x401000, 64, 3)
    assert (jump.target, jump.memory) == (0x402000, None)
    assert (load.target, load.memory) == (None, 0x40101C)
    assert absolute.memory == 0x1000
    (near,) = instructions(bytes.fromhex("e9fbff"), 0x1FFFE, 16, 1, 0x10000)
    assert (near.address, near.target) == (0x1FFFE, 0x1FFFC)  # the offset wraps within its segment
    (wrapped,) = instructions(bytes.fromhex("eb10"), 0x1FFFE, 16, 1, 0x10000)
    assert wrapped.target == 0x10010


def test_text() -> None:
    assert instruction_text(b"\x0f\xa2\x90", 0, 64) == ("cpuid", 2)
    assert instruction_text(b"\x0f", 0, 64) is None
    assert [one.text for one in instructions(bytes.fromhex("0f01fe0f01fff30f01fa06"), 0, 64, 9)] == ["invlpgb", "tlbsync", "mcommit", ".byte 0x06"]


@given(st.binary(max_size=64), st.sampled_from((16, 32, 64)))
def test_anything_is_covered_without_gaps(code: bytes, bits: int) -> None:
    at = 0x1000
    for one in instructions(code, at, bits, 100):
        assert one.address == at
        assert one.code == code[at - 0x1000 : at - 0x1000 + len(one.code)]
        at += len(one.code)
    assert 0 <= at - 0x1000 <= len(code)
    assert len(code) - (at - 0x1000) < 15  # only an instruction that is cut is left


@pytest.mark.parametrize(("name", "bits", "machine"), [("guest64.elf", 64, "x86-64"), ("guestpae.elf", 32, "i386"), ("guestreal.elf", 16, "i8086"),
                                                       ("hypervisor.debug", 64, "x86-64")])  # fmt: skip
def test_boundaries_are_objdumps(name: str, bits: int, machine: str, tmp_path: Path) -> None:
    """Of each function of the examples, as objdump cuts it."""
    if shutil.which("objdump") is None or not (EXAMPLES / name).exists():
        pytest.skip("objdump is not in PATH, or the examples are not built (make examples)")
    source = EXAMPLES / (name if name != "hypervisor.debug" else "hypervisor.elf")
    printed = subprocess.run(["objdump", "-d", "-w", "-M", machine, str(source)], check=True, capture_output=True, text=True).stdout
    blocks: list[list[tuple[int, bytes]]] = []
    for line in printed.split("\n"):
        if line.endswith(">:"):
            blocks.append([])
        if "(bad)" in line or "rex" in line:
            blocks[-1:] = []  # data, or code of another mode
        found = re.match(r" *([0-9a-f]+):\t((?:[0-9a-f]{2} )+)", line)
        if found and blocks:
            blocks[-1].append((int(found[1], 16), bytes.fromhex(found[2])))
    checked = 0
    for block in blocks:
        if block:
            code = b"".join(data for _, data in block)
            mine = [(one.address, one.code) for one in instructions(code, block[0][0], bits, len(block))]
            assert mine == [(address & (1 << 64) - 1, data) for address, data in block]
            checked += len(block)
    assert checked > 20


@pytest.mark.parametrize(
    ("registers", "name", "bits", "pc", "sp"),
    [
        ({"cr0": 0, "cs.base": 0xF0000, "ss.base": 0x1000, "rip": 0xFFF0, "rsp": 0x12345}, "real mode", 16, 0xFFFF0, 0x3345),
        ({"cr0": 1, "rflags": 1 << 17, "cs.base": 0x100, "ss.base": 0, "rip": 4, "rsp": 8, "cs.selector": 0x10}, "virtual-8086 mode", 16, 0x104, 8),
        ({"cr0": 1, "cs.attrib": 0xC9B, "ss.attrib": 0xC93, "cs.base": 0x10, "rip": 4, "rsp": 0x10000}, "protected mode, 32-bit", 32, 0x14, 0x10000),
        ({"cr0": 1, "cs.attrib": 0x9B, "ss.attrib": 0x93, "rip": 4, "rsp": 0x10002}, "protected mode, 16-bit", 16, 4, 2),
        ({"cr0": 1, "efer": 0x500, "cs.attrib": 0xA9B, "cs.base": 0x999, "rip": 1 << 63, "rsp": 8}, "64-bit mode", 64, 1 << 63, 8),
        ({"cr0": 1, "efer": 0x500, "cs.attrib": 0xC9B, "ss.attrib": 0xC93, "rip": 4, "rsp": 8}, "compatibility mode, 32-bit", 32, 4, 8),
        ({"cr0": 1, "efer": 0x500}, "64-bit mode", 64, None, None),
    ],
)  # fmt: skip
def test_modes(registers: dict[str, int], name: str, bits: int, pc: int | None, sp: int | None) -> None:
    mode = execution_mode(registers)
    assert (mode.name, mode.code_bits) == (name, bits)
    assert (linear_pc(registers), linear_sp(registers)) == (pc, sp)
