/* SPDX-License-Identifier: GPL-2.0-or-later */
#include "pci.h"
#include "cpu.h"

static uint32_t inl(uint16_t port)
{
    uint32_t value;
    __asm__ volatile("inl %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}

static void select(uint32_t device, uint32_t offset)
{
    outl(0xcf8, 1u << 31 | device << 8 | (offset & 0xfc));
}

uint32_t pci_read(uint32_t device, uint32_t offset)
{
    select(device, offset);
    return inl(0xcfc);
}

void pci_write(uint32_t device, uint32_t offset, uint32_t value)
{
    select(device, offset);
    outl(0xcfc, value);
}

uint32_t pci_find(uint32_t identity)
{
    for (uint32_t device = 0; device < 256; device++)
        if (pci_read(device, 0) == identity)
            return device;
    return NO_DEVICE;
}

uint32_t pci_capability(uint32_t device, uint32_t id)
{
    if (!(pci_read(device, 4) & 1u << 20))
        return 0;
    uint32_t at = pci_read(device, 0x34) & 0xfc;
    for (int left = 48; at && left; left--) {
        uint32_t head = pci_read(device, at);
        if ((head & 0xff) == id)
            return at;
        at = head >> 8 & 0xfc;
    }
    return 0;
}
