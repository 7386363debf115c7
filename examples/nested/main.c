/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Matryoshka: a hypervisor that runs a copy of itself as its guest, which does the same, down to a leaf.
 * Command line: depth=N, how many levels there are below this machine (3); vgif, vls: use these features.
 */
#include "arguments.h"
#include "guest.h"
#include "level.h"
#include "traps.h"

extern uint8_t _start[], image_end[]; /* boot.S, link.ld */

uint64_t level, depth;
int with_vgif, with_vls;

_Noreturn void main(uint32_t information)
{
    uint64_t my_level = number_argument(information, "level=", 0), my_depth = number_argument(information, "depth=", 3);
    if (!my_depth || my_depth > MAX_DEPTH || my_level > my_depth)
        fatal("depth= must be 1 to 4");
    uint64_t size = (my_depth - my_level + 1) * GUEST_START;
    if (memory_size(information) < size)
        fatal("too little memory: 16 MiB are needed for each level and the leaf (README.md)");
    if (my_level < my_depth) /* the image as it was loaded: nothing in it has changed until here */
        copy((void *)(GUEST_START + (uint64_t)_start), _start, (uint64_t)(image_end - _start));
    level = my_level;
    depth = my_depth;
    with_vgif = has_argument(information, "vgif");
    with_vls = has_argument(information, "vls");

    serial_start();
    traps_start();
    if (level == depth)
        leaf();
    say("hypervisor of level %u, with %u MiB\n", level + 1, size >> 20);
    guest_start((uint64_t)_start);
    guest_run();
}
