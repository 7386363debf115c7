/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The block begins with a header (APM2 15.27.2): where the loader starts, and how much is measured.
 *
 * SKINIT leaves flat 32-bit code and stack segments, and DS, ES, FS, GS of real mode: data is reached through SS until DS is
 * loaded.  All interrupts are held, and there is no IDT.
 */
    .section .header, "ax"
block:
    .word entry - block
    .word measured

    .globl entry
entry:
    cld
    lgdt %ss:gdt_pointer
    movw $0x10, %cx
    movw %cx, %ds
    movw %cx, %es
    movl $bss_start, %edi
    movl $bss_end, %ecx
    subl %edi, %ecx
    xorl %eax, %eax
    rep stosb
    call loader_main

    .balign 8
gdt:
    .quad 0, 0xcf9b000000ffff, 0xcf93000000ffff
gdt_pointer:
    .word . - gdt - 1
    .long gdt
