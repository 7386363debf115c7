/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The example's hypervisor: one guest under nested paging, and the four kinds of #VMEXIT that it needs. It writes 0 to the debug
 * exit port if the guest came to its end, else the number of the exit that it did not expect.
 *
 * The guest is 32-bit code and has no R8 to R15, so the hypervisor works in these (and RAX, which the VMCB holds) and the
 * guest's other registers stay where they are.
 */
#define GUEST_MEMORY 0x200000 /* behind the hypervisor's own */
#define GUEST_SIZE 0x10000
#define GUEST_PAGES_AT_ONCE 8
#define LOAD 0x1000

    .section .multiboot, "a"
    .balign 4
    .long 0x1badb002, 0, -0x1badb002

    .text
    .code32
    .globl _start
_start:
    cli
    mov $stack_top, %esp

    /* Long mode: the first GiB, virtual = physical, in 2 MiB pages. */
    movl $pdpt + 3, pml4
    movl $pd + 3, pdpt
    mov $0x83, %eax
    xor %ecx, %ecx
1:  mov %eax, pd(, %ecx, 8)
    add $0x200000, %eax
    inc %ecx
    cmp $512, %ecx
    jne 1b
    mov $pml4, %eax
    mov %eax, %cr3
    mov $0x20, %eax /* PAE */
    mov %eax, %cr4
    mov $0xc0000080, %ecx
    rdmsr
    or $0x1100, %eax /* EFER: LME, SVME */
    wrmsr
    mov $0x80000011, %eax
    mov %eax, %cr0
    lgdt gdt_pointer
    ljmp $8, $long_mode

    .code64
    .globl main
long_mode:
main:
    mov $0x10, %eax
    mov %eax, %ds
    mov %eax, %es
    mov %eax, %ss
    mov $0xc0010117, %ecx /* VM_HSAVE_PA */
    mov $host_save, %eax
    xor %edx, %edx
    wrmsr

    /* Every port and every MSR is intercepted. */
    mov $maps, %edi
    mov $maps_end - maps, %ecx
    mov $0xff, %al
    rep stosb

    mov $guest_image, %esi
    mov $GUEST_MEMORY + LOAD, %edi
    mov $guest_image_end - guest_image, %ecx
    rep movsb

    /* Nested tables: the lower half of the guest's memory, and the page of its stack. */
    movl $nested_pdpt + 7, nested_pml4
    movl $nested_pd + 7, nested_pdpt
    movl $nested_pt + 7, nested_pd
    xor %r9d, %r9d
2:  call map
    add $0x1000, %r9
    cmp $GUEST_PAGES_AT_ONCE * 0x1000, %r9
    jne 2b
    mov $0xe000, %r9d
    call map

    .globl run
run:
    mov $vmcb, %eax
    .globl vmrun_instruction
vmrun_instruction:
    vmrun %rax
    .globl vmexit
vmexit:
    mov vmcb + 0x70, %r8 /* EXITCODE */
    cmp $0x7b, %r8
    je on_io
    cmp $0x72, %r8
    je on_cpuid
    cmp $0x400, %r8
    je on_nested_page_fault
    cmp $0x81, %r8
    je on_vmmcall

    .globl unexpected
unexpected:
    mov %r8d, %eax
    out %eax, $0xf4
    hlt

    .globl on_io
on_io:
    push %rdx
    mov vmcb + 0x5f8, %al /* RAX */
    mov $0x3f8, %edx
    out %al, %dx
    pop %rdx
    mov vmcb + 0x80, %r9 /* EXITINFO2: where the next instruction is */
    mov %r9, vmcb + 0x578
    jmp run

    .globl on_cpuid
on_cpuid:
    mov $0x62646d76, %ebx /* "vmdbgExample" */
    mov $0x61784567, %ecx
    mov $0x656c706d, %edx
    mov vmcb + 0xc8, %r9 /* next RIP */
    mov %r9, vmcb + 0x578
    jmp run

    .globl on_nested_page_fault
on_nested_page_fault:
    mov vmcb + 0x80, %r9 /* EXITINFO2: the gpa */
    cmp $GUEST_SIZE, %r9
    jae unexpected
    and $-0x1000, %r9
    call map
    jmp run

    .globl on_vmmcall
on_vmmcall:
    mov vmcb + 0x5f8, %eax
    out %eax, $0xf4
    hlt

/* Map the guest's page at gpa R9. */
    .globl map
map:
    mov %r9, %r10
    shr $12, %r10
    lea GUEST_MEMORY + 7(%r9), %r11 /* present, writable, user */
    mov %r11, nested_pt(, %r10, 8)
    ret

    .data
gdt:
    .quad 0, 0x00af9b000000ffff, 0x00cf93000000ffff
gdt_pointer:
    .word . - gdt - 1
    .long gdt

    .macro at offset
    .org vmcb + \offset
    .endm
    .macro segment offset, selector, attributes
    at \offset
    .word \selector, \attributes
    .long 0xffffffff
    .endm

    .balign 4096
    .globl vmcb
vmcb:
    at 0x00c
    .long 0x98040000 /* intercept SHUTDOWN, MSR, IOIO, CPUID */
    .long 0x3        /* VMMCALL, and VMRUN, without which VMRUN refuses */
    at 0x040
    .quad io_map, msr_map
    at 0x058
    .long 1 /* ASID */
    at 0x090
    .quad 1 /* nested paging */
    at 0x0b0
    .quad nested_pml4
    segment 0x400, 0x10, 0xc93
    segment 0x410, 0x08, 0xc9b
    segment 0x420, 0x10, 0xc93
    segment 0x430, 0x10, 0xc93
    at 0x4d0
    .quad 0x1000 /* EFER: SVME */
    at 0x558
    .quad 0x11, 0x400, 0xffff0ff0, 0x2, LOAD /* CR0: PE, ET; DR7, DR6, RFLAGS, RIP */
    at 0x668
    .quad 0x0007040600070406 /* PAT as after reset */
    at 0x1000

    .section .rodata
guest_image:
    .incbin "guest.bin"
guest_image_end:

    .bss
    .balign 4096
pml4: .skip 4096
pdpt: .skip 4096
pd: .skip 4096
host_save: .skip 4096
    .globl nested_pml4, nested_pt
nested_pml4: .skip 4096
nested_pdpt: .skip 4096
nested_pd: .skip 4096
nested_pt: .skip 4096
maps:
io_map: .skip 3 * 4096
msr_map: .skip 2 * 4096
maps_end:
    .skip 4096
stack_top:
    .section .note.GNU-stack, "", @progbits
