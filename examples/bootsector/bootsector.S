/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * 512 bytes from the reset state's real mode through protected mode to long mode, one line on the serial port from each.
 * The firmware loads the sector to 0000:7C00. Page tables go to 1000-3FFF, the stack grows down from 7C00.
 */
#define COM1 0x3f8
#define DEBUG_EXIT 0xf4
#define PML4 0x1000
#define PDPT 0x2000
#define DIRECTORY 0x3000

    .text
    .code16
    .globl _start
_start:
    ljmp $0, $real_mode /* some firmware starts us at 07C0:0000 */
real_mode:
    cli
    cld
    xorw %ax, %ax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %ss
    movw $_start, %sp
    movw $COM1, %dx
    movw $real_text, %si
    call put

    lgdt gdt_pointer
    movl %cr0, %eax
    orb $1, %al /* PE */
    movl %eax, %cr0
    ljmp $0x08, $protected_mode

    .code32
    .globl protected_mode
protected_mode:
    movl $0x10, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %ss
    movl $_start, %esp
    movl $protected_text, %esi
    call put

    /* One PML4 entry, one PDPT entry, one 2 MiB page. Memory holds anything after power-on: clear it first. */
    movl $PML4, %edi
    movl $3 * 4096 / 4, %ecx
    xorl %eax, %eax
    rep stosl
    movw $PDPT + 3, PML4
    movw $DIRECTORY + 3, PDPT
    movw $0x83, DIRECTORY
    movl $PML4, %eax
    movl %eax, %cr3
    movl %cr4, %eax
    orb $0x20, %al /* PAE */
    movl %eax, %cr4
    movl $0xc0000080, %ecx
    rdmsr
    orb $1, %ah /* LME */
    wrmsr
    movl %cr0, %eax
    orl $0x80000000, %eax /* PG: and this makes LMA */
    movl %eax, %cr0
    ljmp $0x18, $long_mode

    .code64
    .globl long_mode
long_mode:
    movl $COM1, %edx /* WRMSR's high half was in EDX */
    movl $long_text, %esi
    movl $_start, %esp
    call put
    xorl %eax, %eax
    outl %eax, $DEBUG_EXIT
stop:
    hlt
    jmp stop

    /* Print the string at SI, ESI or RSI on port DX. These instructions have the same bytes in all three modes, and
       RET takes from the stack what CALL in that mode has put there. */
    .globl put
put:
    lodsb
    testb %al, %al
    jz 1f
    outb %al, %dx
    jmp put
1:  ret

    .balign 8
gdt:
    .quad 0
    .quad 0x00cf9b000000ffff /* 08: 32-bit code */
    .quad 0x00cf93000000ffff /* 10: data */
    .quad 0x00af9b000000ffff /* 18: 64-bit code */
gdt_pointer:
    .word . - gdt - 1
    .long gdt

real_text:      .asciz "hello from real mode\r\n"
protected_text: .asciz "hello from protected mode\r\n"
long_text:      .asciz "hello from long mode\r\n"

    .org 510
    .word 0xaa55
    .section .note.GNU-stack, "", @progbits
