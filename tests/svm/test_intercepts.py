"""Every intercept: its exit code, EXITINFO1, nRIP, and that the instruction has not happened."""

from __future__ import annotations

import pytest

from introspect.vmcb import VMCB
from tests.engine.rig import CODE, DATA, HANDLERS, Mode, bits_of
from tests.svm.covers import covers
from tests.svm.hypervisor import HLT, IOPM, MSRPM, VMMCALL, Hypervisor
from vmdbg.engine.state import FS, RBX, RCX, RDX

MOV = 1 << 63

# (text, intercepted exit code, EXITINFO1): the instruction is at the label `it`, the guest's end at `end`.
PLAIN = [
    ("movq %cr0, %rbx", 0x00, MOV | 3), ("movq %cr3, %r9", 0x03, MOV | 9), ("movq %cr2, %rax", 0x02, MOV),
    ("movq %cr4, %rsi", 0x04, MOV | 6), ("movq %cr8, %rdx", 0x08, MOV | 2), ("smsw %bx", 0x00, 0),
    ("smsw (%rsp)", 0x00, 0),
    ("movq %rbx, %cr0", 0x10, MOV | 3), ("movq %r10, %cr3", 0x13, MOV | 10), ("movq %rbx, %cr2", 0x12, MOV | 3),
    ("movq %rbx, %cr4", 0x14, MOV | 3), ("movq %rbx, %cr8", 0x18, MOV | 3), ("clts", 0x10, 0), ("lmsw %bx", 0x10, 0),
    *((f"movq %dr{n}, %rbx", 0x20 + n, 3) for n in range(8)), *((f"movq %r11, %dr{n}", 0x30 + n, 11) for n in range(8)),
    ("sidt (%rsp)", 0x66, 0), ("sgdt (%rsp)", 0x67, 0), ("sldt %ax", 0x68, 0), ("str %ax", 0x69, 0),
    ("lidt (%rsp)", 0x6A, 0), ("lgdt (%rsp)", 0x6B, 0), ("lldt %ax", 0x6C, 0), ("ltr %ax", 0x6D, 0),
    ("rdtsc", 0x6E, 0), ("rdpmc", 0x6F, 0), ("pushfq", 0x70, 0), ("popfq", 0x71, 0), ("cpuid", 0x72, 0),
    ("iretq", 0x74, 0), ("int $0x33", 0x75, 0x33), ("invd", 0x76, 0), ("pause", 0x77, 0), ("hlt", 0x78, 0),
    (f"invlpg {DATA}(%rbx)", 0x79, DATA), ("invlpga", 0x7A, 0),
    ("vmrun", 0x80, 0), ("vmmcall", 0x81, 0), ("vmload", 0x82, 0), ("vmsave", 0x83, 0), ("stgi", 0x84, 0),
    ("clgi", 0x85, 0),
    ("skinit", 0x86, 0), ("rdtscp", 0x87, 0), (".byte 0xf1", 0x88, 0), ("wbinvd", 0x89, 0), ("monitor", 0x8A, 0), ("mwait", 0x8B, 0),
    (".byte 0x0f, 0x01, 0xfd", 0x8E, 0), (".byte 0x48, 0x0f, 0x01, 0xfd", 0x8E, 0),
    ("rdmsr", 0x7C, 0), ("wrmsr", 0x7C, 1),
]  # fmt: skip


@covers(*sorted({code for _, code, _ in PLAIN}), "NRIPS", "DecodeAssists")
@pytest.mark.parametrize(("text", "code", "info1"), PLAIN, ids=[f"{text} {code:x}" for text, code, _ in PLAIN])
def test_instruction(text: str, code: int, info1: int, python: bool) -> None:
    h = Hypervisor(f"nop\nit: {text}\nend: vmmcall", python=python)
    h.intercept(code)
    h.ram.write(MSRPM, b"\xff" * 0x2000)
    h.state.set_reg(RBX, {"%cr0": h["cr0"], "%cr4": h["cr4"]}.get(text[-4:], 0))
    h.state.set_reg(RCX, 0xC0000100 if "msr" in text else 0)
    before = h["rsp"], h["rflags"], h["cr0"], h["cr4"], h["cr3"]
    assert h.enter() == code
    assert h["exitinfo1"] == info1
    assert h["rip"] == h.labels["it"]
    assert h["nrip"] == h.labels["end"]
    assert (h["rsp"], h["rflags"], h["cr0"], h["cr4"], h["cr3"]) == before
    assert h["exitintinfo"] == 0
    assert h.now == 1 + 3 + 1  # VMRUN, NOP, the host's HLT


# Without an intercept these go on; those that are not: undefined without their feature.
HARMLESS = [text for text, code, _ in PLAIN if text not in (
    "movq %rbx, %cr0", "movq %r10, %cr3", "movq %rbx, %cr4", "lidt (%rsp)", "lgdt (%rsp)", "lldt %ax", "ltr %ax",
    "iretq",
    "int $0x33", "hlt", "vmrun", "vmmcall", "vmload", "vmsave", "skinit", ".byte 0xf1", "popfq", "rdpmc",
    "movq %r11, %dr6",
    "movq %r11, %dr7", "lmsw %bx")]  # fmt: skip


@pytest.mark.parametrize("text", HARMLESS)
def test_not_intercepted(text: str, python: bool) -> None:
    h = Hypervisor(f"nop\nit: {text}\nend: vmmcall", python=python)
    h.state.set_reg(RCX, 0xC0000100 if "msr" in text else 0)
    assert h.enter() == VMMCALL
    assert h["rip"] == h.labels["end"]


@pytest.mark.parametrize("text", ["rsm", "vmcall", "getsec"])
def test_undefined_when_not_claimed(text: str, python: bool) -> None:
    h = Hypervisor(text, python=python)
    assert h.enter() == HLT
    assert h.guest_vector == 6


@pytest.mark.parametrize(("text", "code"), [
    ("divl %ecx", 0x40), ("int3", 0x43), ("ud2", 0x46), ("movw $0x1238, %ax; movw %ax, %ds", 0x4D),
])  # fmt: skip
def test_exceptions(text: str, code: int, python: bool) -> None:
    h = Hypervisor(f"xorl %ecx, %ecx\nit: {text}", python=python)
    h.intercept(code)
    assert h.enter() == code
    assert h["exitinfo1"] == (0x1238 if code == 0x4D else 0)
    assert h["exitinfo2"] == 0
    assert h["rip"] == h.labels["it"] + (4 if code == 0x4D else 0)
    assert h["exitintinfo"] == 0


@covers(0x43)
def test_int3_is_reported_before_it_happens(python: bool) -> None:
    h = Hypervisor("int3\nend: nop", python=python)
    h.intercept(0x43)
    assert h.enter() == 0x43
    assert (h["rip"], h["nrip"]) == (CODE, h.labels["end"])


@covers(0x44)
def test_into(python: bool) -> None:
    h = Hypervisor("movb $0x7f, %al; addb $1, %al\nit: into", "protected32", python=python)
    h.intercept(0x44)
    assert h.enter() == 0x44
    assert h["rip"] == h.labels["it"]


@covers(0x4E)
def test_page_fault(python: bool) -> None:
    h = Hypervisor("movl %eax, 0x300000", python=python)
    h.intercept(0x4E)
    h.guest_write(0x50000 + 0x300 * 8, bytes(8))
    h.set(cr2=0x777)
    assert h.enter() == 0x4E
    assert (h["exitinfo1"], h["exitinfo2"], h["cr2"]) == (2, 0x300000, 0x777)  # CR2 is written only by the delivery
    assert h["insn_len"] == 15
    assert h["insn_bytes"] & 0xFFFFFFFFFFFFFF == int.from_bytes(b"\x89\x04\x25\x00\x00\x30\x00", "little")


@covers(0x48)
def test_double_fault(python: bool) -> None:
    """An exception in delivering another: #DF exits with no EXITINTINFO, its own fault with the first one there."""
    h = Hypervisor("movw $0x1238, %ax; movw %ax, %ds", python=python)
    h.inner.gate(13, present=False)
    h.guest_write(0, h.inner.ram.read(0, 0x8000))
    h.intercept(0x48)
    assert h.enter() == 0x48
    assert (h["exitinfo1"], h["exitintinfo"]) == (0, 0)
    h = Hypervisor("movw $0x1238, %ax; movw %ax, %ds", python=python)
    h.inner.gate(13, present=False)
    h.guest_write(0, h.inner.ram.read(0, 0x8000))
    h.intercept(0x4B, 0x48)
    assert h.enter() == 0x4B
    assert h["exitinfo1"] == 13 << 3 | 3
    assert h["exitintinfo"] == 0x1238 << 32 | 1 << 31 | 1 << 11 | 3 << 8 | 13


def test_exception_intercepts_do_not_see_int_n(python: bool) -> None:
    h = Hypervisor(".byte 0xcd, 13", python=python)
    h.intercept(0x4D)
    assert h.enter() == HLT
    assert h.guest_vector == 13


def test_privilege_comes_before_intercepts(python: bool) -> None:
    """#GP of CPL 3 has priority (APM2 15.7, table of instruction intercepts)."""
    for text in ("movq %cr0, %rax", "hlt", "rdmsr", "invlpg (%rax)", "vmrun", "vmload", "stgi", "clts", "wbinvd"):
        h = Hypervisor(text, python=python, user=True)
        h.intercept(0x00, 0x10, 0x78, 0x7C, 0x79, 0x80, 0x82, 0x84, 0x89, 0x4D)
        assert h.enter() == 0x4D, text
        assert h["rip"] == CODE


def test_svm_instructions_of_a_guest_that_are_not_intercepted(python: bool) -> None:
    """VMLOAD and VMSAVE take a system-physical address, whatever the guest's tables say (APM2 15.5.2); VMMCALL is #UD."""
    source, target = 0x98000, 0x99000
    h = Hypervisor(f"movl ${source}, %eax; vmload; movl ${target}, %eax; vmsave; clgi; stgi; vmmcall", python=python)
    h.intercept(VMMCALL, on=False)
    h.ram.write(source, bytes(VMCB.encode({"fs.base": 0x1234000, "star": 77, "tr.selector": 0x68, "tr.attrib": 0x8B})))
    assert h.enter() == HLT
    assert h.guest_vector == 6
    saved = h.ram.view[target : target + 0x1000]
    assert (VMCB.read(saved, "fs.base"), VMCB.read(saved, "star")) == (0x1234000, 77)
    assert h.state.base(FS) == 0x1234000
    assert not any(h.ram.read(h.base + target, 0x1000))


@pytest.mark.parametrize("text", ["vmrun", "vmload", "vmsave", "clgi", "invlpga"])
def test_without_svme_they_are_undefined_before_they_are_intercepted(text: str, python: bool) -> None:
    """All but STGI, for which CPUID's SKINIT is enough (APM2 15.4)."""
    h = Hypervisor(f"movl $0xc0000080, %ecx; rdmsr; btrl $12, %eax; wrmsr; it: {text}", python=python)
    h.intercept(0x7A, 0x80, 0x82, 0x83, 0x84, 0x85)
    assert h.enter() == HLT
    assert h.guest_vector == 6
    assert h.guest_stack(1) == [h.labels["it"]]


@covers(0x8D)
@pytest.mark.parametrize("text", ["xsetbv", ".byte 0x48; xsetbv"])
def test_xsetbv(text: str, python: bool) -> None:
    """XCR0 is the processor's: a world switch leaves it alone (APM2 15.5)."""
    h = Hypervisor(f"movl $3, %eax\nit: {text}\nend: vmmcall", python=python,
                   host="movl $3, %eax; xorl %edx, %edx; xorl %ecx, %ecx; xsetbv; movl $0x90000, %eax; vmrun; hlt")  # fmt: skip
    h.state.set_cr(4, h.state.cr(4) | 1 << 18)
    h.intercept(0x8D)
    h.set(cr4=h["cr4"] | 1 << 18)
    assert h.enter() == 0x8D
    assert (h["rip"], h["nrip"], h["exitinfo1"]) == (h.labels["it"], h.labels["end"], 0)
    assert h.state.xcr0 == 3
    h.intercept(0x8D, on=False)
    h.guest_write(CODE, b"\xb8\1")
    assert h.again(rip=CODE) == VMMCALL
    assert h.state.xcr0 == 1


@covers(0x8A, 0x8B, 0x8C)
def test_mwait_if_armed(python: bool) -> None:
    """8Ch exits only where the monitor is armed and has not been triggered, and comes before 8Bh (APM2 table 15-7); a world
    switch disarms."""
    h = Hypervisor(f"mwait; movl ${DATA}, %eax; monitor; incb (%rax); mwait; monitor; mwait; mwait; vmmcall", python=python)
    h.intercept(0x8C)
    assert h.enter() == 0x8C
    assert h.guest_read(DATA, 1) == 1
    assert h.again() == VMMCALL
    h.intercept(0x8B)
    assert h.again(rip=CODE) == 0x8B
    assert h["rip"] == CODE
    assert h.skip(3) == 0x8B, "triggered"
    assert h.skip(3) == 0x8C
    assert h.skip(3) == 0x8B, "disarmed"


@covers(0x60, 0x8B)
def test_mwait_of_a_guest_waits(python: bool) -> None:
    """Until an interrupt, which its hypervisor gets behind the MWAIT."""
    h = Hypervisor(f"movl ${DATA}, %eax; monitor; mwait\nend: vmmcall", python=python)
    h.intercept(0x60)
    h.set(v_intr=1 << 24)
    h.state.rflags |= 0x200
    h.run()
    assert h.cpu.halted
    assert h.cpu.guest is not None
    h.cpu.extint_level = True
    assert h.enter() == 0x60
    assert h["rip"] == h.labels["end"]


@covers(0x4E, 0x400)
def test_monitor_reads_its_address(python: bool) -> None:
    h = Hypervisor("movl $0x300000, %eax; monitor", python=python)
    h.intercept(0x4E)
    h.guest_write(0x50000 + 0x300 * 8, bytes(8))
    assert h.enter() == 0x4E
    assert (h["exitinfo1"], h["exitinfo2"]) == (0, 0x300000)
    h = Hypervisor("movl $0x7fff0000, %eax; monitor", python=python)
    assert h.enter() == 0x400
    assert (h["exitinfo1"], h["exitinfo2"]) == (1 << 32 | 4, 0x7FFF0000)


@covers(0x65)
@pytest.mark.parametrize(("text", "exits"), [
    ("movq %cr0, %rbx; xorl $0x8, %ebx; movq %rbx, %cr0", False),
    ("movq %cr0, %rbx; xorl $0x2, %ebx; movq %rbx, %cr0", False),
    ("movq %cr0, %rbx; xorl $0x10000, %ebx; movq %rbx, %cr0", True), ("movq %cr0, %rbx; movq %rbx, %cr0", False),
    ("movl $0x11, %ebx; lmsw %bx", True), ("movl $0x1b, %ebx; lmsw %bx", True), ("movl $0x15, %ebx; lmsw %bx", True),
    ("lmsw 0x7fffffff", True),
    ("clts", False),
])  # fmt: skip
def test_selective_cr0(text: str, exits: bool, python: bool) -> None:
    """Changes of TS and MP alone do not exit, but any LMSW does, before it reads memory (APM2 table 15-7)."""
    h = Hypervisor(f"{text}; vmmcall", python=python)
    h.intercept(0x65)
    assert h.enter() == (0x65 if exits else VMMCALL)


@covers(0x10, 0x65)
def test_cr0_write_hides_the_selective_intercept(python: bool) -> None:
    h = Hypervisor("movq %cr0, %rbx; xorl $0x10000, %ebx; movq %rbx, %cr0", python=python)
    h.intercept(0x65, 0x10)
    assert h.enter() == 0x10


# Ports.

IN, STR, REP, SZ8, SZ16, SZ32, A16, A32, A64 = (1 << bit for bit in (0, 2, 3, 4, 5, 6, 7, 8, 9))


@covers(0x7B)
@pytest.mark.parametrize(("mode", "text", "info"), [
    ("long", "inb $0x60, %al", 0x60 << 16 | IN | SZ8 | A64), ("long", "inw $0x60, %ax", 0x60 << 16 | IN | SZ16 | A64),
    ("long", "outl %eax, %dx", 0x1234 << 16 | SZ32 | A64), ("long", "outb %al, $0x20", 0x20 << 16 | SZ8 | A64),
    ("long", "outsb", 0x1234 << 16 | SZ8 | STR | A64 | 3 << 10),
    ("long", "rep insw", 0x1234 << 16 | IN | SZ16 | STR | REP | A64),
    ("long", "rep outsl %fs:(%rsi), %dx", 0x1234 << 16 | SZ32 | STR | REP | A64 | 4 << 10),
    ("protected32", "inb $0x60, %al", 0x60 << 16 | IN | SZ8 | A32),
    ("real", "outw %ax, %dx", 0x1234 << 16 | SZ16 | A16),
    ("real", "rep insb", 0x1234 << 16 | IN | SZ8 | STR | REP | A16),
])  # fmt: skip
def test_port_access(mode: Mode, text: str, info: int, python: bool) -> None:
    h = Hypervisor(f"{text}\nend: nop", mode, python=python)
    h.intercept(0x7B)
    h.ram.write(IOPM, b"\xff" * 0x3000)
    for register, value in ((RDX, 0x1234), (RCX, 5), (7, DATA & 0xFF00 | 0x3000), (6, 0x3000)):
        h.state.set_reg(register, value)
    assert h.enter() == 0x7B
    segment = 0x1C00 if "rep" not in text and "outs" not in text and "ins" not in text else 0
    # For IN and OUT the segment bits mean nothing.
    assert h["exitinfo1"] & ~segment == info
    assert h["exitinfo2"] == h.labels["end"]
    assert h["nrip"] == h.labels["end"]
    assert h["rip"] == CODE
    assert h.reg(RCX) == 5
    assert bits_of(mode) in (16, 32, 64)


@covers(0x7B)
def test_port_map(python: bool) -> None:
    """One bit a port; an access of several bytes tests all of theirs; beyond port FFFF the third page counts."""
    h = Hypervisor(
        "inb $0x61, %al; inw $0x61, %ax; inb $0x62, %al; movl $0xffff, %edx; inb %dx, %al; inw %dx, %ax; vmmcall",
        python=python,
    )
    h.intercept(0x7B)
    h.ram.write(IOPM + 0x62 // 8, bytes([1 << (0x62 & 7)]))
    assert h.enter() == 0x7B
    assert h["exitinfo1"] >> 16 == 0x61
    assert h["exitinfo1"] & SZ16
    assert h.skip(3) == 0x7B
    assert h["exitinfo1"] >> 16 == 0x62
    h.ram.write(IOPM + 0x2000, b"\x01")
    assert h.skip(2) == 0x7B
    assert h["exitinfo1"] >> 16 == 0xFFFF
    assert h["exitinfo1"] & SZ16
    assert h.skip(2) == VMMCALL


def test_ports_without_permission_fault_before_the_map(python: bool) -> None:
    h = Hypervisor("inb $0x60, %al", python=python, user=True)
    h.intercept(0x7B)
    h.ram.write(IOPM, b"\xff" * 0x3000)
    assert h.enter() == HLT
    assert h.guest_vector == 13


# MSRs.


@covers(0x7C)
@pytest.mark.parametrize(("msr", "at"), [
    (0x10, 0x20), (0x1FFF, 0x3FFE), (0xC0000080, 0x4000 + 0x100), (0xC0001FFF, 0x4000 + 0x3FFE),
    (0xC0010117, 0x8000 + 0x22E),
])  # fmt: skip
@pytest.mark.parametrize("write", [False, True])
def test_msr_map(msr: int, at: int, write: bool, python: bool) -> None:
    for bit, exits in ((at + write, True), (at + 1 - write, False)):
        h = Hypervisor("wrmsr" if write else "rdmsr", python=python)
        h.intercept(0x7C)
        h.state.set_reg(RCX, msr)
        h.ram.write(MSRPM + bit // 8, bytes([1 << (bit & 7)]))
        code = h.enter() if exits else None
        if exits:
            assert (code, h["exitinfo1"], h["rip"]) == (0x7C, int(write), CODE)
        else:
            h.intercept(0x7C, 0x4D, HLT)
            h.guest_write(CODE + 2, b"\xf4")
            assert h.enter() != 0x7C


@covers(0x7C)
def test_msrs_outside_the_map_always_exit(python: bool) -> None:
    h = Hypervisor("rdmsr", python=python)
    h.intercept(0x7C)
    h.state.set_reg(RCX, 0x40000000)
    assert h.enter() == 0x7C


def test_without_msr_prot_the_guest_uses_its_own(python: bool) -> None:
    h = Hypervisor(
        "movl $0xc0000081, %ecx; movl $0x1234, %eax; movl $0x5678, %edx; wrmsr; rdmsr; vmmcall", python=python
    )
    assert h.enter() == VMMCALL
    assert h.state.field("star") == 0x567800001234


# The rest of word 3.


@pytest.mark.parametrize("text", ["ltr %ax", "lldt %ax"])
def test_descriptor_loads_work_without_the_intercept(text: str, python: bool) -> None:
    selector = 0x88 if text.startswith("ltr") else 0x78
    h = Hypervisor(f"movw ${selector}, %ax; {text}; vmmcall", python=python)
    assert h.enter() in (VMMCALL, HLT)


@covers(0x7D)
def test_task_gate_intercept(python: bool) -> None:
    h = Hypervisor("int $0x21", "protected32", python=python)
    h.intercept(0x7D)
    h.inner.gate(0x21, kind=5, selector=0x88)
    h.guest_write(0, h.inner.ram.read(0, 0x8000))
    assert h.enter() == 0x7D
    assert (h["exitinfo1"], h["exitinfo2"], h["nrip"]) == (0x88, 0, 0)
    assert h["rip"] == CODE
    assert h["exitintinfo"] == 1 << 31 | 4 << 8 | 0x21


@covers(0x7D)
def test_task_gate_with_an_error_code(python: bool) -> None:
    h = Hypervisor("movw $0x1238, %ax; movw %ax, %ds", "protected32", python=python)
    h.intercept(0x7D)
    h.inner.gate(13, kind=5, selector=0x88)
    h.guest_write(0, h.inner.ram.read(0, 0x8000))
    assert h.enter() == 0x7D
    assert h["exitinfo2"] == 0x1238 | 1 << 44 | 1 << 48, "a fault: RF would be saved as 1"


def test_handlers_of_the_guest(python: bool) -> None:
    h = Hypervisor("ud2", python=python)
    assert h.enter() == HLT
    assert h["rip"] == HANDLERS + 16 * 6


@covers(0x7D)
@pytest.mark.parametrize(("text", "info2"), [
    ("ljmp $0x88, $0", 1 << 38), ("lcall $0x88, $0", 0), ("ljmp *pointer\nhlt\npointer: .long 0; .word 0x88", 1 << 38),
    ("lcall *pointer\nhlt\npointer: .long 0; .word 0x88", 0), ("ljmp $0xb8, $0", 1 << 38),
])  # fmt: skip
def test_far_transfers_to_a_task(text: str, info2: int, python: bool) -> None:
    """APM2 15.14.1: nothing of the switch has happened; the engine switches tasks itself, so it must not get so far."""
    h = Hypervisor("nop\n" + text, "protected32", python=python)
    h.intercept(0x7D)
    gdt = h["gdtr.base"]
    h.guest_write(gdt + 0xB8, (0x88 << 16 | 5 << 40 | 1 << 47).to_bytes(8, "little"))  # a task gate to it
    h.set(gdtr__limit=0xFFFF)
    tss = h["tr.base"]
    before = h.ram.read(h.base + tss, 104), h["tr.selector"]
    assert h.enter() == 0x7D
    assert h["exitinfo1"] == 0x88
    assert h["exitinfo2"] == info2
    assert h["rip"] == CODE + 1
    assert (h.ram.read(h.base + tss, 104), h["tr.selector"]) == before


@covers(0x7D)
def test_iret_to_the_linked_task(python: bool) -> None:
    h = Hypervisor("pushf; orl $0x4000, (%esp); popf; iret", "protected32", python=python)
    h.intercept(0x7D)
    h.guest_write(h["tr.base"], (0x88).to_bytes(2, "little"))
    h.guest_write(h["gdtr.base"] + 0x88 + 5, b"\x8b")  # busy, as a task that was interrupted is
    assert h.enter() == 0x7D
    assert (h["exitinfo1"], h["exitinfo2"]) == (0x88, 1 << 36)


def test_stores_to_an_intercepted_tss_are_stores(python: bool) -> None:
    """The page of the TSS is guarded to see switches; all else that is stored there goes through, and LTR works."""
    tss = Hypervisor("hlt", "protected32")["tr.base"]
    h = Hypervisor(
        f"movl $0x12345678, {tss + 4}; movw $0x88, %ax; ltr %ax; movl $0x77, {tss + 200}; movl {tss + 4}, %eax; vmmcall",
        "protected32", python=python,
    )  # fmt: skip
    h.intercept(0x7D)
    assert h.enter() == VMMCALL
    assert h["rax"] == 0x12345678
    assert h.guest_read(tss + 200, 4) == 0x77
    assert h.cpu.task_guard is None


@covers(0x7E)
@pytest.mark.parametrize("mode", ["protected32", "long"])
def test_x87_error_without_ne_freezes(mode: Mode, python: bool) -> None:
    """APM2 15.14.2: with CR0.NE clear an unmasked x87 error asserts FERR at the next x87 instruction; the guest sees no NE."""
    divide = "fninit; fldcw control; fld1; fldz; fdivrp"
    register = "%rbx" if mode == "long" else "%ebx"
    h = Hypervisor(f"mov %cr0, {register}; smsw %ecx; {divide}\nwaits: fwait; hlt\ncontrol: .word 0x37b", mode, python=python)
    h.intercept(0x7E)
    h.set(cr0=h["cr0"] & ~0x20)
    assert h.enter() == 0x7E
    assert h["rip"] == h.labels["waits"]
    assert not h["cr0"] & 0x20
    assert not h.state.reg(RBX) & 0x20
    assert not h.state.reg(RCX) & 0x20


@pytest.mark.parametrize("write", ["movq %rax, %cr0", "movq %rax, %cr3", "wrmsr"])
def test_write_traps_are_for_sev_es_only(write: str, python: bool) -> None:
    """APM2 15.35.10: without SEV-ES, which no CPUID here claims, their bits do nothing."""
    read = "movl $0xc0000080, %ecx; rdmsr" if write == "wrmsr" else f"movq {write[-4:]}, %rax"
    h = Hypervisor(f"{read}; {write}; hlt", python=python)
    h.intercept(*range(0x8F, 0xA0))
    h.intercept(0x7C, on=False)
    assert h.enter() == HLT
