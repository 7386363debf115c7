/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Guest 4: looks for memory the careless way, by writing until it hurts. */
#include "../hypercall.h"
#include <stdint.h>

#define PAGE_SIZE 4096

volatile uint32_t *probe; /* the address it writes to next */

static void put(const char *text)
{
    uint32_t length = 0;
    while (text[length])
        length++;
    hypercall(HYPERCALL_PRINT, (uint32_t)text, length);
}

void main(void)
{
    put("stray guest: how much memory is there?\n");
    for (probe = (volatile uint32_t *)0x10000;; probe += PAGE_SIZE / sizeof *probe)
        *probe = 0x57524159;
}
