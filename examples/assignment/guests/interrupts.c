/* SPDX-License-Identifier: GPL-2.0-or-later */
#include "interrupts.h"

struct gate { uint16_t offset_low, selector, type, offset_high; };
struct pointer { uint16_t limit; uint32_t base; } __attribute__((packed));

static const uint64_t gdt[] = {0, 0x00cf9b000000ffff, 0x00cf93000000ffff}; /* flat: code at 8, data at 10 */
static struct gate idt[256];
void handler(void);

void interrupts_start(uint8_t vector)
{
    uint32_t entry = (uint32_t)handler;
    idt[vector] = (struct gate){(uint16_t)entry, 8, 0x8e00, (uint16_t)(entry >> 16)};
    struct pointer tables[] = {{sizeof gdt - 1, (uint32_t)gdt}, {sizeof idt - 1, (uint32_t)idt}};
    __asm__ volatile("lgdt %0\n\t"
                     "ljmp $8, $1f\n"
                     "1: movl $0x10, %%eax\n\t"
                     "movl %%eax, %%ds\n\tmovl %%eax, %%es\n\tmovl %%eax, %%ss\n\t"
                     "lidt %1"
                     : : "m"(tables[0]), "m"(tables[1]) : "eax", "memory");
}

void interrupts_wait(void)
{
    __asm__ volatile("sti; hlt; cli" : : : "memory"); /* STI takes effect behind HLT: nothing is missed in between */
}
