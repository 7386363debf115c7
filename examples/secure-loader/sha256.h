/* SPDX-License-Identifier: GPL-2.0-or-later */
#pragma once
#include <stdint.h>
#define DIGEST 32
void sha256(const uint8_t *data, uint32_t size, uint8_t *digest);
