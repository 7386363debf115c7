/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Guest 1: 32-bit protected mode without paging, and a driver that takes gpa for the addresses of memory, and vectors of its own
 * processor for those of its device's messages, as anyone would.
 */
#include "edu.h"
#include "hypercall.h"
#include "interrupts.h"

#define FROM    0x20ff0 /* across pages that are no neighbours in memory */
#define TO      0x30ff8
#define LENGTH  1024
#define ERRANT  0x01400000 /* beyond this guest's memory; by chance, where the neighbour's is in the machine */

#define MESSAGE 0xfee00000 /* to processor 0 (APM2 16.11.1) */
#define VECTOR  0x51

static struct edu edu;
volatile uint32_t rounds; /* transfers forth and back so far */
volatile uint32_t interrupts, transfers;

static void put(const char *text)
{
    uint32_t length = 0;
    while (text[length])
        length++;
    hypercall(HYPERCALL_PRINT, (uint32_t)text, length);
}

void on_interrupt(void)
{
    edu_acknowledge(&edu);
    interrupts++;
}

/* Its end is an interrupt; whoever else wants the processor has it until then. */
static void move(uint64_t memory, uint32_t length, int to_memory)
{
    transfers++;
    edu_begin(&edu, memory, 0, length, to_memory, 1);
    while (interrupts != transfers)
        interrupts_wait();
}

/* Through the device's buffer and back. */
static int transfer(uint32_t round)
{
    volatile uint8_t *from = (volatile uint8_t *)FROM, *to = (volatile uint8_t *)TO;
    for (uint32_t i = 0; i < LENGTH; i++) {
        from[i] = (uint8_t)(round * 29 + i);
        to[i] = 0;
    }
    move(FROM, LENGTH, 0);
    move(TO, LENGTH, 1);
    for (uint32_t i = 0; i < LENGTH; i++)
        if (to[i] != (uint8_t)(round * 29 + i))
            return 0;
    return 1;
}

/* A driver's bug: an address that was never this guest's. */
void stray(void)
{
    move(ERRANT, 16, 1);
}

void main(uint32_t iterations)
{
    uint32_t lost = 0;
    interrupts_start(VECTOR);
    if (!edu_start(&edu) || !edu_interrupts(&edu, MESSAGE, VECTOR)) {
        put("driver guest: there is no edu device that sends messages\n");
        hypercall(HYPERCALL_DONE, 1, 0);
    }
    put("driver guest: an edu device\n");
    for (rounds = 0; iterations == 0 || rounds < iterations; rounds++) {
        lost += !transfer(rounds);
        hypercall(HYPERCALL_YIELD, 0, 0);
    }
    put(lost ? "driver guest: what came back is not what was sent\n" : "driver guest: all came back as it was sent\n");
    stray();
    put("driver guest: a stray transfer\n");
    hypercall(HYPERCALL_YIELD, 0, 0);
    lost += !transfer(rounds);
    put("driver guest: each transfer has ended with an interrupt\n");
    hypercall(HYPERCALL_DONE, lost != 0, 0);
}
