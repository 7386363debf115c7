/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Guest 1 from 32-bit protected mode to 64-bit C. It lives at gpa 100000 and, once paging is on, at
 * FFFFFFFF80000000 + gpa. EBX holds the number of iterations.
 *
 *   gva FFFFFFFF80000000 + x, x < 2 MiB   ->  gpa x                     (4 KiB pages)
 *   gva FFFFFFFFA0000000 + n * 1000       ->  gpa 187000 - n * 1000     (n = 0..7: a window of 8 pages, in reverse)
 */
#define HIGH   0xffffffff80000000
#define LOW(x) ((x) - HIGH)
#define WINDOW_GPA 0x180000

    .section .boot, "ax"
    .code32
    .globl _start
_start:
    cld
    movl %ebx, %edi /* main's argument; CPUID is not used, EDI survives */

    /* The page table for the image, then the one for the window. */
    movl $0x003, %eax /* present, writable */
    xorl %ecx, %ecx
1:  movl %eax, LOW(image_pages)(, %ecx, 8)
    addl $0x1000, %eax
    incl %ecx
    cmpl $512, %ecx
    jne 1b
    movl $WINDOW_GPA + 0x7003, %eax
    xorl %ecx, %ecx
2:  movl %eax, LOW(window_pages)(, %ecx, 8)
    subl $0x1000, %eax
    incl %ecx
    cmpl $8, %ecx
    jne 2b

    movl $LOW(image_pages) + 3, LOW(directory)
    movl $LOW(window_pages) + 3, LOW(directory) + 256 * 8
    movl $LOW(directory) + 3, LOW(pdpt)           /* entry 0: identity, for the few instructions until the jump below */
    movl $LOW(directory) + 3, LOW(pdpt) + 510 * 8
    movl $LOW(pdpt) + 3, LOW(pml4)
    movl $LOW(pdpt) + 3, LOW(pml4) + 511 * 8

    movl $LOW(pml4), %eax
    movl %eax, %cr3
    movl %cr4, %eax
    orl $0x20, %eax /* PAE */
    movl %eax, %cr4
    movl $0xc0000080, %ecx
    rdmsr           /* both exit: the hypervisor keeps EFER.SVME out of sight */
    orl $0x100, %eax /* LME */
    wrmsr
    movl %cr0, %eax
    orl $0x80000000, %eax
    movl %eax, %cr0 /* does not exit: a guest under nested paging rules its own paging */
    lgdt LOW(gdt_pointer)
    ljmp $0x08, $long_mode

    .code64
long_mode:
    movq $high, %rax
    jmp *%rax

    .text
high:
    movl $0x10, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %ss
    movq $gdt, %rax
    movq %rax, gdt_pointer + 2
    lgdt gdt_pointer
    movq $0, pml4 /* no more identity map */
    movq %cr3, %rax
    movq %rax, %cr3
    movq $stack_top, %rsp
    movl %edi, %edi
    xorl %ebp, %ebp
    call main
    ud2

    /* The virtual timer's interrupt. No EOI: the hypervisor wants none. */
    .globl timer_entry
timer_entry:
    pushq %rax
    pushq %rcx
    pushq %rdx
    pushq %rsi
    pushq %rdi
    pushq %r8
    pushq %r9
    pushq %r10
    pushq %r11
    cld
    call tick
    popq %r11
    popq %r10
    popq %r9
    popq %r8
    popq %rdi
    popq %rsi
    popq %rdx
    popq %rcx
    popq %rax
    iretq

    .data
    .balign 8
gdt:
    .quad 0
    .quad 0x00af9b000000ffff /* 08: 64-bit code */
    .quad 0x00cf93000000ffff /* 10: data */
gdt_pointer:
    .word . - gdt - 1
    .quad LOW(gdt)

    .bss
    .balign 4096
pml4: .skip 4096
pdpt: .skip 4096
directory: .skip 4096
image_pages: .skip 4096
window_pages: .skip 4096
    .skip 8192
stack_top:
    .section .note.GNU-stack, "", @progbits
