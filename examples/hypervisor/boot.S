/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * From the boot loader's 32-bit protected mode to 64-bit C.
 *
 * A multiboot loader starts us in protected mode, paging off, EAX = 0x2BADB002, EBX = multiboot information.
 * Virtualisation needs EFER.SVME only, but nested tables have the format of the *host's* paging mode (APM2 15.25.3):
 * a hypervisor that wants 4-level nested tables runs in long mode.
 */
#define MULTIBOOT_MAGIC 0x1badb002
#define MULTIBOOT_FLAGS 0x3 /* page-aligned modules, memory sizes */

    .section .multiboot, "a"
    .balign 4
    .long MULTIBOOT_MAGIC, MULTIBOOT_FLAGS, -(MULTIBOOT_MAGIC + MULTIBOOT_FLAGS)

    .section .text.boot, "ax"
    .code32
    .globl _start
_start:
    cli
    cld
    movl $stack_top, %esp
    movl %ebx, %edi /* main's first argument; CPUID overwrites EBX, nothing below touches EDI */

    /* No long mode, no demonstration. Leaf 80000001 EDX[29]. */
    movl $0x80000000, %eax
    cpuid
    cmpl $0x80000001, %eax
    jb no_long_mode
    movl $0x80000001, %eax
    cpuid
    btl $29, %edx
    jnc no_long_mode

    /* 4 GiB identity-mapped with 2 MiB pages: 2048 entries in four page directories that lie behind each other.
       The top GiB holds devices (the local APIC is at FEE00000) and is mapped uncached: PCD and PWT, bits 4:3. */
    movl $0x83, %eax /* present, writable, large */
    xorl %ecx, %ecx
1:  movl %eax, page_directories(, %ecx, 8)
    movl $0, page_directories + 4(, %ecx, 8)
    addl $0x200000, %eax
    incl %ecx
    cmpl $0x600, %ecx
    jne 2f
    orl $0x18, %eax
2:  cmpl $0x800, %ecx
    jne 1b

    movl $page_directories + 3, %eax
    xorl %ecx, %ecx
3:  movl %eax, pdpt(, %ecx, 8)
    addl $0x1000, %eax
    incl %ecx
    cmpl $4, %ecx
    jne 3b
    movl $pdpt + 3, pml4
    /* The first GiB once more at FFFFFFFF80000000, the address that the 64-bit guest uses for itself: the same
       virtual address then holds one thing in the host and another in the guest. */
    movl $page_directories + 3, high_pdpt + 510 * 8
    movl $high_pdpt + 3, pml4 + 511 * 8

    movl $pml4, %eax
    movl %eax, %cr3
    movl %cr4, %eax
    orl $0x20, %eax /* PAE */
    movl %eax, %cr4
    movl $0xc0000080, %ecx
    rdmsr
    orl $0x900, %eax /* LME, NXE */
    wrmsr
    movl %cr0, %eax
    orl $0x80010000, %eax /* PG, WP */
    movl %eax, %cr0
    lgdt gdt_pointer
    ljmp $0x08, $long_mode

no_long_mode:
    movl $no_long_mode_text, %esi
    movl $0x3f8, %edx
4:  lodsb
    testb %al, %al
    jz 5f
    outb %al, %dx
    jmp 4b
5:  movl $1, %eax
    outl %eax, $0xf4
6:  hlt
    jmp 6b

    .code64
long_mode:
    movl $0x10, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %ss
    xorl %eax, %eax
    movl %eax, %fs
    movl %eax, %gs
    movl $stack_top, %esp
    movl %edi, %edi /* the upper halves are undefined after the mode switch */
    xorl %ebp, %ebp /* ends a debugger's backtrace */
    call main
    ud2 /* main does not return */

    .section .rodata
no_long_mode_text:
    .asciz "hypervisor: this CPU has no long mode (CPUID 80000001 EDX[29] = 0)\r\n"

    .data
    .balign 8
    .globl gdt
gdt:
    .quad 0
    .quad 0x00af9b000000ffff /* 08: 64-bit code */
    .quad 0x00cf93000000ffff /* 10: data */
    .quad 0, 0               /* 18: TSS, filled in by traps.c */
gdt_pointer:
    .word . - gdt - 1
    .quad gdt

    .bss
    .balign 4096
pml4: .skip 4096
pdpt: .skip 4096
high_pdpt: .skip 4096
page_directories: .skip 4 * 4096
    .skip 16384
    .globl stack_top
stack_top:
    .section .note.GNU-stack, "", @progbits
