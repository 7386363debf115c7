/* SPDX-License-Identifier: GPL-2.0-or-later */
/* From multiboot into 64-bit mode with the first GiB mapped to itself; goes on at `main`. */
    .section .text
    .code32
    .align 4
    .long 0x1badb002, 0, -0x1badb002
    .globl _start
_start:
    mov $stack_end, %esp
    movl $pdpt + 3, pml4
    movl $directory + 3, pdpt
    xor %ecx, %ecx
1:  mov %ecx, %eax
    shl $21, %eax
    or $0x83, %eax
    mov %eax, directory(, %ecx, 8)
    inc %ecx
    cmp $512, %ecx
    jne 1b
    mov $pml4, %eax
    mov %eax, %cr3
    mov %cr4, %eax
    or $0x20, %eax /* PAE */
    mov %eax, %cr4
    mov $0xc0000080, %ecx
    rdmsr
    or $0x1100, %eax /* SVME, LME */
    wrmsr
    mov %cr0, %eax
    or $0x80000000, %eax
    mov %eax, %cr0
    lgdt gdt_pointer
    ljmp $8, $main

    .align 8
gdt:
    .quad 0, 0x00af9b000000ffff, 0x00cf93000000ffff
gdt_pointer:
    .word . - gdt - 1
    .long gdt

    .bss
    .balign 4096
pml4: .skip 4096
pdpt: .skip 4096
directory: .skip 4096
    .skip 4096
stack_end:
    .text
    .code64
