/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Two processors: the second one, in real mode, counts at 9000 for as long as the first one counts to 400000. */
#include "long.S"

#define APIC 0xfee00000
#define TRAMPOLINE 0x8000

    .globl main
main:
    mov $0x10, %eax
    mov %eax, %ss
    mov %eax, %ds
    mov %eax, %es
    /* The local APIC lies beyond the first GiB: map the fourth. */
    movl $high + 3, pdpt + 24
    movl $0xfee00083, high + 503 * 8
    mov $trampoline, %esi
    mov $TRAMPOLINE, %edi
    mov $trampoline_end - trampoline, %ecx
    cld
    rep movsb
    mov $APIC, %edi
    movl $0x01000000, 0x310(%rdi)
    movl $0x00004500, 0x300(%rdi) /* INIT */
    movl $0x01000000, 0x310(%rdi)
    movl $(0x4600 | TRAMPOLINE >> 12), 0x300(%rdi) /* SIPI */
first_cpu:
    incq count
    cmpq $400000, count
    jne first_cpu
    xor %eax, %eax
    out %eax, $0xf4
    hlt

    .code16
trampoline:
    xorw %ax, %ax
    movw %ax, %ds
1:  incl 0x9000
    nop
    jmp 1b
trampoline_end:
    .code64

    .bss
    .balign 4096
    .globl count
high: .skip 4096
count: .skip 8
