/* SPDX-License-Identifier: GPL-2.0-or-later */
#include "tables.h"
#include "cpu.h"
#include "memory.h"

unsigned physical_bits;

void tables_create(struct tables *tables, unsigned count)
{
    tables->pages = allocate_page();
    for (unsigned n = 1; n < count; n++)
        allocate_page(); /* they lie behind each other */
    tables->count = count;
    tables_clear(tables);
}

void tables_clear(struct tables *tables)
{
    clear(tables->pages[0], PAGE_SIZE);
    tables->used = 1;
    tables->flush = 1;
}

void tables_map(struct tables *tables, uint64_t address, uint64_t entry, int step)
{
    if (tables->used + 3 > tables->count)
        tables_clear(tables);
    uint64_t *table = tables->pages[0];
    for (int at = 3; at > step; at--) {
        uint64_t *next = &table[index_at(address, at)];
        if (!(*next & PRESENT)) {
            clear(tables->pages[tables->used], PAGE_SIZE);
            *next = physical(tables->pages[tables->used++]) | PRESENT | WRITABLE | USER;
        }
        table = (uint64_t *)(*next & ADDRESS);
    }
    table[index_at(address, step)] = entry;
}

struct found walk(uint64_t root, uint64_t address, uint64_t access, void *(*memory)(uint64_t address))
{
    uint64_t reserved = ADDRESS & ~((1ull << physical_bits) - 1), allowed = WRITABLE | USER, no_execute = 0;
    uint64_t table = root & ADDRESS;
    for (int step = 3;; step--) {
        uint64_t *entry = memory(table + 8 * index_at(address, step));
        if (!entry) /* where there is no memory all bits are read as ones */
            return (struct found){.fault = NPF_PRESENT | NPF_RESERVED};
        if (!(*entry & PRESENT))
            return (struct found){.fault = 0};
        int last = !step || *entry & LARGE;
        uint64_t size = 1ull << (12 + 9 * step);
        if (*entry & reserved || (step == 3 && *entry & LARGE) || (step && last && *entry & ADDRESS & (size - 1) & ~PAGE_SIZE))
            return (struct found){.fault = NPF_PRESENT | NPF_RESERVED};
        allowed &= *entry;
        no_execute |= *entry & NO_EXECUTE;
        if (!last) {
            *entry |= ACCESSED;
            table = *entry & ADDRESS;
            continue;
        }
        if (!(allowed & USER) || (access & NPF_WRITE && !(allowed & WRITABLE)) || (access & NPF_FETCH && no_execute))
            return (struct found){.fault = NPF_PRESENT};
        *entry |= ACCESSED | (access & NPF_WRITE ? DIRTY : 0);
        if (!(*entry & DIRTY))
            allowed &= ~WRITABLE;
        return (struct found){
            .ok = 1,
            .address = (*entry & ADDRESS & ~(size - 1)) | (address & (size - 1)),
            .rights = (allowed & WRITABLE) | no_execute,
        };
    }
}
