/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The world switch (vmrun.S). */
#ifndef VMRUN_H
#define VMRUN_H

#include <stdint.h>

/* The general registers that VMRUN does not switch: RAX, RSP and RIP are in the VMCB (APM2 15.5.1). vmrun.S knows this order. */
struct registers {
    uint64_t rbx, rcx, rdx, rsi, rdi, rbp, r8, r9, r10, r11, r12, r13, r14, r15;
};

/* Run the guest of a VMCB until its next #VMEXIT. `host_vmcb`: where VMSAVE put the host's FS, GS, TR and MSRs. */
void vmrun(uint64_t guest_vmcb, struct registers *registers, uint64_t host_vmcb);

#endif
