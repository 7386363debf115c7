/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * A hypervisor that lets go of guests: it clears the VMCB of one, makes that of another anew, turns SVM off, and halts
 * for ever.  The guests execute VMMCALL only.
 */
#include "long.S"
#include "vmcb.S"

    .globl main, cleared, rebuilt, again, off, on, halted
main:
    call prepare
    mov $0x400087, %ebx
    mov $root1, %edi
    call fill_root
    mov $root2, %edi
    call fill_root
    new_vmcb vmcb1, 1, root1, 0x500000
    new_vmcb vmcb2, 2, root2, 0x500000
    call run_first
    call run_second

    mov $vmcb2, %edi
    call clear
    call wait
    call wait
    call wait
cleared:
    mov $vmcb1, %edi
    call clear
    call wait /* to the next look, which sees it so */
    new_vmcb vmcb1, 1, root1, 0x500000
    call run_first
    call wait
rebuilt:
    new_vmcb vmcb2, 2, root2, 0x500000
    call run_second
again:
    call switch_svm
off:
    call wait
    call wait
    call wait
on:
    call switch_svm
    call run_first
    mov $vmcb1, %edi
    call clear
halted:
    cmpl $0, forever
    jne 1f
    xor %eax, %eax
    out %eax, $0xf4
1:  cli
    hlt

run_first:
    mov $vmcb1, %eax
    vmrun %rax
    addq $3, 0x578(%rax) /* behind VMMCALL */
    ret

run_second:
    mov $vmcb2, %eax
    vmrun %rax
    addq $3, 0x578(%rax)
    ret

clear: /* EDI: page */
    xor %eax, %eax
    mov $512, %ecx
    rep stosq
    ret

switch_svm:
    mov $0xc0000080, %ecx
    rdmsr
    xor $0x1000, %eax
    wrmsr
    ret

wait: /* until bit 23 of the guest time changes: the time of a look */
    rdtsc
    mov %eax, %esi
1:  .rept 120
    .byte 0x66, 0x0f, 0x1f, 0x84, 0, 0, 0, 0, 0
    .endr
    rdtsc
    xor %esi, %eax
    test $1 << 23, %eax
    jz 1b
    ret

guest:
    vmmcall
    jmp guest

    .data
    .globl forever
forever: .long 0

    .bss
    .balign 4096
    .globl vmcb1, vmcb2
vmcb1: .skip 4096
vmcb2: .skip 4096
root1: .skip 4096 * 3
root2: .skip 4096 * 3
