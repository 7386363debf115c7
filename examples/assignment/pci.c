/* SPDX-License-Identifier: GPL-2.0-or-later */
#include "pci.h"

static void select(uint32_t device, uint32_t offset)
{
    uint32_t address = 0x80000000 | device << 8 | (offset & 0xfc);
    __asm__ volatile("outl %0, %1" : : "a"(address), "Nd"((uint16_t)PCI_ADDRESS_PORT));
}

uint32_t pci_read(uint32_t device, uint32_t offset)
{
    uint32_t value;
    select(device, offset);
    __asm__ volatile("inl %1, %0" : "=a"(value) : "Nd"((uint16_t)PCI_DATA_PORT));
    return value;
}

void pci_write(uint32_t device, uint32_t offset, uint32_t value)
{
    select(device, offset);
    __asm__ volatile("outl %0, %1" : : "a"(value), "Nd"((uint16_t)PCI_DATA_PORT));
}

uint32_t pci_find(uint32_t offset, uint32_t mask, uint32_t value)
{
    for (uint32_t device = 0; device < 256; device++) {
        if (device & 7 && !(pci_read(device & ~7u, PCI_HEADER) >> 23 & 1))
            continue; /* functions 1 to 7 of a device with one function may answer, or not */
        if ((pci_read(device, PCI_IDENTITY) & 0xffff) != 0xffff && (pci_read(device, offset) & mask) == value)
            return device;
    }
    return PCI_NOWHERE;
}

uint32_t pci_capability(uint32_t device, uint32_t id)
{
    uint32_t offset = pci_read(device, PCI_FIRST_CAPABILITY) & 0xfc;
    for (int most = 48; offset && most; most--) {
        uint32_t head = pci_read(device, offset);
        if ((head & 0xff) == id)
            return offset;
        offset = head >> 8 & 0xfc;
    }
    return 0;
}

int pci_interrupt_by(uint32_t device, uint32_t address, uint32_t data)
{
    uint32_t msi = pci_capability(device, PCI_CAPABILITY_MSI);
    if (!msi)
        return 0;
    uint32_t head = pci_read(device, msi);
    pci_write(device, msi, head & ~PCI_MSI_ENABLE);
    pci_write(device, msi + PCI_MSI_ADDRESS, address);
    if (head & PCI_MSI_WIDE)
        pci_write(device, msi + PCI_MSI_ADDRESS + 4, 0);
    pci_write(device, msi + PCI_MSI_DATA(head & PCI_MSI_WIDE), data);
    pci_write(device, msi, head | PCI_MSI_ENABLE);
    return 1;
}
