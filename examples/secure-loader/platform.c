/* SPDX-License-Identifier: GPL-2.0-or-later */
#include "platform.h"

#define COM1 0x3f8
#define DEBUG_EXIT 0xf4
#define EDU 0x11e81234
#define EDU_BUFFER 0x40000
#define NORTHBRIDGE 0x18
#define MMCONFIG 0xe0000000

void serial_start(void)
{
    outb(COM1 + 1, 0);
    outb(COM1 + 3, 0x80);
    outb(COM1 + 0, 1);
    outb(COM1 + 1, 0);
    outb(COM1 + 3, 3);
    outb(COM1 + 2, 0xc7);
}

static void put(char c)
{
    for (int i = 0; i < 100000 && !(inb(COM1 + 5) & 0x20); i++)
        ;
    outb(COM1, (uint8_t)c);
}

void print(const char *text)
{
    for (; *text; text++) {
        if (*text == '\n')
            put('\r');
        put(*text);
    }
}

void print_bytes(const uint8_t *data, int count)
{
    for (int i = 0; i < count; i++) {
        put("0123456789abcdef"[data[i] >> 4]);
        put("0123456789abcdef"[data[i] & 15]);
    }
}

void end(uint32_t status)
{
    outl(DEBUG_EXIT, status);
    for (;;)
        __asm__ volatile("cli; hlt");
}

static uint32_t config_read(int device, int function, int offset)
{
    outl(0xcf8, 0x80000000u | device << 11 | function << 8 | offset);
    return inl(0xcfc);
}

static void config_write(int device, int function, int offset, uint32_t value)
{
    outl(0xcf8, 0x80000000u | device << 11 | function << 8 | offset);
    outl(0xcfc, value);
}

static int edu_slot(void)
{
    for (int device = 0; device < 32; device++)
        if (config_read(device, 0, 0) == EDU)
            return device;
    return -1;
}

uint32_t edu_find(void)
{
    int device = edu_slot();
    return device < 0 ? 0 : config_read(device, 0, 0x10) & ~0xfu;
}

uint32_t edu_start(void)
{
    int device = edu_slot();
    if (device >= 0)
        config_write(device, 0, 4, 6); /* memory, bus master */
    return edu_find();
}

void edu_write(uint32_t registers, uint32_t address, uint32_t word)
{
    volatile uint32_t *edu = (volatile uint32_t *)registers;
    edu[EDU_BUFFER / 4] = word;
    edu[0x80 / 4] = EDU_BUFFER;
    edu[0x88 / 4] = address;
    edu[0x90 / 4] = 4;
    edu[0x98 / 4] = 3; /* start, from the device to memory */
    for (int i = 0; i < 1000000 && edu[0x98 / 4] & 1; i++)
        ;
}

void end_protection(void)
{
    /* A device exclusion vector: SL_DEV_EN, bit 5 of DEV_CR, by a capability of type 0 in function 3. */
    int at = config_read(NORTHBRIDGE, 3, 0) == 0xffffffff ? 0 : config_read(NORTHBRIDGE, 3, 0x34) & 0xfc;
    for (int i = 0; at && i < 48; i++) {
        uint32_t header = config_read(NORTHBRIDGE, 3, at);
        if ((header & 0x700ff) == 0x0f) {
            config_write(NORTHBRIDGE, 3, at + 4, 4 << 8);
            config_write(NORTHBRIDGE, 3, at + 8, config_read(NORTHBRIDGE, 3, at + 8) & ~0x20u);
            return;
        }
        at = header >> 8 & 0xfc;
    }
    /* Families without one: bit 0 at offset 384 of function 0, which MMCONFIG alone reaches. */
    volatile uint32_t *protect = (volatile uint32_t *)(MMCONFIG + (NORTHBRIDGE << 15) + 0x384);
    *protect &= ~1u;
}
