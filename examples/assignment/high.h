/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Guests live above 4 GiB here, where a device with 28 address bits never gets by itself. */
#ifndef HIGH_H
#define HIGH_H

#include "memory.h"

#undef GUEST_START
#define GUEST_START 0x140000000ull

#endif
