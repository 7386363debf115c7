/* SPDX-License-Identifier: GPL-2.0-or-later */
/* One round trip:   void round_...(uint64_t vmcb, uint64_t host_vmcb). The guests below change RAX to RDX only. */
    .text
    .globl round_bare, round_full
round_bare:
    pushq %rbx
    movq %rdi, %rax
    vmrun %rax
    stgi /* #VMEXIT leaves GIF = 0 */
    popq %rbx
    ret

round_full:
    pushq %rbx
    pushq %rsi
    clgi
    movq %rdi, %rax
    vmload %rax
    vmrun %rax
    vmsave %rax
    movq (%rsp), %rax
    vmload %rax
    stgi
    popq %rsi
    popq %rbx
    ret

    .code32
    .globl guest_vmmcall, guest_cpuid
guest_vmmcall:
    vmmcall
    jmp guest_vmmcall
guest_cpuid:
    cpuid
    jmp guest_cpuid
    .section .note.GNU-stack, "", @progbits
