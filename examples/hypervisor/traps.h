/* SPDX-License-Identifier: GPL-2.0-or-later */
#ifndef TRAPS_H
#define TRAPS_H

/* Load the hypervisor's own TSS and IDT. */
void traps_start(void);

#endif
