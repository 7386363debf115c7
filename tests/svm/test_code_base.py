"""The base in CS while 64-bit code runs, over VMRUN and #VMEXIT: ignored by the code, and in the VMCB all the same."""

from __future__ import annotations

from typing import Any

import pytest

from introspect.vmcb import VMCB
from tests.engine.rig import CODE, CODE64, DATA, GDT, HANDLERS, descriptor
from tests.svm.hypervisor import HSAVE, NPF, VMMCALL, Hypervisor, P
from vmdbg.engine.state import CS, RAX, RBX

BASED = 0xA8
BASE = 0x240000

EXITS = {
    "VMMCALL": ("vmmcall", VMMCALL), "CPUID": ("cpuid", 0x72), "exception": ("ud2", 0x46), "port": ("outb %al, $0x80", 0x7B),
    "nested page fault": (f"movl %eax, {DATA}", NPF),
}  # fmt: skip


def based(source: str, **options: Any) -> Hypervisor:
    """With a segment that has a base in the guest's GDT and the host's."""
    h = Hypervisor(source, **options)
    for write in (h.guest_write, h.ram.write):
        write(GDT + BASED, descriptor(BASE, 0xFFFFF, 0xA9B).to_bytes(8, "little"))
    return h


@pytest.mark.parametrize("base", [0x240000, 0xFFFF0000, 0x123456789000, 0xFFFF800000010000])
@pytest.mark.parametrize("way", EXITS)
def test_what_vmrun_loaded(way: str, base: int, python: bool) -> None:
    """At the first exit, made in Python, and at the next, made in C where it can be.  Bases have 32 bits (APM2 table B-2)."""
    source, code = EXITS[way]
    h = based(f"incl %ebx; {source}; incl %ebx; {source}", python=python)
    h.intercept(0x46, 0x72, 0x7B)
    h.ram.write(h["iopm_base_pa"], b"\xff" * 0x3000)
    if way == "nested page fault":
        h.change_nested(DATA, drop=P)
    h.set(cs__base=base)
    assert h.enter() == code
    base &= 0xFFFFFFFF
    assert (h.reg(RBX), h["cs.base"], h["rip"]) == (1, base, CODE + 2)
    assert h.again(rip=CODE) == code
    assert (h.reg(RBX), h["cs.base"], h["rip"]) == (2, base, CODE + 2)


@pytest.mark.parametrize("segment", ["es", "cs", "ss", "ds"])
def test_bases_have_32_bits(segment: str, python: bool) -> None:
    """APM2 table B-2; and those are canonical."""
    h = based("vmmcall", python=python)
    for _ in range(3):
        assert h.again(rip=CODE, **{f"{segment}__base": 0x123480009000}) == VMMCALL
        assert h[f"{segment}.base"] == 0x80009000


def test_what_the_guest_loaded(python: bool) -> None:
    """A far transfer loads the base of the descriptor, an interrupt that of the handler's segment."""
    h = based(f"""
        pushq ${BASED}; leaq first(%rip), %rax; pushq %rax; lretq
        first: vmmcall
        pushq ${CODE64}; leaq second(%rip), %rax; pushq %rax; lretq
        second: vmmcall
        int $0x50""", python=python)
    h.inner.gate(0x50, selector=BASED)
    h.guest_write(0x2000, h.inner.ram.read(0x2000, 0x1000))
    h.guest_handler(0x50, "vmmcall")
    h.set(cs__base=0x123456000)
    for label, base in (("first", BASE), ("second", 0)):
        assert h.enter() == VMMCALL
        assert (h["rip"], h["cs.base"]) == (h.labels[label], base)
        h.set(rip=h["rip"] + 3)
        h.state.rip = h.program.origin
        h.state.set_reg(RAX, 0x90000)
        h.cpu.halted = False
    assert h.enter() == VMMCALL
    assert (h["rip"], h["cs.selector"], h["cs.base"]) == (HANDLERS + 0x500, BASED, BASE)


def test_that_of_the_host(python: bool) -> None:
    """VMRUN saves it with the host's state, and #VMEXIT brings it back."""
    h = based("vmmcall; hlt", host=f"""
        pushq ${BASED}; leaq there(%rip), %rbx; pushq %rbx; lretq; hlt
        there: vmrun; incl %ecx; vmrun; incl %ecx; hlt""", python=python)
    h.intercept(VMMCALL, on=False)
    h.intercept(0x46)
    assert h.enter() == 0x46
    assert h.reg(1) == 2
    assert (h.state.selector(CS), h.state.base(CS)) == (BASED, BASE)
    assert VMCB.read(h.ram.view[HSAVE : HSAVE + 0x1000], "cs.base") == BASE
    assert h["cs.base"] == 0
