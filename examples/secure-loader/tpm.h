/* SPDX-License-Identifier: GPL-2.0-or-later */
/* As much of a TPM 2.0 behind its FIFO interface as a loader needs.  All return 0 if there is none, or it refuses. */
#pragma once
#include <stdint.h>
#define DIGEST 32
int tpm_open(int locality);
void tpm_close(void);
/* Of the SHA-256 bank. */
int tpm_extend(int pcr, const uint8_t *digest);
int tpm_read(int pcr, uint8_t *value);
