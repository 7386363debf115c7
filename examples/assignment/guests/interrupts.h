/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Interrupts of a guest in 32-bit protected mode. */
#ifndef INTERRUPTS_H
#define INTERRUPTS_H

#include <stdint.h>

/* A GDT and an IDT with one gate, which leads to `on_interrupt`; interrupts stay off. */
void interrupts_start(uint8_t vector);
/* Sleep until one has come. The caller looks, with interrupts off, whether it still has to wait. */
void interrupts_wait(void);
/* The guest's own. */
void on_interrupt(void);

#endif
