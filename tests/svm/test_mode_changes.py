"""One guest that goes through all modes by itself: real, protected, legacy paging, PAE, compatibility, 64-bit, virtual-8086, real.

Under nested paging nobody intercepts anything (APM2 15.25).  Without it the hypervisor pages for the guest and so keeps CR0.PG set
(15.25.1): the guest is in paged real mode (15.19) where it thinks it is in real mode, and reads the control registers it wrote.
"""

from __future__ import annotations

import struct

import pytest

from tests.engine.rig import (
    CODE16,
    CODE32,
    CODE64,
    DATA16,
    DATA32,
    GDT,
    GDT_LIMIT,
    IDT,
    PS,
    RING0_STACK,
    STACK,
    TSS,
    TSS_SELECTOR,
    Mode,
    descriptor,
)
from tests.svm.covers import covers
from tests.svm.hypervisor import HLT, IOPM, MSRPM, SVME, VMCB_PAGE, Hypervisor, P, U, W

LEGACY, PAE, DIRECTORY, LONG, PDPT = 0x60000, 0x61000, 0x62000, 0x63000, 0x64000
"""Roots and tables that map all to itself in large pages."""
MARKS, REAL, PROTECTED, WIDE = 0x7100, 0x7180, 0x7184, 0x7188
"""A mark of each stage, then how often the handlers of each width ran."""
EFER = 0xC0000080
LONG_IDT = 0x4000


def mark(stage: int) -> str:
    return f"movl ${stage}, {MARKS + 4 * stage}"


GUEST = f"""
        .set unpaged, 0x7fffffff
        .code16
        {mark(1)}; int $0x80                                    # real mode
        lgdtl gdtr; lidtl idtr32
        movl %cr0, %eax; orl $1, %eax; movl %eax, %cr0
        ljmpl ${CODE32}, $protected

        .code32
protected: movw ${DATA32}, %ax; movw %ax, %ds; movw %ax, %es; movw %ax, %ss; movl ${STACK}, %esp
        {mark(2)}; int $0x80
        movl %cr4, %eax; orl $0x10, %eax; movl %eax, %cr4       # PSE
        movl ${LEGACY}, %eax; movl %eax, %cr3
        movl %cr0, %eax; orl $0x80000000, %eax; movl %eax, %cr0
        jmp 1f; 1:
        {mark(3)}; int $0x80                                    # legacy paging
        movl %cr0, %eax; andl $unpaged, %eax; movl %eax, %cr0
        movl %cr4, %eax; orl $0x20, %eax; movl %eax, %cr4
        movl ${PAE}, %eax; movl %eax, %cr3
        movl %cr0, %eax; orl $0x80000000, %eax; movl %eax, %cr0
        jmp 1f; 1:
        {mark(4)}; int $0x80                                    # PAE
        movl %cr0, %eax; andl $unpaged, %eax; movl %eax, %cr0
        movl ${LONG}, %eax; movl %eax, %cr3
        movl ${EFER}, %ecx; rdmsr; orl $0x100, %eax; wrmsr
        lidtl idtr64
        movl %cr0, %eax; orl $0x80000000, %eax; movl %eax, %cr0
        rdmsr; movl %eax, efer
        {mark(5)}; int $0x80                                    # compatibility mode
        ljmp ${CODE64}, $wide

        .code64
wide:   movq $-1, %r8; {mark(6)}; int $0x80
        pushq ${CODE32}; pushq $narrow; lretq

        .code32
narrow: movl %cr0, %eax; andl $unpaged, %eax; movl %eax, %cr0
        rdmsr; andl $~0x100, %eax; wrmsr
        movl %cr4, %eax; andl $~0x20, %eax; movl %eax, %cr4
        movl %cr4, %eax; movl %eax, %ebx
        lidtl idtr32
        {mark(7)}; int $0x80                                    # protected mode again
        movw ${TSS_SELECTOR}, %ax; ltr %ax
        pushl $0; pushl $0; pushl $0; pushl $0; pushl $0; pushl ${STACK}
        pushl $0x23002; pushl $0; pushl $virtual; iretl

        .code16
virtual: {mark(8)}; int $0x81                                   # virtual-8086 mode, IOPL 3

        .code32
supervisor: popl %ebp; popl %ebp; popl %edi                     # EIP, CS, EFLAGS
        movw ${DATA16}, %ax; movw %ax, %ds; movw %ax, %es; movw %ax, %ss
        ljmp ${CODE16}, $leave
        .code16
leave:  movl %cr0, %eax; andl $~1, %eax; movl %eax, %cr0
        ljmp $0, $real
real:   xorw %ax, %ax; movw %ax, %ds; movw %ax, %es; movw %ax, %ss; movw ${STACK}, %sp
        lidtl ivt
        {mark(9)}; int $0x80
        movl %cr0, %eax; movl %eax, %esi
        hlt

        .code16
handler16: incl {REAL}; iretw
        .code32
handler32: incl {PROTECTED}; iretl
        .code64
handler64: incl {WIDE}; iretq

gdtr:   .word {GDT_LIMIT}; .long {GDT}
idtr32: .word 0x7ff; .long {IDT}
idtr64: .word 0xfff; .quad {LONG_IDT}
ivt:    .word 0x3ff; .long 0
efer:   .long 0
"""

# What a hypervisor without nested paging does: the guest's MOVs use EAX, its tables and the hypervisor's are the same.
HOST = f"""
        movl ${VMCB_PAGE}, %r15d
run:    movl $1, 0x5c(%r15); movl %r15d, %eax; vmrun
        movl 0x70(%r15), %r8d; movl 0x5f8(%r15), %r9d
        cmpl $0x00, %r8d; je read_cr0
        cmpl $0x03, %r8d; je read_cr3
        cmpl $0x04, %r8d; je read_cr4
        cmpl $0x10, %r8d; je write_cr0
        cmpl $0x13, %r8d; je write_cr3
        cmpl $0x14, %r8d; je write_cr4
        cmpl $0x7c, %r8d; je msr
        hlt
read_cr0: movl cr0, %r9d; jmp reply
read_cr3: movl cr3, %r9d; jmp reply
read_cr4: movl cr4, %r9d; jmp reply
write_cr0: movl %r9d, cr0; orl $0x80000000, %r9d; movl %r9d, 0x558(%r15)
        andl $~0x400, efer; movl ${PAE}, %r10d
        testl $0x80000000, cr0; jz 1f
        testl $0x100, efer; jz 1f
        orl $0x400, efer; movl ${LONG}, %r10d
1:      movl %r10d, 0x550(%r15)
        movl efer, %r10d; andl $0x400, %r10d; movl %r10d, %r11d; shrl $2, %r11d; orl %r11d, %r10d   # LME as LMA
        orl ${SVME}, %r10d; movl %r10d, 0x4d0(%r15)
        jmp next
write_cr3: movl %r9d, cr3; jmp next
write_cr4: movl %r9d, cr4; orl $0x20, %r9d; movl %r9d, 0x548(%r15); jmp next
msr:    cmpl $1, 0x78(%r15); je write_efer
        movl efer, %r9d; xorl %edx, %edx
reply:  movl %r9d, 0x5f8(%r15); jmp next
write_efer: movl efer, %r10d; andl $0x400, %r10d; andl $~0x400, %r9d; orl %r9d, %r10d; movl %r10d, efer
next:   movq 0xc8(%r15), %r8; movq %r8, 0x578(%r15); jmp run
cr0:    .long 0x10
cr3:    .long 0
cr4:    .long 0
efer:   .long 0
"""


def gate(selector: int, offset: int, dpl: int = 0) -> int:
    return offset & 0xFFFF | selector << 16 | 0x8E00 << 32 | dpl << 45 | offset >> 16 << 48


def prepare(h: Hypervisor) -> None:
    """The guest's tables: pages, gates and a TSS that may be loaded."""
    labels = h.inner.labels
    h.guest_write(LEGACY, struct.pack("<I", P | W | U | PS))
    h.guest_write(PAE, struct.pack("<Q", DIRECTORY | P))
    h.guest_write(DIRECTORY, struct.pack("<2Q", P | W | U | PS, 0x200000 | P | W | U | PS))
    h.guest_write(LONG, struct.pack("<Q", PDPT | P | W | U))
    h.guest_write(PDPT, struct.pack("<Q", DIRECTORY | P | W | U))
    h.guest_write(4 * 0x80, struct.pack("<HH", labels["handler16"], 0))
    h.guest_write(IDT + 8 * 0x80, struct.pack("<Q", gate(CODE32, labels["handler32"])))
    h.guest_write(IDT + 8 * 0x81, struct.pack("<Q", gate(CODE32, labels["supervisor"], dpl=3)))
    h.guest_write(LONG_IDT + 16 * 0x80, struct.pack("<QQ", gate(CODE64, labels["handler64"]), 0))
    h.guest_write(GDT + TSS_SELECTOR, struct.pack("<Q", descriptor(TSS, 0x20FF, 0x089)))
    h.guest_write(TSS + 4, struct.pack("<II", RING0_STACK, DATA32))


def check(h: Hypervisor) -> None:
    assert [h.guest_read(MARKS + 4 * stage, 4) for stage in range(1, 10)] == list(range(1, 10))
    assert [h.guest_read(at, 4) for at in (REAL, PROTECTED, WIDE)] == [2, 4, 2]
    assert h.guest_read(h.inner.labels["efer"], 4) & 0xD00 == 0x500, "LMA came with CR0.PG"
    assert (h.reg(3), h.reg(6) & 0x80000001) == (0x10, 0), "CR4 and CR0 as the guest wrote them"
    assert (h.reg(5), h.reg(7)) == (0, 0x23002 | 0x40 & h.reg(7)), "CS and EFLAGS of virtual-8086 mode"


@covers("NP")
@pytest.mark.parametrize("host", ["legacy", "pae", "long"])
def test_under_nested_paging(host: Mode, python: bool) -> None:
    h = Hypervisor(GUEST, "real", host_mode=host, python=python)
    prepare(h)
    assert h.enter() == HLT
    check(h)
    assert h["rip"] == h.inner.labels["handler16"] - 1


@pytest.mark.parametrize("strict_tlb", [False, True])
def test_in_paged_real_mode(strict_tlb: bool, python: bool) -> None:
    h = Hypervisor(GUEST, "real", host=HOST, np=False, python=python, strict_tlb=strict_tlb)
    prepare(h)
    h.intercept(0x00, 0x03, 0x04, 0x10, 0x13, 0x14, 0x7C)
    h.ram.write(MSRPM, bytes(0x2000))
    bit = 2 * (0x2000 + (EFER & 0x1FFF))
    h.ram.write(MSRPM + bit // 8, bytes([3 << bit % 8]))
    h.ram.write(IOPM, bytes(0x3000))
    h.set(cr0=h["cr0"] | 1 << 31, cr4=0x20, cr3=PAE)
    assert h.enter(400_000) == HLT
    check(h)
    assert h["cr0"] >> 31 == 1
    assert h["cr0"] & 1 == 0
