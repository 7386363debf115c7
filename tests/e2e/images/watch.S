/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Stores of every kind to the quadword `cell`, each between labels; page tables that move; the processor's own accesses. */
#include "long.S"
    .globl main, cell, window, moves, unmapped, walked, loads_ds, loaded, done, first, second
main:
    mov %cr4, %rax
    or $0x600, %eax /* OSFXSR, OSXMMEXCPT */
    mov %rax, %cr4
    mov $stack_end, %rsp
    mov $0x1122334455667788, %rbx
    mov %rsp, %rbp

    /* Each store changes the cell. */
    movq %rbx, cell
at_mov: incq cell
at_inc: lock xaddq %rbx, cell
at_xadd: xchgq %rbp, cell
at_xchg: movq cell, %rax
    lock cmpxchgq %rbx, cell
at_cmpxchg: movb $0x5a, cell + 3
at_byte: movq %rbx, cell - 5
at_overlap: mov $cell + 8, %rsp
    push %rbp
at_push: mov $cell + 8, %rsp
    call at_call
at_call: mov $cell + 8, %rsp
    pushf
at_pushf: mov $stack_end, %rsp
    movq %rbx, %xmm0
    movups %xmm0, cell - 4
at_movups: fnstcw cell + 2
at_fnstcw: fldpi
    fstpt cell - 1
at_fstpt: fxsave cell - 16
at_fxsave: mov $cell, %edi
    mov $main, %esi
    mov $3, %ecx
    cld
at_string: rep movsb
at_movsb: mov $cell, %edi
    mov $0x7777777777777777, %rax
    stosq
at_stosq: sgdt cell
at_sgdt: sete cell + 6
at_setcc: mov $cell, %edi
    mov $0x11223344, %eax
    movnti %eax, (%rdi)
at_movnti: nop

    /* A window on two pages in turn: its page-table entry is changed, and INVLPG makes it count. */
    movq $table + 3, directory + 0x1ff * 8
    movq $first + 3, table
    mov $0x3fe00000, %edi
window:
    movq $1, (%rdi)
at_first: movq $second + 3, table
moves: invlpg (%rdi)
    movq $2, (%rdi)
at_second: incq first /* no longer behind the window */
    movq $0, table
    invlpg (%rdi)
unmapped:
    movq $first + 3, table
    invlpg (%rdi)
    movq $3, (%rdi)
at_third: nop

    /* A walk sets the accessed bit of an entry that a load needs; a segment register is loaded from the GDT. */
    movq $second + 3, table + 8
    mov $0x3fe01000, %edi
walked:
    movq (%rdi), %rax
at_walked: lgdt own_gdt_pointer
    mov $0x10, %eax
loads_ds:
    mov %eax, %ds
loaded:
    xor %eax, %eax
done:
    out %al, $0xf4
    hlt

    .globl at_mov, at_inc, at_xadd, at_xchg, at_cmpxchg, at_byte, at_overlap, at_push, at_call, at_pushf, at_movups, at_fnstcw
    .globl at_fstpt, at_fxsave, at_string, at_movsb, at_stosq, at_sgdt, at_setcc, at_movnti, at_first, at_second, at_third
    .globl at_walked, table, own_gdt
    .data
    .balign 4096
    .skip 64
    .balign 16
cell: .quad 0
    .skip 600
    .balign 4096
own_gdt:
    .quad 0, 0x00af9b000000ffff, 0x00cf93000000ffff
own_gdt_pointer:
    .word . - own_gdt - 1
    .quad own_gdt
    .bss
    .balign 4096
first: .skip 4096
second: .skip 4096
table: .skip 4096
