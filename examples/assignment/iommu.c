/* SPDX-License-Identifier: GPL-2.0-or-later */
#include "iommu.h"
#include "memory.h"
#include "pci.h"

static uint64_t *device_table, *commands;
static volatile struct event *events;

int iommu_present(void)
{
    return pci_find(PCI_CLASS, 0xffff0000, IOMMU_CLASS) != PCI_NOWHERE;
}

uint64_t *iommu_entry(uint32_t device)
{
    return device_table + device * (DTE_SIZE / 8);
}

void iommu_start(uint64_t interrupts)
{
    device_table = allocate_page();
    allocate_page(); /* 256 entries are two pages, and pages are handed out in order */
    commands = allocate_page();
    events = allocate_page();
    /* No device reaches anything: translation is on, nothing is mapped, reading and writing are not allowed (2.2.2). Requesters
       of other buses are beyond the table, and as badly off. */
    for (uint32_t device = 0; device < IOMMU_DEVICES; device++) {
        iommu_entry(device)[0] = DTE_VALID | DTE_TRANSLATION;
        iommu_entry(device)[2] = interrupts;
    }
    iommu_write(IOMMU_CONTROL, 0);
    iommu_write(IOMMU_DEVICE_TABLE, physical(device_table) | 1);
    iommu_write(IOMMU_COMMAND_BASE, physical(commands) | IOMMU_RING_SIZE);
    iommu_write(IOMMU_EVENT_BASE, physical((void *)events) | IOMMU_RING_SIZE);
    iommu_write(IOMMU_COMMAND_HEAD, 0);
    iommu_write(IOMMU_COMMAND_TAIL, 0);
    iommu_write(IOMMU_EVENT_HEAD, 0);
    iommu_write(IOMMU_EVENT_TAIL, 0);
    iommu_write(IOMMU_CONTROL, IOMMU_CONTROL_ENABLE | IOMMU_CONTROL_EVENTS | IOMMU_CONTROL_COMMANDS);
}

void iommu_map(uint64_t *table, int levels, uint64_t iova, uint64_t spa, uint64_t rights)
{
    for (int level = levels; level > 1; level--) {
        uint64_t *entry = &table[iova >> (12 + 9 * (level - 1)) & 511];
        if (!(*entry & PTE_PRESENT)) /* rights are those of all levels together: the leaf says */
            *entry = physical(allocate_page()) | PTE_PRESENT | PTE_NEXT(level - 1) | PTE_READ | PTE_WRITE;
        table = (uint64_t *)(*entry & PTE_ADDRESS);
    }
    table[iova >> 12 & 511] = spa | PTE_PRESENT | rights;
}

void iommu_command(uint64_t low, uint64_t high)
{
    uint64_t tail = iommu_read(IOMMU_COMMAND_TAIL);
    commands[tail / 8] = low;
    commands[tail / 8 + 1] = high;
    iommu_write(IOMMU_COMMAND_TAIL, (tail + 16) % (IOMMU_ENTRIES * 16));
}

int iommu_wait(void)
{
    static volatile uint64_t done __attribute__((aligned(8)));
    static uint64_t count;
    iommu_command(1ull << 60 | physical((void *)&done) | 1, ++count); /* COMPLETION_WAIT with store, 2.4 */
    for (int i = 0; i < 100000; i++) {
        if (done == count)
            return 1;
        __asm__ volatile("pause");
    }
    return 0;
}

void iommu_forget_device(uint32_t device)
{
    iommu_command(2ull << 60 | device, 0); /* INVALIDATE_DEVTAB_ENTRY, 2.4 */
}

void iommu_forget_domain(uint16_t domain)
{
    iommu_command(3ull << 60 | (uint64_t)domain << 32, 0x7ffffffffffff003); /* INVALIDATE_IOMMU_PAGES, all of them, 2.4 */
}

void iommu_assign(uint32_t device, uint16_t domain, const uint64_t *root, int levels)
{
    uint64_t *entry = iommu_entry(device);
    /* The entry is valid all the time: what it points at comes first, the quadword with the pointer last (2.2.2). */
    entry[1] = domain;
    entry[0] = DTE_VALID | DTE_TRANSLATION | DTE_MODE(levels) | physical(root) | PTE_READ | PTE_WRITE;
    iommu_forget_device(device);
    iommu_forget_domain(domain);
    iommu_wait();
}

void iommu_remap(uint32_t device, uint8_t vector, uint8_t apic)
{
    uint32_t *table = allocate_page();
    table[0] = IRTE_REMAP | IRTE_VECTOR(vector) | IRTE_APIC(apic);
    iommu_entry(device)[2] = physical(table) | DTE_INTERRUPTS | DTE_INTERRUPTS_TABLE;
    iommu_forget_device(device);
    iommu_command(5ull << 60 | device, 0); /* INVALIDATE_INTERRUPT_TABLE, 2.4 */
    iommu_wait();
}

int iommu_event(struct event *event)
{
    uint64_t head = iommu_read(IOMMU_EVENT_HEAD);
    if (head == iommu_read(IOMMU_EVENT_TAIL))
        return 0;
    event->low = events[head / 16].low;
    event->high = events[head / 16].high;
    iommu_write(IOMMU_EVENT_HEAD, (head + 16) % (IOMMU_ENTRIES * 16));
    return 1;
}
