/* SPDX-License-Identifier: GPL-2.0-or-later */
/* String input and output: the scratch register of the serial port, which holds what was written to it. */
#include "long.S"
    .globl main, at_ins, at_ins_again, at_outs, behind
main:
    mov $0x3ff, %edx
    mov $0x5a, %al
    out %al, %dx
    mov $buffer, %edi
    mov $5, %ecx
at_ins:
    rep insb
    mov $buffer, %edi
    mov $5, %ecx
at_ins_again:
    rep insb
    mov $buffer, %esi
    mov $5, %ecx
at_outs:
    rep outsb
behind:
    xor %eax, %eax
    out %al, $0xf4
    hlt

    .data
    .balign 4096
buffer:
    .byte 1, 2, 3, 4, 5, 6, 7, 8
