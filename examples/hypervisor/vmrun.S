/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The world switch.   void vmrun(uint64_t guest_vmcb, struct registers *registers, uint64_t host_vmcb)
 *
 * VMRUN and #VMEXIT exchange CS, DS, ES, SS, GDTR, IDTR, the control registers, EFER, RFLAGS, RIP, RSP and RAX
 * (APM2 15.5.1, 15.6). Left to us: the other general registers, and, by VMLOAD and VMSAVE, FS, GS, TR, LDTR and the
 * system-call MSRs. x87 and SSE state stays in place as well: nobody in this demonstration uses it.
 */
    .text
    .globl vmrun
vmrun:
    pushq %rbx
    pushq %rbp
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    pushq %rdx /* 16(%rsp): host VMCB */
    pushq %rsi /*  8(%rsp): guest's registers */
    pushq %rdi /*  0(%rsp): guest VMCB */

    /* GIF = 0 from here to STGI: no interrupt, not even an NMI, meets us with half of the guest's state loaded
       (APM2 15.17). RFLAGS.IF stays 1, for it is the host's IF that lets a physical interrupt end the guest's run
       when V_INTR_MASKING is on; VMRUN itself sets GIF. */
    clgi

    movq %rdi, %rax
    movq 0x00(%rsi), %rbx
    movq 0x08(%rsi), %rcx
    movq 0x10(%rsi), %rdx
    movq 0x20(%rsi), %rdi
    movq 0x28(%rsi), %rbp
    movq 0x30(%rsi), %r8
    movq 0x38(%rsi), %r9
    movq 0x40(%rsi), %r10
    movq 0x48(%rsi), %r11
    movq 0x50(%rsi), %r12
    movq 0x58(%rsi), %r13
    movq 0x60(%rsi), %r14
    movq 0x68(%rsi), %r15
    movq 0x18(%rsi), %rsi

    vmload %rax
    .globl vmrun_instruction, vmexit
vmrun_instruction:
    vmrun %rax
vmexit: /* RAX and RSP are ours again, GIF = 0 */
    vmsave %rax

    xchgq %rsi, 8(%rsp)
    movq %rbx, 0x00(%rsi)
    movq %rcx, 0x08(%rsi)
    movq %rdx, 0x10(%rsi)
    movq %rdi, 0x20(%rsi)
    movq %rbp, 0x28(%rsi)
    movq %r8, 0x30(%rsi)
    movq %r9, 0x38(%rsi)
    movq %r10, 0x40(%rsi)
    movq %r11, 0x48(%rsi)
    movq %r12, 0x50(%rsi)
    movq %r13, 0x58(%rsi)
    movq %r14, 0x60(%rsi)
    movq %r15, 0x68(%rsi)
    movq 8(%rsp), %rbx /* the guest's RSI */
    movq %rbx, 0x18(%rsi)

    movq 16(%rsp), %rax
    vmload %rax
    stgi /* the interrupt that ended the guest's run, if one did, is taken here, by our own IDT */

    addq $24, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbp
    popq %rbx
    ret
    .section .note.GNU-stack, "", @progbits
