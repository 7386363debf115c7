/* SPDX-License-Identifier: GPL-2.0-or-later */
/* `vmcb` is that of the guest or, for what the guest does not intercept of its own guest, the one that runs for that. */
#include "exits.h"
#include "cpu.h"
#include "level.h"
#include "nest.h"
#include "timer.h"

#define VECTOR_UD 6
#define VECTOR_GP 13
#define COM1 0x3f8

static void skip(struct vmcb *vmcb, unsigned length)
{
    vmcb->rip = has_next_rip ? vmcb->next_rip : vmcb->rip + length;
    vmcb->int_shadow &= ~1ull;
}

static void inject_ud(struct vmcb *vmcb)
{
    vmcb->event_inject = EVENT_VALID | EVENT_EXCEPTION | VECTOR_UD;
}

static void inject_gp(struct vmcb *vmcb)
{
    vmcb->event_inject = EVENT_VALID | EVENT_EXCEPTION | EVENT_ERROR_VALID | VECTOR_GP;
}

static void on_cpuid(struct vmcb *vmcb)
{
    uint32_t leaf = (uint32_t)vmcb->rax;
    struct cpuid r = cpuid(leaf, (uint32_t)guest.registers.rcx);
    if (leaf == 1)
        r.ecx |= 1u << 31; /* "there is a hypervisor" */
    else if (leaf == 0x8000000a)
        r = (struct cpuid){1, ASIDS, 0, r.edx & (SVM_NP | SVM_NRIPS | (with_vgif ? SVM_VGIF : 0) | (with_vls ? SVM_VLS : 0))};
    vmcb->rax = r.eax;
    guest.registers.rbx = r.ebx;
    guest.registers.rcx = r.ecx;
    guest.registers.rdx = r.edx;
    skip(vmcb, 2);
}

static void on_io(struct vmcb *vmcb)
{
    uint64_t info = vmcb->exit_info1; /* APM2 15.10.2: bit 0 IN, 2 string, 6:4 size, 31:16 port */
    uint16_t port = (uint16_t)(info >> 16);
    unsigned bits = 8 * (info >> 4 & 7);
    if (info & 1 << 2)
        fatal("the guest uses INS or OUTS, which is not emulated");
    if (info & 1) {
        uint64_t mask = (1ull << bits) - 1;
        uint64_t value = port >= COM1 && port < COM1 + 8 && bits == 8 ? inb(port) : mask;
        vmcb->rax = bits == 32 ? value : (vmcb->rax & ~mask) | value;
    } else if (port >= COM1 && port < COM1 + 8 && bits == 8) {
        outb(port, (uint8_t)vmcb->rax);
    } else if (port == DEBUG_EXIT_PORT) {
        fatal("the guest gave up");
    }
    vmcb->rip = vmcb->exit_info2;
    vmcb->int_shadow &= ~1ull;
}

/* Both return 0 for an MSR, or a value, that calls for #GP. */
static int read_msr(const struct vmcb *vmcb, uint32_t msr, uint64_t *value)
{
    switch (msr) {
    case MSR_EFER:
        *value = guest.svme || guest.nested ? vmcb->efer : vmcb->efer & ~EFER_SVME;
        return 1;
    case MSR_VM_CR:
        *value = 0;
        return 1;
    case MSR_VM_HSAVE_PA:
        *value = guest.hsave;
        return 1;
    }
    return 0;
}

static int write_msr(struct vmcb *vmcb, uint32_t msr, uint64_t value)
{
    if (msr == MSR_VM_HSAVE_PA) {
        if (value & (PAGE_SIZE - 1) || value >> physical_bits)
            return 0;
        guest.hsave = value;
        return 1;
    }
    if (msr != MSR_EFER || value & ~(EFER_SCE | EFER_LME | EFER_LMA | EFER_NXE | EFER_SVME))
        return 0;
    if (vmcb->cr0 & CR0_PG && (value ^ vmcb->efer) & EFER_LME)
        return 0;
    if (!guest.nested)
        guest.svme = !!(value & EFER_SVME);
    vmcb->efer = (value & ~EFER_LMA) | (vmcb->efer & EFER_LMA) | EFER_SVME;
    return 1;
}

static void on_msr(struct vmcb *vmcb)
{
    uint32_t msr = (uint32_t)guest.registers.rcx;
    uint64_t value = guest.registers.rdx << 32 | (uint32_t)vmcb->rax;
    if (vmcb->exit_info1 ? !write_msr(vmcb, msr, value) : !read_msr(vmcb, msr, &value)) {
        inject_gp(vmcb);
        return;
    }
    if (!vmcb->exit_info1) {
        vmcb->rax = (uint32_t)value;
        guest.registers.rdx = value >> 32;
    }
    skip(vmcb, 2);
}

static void on_halt(struct vmcb *vmcb)
{
    skip(vmcb, 1);
    if (!guest.pending && !guest.tick_vector)
        fatal("the guest halts, and nothing will ever wake it");
    while (!guest.pending && !timer_expired)
        timer_wait();
}

static void on_hypercall(struct vmcb *vmcb)
{
    uint64_t number = vmcb->rax, first = guest.registers.rbx, second = guest.registers.rcx;
    skip(vmcb, 3);
    if (guest.nested || vmcb->cpl) { /* its hypervisor has hypercalls to offer only if it intercepts them */
        vmcb->rip -= 3;
        inject_ud(vmcb);
    } else if (number == HYPERCALL_TICK) {
        guest.tick_vector = first & 0xff;
        timer_start();
    } else if (number == HYPERCALL_DONE) {
        uint64_t now = rdtsc() + vmcb->tsc_offset;
        say("level %u reports %u after %u exits of it, %u of its guests (%u passed on, %u for shadow tables)\n", level + 1, first,
            statistics.own, statistics.nested, statistics.reflected, statistics.filled);
        if (second > now)
            fatal("the guest's time is ahead of ours: TSC offsets do not add up");
        if (level)
            hypercall(HYPERCALL_DONE, first, rdtsc());
        if (first != PRIMES)
            fatal("the leaf's result is wrong");
        end(0);
    }
}

static void on_nested_page_fault(struct vmcb *vmcb)
{
    if (guest.nested)
        nest_page_fault();
    else
        own_page_fault(vmcb->exit_info2, vmcb->exit_info1);
}

void own_page_fault(uint64_t gpa, uint64_t info)
{
    static void *page; /* the first read of it maps it, the first write makes it writable */
    say("#NPF, EXITINFO1 %x, gpa %x\n", info, gpa);
    if (gpa >> 12 != OUTSIDE >> 12 || info & NPF_FETCH)
        fatal("the guest touched memory that is not there");
    if (!page)
        page = allocate_page();
    tables_map(&guest.tables, OUTSIDE,
               physical(page) | PRESENT | USER | ACCESSED | DIRTY | (info & NPF_WRITE ? WRITABLE : 0), 0);
}

static void on_invalidate(struct vmcb *vmcb)
{
    (void)vmcb;
    skip(vmcb, 2);
}

static void on_interrupt(struct vmcb *vmcb)
{
    (void)vmcb; /* STGI in vmrun.S has let our own handler see to it */
}

static void on_shutdown(struct vmcb *vmcb)
{
    say("triple fault of its guest at %x\n", vmcb->rip);
    fatal("the guest shut down");
}

static void on_undefined(struct vmcb *vmcb)
{
    inject_ud(vmcb);
}

/* SVM instructions, which the guest has once it has set EFER.SVME (APM2 15.4). */

static void on_vmrun(struct vmcb *vmcb)
{
    if (!guest_page(vmcb->rax)) {
        inject_gp(vmcb);
        return;
    }
    skip(vmcb, 3);
    nest_enter(vmcb->rax);
}

static void on_vmload(struct vmcb *vmcb)
{
    const struct vmcb *from = guest_page(vmcb->rax);
    if (!from) {
        inject_gp(vmcb);
        return;
    }
    copy_direct_state(vmcb, from);
    skip(vmcb, 3);
}

static void on_vmsave(struct vmcb *vmcb)
{
    struct vmcb *to = guest_page(vmcb->rax);
    if (!to) {
        inject_gp(vmcb);
        return;
    }
    copy_direct_state(to, vmcb);
    skip(vmcb, 3);
}

static void on_stgi(struct vmcb *vmcb)
{
    set_guest_gif(1);
    skip(vmcb, 3);
}

static void on_clgi(struct vmcb *vmcb)
{
    set_guest_gif(0);
    skip(vmcb, 3);
}

static void on_invlpga(struct vmcb *vmcb)
{
    nest_flush((uint32_t)guest.registers.rcx);
    skip(vmcb, 3);
}

static const struct { uint64_t code; void (*handle)(struct vmcb *vmcb); int svm; } handlers[] = {
    {EXIT_INTR, on_interrupt, 0},  {EXIT_NMI, on_interrupt, 0},      {EXIT_CPUID, on_cpuid, 0},
    {EXIT_IOIO, on_io, 0},         {EXIT_MSR, on_msr, 0},            {EXIT_HLT, on_halt, 0},
    {EXIT_VMMCALL, on_hypercall, 0}, {EXIT_NPF, on_nested_page_fault, 0}, {EXIT_SHUTDOWN, on_shutdown, 0},
    {EXIT_INVD, on_invalidate, 0}, {EXIT_WBINVD, on_invalidate, 0},  {EXIT_SKINIT, on_undefined, 0},
    {EXIT_MONITOR, on_undefined, 0}, {EXIT_MWAIT, on_undefined, 0},  {EXIT_XSETBV, on_undefined, 0},
    {EXIT_VMRUN, on_vmrun, 1},     {EXIT_VMLOAD, on_vmload, 1},      {EXIT_VMSAVE, on_vmsave, 1},
    {EXIT_STGI, on_stgi, 1},       {EXIT_CLGI, on_clgi, 1},          {EXIT_INVLPGA, on_invlpga, 1},
};

void handle_exit(void)
{
    struct vmcb *vmcb = running();
    if (guest.nested)
        statistics.nested++;
    else
        statistics.own++;
    if (guest.nested && nest_intercepts()) {
        nest_exit(vmcb->exit_code, vmcb->exit_info1, vmcb->exit_info2);
        return;
    }
    /* An exit in the middle of an event's delivery leaves the event to us; not so INT n, which runs again (APM2 15.7.2), and
       not an interrupt that QEMU still has in V_IRQ, while it names it an exception here. */
    uint64_t event = vmcb->exit_int_info;
    int again = (event & EVENT_TYPE(7)) == EVENT_SOFTWARE ||
                (vmcb->int_control & V_IRQ && (event & EVENT_VECTOR) == (vmcb->int_vector & EVENT_VECTOR));
    vmcb->event_inject = event & EVENT_VALID && !again ? event : 0;
    for (unsigned n = 0; n < sizeof handlers / sizeof *handlers; n++) {
        if (handlers[n].code != vmcb->exit_code)
            continue;
        if (handlers[n].svm && !guest.svme)
            inject_ud(vmcb);
        else
            handlers[n].handle(vmcb);
        return;
    }
    say("no handler for EXITCODE %x, EXITINFO1 %x, EXITINFO2 %x, rip %x\n", vmcb->exit_code, vmcb->exit_info1, vmcb->exit_info2,
        vmcb->rip);
    fatal("an exit is not handled");
}
