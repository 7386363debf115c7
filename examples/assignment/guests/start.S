/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Both guests: 32-bit protected mode without paging, just as the hypervisor starts them, and their rounds in EBX. */
    .section .boot, "ax"
    .globl _start
_start:
    movl $stack_top, %esp
    xorl %ebp, %ebp
    pushl %ebx
    call main
    ud2
    .bss
    .balign 16
    .skip 4096
stack_top:
    .section .note.GNU-stack, "", @progbits
