/* SPDX-License-Identifier: GPL-2.0-or-later */
#include "kit.h"
#include "arguments.h"
#include "cpu.h"
#include "pci.h"
#include "print.h"

#define EDU_RAISE   0x60
#define EDU_LOWER   0x64
#define MSI         5
#define MESSAGE     0xfee00000ull
#define LAPIC_EOI   0xb0
#define LAPIC_SPURIOUS 0xf0

struct edu edu;
struct unit *unit;
uint64_t *root, entry[4];
volatile unsigned taken[256];
static struct unit units[2];
static int failed;

void check(int holds, const char *what, const char *file, int line)
{
    if (!holds && !failed++)
        print("wrong: %s (%s:%u, status %x)\n", what, file, (uint64_t)line, get(IOMMU_STATUS));
}

/* Interrupts */

struct frame { uint64_t registers[15], vector, error, rip; };
static struct gate {
    uint16_t low, selector;
    uint8_t ist, type;
    uint16_t middle;
    uint32_t high, reserved;
} __attribute__((packed)) idt[256];
extern uint8_t trap_entries[256][16];

void trap(struct frame *f)
{
    taken[f->vector]++;
    if (f->vector < 32 && f->vector != 2) {
        print("exception %u at %x\n", f->vector, f->rip);
        fatal("an exception");
    }
    if (f->vector != 2)
        *(volatile uint32_t *)(MESSAGE + LAPIC_EOI) = 0;
}

static void interrupts_start(void)
{
    for (int vector = 0; vector < 256; vector++) {
        uint64_t at = (uint64_t)trap_entries[vector];
        idt[vector].low = (uint16_t)at;
        idt[vector].middle = (uint16_t)(at >> 16);
        idt[vector].high = (uint32_t)(at >> 32);
        idt[vector].selector = 8;
        idt[vector].type = 0x8e;
    }
    struct { uint16_t limit; uint64_t base; } __attribute__((packed)) pointer = {sizeof idt - 1, (uint64_t)idt};
    __asm__ volatile("lidt %0" : : "m"(pointer));
    outb(0x21, 0xff); /* the 8259s are silent */
    outb(0xa1, 0xff);
    *(volatile uint32_t *)(MESSAGE + LAPIC_SPURIOUS) = 0x1ff;
    __asm__ volatile("sti");
}

void messages(uint32_t function, uint64_t address, uint32_t data)
{
    uint32_t at = pci_read(function, 0x34) & 0xfc;
    while (at && (pci_read(function, at) & 0xff) != MSI)
        at = pci_read(function, at) >> 8 & 0xfc;
    uint32_t control = pci_read(function, at);
    int wide = control >> 23 & 1;
    pci_write(function, at + 4, (uint32_t)address);
    if (wide)
        pci_write(function, at + 8, (uint32_t)(address >> 32));
    pci_write(function, at + (wide ? 12 : 8), data);
    pci_write(function, at, control | 1 << 16);
}

int arrives(uint32_t data, int vector)
{
    unsigned before = taken[vector];
    messages(edu.device, MESSAGE, data);
    *(volatile uint32_t *)(edu.registers + EDU_RAISE) = 1;
    int come = SOON(taken[vector] != before);
    *(volatile uint32_t *)(edu.registers + EDU_LOWER) = 1;
    return come && taken[vector] == before + 1;
}

/* The IOMMU */

uint64_t get(uint32_t offset)
{
    return *(volatile uint64_t *)(unit->registers + offset);
}

void put(uint32_t offset, uint64_t value)
{
    *(volatile uint64_t *)(unit->registers + offset) = value;
}

void begin(int levels)
{
    put(IOMMU_CONTROL, 0);
    put(IOMMU_STATUS, 0x68e67); /* what is cleared by writing ones */
    put(HARDWARE_STATUS, 3);
    put(IOMMU_EXCLUSION_BASE, 0);
    clear(unit->table, 2 * PAGE_SIZE);
    clear((void *)unit->events, RING);
    put(IOMMU_DEVICE_TABLE, physical(unit->table) | 1);
    put(IOMMU_COMMAND_BASE, physical(unit->commands) | IOMMU_RING_SIZE);
    put(IOMMU_EVENT_BASE, physical((void *)unit->events) | IOMMU_RING_SIZE);
    put(PPR_BASE, physical((void *)unit->ppr) | IOMMU_RING_SIZE);
    put(GA_BASE, physical((void *)unit->ga) | IOMMU_RING_SIZE);
    root = allocate_page();
    entry[0] = DTE_VALID | DTE_TRANSLATION | DTE_MODE(levels) | physical(root) | RW;
    entry[1] = DOMAIN;
    entry[2] = entry[3] = 0;
}

void put_entry(void)
{
    for (int i = 0; i < 4; i++)
        unit->table[edu.device * 4 + (uint32_t)i] = entry[i];
}

void enable(uint64_t more)
{
    put_entry();
    put(IOMMU_CONTROL, ON | more);
    forget_all();
}

uint64_t *leaf(uint64_t iova, int levels)
{
    iommu_map(root, levels, iova, 0, 0);
    uint64_t *at = root;
    for (int level = levels; level > 1; level--)
        at = (uint64_t *)(at[iova >> (12 + 9 * (level - 1)) & 511] & PTE_ADDRESS);
    return &at[iova >> 12 & 511];
}

void page(uint64_t value)
{
    begin(4);
    *leaf(IOVA, 4) = value;
    enable(0);
}

void command(uint64_t low, uint64_t high)
{
    uint64_t tail = get(IOMMU_COMMAND_TAIL);
    unit->commands[tail / 8] = low;
    unit->commands[tail / 8 + 1] = high;
    put(IOMMU_COMMAND_TAIL, (tail + 16) % RING);
}

int completes(void)
{
    static volatile uint64_t stored __attribute__((aligned(8)));
    static uint64_t number;
    command(1ull << 60 | physical((void *)&stored) | 1, ++number);
    return SOON(stored == number);
}

void forget_all(void)
{
    command(8ull << 60, 0);
    CHECK(completes());
}

int event_is(uint64_t low, uint64_t high)
{
    uint64_t head = get(IOMMU_EVENT_HEAD);
    if (!SOON(get(IOMMU_EVENT_TAIL) != head))
        return 0;
    uint64_t l = unit->events[head / 8], h = unit->events[head / 8 + 1];
    put(IOMMU_EVENT_HEAD, (head + 16) % RING);
    if (l != low || h != high)
        print("event %016x %016x, expected %016x %016x\n", l, h, low, high);
    return l == low && h == high;
}

int no_event(void)
{
    return get(IOMMU_EVENT_HEAD) == get(IOMMU_EVENT_TAIL);
}

/* The device */

static volatile uint8_t first;

int writes(uint64_t iova, uint64_t spa)
{
    first = (uint8_t)(first + 0x11);
    for (int i = 0; i < LENGTH; i++) {
        edu.registers[EDU_BUFFER + i] = (uint8_t)(first + i);
        ((volatile uint8_t *)spa)[i] = 0;
    }
    edu_to_memory(&edu, iova, 0, LENGTH);
    for (int i = 0; i < LENGTH; i++)
        if (((volatile uint8_t *)spa)[i] != (uint8_t)(first + i))
            return 0;
    return 1;
}

int reads(uint64_t iova, uint64_t spa)
{
    first = (uint8_t)(first + 0x13);
    for (int i = 0; i < LENGTH; i++) {
        edu.registers[EDU_BUFFER + i] = 0;
        ((volatile uint8_t *)spa)[i] = (uint8_t)(first + i);
    }
    edu_from_memory(&edu, iova, 0, LENGTH);
    for (int i = 0; i < LENGTH; i++)
        if (edu.registers[EDU_BUFFER + i] != (uint8_t)(first + i))
            return 0;
    return 1;
}

/* Which IOMMU's registers are where: the capability says. */
static void find_units(void)
{
    int count = 0;
    for (uint32_t function = 0; function < 8 && count < 2; function++) {
        if ((pci_read(function, PCI_CLASS) & 0xffff0000) != IOMMU_CLASS)
            continue;
        uint32_t at = pci_read(function, 0x34) & 0xfc;
        while (at && (pci_read(function, at) & 0xff) != 0x0f)
            at = pci_read(function, at) >> 8 & 0xfc;
        unit = &units[count++];
        unit->function = function;
        unit->registers = (volatile uint8_t *)(uint64_t)(pci_read(function, at + 4) & ~0x3fffu);
        unit->table = allocate_page();
        allocate_page();
        unit->commands = allocate_page();
        unit->events = allocate_page();
        unit->ppr = allocate_page();
        unit->ga = allocate_page();
    }
    unit = units;
    if (!count)
        fatal("no IOMMU");
}

/* The device on bus 1, which firmware has numbered. */
static int behind_bridge(void)
{
    for (edu.device = 0x100; edu.device < 0x200; edu.device += 8)
        if (pci_read(edu.device, PCI_IDENTITY) == EDU_IDENTITY) {
            uint32_t on = pci_read(edu.device, PCI_COMMAND) & 0xffff;
            pci_write(edu.device, PCI_COMMAND, on | PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER);
            edu.registers = (volatile uint8_t *)(uint64_t)(pci_read(edu.device, PCI_BAR0) & ~15u);
            return 1;
        }
    return 0;
}

static void run(const struct feature *feature, uint32_t information)
{
    for (; feature->name; feature++) {
        if (!has_argument(information, feature->when))
            continue;
        failed = 0;
        unit = units;
        feature->run();
        put(IOMMU_CONTROL, 0);
        print("feature %s: %s\n", feature->name, failed ? "wrong" : "right");
    }
}

_Noreturn void main(uint32_t information)
{
    serial_start();
    interrupts_start();
    if (!edu_start(&edu) && !behind_bridge())
        fatal("no edu device");
    find_units();
    run(memory_features, information);
    run(ring_features, information);
    run(interrupt_features, information);
    run(other_features, information);
    run(ivrs_features, information);
    run(service_features, information);
    print("features: done\n");
    end(0);
}
