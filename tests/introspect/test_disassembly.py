"""Instructions: where they begin, what they name, and which exits they may cause."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from introspect.disassembly import instructions, intercept_codes
from introspect.execution import execution_mode, linear_pc, linear_sp
from introspect.exits import ExitCode

EXAMPLES = Path(__file__).resolve().parents[2] / "examples/hypervisor/build"

CAUSES = {
    "0fa2": "CPUID", "f4": "HLT IDLE_HLT", "0f01d9": "VMMCALL", "0f01d8": "VMRUN", "0f01da": "VMLOAD", "0f01db": "VMSAVE",
    "0f01dc": "STGI", "0f01dd": "CLGI", "0f01de": "SKINIT", "0f01df": "INVLPGA", "0f0138": "INVLPG", "0f08": "INVD", "0f09": "WBINVD",
    "f30f09": "WBINVD", "0f31": "RDTSC", "0f01f9": "RDTSCP", "0f33": "RDPMC", "0f32": "MSR", "0f30": "MSR", "e460": "IOIO",
    "ee": "IOIO", "6c": "IOIO", "f36e": "IOIO", "f390": "PAUSE", "0f01c8": "MONITOR", "0f01c9": "MWAIT MWAIT_COND", "0f01fa": "MONITOR",
    "0f01fb": "MWAIT MWAIT_COND", "0f01d1": "XSETBV", "0f20c0": "CR0_READ", "0f22c0": "CR0_WRITE CR0_SEL_WRITE", "0f22d8": "CR3_WRITE",
    "440f20c0": "CR8_READ", "0f21f8": "DR7_READ", "0f23c0": "DR0_WRITE", "0f06": "CR0_WRITE", "0f01f0": "CR0_WRITE CR0_SEL_WRITE",
    "0f01e0": "CR0_READ", "9c": "PUSHF", "9d": "POPF", "48cf": "IRET", "cd80": "SWINT", "cc": "EXCP_BP", "f1": "ICEBP EXCP_DB",
    "0f0b": "EXCP_UD", "0faa": "RSM", "0f0108": "IDTR_READ", "0f0100": "GDTR_READ", "0f00c0": "LDTR_READ", "0f00c8": "TR_READ",
    "0f0118": "IDTR_WRITE", "0f0110": "GDTR_WRITE", "0f00d0": "LDTR_WRITE", "0f00d8": "TR_WRITE", "0f01fd": "RDPRU",
    "0f01fe": "INVLPGB", "0f01ff": "TLBSYNC", "f30f01fa": "MCOMMIT", "90": "", "4889e5": "",
}  # fmt: skip


@pytest.mark.parametrize(("code", "names"), CAUSES.items())
def test_what_may_exit(code: str, names: str) -> None:
    """A GDTR_READ is SGDT's, 0f 01 /0, IDTR_READ SIDT's, 0f 01 /1 (APM3)."""
    (one,) = instructions(bytes.fromhex(code), 0x1000, 64, 10)
    assert one.code.hex() == code
    assert [ExitCode(found).name for found in one.codes] == names.split(), one.text


def test_moves_of_other_registers_cause_nothing() -> None:
    assert intercept_codes("mov", "rax, qword ptr [rip + 8]") == ()
    assert intercept_codes("mov", "crazy, drx") == ()


def test_targets_and_memory() -> None:
    jump, load, absolute = instructions(bytes.fromhex("e8fb0f0000" "488b0510000000" "a00010000000000000"), 0x401000, 64, 3)
    assert (jump.target, jump.memory) == (0x402000, None)
    assert (load.target, load.memory) == (None, 0x40101C)
    assert absolute.memory == 0x1000
    (near,) = instructions(bytes.fromhex("e9fbff"), 0x1FFFE, 16, 1, 0x10000)
    assert (near.address, near.target) == (0x1FFFE, 0x1FFFC)  # the offset wraps within its segment
    (wrapped,) = instructions(bytes.fromhex("eb10"), 0x1FFFE, 16, 1, 0x10000)
    assert wrapped.target == 0x10010


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
