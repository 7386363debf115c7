/* Translation of a linear address by the tables of a thread, in two dimensions, as far as reading goes: what introspect's
 * paging.py says, whose table of levels this runs.  Nothing is marked as accessed. */
#ifndef VMDBG_WALK_H
#define VMDBG_WALK_H
#include <stdbool.h>
#include <stdint.h>

enum { PAGE = 4096, ENTRY_P = 1, ENTRY_W = 2, ENTRY_U = 4 };
#define ENTRY_ADDRESS 0x000ffffffffff000ull

/* Declared once more in judge.py, by ctypes. */
struct memory { uint8_t *ram; uint64_t ranges[4]; };            /* address of system-physical 0; first, end, first, end */
struct level { uint64_t shift, mask, leaf, leaf_reserved, table_reserved, grants; };
struct form { uint64_t levels, entry_size, width, base; struct level level[5]; };       /* of a paging mode */
struct space {
    uint64_t cr3, ncr3;
    uint64_t needs;                     /* ENTRY_U if the nested tables must set it for data, 0 under GMET */
    struct form guest, nested;          /* without levels: no paging in that dimension */
};

static inline bool in_ram(const struct memory *m, uint64_t spa, uint64_t size)
{
    return (spa >= m->ranges[0] && spa + size <= m->ranges[1]) || (spa >= m->ranges[2] && spa + size <= m->ranges[3]);
}

/* introspect/paging.py, _descend and _nested, for a supervisor that reads and leaves no mark. */
static inline bool descend(const struct memory *m, const struct form *f, uint64_t root, uint64_t address, const struct space *nested,
                    uint64_t *rights, uint64_t *result);

static inline bool nested_to_spa(const struct memory *m, const struct space *v, uint64_t gpa, uint64_t write, uint64_t *spa)
{
    uint64_t rights = 0, needs = v->needs | write;
    if (!v->nested.levels) {
        *spa = gpa;
        return true;
    }
    return !(v->nested.width < 64 && gpa >> v->nested.width) &&
           descend(m, &v->nested, v->ncr3, gpa, NULL, &rights, spa) && (rights & needs) == needs;
}

static inline bool descend(const struct memory *m, const struct form *f, uint64_t root, uint64_t address, const struct space *nested,
                    uint64_t *rights, uint64_t *result)
{
    uint64_t table = root & f->base;
    *rights = ENTRY_W | ENTRY_U;
    for (uint64_t n = 0; n < f->levels; n++) {
        const struct level *l = &f->level[n];
        uint64_t spa = table + (address >> l->shift & l->mask) * f->entry_size, entry = ~(uint64_t)0, offset;
        if (nested && !nested_to_spa(m, nested, spa, ENTRY_W, &spa))
            return false;
        if (f->entry_size == 4)
            entry = in_ram(m, spa, 4) ? *(uint32_t *)(m->ram + spa) : 0xffffffff;
        else if (in_ram(m, spa, 8))
            entry = *(uint64_t *)(m->ram + spa);
        *rights &= entry | l->grants;
        if (!(entry & ENTRY_P) || entry & (entry & l->leaf ? l->leaf_reserved : l->table_reserved))
            return false;
        if (entry & l->leaf) {
            offset = ((uint64_t)1 << l->shift) - 1;
            *result = (entry & ENTRY_ADDRESS & ~offset) | (address & offset);
            if (l->shift == 22)
                *result |= (entry >> 13 & 0xff) << 32;
            return true;
        }
        table = entry & ENTRY_ADDRESS;
    }
    return false;
}

static inline bool guest_physical(const struct memory *m, const struct space *v, uint64_t address, uint64_t *gpa)
{
    uint64_t rights;
    if (!v->guest.levels) {
        *gpa = (uint32_t)address;
        return true;
    }
    if (v->guest.width == 32)
        address = (uint32_t)address;
    else if (address >> (v->guest.width - 1) && address >> (v->guest.width - 1) != ((uint64_t)1 << (65 - v->guest.width)) - 1)
        return false;
    return descend(m, &v->guest, v->cr3, address, v->nested.levels ? v : NULL, &rights, gpa);
}

#endif
