/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * A hypervisor whose guest runs three processes in turn.  At USER processes 1 and 2 have pages of their own with the same
 * code; process 3 has the page of process 1.  The kernel is in all of them at the same address.
 */
#include "long.S"
#include "vmcb.S"

#define USER 0x40000000

    .globl main, process1, process2, process3, program1, program2, kernel, boot, ticks
main:
    call prepare
    mov $root, %edi
    mov $0x400087, %ebx
    call fill_root
    new_vmcb vmcb, 1, root, 0x500000
    mov $vmcb, %eax
    movl $60, rounds
1:  vmrun %rax
after_vmexit:
    addq $3, 0x578(%rax) /* behind VMMCALL */
    decl rounds
    jnz 1b
    xor %eax, %eax
    out %eax, $0xf4
    hlt

guest:
    vmmcall
boot:
    mov $USER, %ebx
each:
    mov $process1, %eax
    call switch_to
    mov $process2, %eax
    call switch_to
    mov $process3, %eax
    call switch_to
    vmmcall
    jmp each

switch_to:
    mov %rax, %cr3
    call *%rbx
kernel:
    incq ticks
    ret

    .macro process number, page
    .balign 4096
process\number:
    .quad pdpt\number + 3
    .balign 4096
pdpt\number:
    .quad directory + 3, directory\number + 3
    .balign 4096
directory\number:
    .quad table\number + 3
    .balign 4096
table\number:
    .quad \page + 3
    .balign 4096
    .endm

    .macro program number
    .balign 4096
program\number:
    incq 1f(%rip)
    ret
    .balign 16
1:  .quad \number * 0x1000 /* at USER + 0x10 */
    .endm

    process 1, program1
    process 2, program2
    process 3, program1
    program 1
    program 2

    .bss
    .balign 4096
vmcb: .skip 4096
root: .skip 4096 * 3
ticks: .skip 8
rounds: .skip 4
