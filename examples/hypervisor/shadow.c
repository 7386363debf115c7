/* SPDX-License-Identifier: GPL-2.0-or-later */
#include "shadow.h"
#include "cpu.h"
#include "memory.h"

#define PRESENT_WRITABLE_USER 7u

/* Legacy 32-bit tables, CR4.PAE = 0: a page directory of 4 MiB entries. Real mode reaches 1 MiB and 64 KiB, so one
   page table, for the first entry, will do. */
void shadow_create(struct guest *guest)
{
    uint32_t *directory = allocate_page();
    uint32_t *page_table = allocate_page();
    directory[0] = (uint32_t)physical(page_table) | PRESENT_WRITABLE_USER;
    guest->table = directory;

    struct vmcb *vmcb = guest->vmcb;
    vmcb->cr0 |= CR0_PG; /* and PE stays 0 */
    vmcb->cr3 = physical(directory);
    /* A page fault is a matter between the hypervisor and its table: real mode has no #PF. The guest must not see PG
       either, nor change it: accesses to CR0 are emulated (exits.c), and so are those to CR3 and CR4. */
    vmcb->intercept_exceptions |= 1u << 14;
    vmcb->intercept_cr_read |= 1u << 0 | 1u << 3;
    vmcb->intercept_cr_write |= 1u << 0 | 1u << 3 | 1u << 4;

    /* The pages the image is loaded to come first, so that load_image can write to them; the rest comes at first touch. */
    uint64_t image_size = (uint64_t)(guest->kind->image_end - guest->kind->image);
    for (uint64_t offset = 0; offset < image_size; offset += PAGE_SIZE)
        shadow_fill(guest, guest->kind->load + offset);
}

int shadow_fill(struct guest *guest, uint64_t linear)
{
    uint64_t page = linear & ~(PAGE_SIZE - 1);
    uint64_t spa = guest_to_system(guest, page); /* real mode: the linear address is the guest-physical one */
    if (spa == NO_PAGE)
        return 0;
    uint32_t *page_table = (uint32_t *)(uint64_t)(*(uint32_t *)guest->table & ~0xfffu);
    clear((void *)spa, PAGE_SIZE);
    page_table[page / PAGE_SIZE] = (uint32_t)spa | PRESENT_WRITABLE_USER;
    return 1;
}
