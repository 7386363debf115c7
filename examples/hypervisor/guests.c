/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The guests of the demonstration. To add one: a Makefile line, an entry in blobs.S, an entry here. */
#include "guest.h"

#define BLOB(name) extern const uint8_t name[], name##_end[]
BLOB(guest64_image);
BLOB(guestpae_image);
BLOB(guestreal_image);
BLOB(gueststray_image);

#define KIB 1024ull
#define IMAGE(name) .image = name##_image, .image_end = name##_image_end

const struct guest_kind guest_kinds[MAX_GUESTS] = {
    {
        .name = "64-bit", IMAGE(guest64), .load = 0x100000, .size = 2048 * KIB, .iterations = 256,
        .start = START_PROTECTED, .mapping = MAP_REVERSED, .must_finish = 1,
    },
    {
        .name = "32-bit PAE", IMAGE(guestpae), .load = 0x100000, .size = 4096 * KIB, .iterations = 640,
        .start = START_PROTECTED, .mapping = MAP_LARGE, .must_finish = 1,
    },
    {
        .name = "paged real mode", IMAGE(guestreal), .load = 0x1000, .size = 1024 * KIB, .iterations = 256,
        .start = START_REAL, .mapping = MAP_SHADOW, .must_finish = 1,
    },
    {
        .name = "stray", IMAGE(gueststray), .load = 0x1000, .size = 256 * KIB, .iterations = 1,
        .start = START_PROTECTED, .mapping = MAP_SMALL, .must_finish = 0,
    },
};

struct guest guests[MAX_GUESTS + 1];
