/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The guests: one with a driver for the device, one whose memory the device shall not touch. */
#include "guest.h"

#define BLOB(name) extern const uint8_t name[], name##_end[]
BLOB(driver_image);
BLOB(neighbour_image);

#define KIB 1024ull
#define IMAGE(name) .image = name##_image, .image_end = name##_image_end

const struct guest_kind guest_kinds[MAX_GUESTS] = {
    {
        .name = "driver", IMAGE(driver), .load = 0x1000, .size = 1024 * KIB, .iterations = 4,
        .start = START_PROTECTED, .mapping = MAP_REVERSED, .must_finish = 1,
    },
    {
        .name = "neighbour", IMAGE(neighbour), .load = 0x1000, .size = 1024 * KIB, .iterations = 120,
        .start = START_PROTECTED, .mapping = MAP_SMALL, .must_finish = 1,
    },
};

struct guest guests[MAX_GUESTS + 1];
