/* SPDX-License-Identifier: GPL-2.0-or-later */
/* An endless loop with a counter to watch, for debuggers. It needs nothing around it: it is a multiboot image with the boot
 * code, and without that a Linux program that starts at main. */
    .text
    .globl main, loop_top, loop_mid, never
main:
    xorl %ecx, %ecx
    xorl %ebx, %ebx
    leaq counter(%rip), %rdi
    .balign 64
loop_top:
    incq %rcx
    movq %rcx, (%rdi)
loop_mid:
    leaq 3(%rbx, %rcx, 2), %rbx
    xorq %rcx, %rbx
    nop
    jmp loop_top
    .balign 64
never: /* for breakpoints that are not hit */
    .fill 4096, 1, 0x90

    .data
    .balign 4096
    .globl counter
counter:
    .quad 0
    .bss
    .balign 4096
    .globl buffer
buffer: /* to read and write */
    .skip 1 << 20
    .section .note.GNU-stack, "", @progbits
