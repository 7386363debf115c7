/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The virtual machine control block: one 4 KiB page that describes a guest to the processor
 * (APM2 15.5.1 and Appendix B). The first 1 KiB, the control area, says what the processor shall
 * intercept and, after a #VMEXIT, why it stopped. The rest, the state-save area, is the guest's registers.
 */
#ifndef VMCB_H
#define VMCB_H

#include <stdint.h>

struct segment {
    uint16_t selector;
    uint16_t attributes; /* bits 47:40 and 55:52 of a descriptor, put side by side */
    uint32_t limit;      /* in bytes, after the granularity bit has been applied */
    uint64_t base;
} __attribute__((packed));

struct vmcb {
    /* control area */
    uint16_t intercept_cr_read, intercept_cr_write; /* 000: bit n for CRn */
    uint16_t intercept_dr_read, intercept_dr_write; /* 004 */
    uint32_t intercept_exceptions;                  /* 008: bit n for vector n */
    uint32_t intercept1, intercept2, intercept3;    /* 00C: the bits below */
    uint8_t reserved_018[0x3c - 0x18];
    uint16_t pause_threshold, pause_count;
    uint64_t iopm_base;   /* 040 */
    uint64_t msrpm_base;  /* 048 */
    uint64_t tsc_offset;  /* 050 */
    uint32_t asid;        /* 058 */
    uint32_t tlb_control; /* 05C */
    uint32_t int_control; /* 060: V_IRQ and its companions */
    uint32_t int_vector;  /* 064 */
    uint64_t int_shadow;  /* 068: bit 0: the guest is just behind STI or MOV SS */
    uint64_t exit_code;   /* 070 */
    uint64_t exit_info1;  /* 078 */
    uint64_t exit_info2;  /* 080 */
    uint64_t exit_int_info; /* 088: the event whose delivery the #VMEXIT interrupted */
    uint64_t np_enable;   /* 090 */
    uint8_t reserved_098[0xa8 - 0x98];
    uint64_t event_inject; /* 0A8 */
    uint64_t n_cr3;       /* 0B0 */
    uint64_t lbr_control; /* 0B8: and virtual VMLOAD and VMSAVE */
    uint64_t clean;       /* 0C0 */
    uint64_t next_rip;    /* 0C8 */
    uint8_t reserved_0d0[0x400 - 0xd0];
    /* state-save area */
    struct segment es, cs, ss, ds, fs, gs, gdtr, ldtr, idtr, tr; /* 400 */
    uint8_t reserved_4a0[0x4cb - 0x4a0];
    uint8_t cpl;   /* 4CB */
    uint32_t reserved_4cc;
    uint64_t efer; /* 4D0 */
    uint8_t reserved_4d8[0x548 - 0x4d8];
    uint64_t cr4, cr3, cr0, dr7, dr6, rflags, rip; /* 548 */
    uint8_t reserved_580[0x5d8 - 0x580];
    uint64_t rsp; /* 5D8 */
    uint8_t reserved_5e0[0x5f8 - 0x5e0];
    uint64_t rax; /* 5F8 */
    uint64_t star, lstar, cstar, sfmask, kernel_gs_base, sysenter_cs, sysenter_esp, sysenter_eip, cr2;
    uint8_t reserved_648[0x668 - 0x648];
    uint64_t g_pat; /* 668: the guest's PAT, used with nested paging only */
    uint8_t reserved_670[0x1000 - 0x670];
} __attribute__((packed, aligned(4096)));

_Static_assert(__builtin_offsetof(struct vmcb, iopm_base) == 0x40, "VMCB layout");
_Static_assert(__builtin_offsetof(struct vmcb, exit_code) == 0x70, "VMCB layout");
_Static_assert(__builtin_offsetof(struct vmcb, event_inject) == 0xa8, "VMCB layout");
_Static_assert(__builtin_offsetof(struct vmcb, next_rip) == 0xc8, "VMCB layout");
_Static_assert(__builtin_offsetof(struct vmcb, es) == 0x400, "VMCB layout");
_Static_assert(__builtin_offsetof(struct vmcb, efer) == 0x4d0, "VMCB layout");
_Static_assert(__builtin_offsetof(struct vmcb, cr4) == 0x548, "VMCB layout");
_Static_assert(__builtin_offsetof(struct vmcb, rsp) == 0x5d8, "VMCB layout");
_Static_assert(__builtin_offsetof(struct vmcb, rax) == 0x5f8, "VMCB layout");
_Static_assert(__builtin_offsetof(struct vmcb, g_pat) == 0x668, "VMCB layout");
_Static_assert(sizeof(struct vmcb) == 4096, "VMCB layout");

/* intercept1 */
#define INTERCEPT_INTR        (1u << 0)
#define INTERCEPT_NMI         (1u << 1)
#define INTERCEPT_RDPMC       (1u << 15)
#define INTERCEPT_CPUID       (1u << 18)
#define INTERCEPT_INVD        (1u << 22)
#define INTERCEPT_HLT         (1u << 24)
#define INTERCEPT_INVLPG      (1u << 25)
#define INTERCEPT_INVLPGA     (1u << 26)
#define INTERCEPT_IOIO        (1u << 27)
#define INTERCEPT_MSR         (1u << 28)
#define INTERCEPT_TASK_SWITCH (1u << 29)
#define INTERCEPT_SHUTDOWN    (1u << 31)
/* intercept2 */
#define INTERCEPT_VMRUN   (1u << 0)
#define INTERCEPT_VMMCALL (1u << 1)
#define INTERCEPT_VMLOAD  (1u << 2)
#define INTERCEPT_VMSAVE  (1u << 3)
#define INTERCEPT_STGI    (1u << 4)
#define INTERCEPT_CLGI    (1u << 5)
#define INTERCEPT_SKINIT  (1u << 6)
#define INTERCEPT_WBINVD  (1u << 9)
#define INTERCEPT_MONITOR (1u << 10)
#define INTERCEPT_MWAIT   (1u << 11)
#define INTERCEPT_XSETBV  (1u << 13)

/* int_control (APM2 15.21) */
#define V_IRQ          (1u << 8)
#define V_GIF          (1u << 9)  /* with V_GIF_ENABLE (APM2 15.33.2) */
#define V_INTR_PRIO(n) ((uint32_t)(n) << 16)
#define V_IGN_TPR      (1u << 20)
#define V_INTR_MASKING (1u << 24)
#define V_GIF_ENABLE   (1u << 25)

/* lbr_control (APM2 15.33.1) */
#define VIRTUAL_VMLOAD_VMSAVE (1ull << 1)

/* event_inject and exit_int_info (APM2 15.20) */
#define EVENT_VECTOR      0xffu
#define EVENT_TYPE(n)     ((uint64_t)(n) << 8)
#define EVENT_EXCEPTION   EVENT_TYPE(3)
#define EVENT_SOFTWARE    EVENT_TYPE(4)
#define EVENT_ERROR_VALID (1ull << 11)
#define EVENT_VALID       (1ull << 31)

#define TLB_FLUSH_ALL 1u

/* exit codes (APM2 Appendix C) */
enum {
    EXIT_CR0_READ = 0x000,
    EXIT_CR0_WRITE = 0x010,
    EXIT_EXCEPTION = 0x040, /* + vector */
    EXIT_PF = 0x04e,
    EXIT_INTR = 0x060,
    EXIT_NMI = 0x061,
    EXIT_CPUID = 0x072,
    EXIT_INVD = 0x076,
    EXIT_HLT = 0x078,
    EXIT_INVLPG = 0x079,
    EXIT_INVLPGA = 0x07a,
    EXIT_IOIO = 0x07b,
    EXIT_MSR = 0x07c,
    EXIT_SHUTDOWN = 0x07f,
    EXIT_VMRUN = 0x080,
    EXIT_VMMCALL = 0x081,
    EXIT_VMLOAD = 0x082,
    EXIT_VMSAVE = 0x083,
    EXIT_STGI = 0x084,
    EXIT_CLGI = 0x085,
    EXIT_SKINIT = 0x086,
    EXIT_WBINVD = 0x089,
    EXIT_MONITOR = 0x08a,
    EXIT_MWAIT = 0x08b,
    EXIT_XSETBV = 0x08d,
    EXIT_NPF = 0x400,
};
#define EXIT_INVALID (~0ull)

#endif
