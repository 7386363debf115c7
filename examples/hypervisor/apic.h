/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The hypervisor's clock: the local APIC timer, periodic (APM2 16.4.1). */
#ifndef APIC_H
#define APIC_H

#include <stdint.h>

#define TIMER_VECTOR    0x40
#define SPURIOUS_VECTOR 0xff

extern volatile uint64_t host_ticks;

/* Silence the 8259 pair and start ticking every `count` cycles of the APIC's own clock, whatever its speed. */
void apic_start(uint32_t count);
void timer_interrupt(void);

#endif
