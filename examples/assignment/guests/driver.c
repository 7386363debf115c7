/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Guest 1: a driver of the edu device. It is told where the registers are, and knows of no IOMMU: what it gives the device are
   the addresses that its own memory has. */
#include "put.h"

#define REGISTERS 0xc0000000u /* as the hypervisor maps them for it */
#define BUFFER 0x40000u       /* within the device */
#define FROM_MEMORY 1u
#define TO_MEMORY 3u
#define SIZE 4096u

static uint8_t sent[2 * SIZE], received[2 * SIZE]; /* each crosses a page: neighbours here lie apart in the machine */

static volatile uint32_t *const edu = (volatile uint32_t *)REGISTERS;

static void transfer(uint32_t source, uint32_t destination, uint32_t high, uint32_t command)
{
    edu[0x80 / 4] = source, edu[0x84 / 4] = 0;
    edu[0x88 / 4] = destination, edu[0x8c / 4] = high;
    edu[0x90 / 4] = SIZE;
    edu[0x98 / 4] = command;
    while (edu[0x98 / 4] & 1)
        ;
}

void main(void)
{
    if (edu[0] != 0x010000ed) {
        put("driver: there is no edu device\n");
        hypercall(HYPERCALL_DONE, 1, 0);
    }
    uint8_t *from = sent + 100, *to = received + 300;
    for (uint32_t i = 0; i < SIZE; i++)
        from[i] = (uint8_t)(i * 7 + 3);
    transfer((uint32_t)from, BUFFER, 0, FROM_MEMORY);
    transfer(BUFFER, (uint32_t)to, 0, TO_MEMORY);
    for (uint32_t i = 0; i < SIZE; i++) {
        if (to[i] != from[i]) {
            put("driver: the data is not what was sent\n");
            hypercall(HYPERCALL_DONE, 1, 0);
        }
    }
    put("driver: 4096 bytes to the device and back, at addresses of this guest\n");
    transfer(BUFFER, 0x00800000, 0, TO_MEMORY);
    put("driver: has tried to write to the hypervisor\n");
    transfer(BUFFER, 0x40400000, 1, TO_MEMORY);
    put("driver: has tried to write to the neighbour\n");
    hypercall(HYPERCALL_DONE, 0, 0);
}
