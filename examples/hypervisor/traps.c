/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The hypervisor's own interrupts and exceptions. The only ones it expects are its timer and, should the machine
 * have one to give, an NMI; everything else is a bug of ours and gets a report.
 */
#include "traps.h"
#include "apic.h"
#include "cpu.h"
#include "memory.h"
#include "print.h"

struct frame {
    uint64_t r15, r14, r13, r12, r11, r10, r9, r8, rdi, rsi, rbp, rbx, rdx, rcx, rax;
    uint64_t vector, error;
    uint64_t rip, cs, rflags, rsp, ss;
};

struct gate {
    uint16_t offset_low, selector;
    uint8_t ist, type;
    uint16_t offset_middle;
    uint32_t offset_high, reserved;
} __attribute__((packed));

static struct {
    uint32_t reserved0;
    uint64_t rsp[3];
    uint64_t reserved1;
    uint64_t ist[7];
    uint64_t reserved2;
    uint16_t reserved3, io_map;
} __attribute__((packed)) tss;

static struct gate idt[256];
static uint8_t ist_stack[8192] __attribute__((aligned(16)));
extern uint64_t gdt[];
extern uint8_t trap_entries[256][16];

static const char *const names[32] = {
    "#DE", "#DB", "NMI", "#BP", "#OF", "#BR", "#UD", "#NM", "#DF", "9", "#TS", "#NP", "#SS", "#GP", "#PF", "15",
    "#MF", "#AC", "#MC", "#XF", "20", "#CP", "22", "23", "24", "25", "26", "27", "#HV", "#VC", "#SX", "31",
};

void traps_start(void)
{
    /* VMRUN wants a real TSS in TR: VMSAVE and VMLOAD move TR with its hidden base and limit, and IST stacks are read from it. */
    uint64_t base = (uint64_t)&tss;
    tss.ist[0] = (uint64_t)(ist_stack + sizeof ist_stack);
    tss.io_map = sizeof tss;
    gdt[3] = (sizeof tss - 1) | (base & 0xffffff) << 16 | 0x89ull << 40 | (base >> 24 & 0xff) << 56;
    gdt[4] = base >> 32;
    __asm__ volatile("ltr %w0" : : "r"(0x18));

    for (int vector = 0; vector < 256; vector++) {
        uint64_t entry = (uint64_t)trap_entries[vector];
        idt[vector] = (struct gate){
            .offset_low = (uint16_t)entry,
            .offset_middle = (uint16_t)(entry >> 16),
            .offset_high = (uint32_t)(entry >> 32),
            .selector = 0x08,
            .type = 0x8e, /* present, interrupt gate */
            /* NMI, #DF and #MC come at the worst moments: a stack of their own. */
            .ist = vector == 2 || vector == 8 || vector == 18,
        };
    }
    struct { uint16_t limit; uint64_t base; } __attribute__((packed)) pointer = {sizeof idt - 1, (uint64_t)idt};
    __asm__ volatile("lidt %0" : : "m"(pointer));
}

void trap(struct frame *f)
{
    if (f->vector == TIMER_VECTOR) {
        timer_interrupt();
        return;
    }
    if (f->vector == SPURIOUS_VECTOR)
        return; /* no EOI for a spurious interrupt (APM2 16.4.7) */
    if (f->vector == 2) {
        print("hypervisor: NMI\n");
        return;
    }
    print("hypervisor: unexpected %s vector %u error %x\n", f->vector < 32 ? names[f->vector] : "interrupt", f->vector,
          f->error);
    print("  rip %016x cs %x rflags %x rsp %016x cr2 %016x\n", f->rip, f->cs, f->rflags, f->rsp, read_cr2());
    print("  rax %016x rbx %016x rcx %016x rdx %016x\n", f->rax, f->rbx, f->rcx, f->rdx);
    print("  rsi %016x rdi %016x rbp %016x r8  %016x\n", f->rsi, f->rdi, f->rbp, f->r8);
    fatal("stopped by its own exception");
}
