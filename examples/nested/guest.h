/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The one guest of a level: a virtual processor that has SVM itself. */
#ifndef GUEST_H
#define GUEST_H

#include "tables.h"
#include "vmcb.h"
#include "vmrun.h"

struct guest {
    struct vmcb *vmcb;          /* of the guest itself */
    struct tables tables;       /* where its memory is */
    struct nested *nested;      /* the guest's guest that runs in its place (nest.h), or 0 */
    struct registers registers; /* of whoever runs */
    int gif;                    /* its GIF, if the processor does not keep it (see guest_gif) */
    int svme;                   /* its EFER.SVME: the real one is always set */
    uint64_t hsave;             /* its VM_HSAVE_PA, of which we make no use */
    uint64_t tick_vector;       /* it has asked for an interrupt, 0: no */
    uint64_t pending;           /* the vector of an interrupt it has yet to take, 0: none */
};
extern struct guest guest;

extern int has_next_rip; /* CPUID 8000_000A EDX[3] */
extern struct statistics {
    uint64_t own, nested, reflected, filled; /* exits of the guest; of its guests; passed on to it; for our shadow tables */
} statistics;

/* Make the guest from what main.c put into its memory, about to start at `entry` as a multiboot loader starts a kernel. */
void guest_start(uint64_t entry);
/* Run it until it reports. */
_Noreturn void guest_run(void);
/* The VMCB that runs next: the guest's, or that of its guest. */
struct vmcb *running(void);
int guest_gif(void);
void set_guest_gif(int gif);
/* `size` bytes of the guest's memory, 0 if they are not all within it. */
void *guest_memory(uint64_t gpa, uint64_t size);
/* The page at a guest-physical address, 0 if it is not the address of one: what VMRUN, VMLOAD and VMSAVE take. */
struct vmcb *guest_page(uint64_t gpa);
/* Intercepts in all VMCBs, but for those of SVM instructions that the processor may execute for one with these features. */
uint32_t intercepts2(uint32_t int_control, uint64_t lbr_control);
#define INTERCEPTS1 \
    (INTERCEPT_INTR | INTERCEPT_NMI | INTERCEPT_CPUID | INTERCEPT_INVD | INTERCEPT_HLT | INTERCEPT_INVLPGA | INTERCEPT_IOIO | \
     INTERCEPT_MSR | INTERCEPT_SHUTDOWN)
/* Permission maps that intercept everything. */
extern uint8_t io_map[], msr_map[];

#endif
