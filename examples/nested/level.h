/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Which of the dolls this copy of the program is, and what it may ask of the one around it. */
#ifndef LEVEL_H
#define LEVEL_H

#include "memory.h"
#include "print.h"
#include <stdint.h>

#define MAX_DEPTH 4

extern uint64_t level; /* 0 runs on the machine, each other one in the level above it */
extern uint64_t depth; /* the level of the leaf, which runs nobody */
extern int with_vgif, with_vls; /* features to use and to offer: virtual GIF, virtual VMLOAD and VMSAVE */

/* Each level has GUEST_START bytes for itself; what is behind them is its guest's memory. */
static inline uint64_t guest_memory_size(void)
{
    return (depth - level) * GUEST_START;
}

/* Behind everyone's memory: the level above the leaf puts a page there when the leaf touches it. */
#define OUTSIDE 0x40000000ull

#define say(...) (print("level %u: ", level), print(__VA_ARGS__))

/* VMMCALL: number in RAX, arguments in RBX and RCX. */
#define HYPERCALL_TICK 1 /* RBX: vector, 32 to 255, of one interrupt to come after a while. No EOI is wanted */
#define HYPERCALL_DONE 2 /* RBX: the leaf's result, RCX: the caller's time stamp counter; does not return */

static inline void hypercall(uint64_t number, uint64_t first, uint64_t second)
{
    __asm__ volatile("vmmcall" : "+a"(number) : "b"(first), "c"(second) : "memory");
}

static inline uint64_t rdtsc(void)
{
    uint32_t low, high;
    __asm__ volatile("rdtsc" : "=a"(low), "=d"(high));
    return (uint64_t)high << 32 | low;
}

/* leaf.c: the innermost guest's whole life. */
_Noreturn void leaf(void);
#define PRIMES_BELOW 10000u
#define PRIMES 1229u

#endif
