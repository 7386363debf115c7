/* SPDX-License-Identifier: GPL-2.0-or-later */
/* PCI configuration space by ports CF8 and CFC; in 32-bit guests as in the hypervisor. */
#ifndef PCI_H
#define PCI_H

#include <stdint.h>

#define PCI_IDENTITY 0x00 /* vendor in 15:0, device in 31:16 */
#define PCI_COMMAND  0x04
#define PCI_CLASS    0x08 /* class and subclass in 31:16 */
#define PCI_HEADER   0x0c
#define PCI_BAR0     0x10
#define PCI_FIRST_CAPABILITY 0x34
#define PCI_COMMAND_MEMORY 2
#define PCI_COMMAND_MASTER 4
#define PCI_NOWHERE  0xffffffff

#define PCI_CAPABILITY_MSI 5
/* Of an MSI capability, from its beginning; the first word is its control register in 31:16. */
#define PCI_MSI_ENABLE     (1u << 16)
#define PCI_MSI_WIDE       (1u << 23) /* the address has 64 bits: the data is one word further on */
#define PCI_MSI_ADDRESS    4
#define PCI_MSI_DATA(wide) ((wide) ? 12 : 8)

#define PCI_ADDRESS_PORT 0xcf8
#define PCI_DATA_PORT    0xcfc

/* `device`: bus in 15:8, device in 7:3, function in 2:0, which is also the requester ID of its transactions. */
uint32_t pci_read(uint32_t device, uint32_t offset);
void pci_write(uint32_t device, uint32_t offset, uint32_t value);
/* The first function on bus 0 where these bits of a register have this value, or PCI_NOWHERE. */
uint32_t pci_find(uint32_t offset, uint32_t mask, uint32_t value);
/* Where a capability of a function is, or 0. */
uint32_t pci_capability(uint32_t device, uint32_t id);
/* Have it interrupt by this message (MSI). 0: it cannot. */
int pci_interrupt_by(uint32_t device, uint32_t address, uint32_t data);

#endif
