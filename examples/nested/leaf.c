/* SPDX-License-Identifier: GPL-2.0-or-later */
#include "apic.h"
#include "cpu.h"
#include "level.h"
#include "tables.h"
#include "timer.h"

#define WINDOW 0x700000000000ull /* a linear address of the leaf's own for OUTSIDE */

static uint64_t primes_below(uint64_t limit)
{
    uint64_t count = 0;
    for (uint64_t n = 2; n < limit; n++) {
        uint64_t divisor = 2;
        while (divisor * divisor <= n && n % divisor)
            divisor++;
        count += divisor * divisor > n;
    }
    return count;
}

/* A page table of its own, beside the one from boot.S. */
static volatile uint64_t *open_window(void)
{
    struct tables tables;
    uint64_t cr3;
    tables_create(&tables, 4);
    tables_map(&tables, WINDOW, OUTSIDE | PRESENT | WRITABLE, 0);
    __asm__ volatile("mov %%cr3, %0" : "=r"(cr3));
    ((uint64_t *)cr3)[index_at(WINDOW, 3)] = tables.pages[0][index_at(WINDOW, 3)];
    return (volatile uint64_t *)WINDOW;
}

_Noreturn void leaf(void)
{
    say("leaf, with %u MiB\n", GUEST_START >> 20);
    uint64_t primes = primes_below(PRIMES_BELOW);

    volatile uint64_t *outside = open_window();
    if (*outside) /* nobody's memory: the level above has to find it, here and when it is written */
        fatal("the page from outside is not empty");
    *outside = primes;
    say("%u primes below %u, written to %x\n", *outside, (uint64_t)PRIMES_BELOW, OUTSIDE);

    __asm__ volatile("sti");
    timer_start();
    while (!timer_expired)
        ;
    say("a tick\n");
    timer_start();
    while (!timer_expired)
        timer_wait();
    say("a tick that ended HLT\n");
    hypercall(HYPERCALL_DONE, primes, rdtsc());
    fatal("DONE came back");
}
