/* SPDX-License-Identifier: GPL-2.0-or-later */
#include "apic.h"
#include "cpu.h"

#define APIC_BASE_X2APIC   (1ull << 10)
#define APIC_BASE_ENABLE   (1ull << 11)

/* Offsets from the base: the registers lie in memory (xAPIC mode). */
#define APIC_TPR           0x080
#define APIC_EOI           0x0b0
#define APIC_SPURIOUS      0x0f0
#define APIC_TIMER_LVT     0x320
#define APIC_TIMER_INITIAL 0x380
#define APIC_TIMER_DIVIDE  0x3e0

volatile uint64_t host_ticks;
static uint64_t apic_base;

static void apic_write(unsigned offset, uint32_t value)
{
    *(volatile uint32_t *)(apic_base + offset) = value;
}

void apic_start(uint32_t count)
{
    /* At reset the 8259s deliver on vectors 08-0F and 70-77, among the exceptions: move them to 20-2F, then mask all. */
    outb(0x20, 0x11);
    outb(0xa0, 0x11);
    outb(0x21, 0x20);
    outb(0xa1, 0x28);
    outb(0x21, 0x04);
    outb(0xa1, 0x02);
    outb(0x21, 0x01);
    outb(0xa1, 0x01);
    outb(0x21, 0xff);
    outb(0xa1, 0xff);

    uint64_t base = rdmsr(MSR_APIC_BASE);
    if (base & APIC_BASE_X2APIC) { /* chosen by the firmware; the way back to xAPIC leads through "off" */
        base &= ~(APIC_BASE_X2APIC | APIC_BASE_ENABLE);
        wrmsr(MSR_APIC_BASE, base);
    }
    wrmsr(MSR_APIC_BASE, base | APIC_BASE_ENABLE);
    apic_base = base & 0x000ffffffffff000;
    apic_write(APIC_TPR, 0);
    apic_write(APIC_SPURIOUS, 0x100 | SPURIOUS_VECTOR);
    apic_write(APIC_TIMER_DIVIDE, 0xb);                  /* divide by 1 */
    apic_write(APIC_TIMER_LVT, 1 << 17 | TIMER_VECTOR); /* periodic */
    apic_write(APIC_TIMER_INITIAL, count);
}

void timer_interrupt(void)
{
    host_ticks++;
    apic_write(APIC_EOI, 0);
}
