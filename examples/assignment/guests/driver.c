/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Guest 1: 32-bit protected mode without paging, and a driver that takes gpa for the addresses of memory, as anyone would. */
#include "edu.h"
#include "hypercall.h"

#define FROM    0x20ff0 /* across pages that are no neighbours in memory */
#define TO      0x30ff8
#define LENGTH  1024
#define ERRANT  0x01400000 /* beyond this guest's memory; by chance, where the neighbour's is in the machine */

volatile uint32_t rounds; /* transfers forth and back so far */

static void put(const char *text)
{
    uint32_t length = 0;
    while (text[length])
        length++;
    hypercall(HYPERCALL_PRINT, (uint32_t)text, length);
}

/* Through the device's buffer and back. */
static int transfer(const struct edu *edu, uint32_t round)
{
    volatile uint8_t *from = (volatile uint8_t *)FROM, *to = (volatile uint8_t *)TO;
    for (uint32_t i = 0; i < LENGTH; i++) {
        from[i] = (uint8_t)(round * 29 + i);
        to[i] = 0;
    }
    edu_from_memory(edu, FROM, 0, LENGTH);
    edu_to_memory(edu, TO, 0, LENGTH);
    for (uint32_t i = 0; i < LENGTH; i++)
        if (to[i] != (uint8_t)(round * 29 + i))
            return 0;
    return 1;
}

/* A driver's bug: an address that was never this guest's. */
void stray(const struct edu *edu)
{
    edu_to_memory(edu, ERRANT, 0, 16);
}

void main(uint32_t iterations)
{
    struct edu edu;
    uint32_t lost = 0;
    if (!edu_start(&edu)) {
        put("driver guest: there is no edu device\n");
        hypercall(HYPERCALL_DONE, 1, 0);
    }
    put("driver guest: an edu device\n");
    for (rounds = 0; iterations == 0 || rounds < iterations; rounds++) {
        lost += !transfer(&edu, rounds);
        hypercall(HYPERCALL_YIELD, 0, 0);
    }
    put(lost ? "driver guest: what came back is not what was sent\n" : "driver guest: all came back as it was sent\n");
    stray(&edu);
    put("driver guest: a stray transfer\n");
    hypercall(HYPERCALL_YIELD, 0, 0);
    lost += !transfer(&edu, rounds);
    hypercall(HYPERCALL_DONE, lost != 0, 0);
}
