/* SPDX-License-Identifier: GPL-2.0-or-later */
/* A guest in a tight loop with interrupts off, under a hypervisor without a timer. */
#include "long.S"
#include "vmcb.S"

    .globl main
main:
    call prepare
    mov $root, %edi
    mov $0x400087, %ebx
    call fill_root
    new_vmcb vmcb, 1, root, 0x500000
    mov $vmcb, %eax
    cli
    vmrun %rax
    hlt

guest:
    cli
spin:
    jmp spin

    .bss
    .balign 4096
vmcb: .skip 4096
root: .skip 4096 * 3
