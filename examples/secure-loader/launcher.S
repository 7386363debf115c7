/* SPDX-License-Identifier: GPL-2.0-or-later */
#define MULTIBOOT_MAGIC 0x1badb002
#define MULTIBOOT_FLAGS 0x2 /* memory sizes, and so the multiboot information with the command line */

    .section .multiboot, "a"
    .balign 4
    .long MULTIBOOT_MAGIC, MULTIBOOT_FLAGS, -(MULTIBOOT_MAGIC + MULTIBOOT_FLAGS)

    .text
    .globl _start
_start:
    cli
    cld
    movl $stack_top, %esp
    pushl %ebx
    call main

    /* SKINIT takes the block's address in EAX, and comes back to nobody. */
    .globl launch
launch:
    movl 4(%esp), %eax
    skinit
    hlt

    .section .block, "ax"
    .incbin "loader.bin"
    .section .kernel, "a"
    .incbin "kernel.bin"

    .bss
    .balign 16
    .skip 4096
stack_top:
