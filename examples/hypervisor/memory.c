/* SPDX-License-Identifier: GPL-2.0-or-later */
#include "memory.h"
#include "print.h"

void clear(void *to, uint64_t size)
{
    uint64_t count = size / 8;
    __asm__ volatile("rep stosq" : "+D"(to), "+c"(count) : "a"(0ull) : "memory");
}

void copy(void *to, const void *from, uint64_t size)
{
    __asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(size) : : "memory");
}

/* gcc may call these for structure copies even in freestanding code. */
void *memcpy(void *to, const void *from, uint64_t size)
{
    copy(to, from, size);
    return to;
}

void *memset(void *to, int byte, uint64_t size)
{
    void *start = to;
    __asm__ volatile("rep stosb" : "+D"(to), "+c"(size) : "a"(byte) : "memory");
    return start;
}

void *allocate_page(void)
{
    static uint64_t next = POOL_START;
    if (next == POOL_END)
        fatal("no page left for page tables: raise POOL_END in memory.h");
    void *page = (void *)next;
    next += PAGE_SIZE;
    clear(page, PAGE_SIZE);
    return page;
}
