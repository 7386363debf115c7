/* SPDX-License-Identifier: GPL-2.0-or-later */
/* A PCI device that belongs to a guest. */
#ifndef ASSIGN_H
#define ASSIGN_H

#include "guest.h"

#define DEVICE_VECTOR 0x41 /* the device's interrupt, as the hypervisor sees it */

/* Give the device with this identity to a guest, which finds it on its own PCI bus. `guarded`: behind the IOMMU. */
void assign(struct guest *guest, uint32_t identity, int guarded);
/* An access of a guest to the ports of PCI configuration space. Returns 0 if the #VMEXIT was none. */
int assign_port(struct guest *guest);
/* A HLT of the guest that has the device: it waits for an interrupt. Returns 0 if the #VMEXIT was none. */
int assign_halt(struct guest *guest);
/* The device's interrupt, in the hypervisor's own interrupt handler. */
void assign_interrupt(void);
/* Say what the IOMMU has blocked since the last time. */
void assign_report(void);
/* How much that was. */
uint64_t assign_blocked(void);

#endif
