/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Loads CR3 with page tables that somebody has put at 16 MiB, and waits: for those who look at them from outside. The tables
 * must map the image, below 2 MiB, to itself. */
    .text
    .globl main, waiting
main:
    movl $0x1000000, %eax
    movq %rax, %cr3
waiting:
    cli
    hlt
    jmp waiting
    .section .note.GNU-stack, "", @progbits
