/* SPDX-License-Identifier: GPL-2.0-or-later */
#include "guest.h"
#include "cpu.h"
#include "memory.h"
#include "npt.h"
#include "print.h"
#include "shadow.h"
#include "svm.h"

_Static_assert(GUEST_STRIDE >= 4096 * 1024, "the largest guest");

uint64_t guest_to_system(const struct guest *guest, uint64_t gpa)
{
    uint64_t size = guest->kind->size;
    if (gpa >= size)
        return NO_PAGE;
    if (guest->kind->mapping == MAP_REVERSED) {
        uint64_t offset = gpa % PAGE_SIZE;
        return guest->base + (size - PAGE_SIZE - (gpa - offset)) + offset;
    }
    return guest->base + gpa;
}

static void load_image(struct guest *guest)
{
    const uint8_t *from = guest->kind->image;
    uint64_t left = (uint64_t)(guest->kind->image_end - from);
    for (uint64_t gpa = guest->kind->load; left; gpa += PAGE_SIZE) {
        uint64_t part = left < PAGE_SIZE ? left : PAGE_SIZE;
        copy((void *)guest_to_system(guest, gpa), from, part);
        from += part;
        left -= part;
    }
}

static void set_segment(struct segment *segment, uint16_t selector, uint16_t attributes, uint32_t limit)
{
    *segment = (struct segment){.selector = selector, .attributes = attributes, .limit = limit};
}

/* The registers a guest starts with. VMRUN checks some of them (APM2 15.5.1, "canonicalization and consistency checks")
   and believes the rest: a segment's attributes here are the hidden part itself, no descriptor is read. */
static void set_registers(struct guest *guest, uint64_t iterations)
{
    struct vmcb *vmcb = guest->vmcb;
    uint32_t limit = 0xffffffff;
    uint16_t code = 0xc9b, data = 0xc93, code_selector = 0x08, data_selector = 0x10; /* G and D/B set, present, ring 0 */
    vmcb->cr0 = CR0_PE | CR0_ET;
    if (guest->kind->start == START_REAL) {
        limit = 0xffff;
        code = 0x09b, data = 0x093, code_selector = 0, data_selector = 0;
        vmcb->cr0 = CR0_ET;
    }
    set_segment(&vmcb->cs, code_selector, code, limit);
    struct segment *others[] = {&vmcb->ds, &vmcb->es, &vmcb->ss, &vmcb->fs, &vmcb->gs};
    for (unsigned i = 0; i < sizeof others / sizeof *others; i++)
        set_segment(others[i], data_selector, data, limit);
    set_segment(&vmcb->tr, 0, 0x08b, 0xffff);
    set_segment(&vmcb->ldtr, 0, 0x082, 0xffff);
    vmcb->gdtr.limit = 0;
    vmcb->idtr.limit = guest->kind->start == START_REAL ? 0x3ff : 0;
    vmcb->rip = guest->kind->load;
    vmcb->rflags = 2; /* bit 1 is always 1; IF = 0 */
    vmcb->efer = EFER_SVME; /* VMRUN insists; MSR reads hide it (exits.c) */
    vmcb->dr6 = 0xffff0ff0;
    vmcb->dr7 = 0x400;
    vmcb->g_pat = 0x0007040600070406; /* the value after reset (APM2 7.8.2) */
    guest->registers.rbx = iterations;
}

void guest_start(uint64_t number, uint64_t loop)
{
    struct guest *guest = &guests[number];
    guest->number = number;
    guest->kind = &guest_kinds[number - 1];
    guest->base = GUEST_START + (number - 1) * GUEST_STRIDE;
    guest->vmcb = allocate_page();
    svm_prepare(guest);
    set_registers(guest, guest->kind->iterations * loop);
    if (guest->kind->mapping == MAP_SHADOW)
        shadow_create(guest);
    else
        npt_create(guest);
    load_image(guest);
    guest->state = RUNNABLE;
    print("hypervisor: guest %u (%s): %u KiB at spa %x, ASID %u, %s %x\n", number, guest->kind->name,
          guest->kind->size / 1024, guest->base, (uint64_t)guest->vmcb->asid,
          guest->kind->mapping == MAP_SHADOW ? "shadow CR3" : "nCR3", physical(guest->table));
}

void guest_flush(struct guest *guest)
{
    if (!guest->line_length)
        return;
    print("guest %u: ", guest->number);
    for (unsigned i = 0; i < guest->line_length; i++)
        put_char(guest->line[i]);
    put_char('\n');
    guest->line_length = 0;
}

void guest_put(struct guest *guest, char c)
{
    if (c == '\n' || guest->line_length == sizeof guest->line)
        guest_flush(guest);
    if (c != '\n' && c != '\r')
        guest->line[guest->line_length++] = c >= ' ' && c <= '~' ? c : '?';
}

void guest_stop(struct guest *guest, const char *why)
{
    guest_flush(guest);
    print("hypervisor: guest %u stopped: %s\n", guest->number, why);
    guest->state = STOPPED;
}
