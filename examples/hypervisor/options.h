/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The multiboot command line: guests=1,2,4 loop=N tick=N. */
#ifndef OPTIONS_H
#define OPTIONS_H

#include <stdint.h>

struct options {
    uint32_t guests; /* bit n: start guest n */
    uint64_t loop;   /* each guest does this many times its usual work; 0: for ever */
    uint32_t tick;   /* APIC timer cycles from one host tick to the next */
    uint64_t memory; /* bytes of RAM from address 0 up, 0 if the loader did not say */
};

/* `information`: the structure a multiboot loader passes in EBX. Read it before memory is handed out: the loader may
   have put it, and the command line, anywhere. */
struct options read_options(uint32_t information, uint32_t all_guests);

#endif
