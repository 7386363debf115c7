/* SPDX-License-Identifier: GPL-2.0-or-later */
#include "edu.h"
#include "pci.h"

#define ACKNOWLEDGE 0x64
#define SOURCE      0x80
#define DESTINATION 0x88
#define COUNT       0x90
#define COMMAND     0x98
#define BUFFER      0x40000

#define COMMAND_START     1
#define COMMAND_TO_MEMORY 2
#define COMMAND_INTERRUPT 4
#define INTERRUPT_DMA     0x100

int edu_start(struct edu *edu)
{
    edu->device = pci_find(PCI_IDENTITY, 0xffffffff, EDU_IDENTITY);
    if (edu->device == PCI_NOWHERE)
        return 0;
    uint32_t command = pci_read(edu->device, PCI_COMMAND) & 0xffff;
    pci_write(edu->device, PCI_COMMAND, command | PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER);
    edu->registers = (volatile uint8_t *)(uintptr_t)(pci_read(edu->device, PCI_BAR0) & ~15u);
    return 1;
}

/* Registers of 64 bits, written in halves as a 32-bit driver must. */
static void put(const struct edu *edu, uint32_t offset, uint64_t value)
{
    *(volatile uint32_t *)(edu->registers + offset) = (uint32_t)value;
    *(volatile uint32_t *)(edu->registers + offset + 4) = (uint32_t)(value >> 32);
}

int edu_busy(const struct edu *edu)
{
    return *(volatile uint32_t *)(edu->registers + COMMAND) & COMMAND_START;
}

void edu_acknowledge(const struct edu *edu)
{
    *(volatile uint32_t *)(edu->registers + ACKNOWLEDGE) = INTERRUPT_DMA;
}

int edu_interrupts(const struct edu *edu, uint32_t address, uint32_t data)
{
    return pci_interrupt_by(edu->device, address, data);
}

void edu_begin(const struct edu *edu, uint64_t memory, uint32_t at, uint32_t length, int to_memory, int interrupt)
{
    put(edu, SOURCE, to_memory ? BUFFER + at : memory);
    put(edu, DESTINATION, to_memory ? memory : BUFFER + at);
    put(edu, COUNT, length);
    *(volatile uint32_t *)(edu->registers + COMMAND) =
        COMMAND_START | (to_memory ? COMMAND_TO_MEMORY : 0) | (interrupt ? COMMAND_INTERRUPT : 0);
}

static void finish(const struct edu *edu)
{
    while (edu_busy(edu))
        for (int i = 0; i < 200; i++)
            __asm__ volatile("pause");
    __asm__ volatile("" : : : "memory"); /* what the device wrote is read from memory, not from a register */
}

void edu_from_memory(const struct edu *edu, uint64_t from, uint32_t at, uint32_t length)
{
    edu_begin(edu, from, at, length, 0, 0);
    finish(edu);
}

void edu_to_memory(const struct edu *edu, uint64_t to, uint32_t at, uint32_t length)
{
    edu_begin(edu, to, at, length, 1, 0);
    finish(edu);
}
