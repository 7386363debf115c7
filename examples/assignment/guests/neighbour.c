/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Guest 2: fills its memory, lets the others run, and looks whether anything has changed. */
#include "put.h"

#define FIRST 0x10000u
#define END 0x80000u

static uint32_t *const memory = (uint32_t *)0;

void main(void)
{
    for (uint32_t i = FIRST / 4; i < END / 4; i++)
        memory[i] = i * 2654435761u;
    for (int turn = 0; turn < 64; turn++)
        hypercall(HYPERCALL_YIELD, 0, 0);
    for (uint32_t i = FIRST / 4; i < END / 4; i++) {
        if (memory[i] != i * 2654435761u) {
            put("neighbour: somebody has written to this memory\n");
            hypercall(HYPERCALL_DONE, 1, 0);
        }
    }
    put("neighbour: all memory is as it was\n");
    hypercall(HYPERCALL_DONE, 0, 0);
}
