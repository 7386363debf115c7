/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * A hypervisor whose guests are hard to tell apart: all run the code at `guest`, mapped as in the hypervisor, and differ
 * in what gpa 400000 is. VMCBs 1 and 2 share a nested root; VMCB 3 has another, then is used anew for a third guest.
 */
#include "long.S"
#include "vmcb.S"

#define COUNTER 0x400000
#define NOTE 0x400008

    .macro run vmcb
    mov $\vmcb, %eax
    call run_until_vmmcall
    .endm

    .globl main
main:
    call prepare
    mov $root1, %edi
    mov $0x400087, %ebx
    call fill_root
    mov $root2, %edi
    mov $0x800087, %ebx
    call fill_root
    mov $root3, %edi
    mov $0xa00087, %ebx
    call fill_root
    movq $0x1111, COUNTER /* of the hypervisor, and of guest 1 */
    movq $0x2000, 0x800000
    movq $0x3000, 0xa00000
first:
    new_vmcb vmcb1, 1, root1, 0x500000
    run vmcb1
second_vcpu:
    new_vmcb vmcb2, 2, root1, 0x501000
    run vmcb2
other_guest:
    new_vmcb vmcb3, 3, root2, 0x500000
    run vmcb3
anew:
    new_vmcb vmcb3, 4, root3, 0x500000
    run vmcb3
    movl $200, rounds
again:
    run vmcb1
    run vmcb2
    run vmcb3
    decl rounds
    jnz again
end:
    xor %eax, %eax
    out %eax, $0xf4
    hlt

/* RAX: VMCB. Every intercepted instruction is skipped. */
run_until_vmmcall:
    vmrun %rax
after_vmexit:
    mov 0xc8(%rax), %rcx /* nRIP */
    mov %rcx, 0x578(%rax)
    incq exits
    incq hot
    cmpl $0x81, 0x70(%rax)
    jne run_until_vmmcall
    ret

    .balign 8
hot: .quad 0 /* data among hot code */

guest:
    mov $COUNTER, %edi
increment:
    incq (%rdi)
at_cpuid:
    cpuid
at_out:
    out %al, $0x80
at_hlt:
    hlt
    mov $NOTE, %edi
    mov %rsi, (%rdi)
at_vmmcall:
    vmmcall
    jmp guest

    .bss
    .balign 4096
    .globl vmcb1, vmcb2, vmcb3, exits, rounds, hot
vmcb1: .skip 4096
vmcb2: .skip 4096
vmcb3: .skip 4096
root1: .skip 4096 * 3
root2: .skip 4096 * 3
root3: .skip 4096 * 3
exits: .skip 8
rounds: .skip 8
