/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Device table, host and guest tables, rights, and the events of what is refused. */
#include "kit.h"

#define FAULT(flags) EVENT(2, (flags) | DOMAIN << 32)

static void device_table(void)
{
    begin(4);
    entry[0] = 0; /* V is 0 */
    enable(0);
    CHECK(writes(DATA, DATA) && reads(DATA, DATA));
    begin(4);
    entry[0] = DTE_VALID;
    enable(0);
    CHECK(!writes(DATA, DATA));
    CHECK(event_is(FAULT(FLAG_RW), DATA));
    begin(0); /* Mode 0: what is asked for is what is reached */
    entry[0] &= ~PTE_WRITE;
    enable(0);
    CHECK(reads(DATA, DATA) && !writes(DATA, DATA));
    CHECK(event_is(FAULT(FLAG_PR | FLAG_RW | FLAG_PE), DATA));
    begin(4);
    entry[0] |= BIT(2); /* reserved */
    enable(0);
    CHECK(!writes(IOVA, DATA));
    CHECK(event_is(EVENT(1, FLAG_RW | FLAG_RZ), IOVA));
    page(DATA | PTE_PRESENT | RW);
    put(IOMMU_DEVICE_TABLE, physical(unit->table)); /* 128 entries, and 00:11.0 is number 136 */
    forget_all();
    CHECK(!writes(IOVA, DATA));
    CHECK(event_is(EVENT(2, FLAG_RW), IOVA));
}

static void levels(void)
{
    for (int n = 1; n <= 6; n++) {
        uint64_t iova = n == 6 ? 0x123456789a345000 : (1ull << (12 + 9 * n)) - PAGE_SIZE;
        begin(n);
        *leaf(iova, n) = DATA | PTE_PRESENT | RW;
        enable(0);
        CHECK(writes(iova, DATA) && reads(iova, DATA));
        if (n < 6) {
            CHECK(!writes(1ull << (12 + 9 * n), DATA));
            CHECK(event_is(FAULT(FLAG_PR | FLAG_RW), 1ull << (12 + 9 * n)));
        }
        CHECK(no_event());
    }
}

static uint64_t *directory(void)
{
    leaf(IOVA, 4);
    return (uint64_t *)(((uint64_t *)(root[0] & PTE_ADDRESS))[0] & PTE_ADDRESS);
}

static void page_sizes(void)
{
    begin(4); /* 2 MiB: a leaf at level 2 */
    directory()[1] = DATA | PTE_PRESENT | RW;
    enable(0);
    CHECK(writes(IOVA, DATA + (IOVA & 0x1fffff)));
    CHECK(reads(0x3ff000, DATA + 0x1ff000));
    begin(4); /* not at a multiple of 2 MiB */
    directory()[1] = DATA | PAGE_SIZE | PTE_PRESENT | RW;
    enable(0);
    CHECK(!writes(IOVA, DATA + (IOVA & 0x1fffff)));
    CHECK(event_is(FAULT(FLAG_PR | FLAG_RW), IOVA));
    begin(4); /* NextLevel 7, 16 KiB: ones up to bit 12, then a zero; each copy of the entry is there */
    for (uint64_t i = 0; i < 4; i++)
        *leaf((IOVA & ~0x3fffull) + i * PAGE_SIZE, 4) = DATA | 0x1000 | PTE_PRESENT | RW | PTE_NEXT(7);
    enable(0);
    CHECK(writes(IOVA, DATA + (IOVA & 0x3fff)));
    CHECK(reads((IOVA & ~0x3fffull) + 0x3ff0, DATA + 0x3ff0));
    CHECK(no_event());
    begin(4); /* no size of level 1 */
    *leaf(IOVA, 4) = DATA | 0x1ff000 | PTE_PRESENT | RW | PTE_NEXT(7);
    enable(0);
    CHECK(!writes(IOVA, DATA + (IOVA & 0x3fffff)));
    CHECK(event_is(FAULT(FLAG_PR | FLAG_RW), IOVA));
}

/* From level 3 to level 1: the address bits between are to be zero (2.2.3). */
static void skipped_level(void)
{
    begin(3);
    uint64_t *last = allocate_page();
    root[0] = physical(last) | PTE_PRESENT | PTE_NEXT(1) | RW;
    last[0x45] = DATA | PTE_PRESENT | RW;
    last[IOVA >> 12 & 511] = DATA | PTE_PRESENT | RW;
    enable(0);
    CHECK(writes(0x45000, DATA) && reads(0x45000, DATA) && no_event());
    CHECK(!writes(IOVA, DATA));
    CHECK(event_is(FAULT(FLAG_PR | FLAG_RW), IOVA));
}

static void rights(void)
{
    page(DATA | PTE_PRESENT | PTE_READ);
    CHECK(reads(IOVA, DATA) && !writes(IOVA, DATA));
    CHECK(event_is(FAULT(FLAG_PR | FLAG_RW | FLAG_PE), IOVA));
    page(DATA | PTE_PRESENT | PTE_WRITE);
    CHECK(writes(IOVA, DATA) && !reads(IOVA, DATA));
    CHECK(event_is(FAULT(FLAG_PR | FLAG_PE), IOVA));
    begin(4);
    directory()[1] &= ~PTE_WRITE; /* what all levels allow */
    *leaf(IOVA, 4) = DATA | PTE_PRESENT | RW;
    enable(0);
    CHECK(reads(IOVA, DATA) && !writes(IOVA, DATA));
    CHECK(event_is(FAULT(FLAG_PR | FLAG_RW | FLAG_PE), IOVA));
    page(DATA | PTE_PRESENT | RW);
    entry[0] &= ~PTE_READ;
    enable(0);
    CHECK(writes(IOVA, DATA) && !reads(IOVA, DATA));
    CHECK(event_is(FAULT(FLAG_PR | FLAG_PE), IOVA) && no_event());
}

static void faults(void)
{
    page(DATA | RW); /* PR is 0 */
    CHECK(!writes(IOVA, DATA) && !reads(IOVA, DATA));
    CHECK(event_is(FAULT(FLAG_RW), IOVA) && event_is(FAULT(0), IOVA));
    CHECK(get(IOMMU_STATUS) & STATUS_EVENT);
    page(DATA | PTE_PRESENT | RW | BIT(52)); /* reserved */
    CHECK(!writes(IOVA, DATA));
    CHECK(event_is(FAULT(FLAG_PR | FLAG_RW | FLAG_RZ), IOVA));
    page(DATA | PTE_PRESENT | RW);
    CHECK(!reads(0xfee00000, DATA)); /* the interrupt range is written only */
    CHECK(event_is(EVENT(8, 0), 0xfee00000) && no_event());
}

static void hardware_errors(void)
{
    begin(4);
    root[0] = 0x0000fffffffff000ull | PTE_PRESENT | PTE_NEXT(3) | RW; /* no memory there */
    enable(0);
    CHECK(!writes(IOVA, DATA));
    uint64_t low = EVENT(4, BIT(57) | FLAG_RW | DOMAIN << 32), address = 0x0000fffffffff000ull;
    CHECK(event_is(low, address));
    CHECK(get(HARDWARE_STATUS) == 1 && get(HARDWARE_HIGH) == low && get(HARDWARE_LOW) == address);
    CHECK(!reads(IOVA, DATA) && get(HARDWARE_STATUS) == 3 && get(HARDWARE_HIGH) == low);
    put(HARDWARE_STATUS, 3);
    CHECK(get(HARDWARE_STATUS) == 0);
}

static void suppression(void)
{
    begin(4);
    entry[1] |= BIT(34); /* SA: none */
    enable(0);
    CHECK(!writes(IOVA, DATA) && no_event());
    begin(4);
    entry[1] |= BIT(33); /* SE: the first */
    enable(0);
    CHECK(!writes(IOVA, DATA) && !writes(IOVA, DATA));
    CHECK(event_is(FAULT(FLAG_RW), IOVA) && no_event());
    command(2ull << 60 | edu.device, 0); /* its entry is read anew */
    CHECK(completes() && !writes(IOVA, DATA) && event_is(FAULT(FLAG_RW), IOVA));
}

static void exclusion(void)
{
    begin(4);
    put(IOMMU_EXCLUSION_LIMIT, DATA);
    put(IOMMU_EXCLUSION_BASE, DATA | 1); /* for devices with EX */
    CHECK(get(IOMMU_EXCLUSION_LIMIT) == DATA);
    enable(0);
    CHECK(!writes(DATA, DATA) && event_is(FAULT(FLAG_RW), DATA));
    entry[1] |= BIT(39);
    enable(0);
    CHECK(writes(DATA, DATA) && reads(DATA + PAGE_SIZE - LENGTH, DATA + PAGE_SIZE - LENGTH));
    CHECK(!writes(DATA + PAGE_SIZE, DATA + PAGE_SIZE) && event_is(FAULT(FLAG_RW), DATA + PAGE_SIZE));
    entry[1] &= ~BIT(39);
    put(IOMMU_EXCLUSION_BASE, DATA | 3); /* for all */
    enable(0);
    CHECK(writes(DATA, DATA) && no_event());
}

static void accessed_dirty(void)
{
    begin(4);
    uint64_t *at = leaf(IOVA, 4);
    *at = DATA | PTE_PRESENT | RW;
    entry[0] |= 3 << 7; /* HAD */
    enable(0);
    CHECK(!(*(volatile uint64_t *)at & (BIT(5) | BIT(6))));
    CHECK(reads(IOVA, DATA) && (*(volatile uint64_t *)at & (BIT(5) | BIT(6))) == BIT(5));
    CHECK(writes(IOVA, DATA) && (*(volatile uint64_t *)at & (BIT(5) | BIT(6))) == (BIT(5) | BIT(6)));
    CHECK(*(volatile uint64_t *)root & BIT(5));
    *root &= ~BIT(5); /* a refused request marks what it came by, but not what refuses */
    *at = DATA | PTE_PRESENT | PTE_READ;
    forget_all();
    CHECK(!writes(IOVA, DATA) && (*(volatile uint64_t *)root & BIT(5)));
    CHECK(!(*(volatile uint64_t *)at & (BIT(5) | BIT(6))) && event_is(FAULT(FLAG_PR | FLAG_RW | FLAG_PE), IOVA));
    page(DATA | PTE_PRESENT | RW);
    CHECK(writes(IOVA, DATA) && !(*leaf(0, 4) & BIT(5))); /* without HAD nothing is marked */
}

/*
 * Tables as processors have them, for a PASID below 512; GIoV gives requests without one 0. With `nested` the tables are where
 * the host's map guest-physical addresses: each page at itself. GCR3 tables have `glx` + 1 levels. Returns the last entry.
 */
volatile uint64_t *guest(uint64_t gva, int n, int nested, uint64_t glx, uint64_t pasid)
{
    uint64_t *gcr3 = allocate_page(), *top = allocate_page(), *table = top, *last = gcr3;
    for (uint64_t level = glx; level; level--) {
        uint64_t *next = allocate_page();
        last[0] = physical(next) | 1;
        last = next;
    }
    last[pasid] = physical(top) | 1;
    for (int level = n; level > 1; level--) {
        uint64_t *next = allocate_page();
        table[gva >> (12 + 9 * (level - 1)) & 511] = physical(next) | 7;
        table = next;
    }
    table[gva >> 12 & 511] = DATA | 7;
    if (nested) /* 2 MiB pages: tables, and what they lead to */
        for (uint64_t at = 0; at < 0x4000000; at += LARGE_PAGE) {
            leaf(at, 4);
            ((uint64_t *)(((uint64_t *)(root[0] & PTE_ADDRESS))[0] & PTE_ADDRESS))[at / LARGE_PAGE] = at | PTE_PRESENT | RW;
        }
    uint64_t at = physical(gcr3);
    entry[0] |= BIT(54) | BIT(55) | glx << 56 | (at >> 12 & 7) << 58;
    entry[1] |= (at >> 15 & 0xffff) << 16 | (at >> 31) << 43;
    entry[2] |= (uint64_t)(n == 5) << 54;
    return &table[gva >> 12 & 511];
}

static void guest_tables(void)
{
    for (int nested = 0; nested <= 1; nested++)
        for (int n = 4; n <= 5; n++) {
            uint64_t glx = (uint64_t)(2 * nested + n - 4) % 3;
            uint64_t gva = n == 4 ? 0x00007f1234567000 : 0x00ff7f1234567000;
            begin(nested ? 4 : 0);
            volatile uint64_t *last = guest(gva, n, nested, glx, 0);
            enable(CONTROL_GUEST_TABLES);
            CHECK(reads(gva, DATA) && (*last & 0x60) == 0x20); /* A, and no D */
            CHECK(writes(gva, DATA) && (*last & 0x60) == 0x60 && no_event());
            *last = DATA | 5; /* W is 0 */
            forget_all();
            CHECK(!writes(gva, DATA));
            CHECK(event_is(EVENT(2, FLAG_GN | FLAG_US | FLAG_PR | FLAG_RW | FLAG_PE), gva));
        }
}

/* Port I/O and system management of HyperTransport: aborted or translated, as the entry says (2.1.2). */
static void special_addresses(void)
{
    static const struct { uint64_t address, type, translate; } cases[] = {
        {0xfdfc001000, 2, 2ull << 35}, /* IoCtl */
        {0xfdf9101000, 3, 3ull << 40}, /* SysMgt */
    };
    for (int i = 0; i < 2; i++) {
        begin(4);
        *leaf(cases[i].address, 4) = DATA | PTE_PRESENT | RW;
        enable(0);
        CHECK(!writes(cases[i].address, DATA));
        CHECK(event_is(EVENT(8, cases[i].type << 57), cases[i].address));
        entry[1] |= cases[i].translate;
        enable(0);
        CHECK(writes(cases[i].address, DATA) && no_event());
        entry[0] &= ~BIT(1); /* TV is 0 */
        enable(0);
        CHECK(!writes(cases[i].address, DATA));
        CHECK(event_is(EVENT(8, 7ull << 57), cases[i].address));
    }
    begin(4); /* a page of 2 MiB: what is special within it stays so */
    uint64_t address = 0xfdf9000000;
    leaf(address, 4);
    uint64_t *table = (uint64_t *)(root[address >> 39 & 511] & PTE_ADDRESS);
    table = (uint64_t *)(table[address >> 30 & 511] & PTE_ADDRESS);
    table[address >> 21 & 511] = DATA | PTE_PRESENT | RW;
    enable(0);
    CHECK(writes(address, DATA) && !writes(address + 0x100000, DATA));
    CHECK(event_is(EVENT(8, 3ull << 57), address + 0x100000));
    CHECK(!writes(0xfdf7000000, DATA) && !reads(0xfdf7000000, DATA)); /* reserved for interrupts */
    CHECK(event_is(EVENT(8, 6ull << 57), 0xfdf7000000) && event_is(EVENT(8, 0), 0xfdf7000000) && no_event());
}

const struct feature memory_features[] = {
    {"device-table", "all", device_table}, {"levels", "all", levels}, {"page-sizes", "all", page_sizes},
    {"skipped-level", "all", skipped_level}, {"rights", "all", rights}, {"faults", "all", faults},
    {"hardware-errors", "all", hardware_errors}, {"suppression", "all", suppression}, {"exclusion-range", "all", exclusion},
    {"accessed-dirty", "all", accessed_dirty}, {"guest-tables", "all", guest_tables},
    {"special-addresses", "all", special_addresses}, {0, 0, 0},
};
