/* SPDX-License-Identifier: GPL-2.0-or-later */
/* One interrupt after a while: of the local APIC on the machine, by hypercall of the level above in a guest. */
#ifndef TIMER_H
#define TIMER_H

#define TIMER_COUNT 5000000u /* long enough for the request to travel down all levels and the answer back up */

extern volatile int timer_expired;

/* Mask the 8259 pair, before interrupts are on: firmware leaves a clock behind it. */
void timer_alone(void);
void timer_start(void);
/* Halt until an interrupt, if the timer has not expired yet. Leaves interrupts on. */
void timer_wait(void);

#endif
