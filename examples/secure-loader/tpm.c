/* SPDX-License-Identifier: GPL-2.0-or-later */
#include "tpm.h"

#define BASE 0xfed40000u
#define ACCESS 0x00
#define STS 0x18
#define FIFO 0x24
#define ACTIVE 0x20
#define REQUEST 0x02
#define READY 0x40
#define GO 0x20
#define AVAILABLE 0x10
#define SHA256 0x0b
#define PATIENCE 1000000

static uint32_t registers;

static volatile uint8_t *at(int offset)
{
    return (volatile uint8_t *)(registers + offset);
}

int tpm_open(int locality)
{
    registers = BASE + 0x1000 * locality;
    if (*at(ACCESS) == 0xff)
        return 0;
    *at(ACCESS) = REQUEST;
    for (int i = 0; i < PATIENCE; i++)
        if (*at(ACCESS) & ACTIVE)
            return 1;
    return 0;
}

void tpm_close(void)
{
    *at(ACCESS) = ACTIVE;
}

/* Send a command, read the response into the same buffer; 1 if it was a success. */
static int ask(uint8_t *buffer, int size, int most)
{
    buffer[5] = (uint8_t)size;
    *at(STS) = READY;
    for (int i = 0; i < PATIENCE && !(*at(STS) & READY); i++)
        ;
    for (int i = 0; i < size; i++)
        *at(FIFO) = buffer[i];
    *at(STS) = GO;
    for (int i = 0; i < PATIENCE && !(*at(STS) & AVAILABLE); i++)
        ;
    int got = 0;
    while (got < most && *at(STS) & AVAILABLE)
        buffer[got++] = *at(FIFO);
    *at(STS) = READY;
    return got >= 10 && !buffer[6] && !buffer[7] && !buffer[8] && !buffer[9];
}

int tpm_extend(int pcr, const uint8_t *digest)
{
    uint8_t buffer[128] = {
        0x80, 0x02, 0, 0, 0, 0, 0, 0, 0x01, 0x82,       /* with a session; TPM2_PCR_Extend */
        0, 0, 0, (uint8_t)pcr,
        0, 0, 0, 9, 0x40, 0, 0, 9, 0, 0, 0, 0, 0,       /* an empty password */
        0, 0, 0, 1, 0, SHA256,                          /* one digest */
    };
    for (int i = 0; i < DIGEST; i++)
        buffer[33 + i] = digest[i];
    return ask(buffer, 33 + DIGEST, sizeof buffer);
}

int tpm_read(int pcr, uint8_t *value)
{
    uint8_t buffer[128] = {
        0x80, 0x01, 0, 0, 0, 0, 0, 0, 0x01, 0x7e,       /* TPM2_PCR_Read */
        0, 0, 0, 1, 0, SHA256, 3, 0, 0, 0,              /* one selection */
    };
    buffer[17 + pcr / 8] = (uint8_t)(1 << pcr % 8);
    if (!ask(buffer, 20, sizeof buffer))
        return 0;
    for (int i = 0; i < DIGEST; i++)
        value[i] = buffer[30 + i];
    return 1;
}
