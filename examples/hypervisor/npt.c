/* SPDX-License-Identifier: GPL-2.0-or-later */
#include "npt.h"
#include "memory.h"
#include "print.h"

#define PRESENT  (1ull << 0)
#define WRITABLE (1ull << 1)
#define USER     (1ull << 2) /* each access of a guest counts as a user access to the nested table (APM2 15.25.5) */
#define LARGE    (1ull << 7)
#define ADDRESS  0x000ffffffffff000ull

static unsigned index_at(uint64_t gpa, int level)
{
    return gpa >> (12 + 9 * level) & 511; /* level 3: PML4 ... level 0: page table */
}

static void npt_map(struct guest *guest, uint64_t gpa, int leaf)
{
    uint64_t *table = guest->table;
    for (int level = 3; level > leaf; level--) {
        uint64_t *entry = &table[index_at(gpa, level)];
        if (!(*entry & PRESENT))
            *entry = physical(allocate_page()) | PRESENT | WRITABLE | USER;
        table = (uint64_t *)(*entry & ADDRESS);
    }
    uint64_t spa = guest_to_system(guest, gpa);
    clear((void *)spa, leaf ? LARGE_PAGE : PAGE_SIZE); /* nothing of an earlier owner shows through */
    table[index_at(gpa, leaf)] = spa | PRESENT | WRITABLE | USER | (leaf ? LARGE : 0);
}

void npt_create(struct guest *guest)
{
    guest->table = allocate_page();
    if (guest->kind->mapping == MAP_LARGE)
        npt_map(guest, 0, 1);
    else
        for (uint64_t gpa = 0; gpa < guest->kind->size; gpa += PAGE_SIZE)
            npt_map(guest, gpa, 0);
    guest->vmcb->np_enable = 1;
    guest->vmcb->n_cr3 = physical(guest->table);
}

int npt_fill(struct guest *guest, uint64_t gpa)
{
    if (guest_to_system(guest, gpa) == NO_PAGE)
        return 0;
    /* A TLB never keeps a "not present": adding an entry needs no flush (APM2 5.5.3). */
    npt_map(guest, gpa & ~(PAGE_SIZE - 1), 0);
    return 1;
}

int npt_release(struct guest *guest, uint64_t gpa)
{
    if (guest_to_system(guest, gpa) == NO_PAGE || guest->kind->mapping == MAP_SHADOW)
        return 0;
    uint64_t *table = guest->table;
    for (int level = 3; level > 0; level--) {
        uint64_t entry = table[index_at(gpa, level)];
        if (!(entry & PRESENT) || entry & LARGE)
            return 0;
        table = (uint64_t *)(entry & ADDRESS);
    }
    if (!(table[index_at(gpa, 0)] & PRESENT))
        return 0;
    table[index_at(gpa, 0)] = 0;
    guest->vmcb->tlb_control = TLB_FLUSH_ALL; /* the guest would go on using what its TLB still holds (APM2 15.16.2) */
    return 1;
}

void npt_show(const struct guest *guest, uint64_t gpa)
{
    static const char *const names[] = {"PT", "PD", "PDPT", "PML4"};
    const uint64_t *table = guest->table;
    for (int level = 3; level >= 0; level--) {
        uint64_t entry = table[index_at(gpa, level)];
        print("  %-4s at %x, entry %3u: %016x%s\n", names[level], physical(table), (uint64_t)index_at(gpa, level), entry,
              entry & PRESENT ? "" : "  <- not present");
        if (!(entry & PRESENT) || (level && entry & LARGE))
            return;
        table = (const uint64_t *)(entry & ADDRESS);
    }
}
