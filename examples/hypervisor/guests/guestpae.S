/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Guest 2 from unpaged to PAE-paged 32-bit protected mode. It lives at gpa 100000 and at C0000000 + gpa.
 *
 *   gva C0000000 + x, x < 4 MiB  ->  gpa x   (two 2 MiB pages; the hypervisor backs the second at first touch)
 */
#define HIGH   0xc0000000
#define LOW(x) ((x) - HIGH)

    .section .boot, "ax"
    .globl _start
_start:
    cld
    movl $LOW(directory) + 1, LOW(pdpt) /* identity, until the jump; a PDPTE has no writable bit (APM2 5.2.3) */
    movl $LOW(directory) + 1, LOW(pdpt) + 3 * 8
    movl $0x000083, LOW(directory)
    movl $0x200083, LOW(directory) + 8
    movl %cr4, %eax
    orl $0x20, %eax /* PAE */
    movl %eax, %cr4
    movl $LOW(pdpt), %eax
    movl %eax, %cr3
    movl %cr0, %eax
    orl $0x80010000, %eax /* PG, WP */
    movl %eax, %cr0
    lgdt LOW(gdt_pointer)
    ljmp $0x08, $high

    .text
high:
    movl $0x10, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %fs
    movl %eax, %gs
    movl %eax, %ss
    movl $stack_top, %esp
    movl $gdt, gdt_pointer + 2
    lgdt gdt_pointer
    movl $0, pdpt
    movl %cr3, %eax
    movl %eax, %cr3 /* the processor may hold the four PDPTEs in registers: a write to CR3 reads them anew */
    xorl %ebp, %ebp
    pushl %ebx
    call main
    ud2

    .globl general_protection_entry
general_protection_entry:
    pushal
    leal 32(%esp), %eax /* error code, EIP, CS, EFLAGS */
    pushl %eax
    call general_protection
    addl $4, %esp
    popal
    addl $4, %esp
    iretl

    .data
    .balign 8
gdt:
    .quad 0
    .quad 0x00cf9b000000ffff /* 08: 32-bit code */
    .quad 0x00cf93000000ffff /* 10: data */
gdt_pointer:
    .word . - gdt - 1
    .long LOW(gdt)

    .bss
    .balign 4096
directory: .skip 4096
pdpt: .skip 32
    .balign 16
    .skip 8192
stack_top:
    .section .note.GNU-stack, "", @progbits
