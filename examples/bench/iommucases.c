/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What an IOMMU does with one table after another: an edu device writes to memory and reads from it, and a line for each case says
 * what came of it and what the event log has. The device must be 00:11.0, for one case asks for a device beyond a short table.
 *
 *   case NAME: write yes|no read yes|no status S events LOW:HIGH ...
 *   case NAME: vector V status S events ...        what an interrupt of the device became, 0 for nothing
 *
 * "read no": the device's buffer does not hold what memory has. Logged events are read from memory, whatever the tail says.
 */
#include "edu.h"
#include "iommu.h"
#include "memory.h"
#include "pci.h"
#include "print.h"
#include "traps.h"

#define DOMAIN   0x5a
#define IOVA     0x00345000ull
#define DATA     0x02000000ull /* memory that is mapped; pages of their own */
#define DATA2    0x02200000ull
#define SCRATCH  0x03000000ull
#define LENGTH   16
#define RW       (PTE_READ | PTE_WRITE)
#define EVENTS   4 /* slots of the log that are looked at */
#define FULL     (IOMMU_CONTROL_ENABLE | IOMMU_CONTROL_EVENTS | IOMMU_CONTROL_COMMANDS)
#define RESERVED_PTE  (1ull << 52)
#define RESERVED_DTE  (1ull << 2)
#define SUPPRESS_ONE  (1ull << 33) /* SE and SA, bits 97 and 98 of an entry */
#define SUPPRESS_ALL  (1ull << 34)
#define INDEX         5 /* of the interrupt table entry that is used */
#define LENGTH_OF(n)  ((uint64_t)(n) << 1)
#define INT_CTL(n)    ((uint64_t)(n) << 60)
#define INT_TYPE(n)   ((uint32_t)(n) << 2)
#define RESERVED_IRTE (1u << 24)

static struct edu edu;
static uint64_t *table, *commands, *root;
static volatile uint64_t *events;
static uint64_t entry[3]; /* what the device's entry shall be */
static uint32_t *interrupts;
static uint64_t table_size;
static volatile uint64_t stored __attribute__((aligned(8)));

static void fill(uint64_t where, uint8_t first)
{
    for (int i = 0; i < LENGTH; i++)
        ((volatile uint8_t *)where)[i] = (uint8_t)(first + i);
}

static int holds(uint64_t where, uint8_t first)
{
    for (int i = 0; i < LENGTH; i++)
        if (((volatile uint8_t *)where)[i] != (uint8_t)(first + i))
            return 0;
    return 1;
}

/* The IOMMU off, rings empty, a root without entries. */
static void begin(int levels)
{
    iommu_write(IOMMU_CONTROL, 0);
    iommu_write(IOMMU_STATUS, 0x68e67); /* what is cleared by writing ones */
    iommu_write(IOMMU_EXCLUSION_BASE, 0);
    iommu_write(IOMMU_EXCLUSION_LIMIT, 0);
    clear((void *)events, PAGE_SIZE);
    iommu_write(IOMMU_COMMAND_BASE, physical(commands) | IOMMU_RING_SIZE);
    iommu_write(IOMMU_EVENT_BASE, physical((void *)events) | IOMMU_RING_SIZE);
    iommu_write(IOMMU_COMMAND_HEAD, 0);
    iommu_write(IOMMU_COMMAND_TAIL, 0);
    iommu_write(IOMMU_EVENT_HEAD, 0);
    iommu_write(IOMMU_EVENT_TAIL, 0);
    root = allocate_page();
    entry[0] = DTE_VALID | DTE_TRANSLATION | DTE_MODE(levels) | physical(root) | RW;
    entry[1] = DOMAIN;
    entry[2] = 0;
    table_size = 1;
}

static void command(uint64_t low, uint64_t high)
{
    uint64_t tail = iommu_read(IOMMU_COMMAND_TAIL);
    commands[tail / 8] = low;
    commands[tail / 8 + 1] = high;
    iommu_write(IOMMU_COMMAND_TAIL, (tail + 16) % PAGE_SIZE);
}

/* Returns 1 once the store of a COMPLETION_WAIT has been seen. */
static int wait(void)
{
    static uint64_t number;
    command(1ull << 60 | physical((void *)&stored) | 1, ++number);
    for (int i = 0; i < 2000 && stored != number; i++)
        __asm__ volatile("pause");
    return stored == number;
}

static void forget(void)
{
    command(2ull << 60 | edu.device, 0);
    command(3ull << 60 | (uint64_t)DOMAIN << 32, 0x7ffffffffffff003);
    command(5ull << 60 | edu.device, 0);
    wait();
}

static void enable(void)
{
    uint64_t *at = table + edu.device * 4;
    at[0] = entry[0];
    at[1] = entry[1];
    at[2] = entry[2];
    at[3] = 0;
    iommu_write(IOMMU_DEVICE_TABLE, physical(table) | table_size);
    iommu_write(IOMMU_CONTROL, FULL);
    forget();
}

static void say_events(void)
{
    print(" status %x events", iommu_read(IOMMU_STATUS));
    for (int i = 0; i < EVENTS; i++)
        if (events[2 * i] | events[2 * i + 1])
            print(" %x:%x", events[2 * i], events[2 * i + 1]);
    print("\n");
}

/* Let the device write to `iova` and read from it; `spa` is where that should lead. */
static void try(const char *name, uint64_t iova, uint64_t spa)
{
    uint64_t control = iommu_read(IOMMU_CONTROL);
    iommu_write(IOMMU_CONTROL, 0); /* the buffer is filled behind the IOMMU's back */
    fill(SCRATCH, 0x40);
    edu_from_memory(&edu, SCRATCH, 0, LENGTH);
    clear((void *)spa, LENGTH);
    iommu_write(IOMMU_CONTROL, control);
    edu_to_memory(&edu, iova, 0, LENGTH);
    int written = holds(spa, 0x40);
    fill(spa, 0x70);
    edu_from_memory(&edu, iova, 0, LENGTH);
    iommu_write(IOMMU_CONTROL, 0);
    clear((void *)SCRATCH, LENGTH);
    edu_to_memory(&edu, SCRATCH, 0, LENGTH);
    print("case %s: write %s read %s", name, written ? "yes" : "no", holds(SCRATCH, 0x70) ? "yes" : "no");
    say_events();
}

static uint64_t *leaf(uint64_t iova, int levels)
{
    iommu_map(root, levels, iova, 0, 0);
    uint64_t *at = root;
    for (int level = levels; level > 1; level--)
        at = (uint64_t *)(at[iova >> (12 + 9 * (level - 1)) & 511] & PTE_ADDRESS);
    return &at[iova >> 12 & 511];
}

/* Four levels, one page at IOVA with this entry. */
static void page(const char *name, uint64_t value)
{
    begin(4);
    *leaf(IOVA, 4) = value;
    enable();
    try(name, IOVA, DATA);
}

static void device_table_cases(void)
{
    begin(4);
    entry[0] = 0;
    enable();
    try("entry-invalid", DATA, DATA);
    begin(4);
    entry[0] = DTE_VALID;
    enable();
    try("translation-invalid", DATA, DATA);
    begin(0);
    enable();
    try("mode-0", DATA, DATA);
    begin(0);
    entry[0] &= ~PTE_WRITE;
    enable();
    try("mode-0-read-only", DATA, DATA);
    begin(7);
    enable();
    try("mode-7", IOVA, DATA);
    begin(4);
    entry[0] |= RESERVED_DTE;
    *leaf(IOVA, 4) = DATA | PTE_PRESENT | RW;
    enable();
    try("entry-reserved-bit", IOVA, DATA);
    begin(4);
    *leaf(IOVA, 4) = DATA | PTE_PRESENT | RW;
    entry[0] &= ~PTE_WRITE;
    enable();
    try("entry-read-only", IOVA, DATA);
    begin(4);
    *leaf(IOVA, 4) = DATA | PTE_PRESENT | RW;
    table_size = 0; /* one page, 128 entries: 00:11.0 is number 136 */
    enable();
    try("beyond-table", IOVA, DATA);
}

static void page_cases(void)
{
    for (int levels = 1; levels <= 6; levels++) {
        static char name[] = "levels-0";
        uint64_t iova = IOVA & (levels == 1 ? 0x1ff000 : ~0ull);
        name[7] = (char)('0' + levels);
        begin(levels);
        *leaf(iova, levels) = DATA | PTE_PRESENT | RW;
        enable();
        try(name, iova, DATA);
    }
    page("read-only", DATA | PTE_PRESENT | PTE_READ);
    page("write-only", DATA | PTE_PRESENT | PTE_WRITE);
    page("not-present", DATA | RW);
    page("reserved-bit", DATA | PTE_PRESENT | RW | RESERVED_PTE);
    page("next-level-1", DATA | PTE_PRESENT | RW | PTE_NEXT(1)); /* at level 1: not below it */
    /* NextLevel 7: the size is in the address; 16 KiB is bit 12 and a zero bit 13. All copies of the entry must be there. */
    begin(4);
    for (uint64_t i = 0; i < 4; i++)
        *leaf((IOVA & ~0x3fffull) + i * PAGE_SIZE, 4) = DATA | 0x1000 | PTE_PRESENT | RW | PTE_NEXT(7);
    enable();
    try("size-16k", IOVA, DATA + (IOVA & 0x3fff));
    begin(4); /* a size that is none of level 1's: 4 MiB */
    *leaf(IOVA, 4) = DATA | 0x1ff000 | PTE_PRESENT | RW | PTE_NEXT(7);
    enable();
    try("size-4m-at-level-1", IOVA, DATA + (IOVA & 0x3fffff));
    begin(4);
    leaf(IOVA, 4);
    uint64_t *directory = (uint64_t *)(((uint64_t *)(root[0] & PTE_ADDRESS))[0] & PTE_ADDRESS);
    directory[1] = DATA | PTE_PRESENT | RW;
    enable();
    try("size-2m", IOVA, DATA + (IOVA & 0x1fffff));
    begin(4); /* not at a multiple of 2 MiB */
    leaf(IOVA, 4);
    directory = (uint64_t *)(((uint64_t *)(root[0] & PTE_ADDRESS))[0] & PTE_ADDRESS);
    directory[1] = DATA | PAGE_SIZE | PTE_PRESENT | RW;
    enable();
    try("size-2m-unaligned", IOVA, DATA + (IOVA & 0x1fffff));
    begin(4);
    leaf(IOVA, 4);
    directory = (uint64_t *)(((uint64_t *)(root[0] & PTE_ADDRESS))[0] & PTE_ADDRESS);
    directory[1] &= ~PTE_WRITE;
    *leaf(IOVA, 4) = DATA | PTE_PRESENT | RW;
    directory[1] &= ~PTE_WRITE;
    enable();
    try("directory-read-only", IOVA, DATA);
    begin(1);
    root[IOVA >> 12 & 511] = DATA | PTE_PRESENT | RW;
    enable();
    try("beyond-levels", IOVA, DATA); /* one level reaches 2 MiB */
}

/* From level 3 to level 1 at once: the address bits in between have to be zero (2.2.3). */
static void skipping_cases(void)
{
    static const struct { const char *name; uint64_t iova; } cases[] = {{"skip", 0x45000}, {"skip-nonzero", IOVA}};
    for (int i = 0; i < 2; i++) {
        begin(3);
        uint64_t *last = allocate_page();
        root[0] = physical(last) | PTE_PRESENT | PTE_NEXT(1) | RW;
        last[cases[i].iova >> 12 & 511] = DATA | PTE_PRESENT | RW;
        enable();
        try(cases[i].name, cases[i].iova, DATA);
    }
}

static void other_cases(void)
{
    begin(4);
    leaf(IOVA, 4);
    entry[1] |= SUPPRESS_ALL;
    enable();
    try("suppress-all", IOVA, DATA);
    begin(4);
    leaf(IOVA, 4);
    entry[1] |= SUPPRESS_ONE;
    enable();
    try("suppress-more", IOVA, DATA);
    begin(4);
    iommu_write(IOMMU_EXCLUSION_LIMIT, DATA);
    iommu_write(IOMMU_EXCLUSION_BASE, DATA | 3);
    enable();
    try("exclusion-range", DATA, DATA);
    begin(4);
    root[0] = 0x0000fffffffff000ull | PTE_PRESENT | PTE_NEXT(3) | RW; /* no memory there */
    enable();
    try("table-nowhere", IOVA, DATA);
    begin(4);
    enable();
    iommu_write(IOMMU_EVENT_HEAD, 16); /* the log has room for none */
    try("log-full", IOVA, DATA);

    begin(4);
    uint64_t *at = leaf(IOVA, 4);
    *at = DATA | PTE_PRESENT | RW;
    enable();
    edu_to_memory(&edu, IOVA, 0, LENGTH);
    *at = DATA2 | PTE_PRESENT | RW;
    try("changed", IOVA, DATA2);
    begin(4);
    at = leaf(IOVA, 4);
    *at = DATA | PTE_PRESENT | RW;
    enable();
    edu_to_memory(&edu, IOVA, 0, LENGTH);
    *at = DATA2 | PTE_PRESENT | RW;
    forget();
    try("changed-invalidated", IOVA, DATA2);
}

static void command_case(const char *name, uint64_t low, uint64_t high)
{
    begin(4);
    enable();
    command(low, high);
    int done = wait();
    print("case %s: done %s head %x run %u", name, done ? "yes" : "no", iommu_read(IOMMU_COMMAND_HEAD),
          iommu_read(IOMMU_STATUS) >> 4 & 1);
    say_events();
}

static void command_cases(void)
{
    command_case("completion-wait", 1ull << 60 | (physical((void *)&stored) & ~7ull) | 1, 1);
    command_case("completion-interrupt", 1ull << 60 | 2, 0);
    command_case("unknown-command", 15ull << 60, 0);
    command_case("command-reserved-bit", 2ull << 60 | 1ull << 40 | edu.device, 0);
    command_case("invalidate-all", 8ull << 60, 0);
    command_case("invalidate-iotlb", 4ull << 60 | edu.device, 0x7ffffffffffff001);
    command_case("invalidate-interrupts", 5ull << 60 | edu.device, 0);
    command_case("prefetch", 6ull << 60 | edu.device, 0);
    begin(4);
    iommu_write(IOMMU_COMMAND_BASE, 0x000ffffffffff000ull | IOMMU_RING_SIZE);
    iommu_write(IOMMU_DEVICE_TABLE, physical(table) | 1);
    iommu_write(IOMMU_CONTROL, FULL);
    iommu_write(IOMMU_COMMAND_TAIL, 16);
    for (int i = 0; i < 2000; i++)
        __asm__ volatile("pause");
    print("case command-nowhere: done no head %x run %u", iommu_read(IOMMU_COMMAND_HEAD), iommu_read(IOMMU_STATUS) >> 4 & 1);
    say_events();
}

static volatile uint32_t *apic(uint32_t offset)
{
    return (volatile uint32_t *)(uintptr_t)(0xfee00000 + offset);
}

/* Interrupts are off: what has come waits in the local APIC's IRR, so each case has a vector of its own. */
static uint32_t waiting(uint32_t vector)
{
    return *apic(0x200 + vector / 32 * 16) >> vector % 32 & 1;
}

/* Let the device send `data`, with this third quadword of its entry and this interrupt table entry. */
static void interrupt(const char *name, uint64_t third, uint32_t irte, uint32_t data)
{
    uint8_t before[256];
    uint32_t became = 0;
    begin(4);
    interrupts[INDEX] = irte;
    entry[2] = third ? third | DTE_INTERRUPTS | physical(interrupts) : 0;
    enable();
    for (uint32_t vector = 32; vector < 256; vector++)
        before[vector] = (uint8_t)waiting(vector);
    pci_interrupt_by(edu.device, 0xfee00000, data);
    *(volatile uint32_t *)(edu.registers + 0x60) = 1;
    for (int i = 0; i < 2000; i++)
        __asm__ volatile("pause");
    *(volatile uint32_t *)(edu.registers + 0x64) = 1;
    for (uint32_t vector = 32; vector < 256; vector++)
        if (waiting(vector) && !before[vector])
            became = vector;
    print("case %s: vector %x", name, became);
    say_events();
}

static void interrupt_cases(void)
{
    *apic(0xf0) = 0x1ff; /* software enabled */
    interrupts = allocate_page();
    interrupt("irq-unmanaged", 0, 0, 0x61);
    interrupt("irq-remapped", INT_CTL(2) | LENGTH_OF(8), IRTE_REMAP | IRTE_VECTOR(0x62), INDEX);
    interrupt("irq-arbitrated", INT_CTL(2) | LENGTH_OF(8), IRTE_REMAP | INT_TYPE(1) | IRTE_VECTOR(0x63), INDEX);
    interrupt("irq-not-remapped", INT_CTL(2) | LENGTH_OF(8), IRTE_VECTOR(0x64), INDEX);
    interrupt("irq-suppressed", INT_CTL(2) | LENGTH_OF(8), 2 | IRTE_VECTOR(0x64), INDEX); /* SupIOPF */
    interrupt("irq-denied", LENGTH_OF(8), IRTE_REMAP | IRTE_VECTOR(0x64), INDEX);
    interrupt("irq-forwarded", INT_CTL(1) | LENGTH_OF(8), IRTE_REMAP | IRTE_VECTOR(0x64), 0x65);
    interrupt("irq-reserved-control", INT_CTL(3) | LENGTH_OF(8), IRTE_REMAP | IRTE_VECTOR(0x66), INDEX);
    interrupt("irq-beyond-table", INT_CTL(2) | LENGTH_OF(2), IRTE_REMAP | IRTE_VECTOR(0x67), INDEX);
    interrupt("irq-reserved-length", INT_CTL(2) | LENGTH_OF(12), IRTE_REMAP | IRTE_VECTOR(0x68), INDEX);
    interrupt("irq-reserved-type", INT_CTL(2) | LENGTH_OF(8), IRTE_REMAP | INT_TYPE(3) | IRTE_VECTOR(0x69), INDEX);
    interrupt("irq-reserved-bit", INT_CTL(2) | LENGTH_OF(8), IRTE_REMAP | IRTE_VECTOR(0x6a) | RESERVED_IRTE, INDEX);
}

_Noreturn void main(void)
{
    serial_start();
    traps_start();
    if (!iommu_present() || !edu_start(&edu) || edu.device != 0x88)
        fatal("an IOMMU and an edu device at 00:11.0 are needed");
    table = allocate_page();
    allocate_page();
    commands = allocate_page();
    events = allocate_page();
    begin(4);
    enable();
    print("case registers: features %x control %x status %x\n", iommu_read(IOMMU_FEATURES), iommu_read(IOMMU_CONTROL),
          iommu_read(IOMMU_STATUS));
    device_table_cases();
    page_cases();
    skipping_cases();
    other_cases();
    command_cases();
    interrupt_cases();
    print("cases: done\n");
    end(0);
}
