/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Physical memory: the fixed map of README.md, and a page allocator that never frees. */
#ifndef MEMORY_H
#define MEMORY_H

#include <stdint.h>

#define PAGE_SIZE   0x1000ull
#define LARGE_PAGE  0x200000ull
#define POOL_START  0x00800000ull /* VMCBs and page tables */
#define POOL_END    0x01000000ull
#define GUEST_START 0x01000000ull /* guest n's memory: GUEST_START + (n - 1) * GUEST_STRIDE */
#define GUEST_STRIDE 0x00400000ull

/* The hypervisor runs with virtual = physical below 4 GiB (boot.S), so a page's address serves as both. */
void *allocate_page(void);
void *memset(void *to, int byte, uint64_t size);
void clear(void *to, uint64_t size);
void copy(void *to, const void *from, uint64_t size);

static inline uint64_t physical(const void *address)
{
    return (uint64_t)address;
}

#endif
