/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Configuration space by ports CF8 and CFC. A device is named by bus << 8 | device << 3 | function. */
#ifndef PCI_H
#define PCI_H

#include <stdint.h>

#define NO_DEVICE (~0u)

uint32_t pci_read(uint32_t device, uint32_t offset);
void pci_write(uint32_t device, uint32_t offset, uint32_t value);
/* The first on bus 0 of this vendor and device (device << 16 | vendor), or NO_DEVICE. */
uint32_t pci_find(uint32_t identity);
/* Offset of a capability, 0 if there is none. */
uint32_t pci_capability(uint32_t device, uint32_t id);

#endif
