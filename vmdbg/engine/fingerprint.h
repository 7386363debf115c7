/* SPDX-License-Identifier: GPL-2.0-or-later */
/* What a run is told apart by, as far as C sees it: vmdbg/engine/fingerprint.py has the same arithmetic, and says why. */
#ifndef VMDBG_FINGERPRINT_H
#define VMDBG_FINGERPRINT_H
#include <stddef.h>
#include <stdint.h>

struct fingerprint {               /* of a machine */
    uint64_t code;                 /* a sum over all bytes of code that were executed */
    uint64_t switches;             /* a chain over all world switches */
};

enum { FP_VMRUN = 1, FP_VMEXIT };
#define FP_FIRST 0x9e3779b97f4a7c15ull
#define FP_SECOND 0xd6e8feb86659fd93ull

static inline uint64_t fp_mix(uint64_t x)
{
    x *= FP_FIRST;
    x ^= x >> 32;
    x *= FP_SECOND;
    return x ^ x >> 32;
}

static inline uint64_t fp_chain(uint64_t state, const uint64_t *words, size_t count)
{
    for (size_t i = 0; i < count; i++) {
        state = (state ^ words[i]) * FP_FIRST;
        state ^= state >> 32;
    }
    return state;
}

#endif
