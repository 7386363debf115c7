/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Page tables of four levels: nested ones (APM2 15.25), and the leaf's own. */
#ifndef TABLES_H
#define TABLES_H

#include <stdint.h>

#define PRESENT    (1ull << 0)
#define WRITABLE   (1ull << 1)
#define USER       (1ull << 2) /* each access of a guest counts as a user access to the nested table (APM2 15.25.5) */
#define ACCESSED   (1ull << 5)
#define DIRTY      (1ull << 6)
#define LARGE      (1ull << 7)
#define NO_EXECUTE (1ull << 63)
#define ADDRESS    0x000ffffffffff000ull

/* EXITINFO1 of a nested page fault (APM2 15.25.6); the accesses are asked for with the same bits. */
#define NPF_PRESENT  (1ull << 0)
#define NPF_WRITE    (1ull << 1)
#define NPF_RESERVED (1ull << 3)
#define NPF_FETCH    (1ull << 4)

/* A table and the pages it may use; the first page is the root. */
struct tables {
    uint64_t (*pages)[512];
    unsigned count, used;
    int flush; /* the processor may remember translations that are no longer there */
};

/* Which entry of a table a translation uses. `step` 3: PML4 ... 0: page table. */
static inline unsigned index_at(uint64_t address, int step)
{
    return address >> (12 + 9 * step) & 511;
}

/* An empty table of at most `count` pages. */
void tables_create(struct tables *tables, unsigned count);
void tables_clear(struct tables *tables);
/* Enter a page: 4 KiB at step 0, 2 MiB at step 1. Where the pages do not suffice, all else is forgotten first. */
void tables_map(struct tables *tables, uint64_t address, uint64_t entry, int step);

extern unsigned physical_bits; /* of the processor's addresses; those above are reserved in every entry */

struct found {
    uint64_t address;
    uint64_t rights; /* WRITABLE (only once DIRTY is set), NO_EXECUTE, of all levels together */
    int ok;
    uint64_t fault;  /* if not ok: NPF_PRESENT, NPF_RESERVED */
};

/* Translate as the processor's nested walk does, accessed and dirty bits included. `memory` says where an address that
   the table names lies, 0 for nowhere. `access`: NPF_WRITE, NPF_FETCH. */
struct found walk(uint64_t root, uint64_t address, uint64_t access, void *(*memory)(uint64_t address));

#endif
