/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * A hypervisor whose guests are hard to tell apart: all run the code at `guest`, mapped as in the hypervisor, and differ
 * in what gpa 400000 is. VMCBs 1 and 2 share a nested root; VMCB 3 has another, then is used anew for a third guest.
 */
#include "long.S"

#define COUNTER 0x400000
#define NOTE 0x400008
#define VM_HSAVE_PA 0xc0010117

    .macro new_vmcb vmcb, asid, root, sp
    mov $\vmcb, %edi
    mov $\asid, %esi
    mov $\root, %edx
    mov $\sp, %r10d
    call fill_vmcb
    .endm

    .macro run vmcb
    mov $\vmcb, %eax
    call run_until_vmmcall
    .endm

    .globl main
main:
    mov $0x10, %eax
    mov %eax, %ss
    mov %eax, %ds
    mov %eax, %es
    mov $VM_HSAVE_PA, %ecx
    mov $hsave, %eax
    xor %edx, %edx
    wrmsr
    mov $iopm, %edi
    mov $-1, %eax
    mov $0x3000 / 4, %ecx
    cld
    rep stosl
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

fill_root: /* EDI: three pages; EBX: the entry for gpa 400000 */
    lea 0x1007(%rdi), %rax
    mov %rax, (%rdi)
    lea 0x2007(%rdi), %rax
    mov %rax, 0x1000(%rdi)
    mov $0x87, %eax
    xor %ecx, %ecx
1:  mov %rax, 0x2000(%rdi, %rcx, 8)
    add $0x200000, %rax
    inc %ecx
    cmp $8, %ecx
    jne 1b
    mov %rbx, 0x2010(%rdi)
    ret

fill_vmcb: /* EDI: page, ESI: ASID, EDX: nested root, R10D: RSP */
    mov %rdi, %r9
    xor %eax, %eax
    mov $512, %ecx
    rep stosq
    mov %r9, %rdi
    movl $(1 << 18 | 1 << 24 | 1 << 27), 0xc(%rdi) /* CPUID, HLT, IOIO */
    movl $3, 0x10(%rdi)                            /* VMRUN, VMMCALL */
    movq $iopm, 0x40(%rdi)
    mov %esi, 0x58(%rdi)
    movq $1, 0x90(%rdi)
    mov %rdx, 0xb0(%rdi)
    movl $0x0a9b0008, 0x410(%rdi)
    movl $0x0c930010, 0x420(%rdi)
    movl $0x0c930010, 0x430(%rdi)
    movl $0x0c930010, 0x400(%rdi)
    movl $-1, 0x414(%rdi)
    movl $-1, 0x424(%rdi)
    movl $-1, 0x434(%rdi)
    movl $-1, 0x404(%rdi)
    movq $0x1500, 0x4d0(%rdi)
    mov %cr4, %rax
    mov %rax, 0x548(%rdi)
    mov %cr3, %rax
    mov %rax, 0x550(%rdi)
    mov %cr0, %rax
    mov %rax, 0x558(%rdi)
    movq $0x400, 0x560(%rdi)
    movq $2, 0x570(%rdi)
    movq $guest, 0x578(%rdi)
    mov %r10, 0x5d8(%rdi)
    movq $0x00070106, 0x668(%rdi)
    ret

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
hsave: .skip 4096
iopm: .skip 4096 * 3
root1: .skip 4096 * 3
root2: .skip 4096 * 3
root3: .skip 4096 * 3
exits: .skip 8
rounds: .skip 8
