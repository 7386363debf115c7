/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Paged real mode (APM2 15.19). Without nested paging, a real-mode guest would address system memory directly.
 * VMRUN therefore accepts CR0 with PE = 0 and PG = 1, which no MOV to CR0 can make: real mode in every other way, but
 * each linear address goes through a page table, one that the hypervisor makes and the guest never sees.
 */
#ifndef SHADOW_H
#define SHADOW_H

#include "guest.h"

void shadow_create(struct guest *guest);
/* After an intercepted #PF: map the page if it belongs to the guest. Returns 0 if it does not. */
int shadow_fill(struct guest *guest, uint64_t linear);

#endif
