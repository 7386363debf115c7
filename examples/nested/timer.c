/* SPDX-License-Identifier: GPL-2.0-or-later */
#include "timer.h"
#include "apic.h"
#include "cpu.h"
#include "level.h"

#define APIC ((volatile uint32_t *)0xfee00000) /* where it is after a reset */
#define APIC_EOI           (0x0b0 / 4)
#define APIC_SPURIOUS      (0x0f0 / 4)
#define APIC_TIMER_LVT     (0x320 / 4)
#define APIC_TIMER_INITIAL (0x380 / 4)
#define APIC_TIMER_DIVIDE  (0x3e0 / 4)

volatile int timer_expired;

void timer_alone(void)
{
    if (level)
        return;
    outb(0x21, 0xff);
    outb(0xa1, 0xff);
}

void timer_start(void)
{
    timer_expired = 0;
    if (level) {
        hypercall(HYPERCALL_TICK, TIMER_VECTOR, 0);
        return;
    }
    APIC[APIC_SPURIOUS] = 0x100 | SPURIOUS_VECTOR;
    APIC[APIC_TIMER_DIVIDE] = 0xb;         /* by 1 */
    APIC[APIC_TIMER_LVT] = TIMER_VECTOR;   /* one shot */
    APIC[APIC_TIMER_INITIAL] = TIMER_COUNT;
}

/* From traps.c, for TIMER_VECTOR. */
void timer_interrupt(void)
{
    timer_expired = 1;
    if (!level)
        APIC[APIC_EOI] = 0;
}

void timer_wait(void)
{
    __asm__ volatile("cli");
    if (!timer_expired) /* STI takes effect behind HLT's beginning: the interrupt cannot slip in between */
        __asm__ volatile("sti; hlt" : : : "memory");
    __asm__ volatile("sti");
}
