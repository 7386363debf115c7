/* SPDX-License-Identifier: GPL-2.0-or-later */
#pragma once
#include <stdint.h>

static inline void outb(uint16_t port, uint8_t value) { __asm__ volatile("outb %0, %1" : : "a"(value), "Nd"(port)); }
static inline uint8_t inb(uint16_t port)
{
    uint8_t value;
    __asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}
static inline void outl(uint16_t port, uint32_t value) { __asm__ volatile("outl %0, %1" : : "a"(value), "Nd"(port)); }
static inline uint32_t inl(uint16_t port)
{
    uint32_t value;
    __asm__ volatile("inl %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}

void serial_start(void);
void print(const char *text);
void print_bytes(const uint8_t *data, int count);
void end(uint32_t status) __attribute__((noreturn));

/* QEMU's edu device, on bus 0: the address of its registers, 0 if there is none. edu_start lets it master the bus. */
uint32_t edu_find(void);
uint32_t edu_start(void);
/* Have it write a word to memory. */
void edu_write(uint32_t registers, uint32_t address, uint32_t word);

/* End SKINIT's protection of its block, wherever this processor has the bit for it. */
void end_protection(void);
