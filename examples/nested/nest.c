/* SPDX-License-Identifier: GPL-2.0-or-later */
#include "nest.h"
#include "cpu.h"
#include "exits.h"
#include "level.h"

#define SHADOW_PAGES 64
#define RFLAGS_IF (1ull << 9)
#define V_TPR 0xffu

static struct nested known[MAX_DEPTH];

struct range { uint16_t from, to; };
#define FIELDS(first, last) {__builtin_offsetof(struct vmcb, first), __builtin_offsetof(struct vmcb, last) + \
                             sizeof(((struct vmcb *)0)->last)}

/* What VMRUN and #VMEXIT switch of a guest (APM2 15.5.1, 15.6). */
static const struct range switched[] = {
    FIELDS(es, ds), FIELDS(gdtr, gdtr), FIELDS(idtr, idtr), FIELDS(cpl, cpl), FIELDS(efer, efer), FIELDS(cr4, rip),
    FIELDS(rsp, rsp), FIELDS(rax, rax), FIELDS(cr2, cr2), FIELDS(g_pat, g_pat), {0, 0},
};
/* What VMLOAD and VMSAVE move (APM2 15.5.2). */
static const struct range direct[] = {
    FIELDS(fs, gs), FIELDS(ldtr, ldtr), FIELDS(tr, tr), FIELDS(star, sysenter_eip), {0, 0},
};

static void copy_state(struct vmcb *to, const struct vmcb *from, const struct range *ranges)
{
    for (; ranges->to; ranges++)
        for (unsigned at = ranges->from / 8; at < (ranges->to + 7u) / 8; at++) /* whole quadwords */
            ((uint64_t *)to)[at] = ((const uint64_t *)from)[at];
}

void copy_direct_state(struct vmcb *to, const struct vmcb *from)
{
    copy_state(to, from, direct);
}

static struct nested *find(uint64_t address)
{
    static unsigned next;
    for (unsigned n = 0; n < MAX_DEPTH; n++)
        if (known[n].vmcb && known[n].address == address)
            return &known[n];
    struct nested *nested = &known[next];
    if (!nested->vmcb) {
        nested->inner = allocate_page();
        nested->vmcb = allocate_page();
        tables_create(&nested->shadow, SHADOW_PAGES);
        nested->vmcb->asid = next + 2; /* 1 is the guest's own */
    }
    next = (next + 1) % MAX_DEPTH;
    nested->address = address;
    tables_clear(&nested->shadow);
    return nested;
}

/* What is wrong with a VMCB and would no longer be seen in the one made of it: VMRUN refuses it (APM2 15.5.1). The rest the
   processor judges. VMCBs without nested paging are not supported. */
static int illegal(const struct vmcb *inner)
{
    return !(inner->intercept2 & INTERCEPT_VMRUN) || !inner->asid || !(inner->np_enable & 1) ||
           !(guest.vmcb->efer & EFER_LMA) || (inner->n_cr3 | inner->iopm_base | inner->msrpm_base) >> physical_bits;
}

/* One VMCB of two: intercepts of both, the state of the inner one, tables and maps of ours. */
static void merge(struct nested *nested)
{
    struct vmcb *vmcb = nested->vmcb;
    const struct vmcb *own = guest.vmcb, *inner = nested->inner;
    uint32_t of_inner = V_TPR | V_IRQ | V_INTR_PRIO(15) | V_IGN_TPR | (with_vgif ? V_GIF | V_GIF_ENABLE : 0);
    copy(vmcb, inner, __builtin_offsetof(struct vmcb, reserved_018)); /* the intercepts */
    vmcb->int_control = (inner->int_control & of_inner) | V_INTR_MASKING;
    vmcb->lbr_control = with_vls ? inner->lbr_control & VIRTUAL_VMLOAD_VMSAVE : 0;
    vmcb->intercept1 |= INTERCEPTS1;
    vmcb->intercept2 |= intercepts2(vmcb->int_control, vmcb->lbr_control);
    vmcb->iopm_base = own->iopm_base;
    vmcb->msrpm_base = own->msrpm_base;
    vmcb->tsc_offset = own->tsc_offset + inner->tsc_offset;
    vmcb->int_vector = inner->int_vector;
    vmcb->int_shadow = inner->int_shadow;
    vmcb->np_enable = 1;
    vmcb->n_cr3 = physical(nested->shadow.pages);
    vmcb->event_inject = inner->event_inject;
    vmcb->next_rip = inner->next_rip; /* where an injected software interrupt returns to */
    copy_state(vmcb, inner, switched);
    copy_direct_state(vmcb, own); /* VMRUN does not touch it */
}

/* Second half of #VMEXIT: why, in the VMCB of the guest's guest, and the guest's own state, which has stayed in its VMCB. */
static void leave(struct vmcb *inner, uint64_t code, uint64_t info1, uint64_t info2, uint64_t int_info)
{
    struct vmcb *own = guest.vmcb;
    inner->exit_code = code;
    inner->exit_info1 = info1;
    inner->exit_info2 = info2;
    inner->exit_int_info = int_info;
    set_guest_gif(0);
    own->dr7 = 0x400;
    guest.nested = 0;
}

void nest_enter(uint64_t address)
{
    struct nested *nested = find(address);
    struct vmcb *memory = guest_page(address), *inner = nested->inner;
    if (illegal(memory)) {
        leave(memory, EXIT_INVALID, 0, 0, 0);
        return;
    }
    /* A shadow is a TLB: it may hold what the tables said when it was filled, until the guest asks for a flush or takes
       another ASID (APM2 15.16). With a new root under an old ASID it need not follow, but it is simpler if it does. */
    if (memory->tlb_control)
        nest_flush(EVERY_ASID);
    else if (memory->asid != inner->asid || memory->n_cr3 != inner->n_cr3)
        tables_clear(&nested->shadow);
    copy(inner, memory, __builtin_offsetof(struct vmcb, reserved_670));
    merge(nested);
    set_guest_gif(1);
    guest.nested = nested;
}

void nest_exit(uint64_t code, uint64_t info1, uint64_t info2)
{
    struct vmcb *vmcb = guest.nested->vmcb, *inner = guest_page(guest.nested->address);
    uint64_t int_info = code == EXIT_INVALID ? 0 : code == EXIT_INTR ? vmcb->event_inject : vmcb->exit_int_info;
    statistics.reflected++;
    if (code != EXIT_INVALID) {
        uint32_t written = V_TPR | V_IRQ | (vmcb->int_control & V_GIF_ENABLE ? V_GIF : 0);
        inner->int_control = (inner->int_control & ~written) | (vmcb->int_control & written);
        inner->int_shadow = vmcb->int_shadow;
        inner->event_inject &= ~EVENT_VALID;
        inner->next_rip = vmcb->next_rip;
        copy_state(inner, vmcb, switched);
        guest.vmcb->cr2 = vmcb->cr2;
    }
    copy_direct_state(guest.vmcb, vmcb);
    leave(inner, code, info1, info2, int_info);
}

/* A bit of one of the guest's permission maps; where there is no memory all bits are ones. */
static int map_bit(uint64_t base, uint64_t bit)
{
    const uint8_t *byte = guest_memory((base & ~(PAGE_SIZE - 1)) + bit / 8, 1);
    return !byte || *byte >> bit % 8 & 1;
}

static int io_intercepted(const struct vmcb *inner, uint64_t info)
{
    uint64_t port = info >> 16 & 0xffff, size = info >> 4 & 7; /* APM2 15.10 */
    while (size--)
        if (map_bit(inner->iopm_base, port + size))
            return 1;
    return 0;
}

static int msr_intercepted(const struct vmcb *inner, uint32_t msr, uint64_t write)
{
    static const uint32_t first[] = {0, 0xc0000000, 0xc0010000}; /* 2000h MSRs each, two bits an MSR (APM2 15.11) */
    for (unsigned range = 0; range < 3; range++)
        if (msr - first[range] < 0x2000)
            return map_bit(inner->msrpm_base, range * 0x4000 + (msr - first[range]) * 2 + write);
    return 1;
}

int nest_intercepts(void)
{
    const struct vmcb *vmcb = guest.nested->vmcb, *inner = guest.nested->inner;
    uint64_t code = vmcb->exit_code;
    if (code == EXIT_INVALID)
        return 1;
    /* Exit codes are bit numbers of the intercept words. Interrupts of this level's processor are this level's business. */
    if (code > 0xbf || code == EXIT_INTR || code == EXIT_NMI || !(((const uint32_t *)inner)[code / 32] >> code % 32 & 1))
        return 0;
    if (code == EXIT_IOIO)
        return io_intercepted(inner, vmcb->exit_info1);
    if (code == EXIT_MSR)
        return msr_intercepted(inner, (uint32_t)guest.registers.rcx, vmcb->exit_info1);
    return 1;
}

int nest_interruptible(void)
{
    const struct vmcb *inner = guest.nested->inner;
    /* With V_INTR_MASKING it is the guest's IF at its VMRUN that counts, else that of its guest (APM2 15.21.1). */
    const struct vmcb *counts = inner->int_control & V_INTR_MASKING ? guest.vmcb : guest.nested->vmcb;
    return inner->intercept1 & INTERCEPT_INTR && guest_gif() && counts->rflags & RFLAGS_IF;
}

static void *table_of_guest(uint64_t address)
{
    return guest_memory(address, 8);
}

static void *table_of_ours(uint64_t address)
{
    return (void *)address;
}

void nest_page_fault(void)
{
    struct nested *nested = guest.nested;
    uint64_t info = nested->vmcb->exit_info1, address = nested->vmcb->exit_info2, access = info & (NPF_WRITE | NPF_FETCH);
    struct found inner = walk(nested->inner->n_cr3, address, access, table_of_guest);
    if (!inner.ok) {
        nest_exit(EXIT_NPF, (info & ~(NPF_PRESENT | NPF_RESERVED)) | inner.fault, address);
        return;
    }
    struct found own = walk(guest.vmcb->n_cr3, inner.address, access, table_of_ours);
    if (!own.ok) {
        own_page_fault(inner.address, (info & ~(NPF_PRESENT | NPF_RESERVED)) | own.fault);
        return;
    }
    statistics.filled++;
    tables_map(&nested->shadow, address, (own.address & ADDRESS) | PRESENT | USER | (inner.rights & own.rights & WRITABLE) |
               ((inner.rights | own.rights) & NO_EXECUTE), 0);
}

void nest_flush(uint32_t asid)
{
    for (unsigned n = 0; n < MAX_DEPTH; n++)
        if (known[n].vmcb && (asid == EVERY_ASID || asid == known[n].inner->asid))
            tables_clear(&known[n].shadow);
    if (asid == EVERY_ASID || !asid)
        guest.tables.flush = 1;
}
