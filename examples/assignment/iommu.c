/* SPDX-License-Identifier: GPL-2.0-or-later */
#include "iommu.h"
#include "memory.h"
#include "pci.h"
#include "print.h"

#define CAPABILITY 0x0f
#define DEVICE_TABLE 0x0000 /* offsets of registers */
#define COMMAND_BASE 0x0008
#define EVENT_BASE   0x0010
#define CONTROL      0x0018
#define COMMAND_TAIL 0x2008
#define EVENT_HEAD   0x2010
#define EVENT_TAIL   0x2018
#define RING_256     (8ull << 56)
#define IOMMU_EN     (1ull << 0)
#define EVENT_LOG_EN (1ull << 2)
#define COMMAND_EN   (1ull << 12)

#define VALID        (1ull << 0) /* of a device table entry */
#define TRANSLATE    (1ull << 1)
#define LEVELS       3ull        /* 39 bits of addresses */
#define MODE(levels) ((levels) << 9)
#define INTERRUPTS   (1ull << 0) /* of its third word: interrupts are remapped, and with no table none arrives */

#define PRESENT      (1ull << 0) /* of a page table entry */
#define NEXT(level)  ((uint64_t)(level) << 9)
#define READ         (1ull << 61)
#define WRITE        (1ull << 62)
#define ADDRESS      0x000ffffffffff000ull

#define INVALIDATE_DEVICE (2ull << 60)
#define INVALIDATE_PAGES  (3ull << 60)
#define COMPLETION_WAIT   (1ull << 60)
#define EVERYTHING        0x7ffffffffffff001ull
#define STORE             1ull
#define ENTRIES           4096 /* bytes of a ring of 256 */

static volatile uint8_t *registers;
static uint64_t *device_table; /* of bus 0: 256 entries, 8 KiB */
static uint8_t *commands, *events;
static volatile uint64_t done;

static volatile uint64_t *at(uint32_t offset)
{
    return (volatile uint64_t *)(registers + offset);
}

static void command(uint64_t first, uint64_t second)
{
    uint64_t tail = *at(COMMAND_TAIL);
    *(uint64_t *)(commands + tail) = first;
    *(uint64_t *)(commands + tail + 8) = second;
    *at(COMMAND_TAIL) = (tail + 16) % ENTRIES;
}

/* Wait until all commands so far are carried out. */
static void wait(void)
{
    done = 0;
    command(COMPLETION_WAIT | physical((const void *)&done) | STORE, 1);
    while (!done)
        ;
}

void iommu_start(void)
{
    uint32_t device = 0, capability = 0;
    for (device = 0; device < 8 && !capability; device++)
        if ((pci_read(device, 0) & 0xffff) == 0x1022)
            capability = pci_capability(device, CAPABILITY);
    if (!capability)
        fatal("there is no AMD IOMMU");
    device--;
    uint64_t base = (uint64_t)pci_read(device, capability + 8) << 32 | (pci_read(device, capability + 4) & 0xffffc000);
    registers = (volatile uint8_t *)base;
    device_table = allocate_page();
    allocate_page(); /* the pool hands out neighbours */
    commands = allocate_page();
    events = allocate_page();
    for (uint32_t i = 0; i < 256; i++) {
        device_table[4 * i] = VALID | TRANSLATE; /* no right to read or write */
        device_table[4 * i + 2] = INTERRUPTS;
    }
    *at(DEVICE_TABLE) = physical(device_table) | 1; /* two pages */
    *at(COMMAND_BASE) = physical(commands) | RING_256;
    *at(EVENT_BASE) = physical(events) | RING_256;
    *at(CONTROL) = IOMMU_EN | EVENT_LOG_EN | COMMAND_EN;
    print("hypervisor: IOMMU at %x, its registers at %x; no device reaches memory\n", (uint64_t)device, base);
}

static void map(uint64_t *table, uint64_t iova, uint64_t spa)
{
    for (unsigned level = LEVELS; level > 1; level--) {
        uint64_t *entry = &table[iova >> (12 + 9 * (level - 1)) & 511];
        if (!(*entry & PRESENT))
            *entry = physical(allocate_page()) | PRESENT | NEXT(level - 1) | READ | WRITE;
        table = (uint64_t *)(*entry & ADDRESS);
    }
    table[iova >> 12 & 511] = spa | PRESENT | READ | WRITE;
}

void iommu_assign(uint32_t device, const struct guest *guest)
{
    uint64_t *root = allocate_page(), *entry = &device_table[4 * device];
    for (uint64_t gpa = 0; gpa < guest->kind->size; gpa += PAGE_SIZE)
        map(root, gpa, guest_to_system(guest, gpa));
    entry[1] = guest->number; /* DomainID */
    entry[0] = VALID | TRANSLATE | MODE(LEVELS) | physical(root) | READ | WRITE;
    command(INVALIDATE_DEVICE | device, 0);
    command(INVALIDATE_PAGES | guest->number << 32, EVERYTHING);
    wait();
    print("hypervisor: device %x belongs to guest %u\n", (uint64_t)device, guest->number);
}

uint32_t iommu_report(void)
{
    uint32_t count = 0;
    uint64_t head = *at(EVENT_HEAD);
    for (; head != *at(EVENT_TAIL); head = (head + 16) % ENTRIES, count++) {
        uint64_t first = *(uint64_t *)(events + head), address = *(uint64_t *)(events + head + 8);
        print("hypervisor: IOMMU event %u: %s by device %x of domain %u at %x: blocked\n", first >> 60,
              first >> 53 & 1 ? "a write" : "a read", first & 0xffff, first >> 32 & 0xffff, address);
    }
    *at(EVENT_HEAD) = head;
    return count;
}
