/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * A driver of the "edu" device (1234:11e8): transfers between memory and its buffer of 4 KiB. It takes the addresses that its
 * own world calls physical, and knows nothing of who translates them: it runs on the bare machine (examples/bench) as in a guest.
 */
#ifndef EDU_H
#define EDU_H

#include <stdint.h>

#define EDU_IDENTITY 0x11e81234
#define EDU_SIZE     4096
#define EDU_REACH    0x10000000ull /* its addresses have 28 bits */

struct edu {
    uint32_t device;
    volatile uint8_t *registers;
};

/* Find the device, turn its decoding and bus mastering on. 0: there is none. */
int edu_start(struct edu *edu);
void edu_from_memory(const struct edu *edu, uint64_t from, uint32_t at, uint32_t length);
void edu_to_memory(const struct edu *edu, uint64_t to, uint32_t at, uint32_t length);
/* Start a transfer, and do not wait; with `interrupt` the device raises its interrupt at the end. */
void edu_begin(const struct edu *edu, uint64_t memory, uint32_t at, uint32_t length, int to_memory, int interrupt);
int edu_busy(const struct edu *edu);
void edu_acknowledge(const struct edu *edu);
/* Have it interrupt by this message (MSI) at the end of such transfers. 0: it cannot. */
int edu_interrupts(const struct edu *edu, uint32_t address, uint32_t data);

#endif
