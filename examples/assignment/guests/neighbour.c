/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Guest 2: looks after its memory while its neighbour's device is at work. */
#include "hypercall.h"
#include <stdint.h>

#define FIRST 0x0 /* the very first bytes, which a stray write would hit */
#define WORDS 64
#define WORD  0x4e454947

volatile uint32_t looks; /* how often it has looked */

static void put(const char *text)
{
    uint32_t length = 0;
    while (text[length])
        length++;
    hypercall(HYPERCALL_PRINT, (uint32_t)text, length);
}

void main(uint32_t iterations)
{
    volatile uint32_t *words;
    __asm__("" : "=r"(words) : "0"(FIRST)); /* address 0 is memory like any other here */
    for (uint32_t i = 0; i < WORDS; i++)
        words[i] = WORD + i;
    for (looks = 0; iterations == 0 || looks < iterations; looks++) {
        hypercall(HYPERCALL_YIELD, 0, 0);
        for (uint32_t i = 0; i < WORDS; i++) {
            if (words[i] != WORD + i) {
                put("neighbour: somebody has written to my memory\n");
                hypercall(HYPERCALL_DONE, 1, 0);
            }
        }
    }
    put("neighbour: my memory is as I left it\n");
    hypercall(HYPERCALL_DONE, 0, 0);
}
