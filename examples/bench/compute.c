/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * How fast is plain 64-bit code? n= rounds (1000000) of one kernel of kernels.S:
 *   kernel=mix   (the default) 64 instructions in four blocks: arithmetic, loads, branches taken and not taken
 *   kernel=store 17 instructions in one block, five of them stores, to pages that are executable (no NX)
 *   kernel=tight 3 instructions in one block
 * No guest, no exits. Someone who measures takes the time between the lines "start" and "done".
 */
#include "arguments.h"
#include "print.h"

/* kernels.S: run `rounds` >= 1 rounds over 64 KiB of `memory`, return a checksum. */
uint64_t kernel_mix(uint64_t rounds, void *memory);
uint64_t kernel_store(uint64_t rounds, void *memory);
uint64_t kernel_tight(uint64_t rounds, void *memory);

static uint64_t memory[65536 / 8] __attribute__((aligned(4096)));

static const struct kernel {
    const char *argument, *name;
    uint64_t (*run)(uint64_t rounds, void *memory);
    uint64_t instructions; /* a round */
} kernels[] = {
    {"kernel=mix", "mix", kernel_mix, 64},
    {"kernel=store", "store", kernel_store, 17},
    {"kernel=tight", "tight", kernel_tight, 3},
};

_Noreturn void main(uint32_t information)
{
    serial_start();
    const struct kernel *kernel = kernels;
    for (unsigned i = 0; i < sizeof kernels / sizeof *kernels; i++)
        if (has_argument(information, kernels[i].argument))
            kernel = &kernels[i];
    uint64_t n = number_argument(information, "n=", 1000000);
    if (!n)
        fatal("n= must be at least 1");
    for (uint64_t i = 0; i < sizeof memory / sizeof *memory; i++)
        memory[i] = i * 0x9e3779b97f4a7c15;
    print("compute: start: %s, %u rounds of %u instructions\n", kernel->name, n, kernel->instructions);
    uint64_t checksum = kernel->run(n, memory);
    print("compute: done: checksum %016x\n", checksum);
    end(0);
}
