/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * One of each event that can be caught, in the hypervisor and three times in its guest, which shuts down at the end. Exceptions,
 * control registers and MSRs are the guest's own affair; ports and CPUID are not.
 */
#include "long.S"
#include "vmcb.S"

#define LSTAR 0xc0000082
#define NOWHERE 0x40000000

    .globl main, vmcb, guest, rounds, hits
main:
    call prepare
    call fill_idt
    lidt idt_pointer
    mov $root, %edi
    mov $0x400087, %ebx
    call fill_root
    mov $LSTAR, %ecx
    mov $0x1234, %eax
    mov $0x5678, %edx
at_wrmsr:
    wrmsr
at_rdmsr:
    rdmsr
at_read_cr3:
    mov %cr3, %rax
at_write_cr3:
    mov %rax, %cr3
at_read_cr0:
    mov %cr0, %rax
at_clts:
    clts
    mov $0x41, %al
at_out:
    out %al, $0x80
at_in:
    in $0x80, %al
host_ud:
    ud2
    new_vmcb vmcb, 1, root, 0x500000
    orl $1 << 31, vmcb + 0xc /* SHUTDOWN */
    movw $0x17, vmcb + 0x464
    movq $gdt, vmcb + 0x468
    movw $0x21f, vmcb + 0x484
    movq $idt, vmcb + 0x488
    movl $3, rounds
    mov $vmcb, %eax
1:
at_vmrun:
    vmrun %rax
after_vmexit:
    cmpl $0x7f, vmcb + 0x70
    je end
    mov vmcb + 0xc8, %rcx /* nRIP */
    mov %rcx, vmcb + 0x578
    cmpl $0x81, vmcb + 0x70
    jne 1b
    movl $0x80000020, vmcb + 0xa8 /* an interrupt of vector 32 at each VMMCALL */
    decl rounds
    jnz 1b
    movq $0, vmcb + 0xa8
    movw $0, vmcb + 0x484 /* no IDT any more */
    jmp 1b
end:
    xor %eax, %eax
    out %eax, $0xf4
    hlt

fill_idt: /* 34 gates: 6 and 14 return behind the instruction, others to where they came from */
    mov $idt, %edi
    xor %ecx, %ecx
2:  mov $plain, %eax
    cmp $6, %ecx
    jne 3f
    mov $invalid, %eax
3:  cmp $14, %ecx
    jne 4f
    mov $page_fault, %eax
4:  movw %ax, (%rdi)
    movw $8, 2(%rdi)
    movw $0x8e00, 4(%rdi)
    shr $16, %eax
    movw %ax, 6(%rdi)
    movq $0, 8(%rdi)
    add $16, %edi
    inc %ecx
    cmp $34, %ecx
    jne 2b
    ret

invalid:
    addq $2, (%rsp)
    incq hits
    iretq
page_fault:
    addq $2, 8(%rsp)
    add $8, %rsp
    incq hits
    iretq
plain:
    incq hits
    iretq

guest:
    ud2
    mov $NOWHERE, %ebx
guest_load:
    mov (%rbx), %ecx
guest_read_cr3:
    mov %cr3, %rax
guest_write_cr3:
    mov %rax, %cr3
    mov $LSTAR, %ecx
    mov $0x4321, %eax
    xor %edx, %edx
guest_wrmsr:
    wrmsr
guest_rdmsr:
    rdmsr
    mov $0x42, %al
guest_out:
    out %al, $0x80
guest_cpuid:
    cpuid
guest_vmmcall:
    vmmcall
    jmp guest

    .balign 16
idt_pointer:
    .word 34 * 16 - 1
    .quad idt

    .bss
    .balign 4096
idt: .skip 34 * 16
    .balign 4096
vmcb: .skip 4096
root: .skip 4096 * 3
hits: .skip 8
rounds: .skip 4
