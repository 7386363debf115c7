/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Debug registers of the software itself: an instruction and the variable that it changes, ten times. */
#include "long.S"
    .globl main, target, behind, on_debug, variable, hits
main:
    mov $on_debug, %eax
    mov %ax, idt + 16
    movw $8, idt + 18
    movw $0x8e00, idt + 20
    shr $16, %eax
    mov %ax, idt + 22
    lidt idt_pointer
    mov $target, %eax
    mov %rax, %dr0
    mov $variable, %eax
    mov %rax, %dr1
    mov $0x90040a, %eax /* DR0 instruction, DR1 writes of 8 bytes */
    mov %rax, %dr7
    mov $10, %ecx
target:
    incq variable
behind:
    dec %ecx
    jnz target
    mov hits, %eax
    out %al, $0xf4
    hlt

on_debug:
    incl hits
    iretq

    .balign 8
idt_pointer:
    .word 0xfff
    .quad idt

    .bss
    .balign 4096
idt: .skip 4096
variable: .skip 8
    .balign 4096
hits: .skip 4
