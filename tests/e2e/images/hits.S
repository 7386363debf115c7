/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Instructions that have to be begun again: stores to pages never touched before, to a device, to a page of code; and a
 * repeated one. */
#include "long.S"
    .globl main, at_store, at_device, at_code, at_rep, at_loop, counter, text
main:
    mov $0x800000, %edi
    mov $50, %ecx
at_store:
    mov %rcx, (%rdi)
    incq counter
    add $4096, %rdi
    loop at_store

    mov $20, %ecx
at_device:
    mov 0x20000020, %eax
    loop at_device

    mov $10, %ecx
at_code:
    movb $0x90, scratch
    call scratch
    loop at_code

    mov $buffer, %edi
    mov $6, %ecx
    xor %eax, %eax
at_rep:
    rep stosb

    mov $2000, %ecx
at_loop:
    incq counter
    loop at_loop

    xor %eax, %eax
    out %al, $0xf4
    hlt

    .balign 4096
scratch:
    nop
    ret

    .data
    .balign 4096
counter:
    .quad 0
text:
    .asciz "a string of the program"
buffer:
    .skip 8
