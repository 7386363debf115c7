"""Segments with a base in 64-bit mode: CS, DS, ES and SS hold it, and it is ignored (APM2 4.5.3, 4.8.1); other modes add it."""

from __future__ import annotations

import struct
from typing import Any

import pytest

from introspect.smm import SMM_SAVE, SMM_SAVE_OFFSET
from tests.engine.assembler import assemble
from tests.engine.rig import CODE, CODE32, CODE64, DATA, DATA32, GDT, STACK, A, Mode, Rig, descriptor
from vmdbg.engine import bases
from vmdbg.engine.state import CS, DS, ES, FS, RAX, RBX, RCX, RDX, RSI, SS

BASED, GATE, BASED32 = 0xA8, 0x88, 0x20
BASE = 0x240000
"""Of the segments; where the code would be if 64-bit mode added it, there are other pages of ours."""
SMBASE = 0x30000

INTO = {
    "far return": f"pushq ${BASED}; leaq there(%rip), %rax; pushq %rax; lretq",
    "far jump": "ljmpl *pointer(%rip)",
    "far call": "lcalll *pointer(%rip)",
    "call gate": f"lcalll *gate(%rip); .set unused, {GATE}",
    "IRET": f"pushq ${DATA32}; pushq ${STACK}; pushfq; pushq ${BASED}; leaq there(%rip), %rax; pushq %rax; iretq",
    "interrupt": "int $0x50",
    "exception": "ud2",
}
BODY = f"""
    hlt
pointer: .long there; .word {BASED}
gate:   .long 0; .word {GATE}
data:   .long 0x12345678
    .skip 0x1000 - 32
there:
    movl $1, %ebx
    call inner
    movl data(%rip), %edx; .byte 0x2e; addl data, %edx
    jmp 2f
    hlt
inner: leaq inner(%rip), %rcx; incl %ebx; ret
2:  hlt"""


def rig_of(source: str, mode: Mode = "long", *, python: bool) -> Rig:
    rig = Rig(source, mode, python=python)
    rig.ram.write_u64(GDT + BASED, descriptor(BASE, 0xFFFFF, 0xA9B))
    rig.ram.write_u64(GDT + BASED32, descriptor(BASE, 0xFFFFF, 0xC9B))
    there = rig.labels.get("there", 0)
    rig.ram.write(GDT + GATE, struct.pack("<HHHHQ", there & 0xFFFF, BASED, 0x8C00, there >> 16, 0))
    for vector in (6, 0x50):
        rig.gate(vector, selector=BASED, offset=there)
    return rig


@pytest.mark.parametrize("stepped", [False, True], ids=["run", "stepped"])
@pytest.mark.parametrize("way", INTO)
def test_the_base_is_ignored_and_kept(way: str, stepped: bool, python: bool) -> None:
    rig = rig_of(INTO[way] + BODY, python=python)
    if stepped:
        rig.step(INTO[way].split(".set")[0].count(";") + (way != "call gate"))
        assert (rig.rip, rig.state.base(CS)) == (rig.labels["there"], BASE)
        rig.step(9)
    rig.run()
    assert rig.handled is None
    assert (rig.reg(RBX), rig.reg(RCX), rig.reg(RDX)) == (2, rig.labels["inner"], 0x2468ACF0)
    assert (rig.state.selector(CS), rig.state.base(CS)) == (BASED, BASE)
    for page in (CODE, CODE + 0x1000):
        assert not rig.ram.read_u64(rig.entry(BASE + page)) & A, "what is at the base has been looked at"


def test_single_steps_of_the_software(python: bool) -> None:
    """The trap of a far return, taken with the base in CS, and back by IRET."""
    rig = rig_of(f"""
        pushq ${BASED}; leaq there(%rip), %rax; pushq %rax; pushfq; orl $0x100, (%rsp); popfq; lretq
        hlt
        there: incl %ebx; pushfq; andl $~0x100, (%rsp); popfq; incl %ebx; hlt""", python=python)
    rig.handler(1, "movq 8(%rsp), %rcx; incl %esi; iretq")
    rig.run()
    assert (rig.reg(RBX), rig.reg(RCX), rig.reg(RSI)) == (2, BASED, 5)
    assert (rig.state.selector(CS), rig.state.base(CS)) == (BASED, BASE)


def test_the_next_segment_has_its_own(python: bool) -> None:
    """Far transfers from the one with a base to one without, and SYSRET, leave none."""
    rig = rig_of(f"pushq ${BASED}; leaq there(%rip), %rax; pushq %rax; lretq; there: nop; pushq ${CODE64}; leaq last(%rip), %rax;"
                 "pushq %rax; lretq; last: nop; hlt", python=python)  # fmt: skip
    rig.step(5)
    assert rig.state.base(CS) == BASE
    rig.run()
    assert (rig.handled, rig.state.selector(CS), rig.state.base(CS)) == (None, CODE64, 0)
    user = rig_of(f"pushq ${BASED}; leaq there(%rip), %rax; pushq %rax; lretq; there: leaq last(%rip), %rcx; sysretq; last: nop", python=python)
    user.state.efer |= 1
    user.state.set_field("star", 0x23 << 48)
    user.state.set_reg(11, 2)
    user.step(6)
    assert (user.rip, user.state.cpl, user.state.base(CS)) == (user.labels["last"], 3, 0)


@pytest.mark.parametrize("mode", ["long", "compatibility"])
def test_compatibility_mode_adds_it(mode: Mode, python: bool) -> None:
    """To 32-bit code with the base, from it to 64-bit code with the base, and back: only there is it added."""
    rig = rig_of({
        "long": f"pushq ${BASED32}; pushq $1; lretq",
        "compatibility": f"ljmp ${BASED32}, $1",
    }[mode] + "; hlt", mode, python=python)  # fmt: skip
    wide = assemble(f"incl %ebx; movl data(%rip), %ecx; pushq ${CODE32}; pushq ${DATA + 0x100}; lretq; data: .long 77", DATA, 64)
    rig.ram.write(DATA, wide.code)
    rig.ram.write(DATA + 0x100, b"\x41\xf4")  # inc ecx, hlt
    rig.ram.write(BASE + 1, assemble(f"incl %ebx; ljmp ${BASED}, ${DATA}", 1, 32).code)
    rig.run()
    assert (rig.reg(RBX), rig.reg(RCX), rig.rip) == (2, 78, DATA + 0x102)
    assert (rig.state.selector(CS), rig.state.base(CS)) == (CODE32, 0)


def test_smm_saves_it(python: bool) -> None:
    """The save area holds it, and RSM brings it back."""
    rig = rig_of(INTO["far return"] + BODY, python=python)
    rig.ram.write(SMBASE + 0x8000, assemble("rsm", 0x8000, 16).code)
    rig.step(4)
    rig.cpu.smi()
    rig.step()
    assert SMM_SAVE.decode(rig.ram.read(SMBASE + SMM_SAVE_OFFSET, SMM_SAVE.size))["cs.base"] == BASE
    rig.step()
    assert (rig.rip, rig.state.base(CS)) == (rig.labels["there"], BASE)
    rig.run()
    assert (rig.reg(RBX), rig.reg(RCX), rig.reg(RDX)) == (2, rig.labels["inner"], 0x2468ACF0)


PREFIXES = {"es": (0x26, ES), "cs": (0x2E, CS), "ss": (0x36, SS), "ds": (0x3E, DS)}


@pytest.mark.parametrize("mode", ["long", "compatibility"])
@pytest.mark.parametrize("name", PREFIXES)
def test_prefixes(name: str, mode: Mode, python: bool) -> None:
    """A prefix for one of the four means nothing in 64-bit mode, alone and behind one for FS."""
    prefix, segment = PREFIXES[name]
    rig = rig_of(f"""
        .byte {prefix}; movl (%ebx), %eax
        .byte 0x64, {prefix}; movl (%ebx), %ecx
        .byte {prefix}, 0x64; movl (%ebx), %edx
        hlt""", mode, python=python)
    s, wide = rig.state, mode == "long"
    s.set_reg(RBX, DATA)
    for number, base in ((segment, BASE), (FS, BASE + 0x1000)):
        s.set_segment(number, s.selector(number), base, 0xFFFFFFFF, s.attrib(number))
    s.refresh()
    for number, address in enumerate((DATA, BASE + DATA, BASE + 0x1000 + DATA)):
        rig.ram.write_u32(address, 10 + number)
    if segment == CS and not wide:
        rig.ram.write(BASE + CODE, rig.program.code)
    rig.run()
    assert (rig.handled, s.base(segment)) == (None, BASE)
    assert (rig.reg(RAX), rig.reg(RCX), rig.reg(RDX)) == ((10, 12, 12) if wide else (11, 11, 12))


@pytest.mark.parametrize("mend", [bases.mend_code_bases, bases.mend_segment_overrides])
def test_the_engine_is_mended(mend: Any) -> None:
    """On the machines we test on; what is not as expected is left alone."""
    Rig("nop")
    assert mend()
    assert not mend.__wrapped__(), "the library's code is not the wheel's any more"
