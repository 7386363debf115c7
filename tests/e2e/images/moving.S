/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Two processors that run one VMCB in turn: each exit of the guest is followed by a VMRUN on the other one. */
#include "long.S"
#include "vmcb.S"

#define APIC 0xfee00000
#define TRAMPOLINE 0x8000
#define COUNTER 0x400000

    .globl main, after_vmexit, ap, at_cpuid, at_out, at_hlt, increment, to_vmrun
main:
    call prepare
    movl $high + 3, pdpt + 24 /* the fourth GiB, where the local APIC is */
    movl $0xfee00083, high + 503 * 8
    mov $root, %edi
    mov $0x400087, %ebx
    call fill_root
    new_vmcb vmcb, 1, root, 0x500000
    mov $trampoline, %esi
    mov $TRAMPOLINE, %edi
    mov $trampoline_end - trampoline, %ecx
    rep movsb
    mov $APIC, %edi
    movl $0x01000000, 0x310(%rdi)
    movl $0x00004500, 0x300(%rdi) /* INIT */
    movl $0x01000000, 0x310(%rdi)
    movl $(0x4600 | TRAMPOLINE >> 12), 0x300(%rdi) /* SIPI */
    movl $3000, rounds
    mov $0, %ebp
cpu: /* EBP: its number */
    mov $vmcb, %eax
wait:
    pause
    cmp %ebp, turn
    jne wait
    mov registers, %rbx
    mov registers + 8, %rcx
    mov registers + 16, %rdx
    mov registers + 24, %rdi
to_vmrun:
    vmrun %rax
after_vmexit:
    mov %rbx, registers
    mov %rcx, registers + 8
    mov %rdx, registers + 16
    mov %rdi, registers + 24
    mov 0xc8(%rax), %rcx /* nRIP */
    mov %rcx, 0x578(%rax)
    decl rounds
    js end
    xorl $1, turn
    jmp wait
end:
    xor %eax, %eax
    out %eax, $0xf4
    hlt

    .code16
trampoline:
    cli
    xorw %ax, %ax
    movw %ax, %ds
    lgdtl gdt_copy - trampoline + TRAMPOLINE
    movl $pml4, %eax
    movl %eax, %cr3
    movl $0x20, %eax
    movl %eax, %cr4
    movl $0xc0000080, %ecx
    movl $0x1100, %eax /* SVME, LME */
    xorl %edx, %edx
    wrmsr
    movl $0x80000011, %eax
    movl %eax, %cr0
    ljmpl $8, $ap
gdt_copy:
    .word 23
    .long gdt
trampoline_end:
    .code64
ap:
    mov $0x10, %eax
    mov %eax, %ss
    mov %eax, %ds
    mov $VM_HSAVE_PA, %ecx
    mov $hsave2, %eax
    xor %edx, %edx
    wrmsr
    mov $1, %ebp
    jmp cpu

guest:
    mov $COUNTER, %edi
increment:
    incq (%rdi)
at_cpuid:
    cpuid
at_out:
    out %al, $0x80
    nop
at_hlt:
    hlt
    jmp increment

    .bss
    .balign 4096
    .globl turn, rounds, vmcb
high: .skip 4096
vmcb: .skip 4096
hsave2: .skip 4096
root: .skip 4096 * 3
registers: .skip 32
turn: .skip 4
rounds: .skip 4
