/* SPDX-License-Identifier: GPL-2.0-or-later */
#ifndef PUT_H
#define PUT_H

#include "hypercall.h"
#include <stdint.h>

static inline void put(const char *text)
{
    uint32_t length = 0;
    while (text[length])
        length++;
    hypercall(HYPERCALL_PRINT, (uint32_t)text, length);
}

#endif
