/* SPDX-License-Identifier: GPL-2.0-or-later */
/* SVM for the guest: its VMRUN, and the #VMEXITs that its own intercepts ask for. */
#ifndef NEST_H
#define NEST_H

#include "guest.h"

/* A guest of the guest, known by the address of the VMCB that the guest made for it. */
struct nested {
    uint64_t address;     /* of that VMCB, in the guest's memory */
    struct vmcb *inner;   /* that VMCB as VMRUN read it */
    struct vmcb *vmcb;    /* what really runs: both made into one */
    struct tables shadow; /* its nested table, through the guest's */
};

#define ASIDS 8 /* we need, and offer, this many */
/* CPUID 8000_000A EDX */
#define SVM_NP    (1u << 0)
#define SVM_NRIPS (1u << 3)
#define SVM_VLS   (1u << 15)
#define SVM_VGIF  (1u << 16)

/* The guest executes VMRUN: run the guest of the VMCB at `address` in its place. */
void nest_enter(uint64_t address);
/* A #VMEXIT of the guest's guest: on with the guest, behind its VMRUN. */
void nest_exit(uint64_t code, uint64_t info1, uint64_t info2);
/* Whether the guest intercepts what its guest has just exited for. */
int nest_intercepts(void);
/* Whether an interrupt for the guest ends the run of its guest now. */
int nest_interruptible(void);
/* A nested page fault of the guest's guest: fill our shadow, or give it to the guest. */
void nest_page_fault(void);
/* Forget the translations of one of the guest's ASIDs, 0 being its own, or of all. */
#define EVERY_ASID (~0u)
void nest_flush(uint32_t asid);
/* What VMLOAD and VMSAVE move, and VMRUN leaves alone. */
void copy_direct_state(struct vmcb *to, const struct vmcb *from);

#endif
