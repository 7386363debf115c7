/* SPDX-License-Identifier: GPL-2.0-or-later */
/* What needs a machine of another kind: strict caches, two IOMMUs, a device that asks for pages. */
#include "kit.h"
#include "pci.h"

#define ALL_PAGES 0x7ffffffffffff003ull
#define PAGES     (3ull << 60 | DOMAIN << 32)

static void stale_pages(void)
{
    begin(4);
    uint64_t *at = leaf(IOVA, 4);
    *at = DATA | PTE_PRESENT | RW;
    enable(0);
    CHECK(writes(IOVA, DATA));
    *at = DATA2 | PTE_PRESENT | RW;
    CHECK(writes(IOVA, DATA)); /* forgotten */
    command(PAGES, IOVA + PAGE_SIZE); /* another page's */
    CHECK(completes() && writes(IOVA, DATA));
    command(PAGES ^ 1ull << 32, IOVA); /* another domain's */
    CHECK(completes() && writes(IOVA, DATA));
    command(PAGES, IOVA);
    CHECK(completes() && writes(IOVA, DATA2));
    *at = DATA | PTE_PRESENT | RW;
    command(PAGES, ALL_PAGES);
    CHECK(completes() && writes(IOVA, DATA));
    *at = DATA2 | PTE_PRESENT | RW;
    command(PAGES, (IOVA & ~0x7fffull) | 0x3000 | 1); /* S: 32 KiB around */
    CHECK(completes() && writes(IOVA, DATA2));
    *at = 0; /* the map is gone, the device goes on */
    CHECK(writes(IOVA, DATA2) && no_event());
    command(PAGES, IOVA);
    CHECK(completes() && !writes(IOVA, DATA2) && event_is(EVENT(2, FLAG_RW | DOMAIN << 32), IOVA));
}

/* The 2 MiB around an address, and PDE. */
static uint64_t large_page(uint64_t iova)
{
    return (iova & ~(LARGE_PAGE - 1ull)) | 0xff000 | 3;
}

/* A table is replaced, as after unmapping all of it: that its entries are forgotten does not make the entry above forgotten. */
static void stale_directory(void)
{
    begin(4);
    uint64_t *at = leaf(IOVA, 4), *next = allocate_page(), *directory = root;
    *at = DATA | PTE_PRESENT | RW;
    at[1] = 0;
    next[IOVA >> 12 & 511] = next[(IOVA >> 12 & 511) + 1] = DATA2 | PTE_PRESENT | RW;
    enable(0);
    CHECK(writes(IOVA, DATA));
    for (int level = 4; level > 2; level--)
        directory = (uint64_t *)(directory[IOVA >> (12 + 9 * (level - 1)) & 511] & PTE_ADDRESS);
    uint64_t *pde = &directory[IOVA >> 21 & 511], before = *pde;
    *pde = physical(next) | PTE_NEXT(1) | PTE_PRESENT | RW;
    command(PAGES, ALL_PAGES & ~2ull); /* all pages, and no directory */
    CHECK(completes() && writes(IOVA, DATA));
    CHECK(!writes(IOVA + PAGE_SIZE, DATA2)); /* not present by the stale one, and the tables are not walked again (1.3.2) */
    CHECK(event_is(EVENT(2, FLAG_RW | DOMAIN << 32), IOVA + PAGE_SIZE) && no_event());
    command(PAGES, large_page(IOVA + LARGE_PAGE)); /* another directory entry's */
    command(PAGES, IOVA | 2); /* a part of what it maps */
    CHECK(completes() && writes(IOVA, DATA));
    command(PAGES, large_page(IOVA));
    CHECK(completes() && writes(IOVA, DATA2));
    *pde = before;
    command(PAGES, ALL_PAGES);
    CHECK(completes() && writes(IOVA, DATA));
}

static void stale_entry(void)
{
    page(DATA | PTE_PRESENT | RW);
    CHECK(writes(IOVA, DATA));
    entry[0] &= ~PTE_WRITE;
    put_entry();
    CHECK(writes(IOVA, DATA));
    command(2ull << 60 | (edu.device + 8), 0); /* another device's */
    CHECK(completes() && writes(IOVA, DATA));
    command(2ull << 60 | edu.device, 0);
    CHECK(completes() && !writes(IOVA, DATA));
    CHECK(event_is(EVENT(2, FLAG_PR | FLAG_RW | FLAG_PE | DOMAIN << 32), IOVA));
}

static void stale_interrupt(void)
{
    begin(4);
    volatile uint32_t *table = allocate_page();
    table[5] = 1 | 0x91 << 16;
    entry[2] = 1 | 8 << 1 | physical((void *)table) | 2ull << 60;
    enable(0);
    CHECK(arrives(5, 0x91));
    table[5] = 1 | 0x92 << 16;
    CHECK(arrives(5, 0x91));
    command(5ull << 60 | edu.device, 0);
    CHECK(completes() && arrives(5, 0x92));
}

static void stale_everything(void)
{
    begin(4);
    uint64_t *at = leaf(IOVA, 4);
    *at = DATA | PTE_PRESENT | RW;
    enable(0);
    CHECK(writes(IOVA, DATA));
    *at = DATA2 | PTE_PRESENT | RW;
    entry[0] &= ~PTE_READ;
    put_entry();
    CHECK(writes(IOVA, DATA) && reads(IOVA, DATA));
    command(8ull << 60, 0);
    CHECK(completes() && writes(IOVA, DATA2) && !reads(IOVA, DATA2));
}

static void prefetch(void)
{
    begin(4);
    uint64_t *at = leaf(IOVA, 4);
    *at = DATA | PTE_PRESENT | RW;
    enable(0);
    command(6ull << 60 | edu.device, IOVA);
    CHECK(completes());
    *at = DATA2 | PTE_PRESENT | RW;
    CHECK(writes(IOVA, DATA)); /* what was there when it was fetched */
    command(6ull << 60 | edu.device, IOVA | BIT(4)); /* Inval */
    CHECK(completes() && writes(IOVA, DATA2));
    unsigned long at_fault = get(IOMMU_COMMAND_TAIL);
    root[0] = 0x0000fffffffff000ull | PTE_PRESENT | PTE_NEXT(3) | RW; /* no memory there: it stops (2.4.6.1) */
    forget_all();
    command(6ull << 60 | edu.device, IOVA);
    CHECK(event_is(EVENT(4, BIT(57) | DOMAIN << 32), 0x0000fffffffff000ull));
    CHECK(!(get(IOMMU_STATUS) & STATUS_COMMAND_RUN) && get(IOMMU_COMMAND_HEAD) == at_fault + 32);
}

/* Each IOMMU has devices of its own, and judges those by its own table. */
static void two_units(void)
{
    struct edu one = edu, two = edu;
    struct unit *a = unit, *b = unit + 1;
    two.device = edu.device + 8; /* the next slot */
    uint32_t on = pci_read(two.device, PCI_COMMAND) & 0xffff;
    CHECK(b->registers && b->registers != a->registers && pci_read(two.device, PCI_IDENTITY) == EDU_IDENTITY);
    pci_write(two.device, PCI_COMMAND, on | PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER);
    two.registers = (volatile uint8_t *)(uint64_t)(pci_read(two.device, PCI_BAR0) & ~15u);
    edu_to_memory(&one, DATA, 0, LENGTH);
    unit = b;
    begin(4);
    *leaf(IOVA, 4) = DATA2 | PTE_PRESENT | RW;
    put_entry();
    edu = two;
    enable(0);
    edu = one;
    unit = a;
    begin(4);
    *leaf(IOVA, 4) = DATA | PTE_PRESENT | RW;
    enable(0);
    edu = two;
    put_entry(); /* each table has both devices */
    forget_all();
    edu = one;
    uint64_t first = writes(IOVA, DATA) ? DATA : DATA2, second = first == DATA ? DATA2 : DATA;
    CHECK(writes(IOVA, first) && !writes(IOVA, second));
    struct unit *mine = first == DATA ? a : b, *other = first == DATA ? b : a;
    unit = mine;
    CHECK(!writes(IOVA + PAGE_SIZE, DATA) && event_is(EVENT(2, FLAG_RW | DOMAIN << 32), IOVA + PAGE_SIZE));
    unit = other;
    CHECK(no_event());
    edu = two;
    CHECK(writes(IOVA, second) && !writes(IOVA, first));
    CHECK(!writes(IOVA + PAGE_SIZE, DATA) && event_is(EVENT(2, FLAG_RW | DOMAIN << 32), IOVA + PAGE_SIZE));
    unit = mine;
    CHECK(no_event());
    put(IOMMU_CONTROL, 0); /* off, and the other one is not */
    edu = one;
    CHECK(writes(DATA + PAGE_SIZE, DATA + PAGE_SIZE));
    edu = two;
    CHECK(writes(IOVA, second));
    unit = other;
    put(IOMMU_CONTROL, 0);
    edu = one;
}

/* The device behind a bridge: whose transactions they are, and which entry and which segment of the device table decides. */
static void bridge(void)
{
    uint32_t bridge = pci_find(PCI_CLASS, 0xffff0000, 0x06040000), slot = edu.device & 0xff;
    CHECK(bridge != PCI_NOWHERE);
    pci_write(bridge, 0x18, 0x00808000); /* buses 80-80 are behind it */
    pci_write(bridge, PCI_COMMAND, (pci_read(bridge, PCI_COMMAND) & 0xffff) | PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER);
    edu.device = 0x8000 | slot;
    CHECK(pci_read(edu.device, PCI_IDENTITY) == EDU_IDENTITY);
}

static void segments(void)
{
    uint64_t *high = allocate_page(), *low = unit->table;
    uint32_t slot = edu.device & 0xff;
    bridge();
    begin(4);
    *leaf(IOVA, 4) = DATA | PTE_PRESENT | RW;
    unit->table = high - 0x8000 * 4; /* entry 8000 is the segment's first */
    put(0x100, physical(high));      /* DeviceIDs from 8000 on, with DevTblSegEn 1 */
    put_entry();
    unit->table = low;
    put(IOMMU_CONTROL, ON | 1ull << 34);
    forget_all();
    CHECK(writes(IOVA, DATA) && reads(IOVA, DATA) && no_event());
    CHECK(!writes(IOVA + PAGE_SIZE, DATA) && event_is(EVENT(2, FLAG_RW | DOMAIN << 32), IOVA + PAGE_SIZE));
    put(IOMMU_CONTROL, ON); /* one table again, of two pages: bus 80 is beyond it */
    forget_all();
    CHECK(!writes(IOVA, DATA) && event_is(EVENT(2, FLAG_RW), IOVA));
    edu.device = slot;
}

/* Conventional PCI: the bridge answers for all behind it. */
static void alias(void)
{
    uint32_t device = edu.device, requester = pci_find(PCI_CLASS, 0xffff0000, 0x06040000);
    bridge();
    begin(4);
    *leaf(IOVA, 4) = DATA | PTE_PRESENT | RW;
    edu.device = requester;
    enable(0);
    CHECK(writes(IOVA, DATA) && reads(IOVA, DATA) && no_event());
    CHECK(!writes(IOVA + PAGE_SIZE, DATA) && event_is(EVENT(2, FLAG_RW | DOMAIN << 32), IOVA + PAGE_SIZE));
    edu.device = device;
}

/* The tester is the device that asks while this one waits: for 0x1234000, PASID 0x42, tag 7; then tag 8, for
   which the log has no room, and tag 9, without the right. Then there are no tables of a PASID for the answer. */
static void page_requests(void)
{
    begin(4);
    messages(unit->function, 0xfee00000, 0x64);
    entry[0] |= BIT(52) | BIT(55); /* PPR, GV */
    enable(CONTROL_PPR | CONTROL_GUEST_TABLES);
    __asm__ volatile("hlt");
    CHECK(SOON(taken[0x64] == 1) && get(IOMMU_STATUS) & STATUS_PPR);
    CHECK(get(PPR_HEAD) == 0 && get(PPR_TAIL) == 16);
    CHECK(unit->ppr[0] == (1ull << 60 | BIT(56) | BIT(50) | 7ull << 32 | 0x42 << 16 | edu.device) && unit->ppr[1] == 0x1234000);
    command(7ull << 60 | 0x42ull << 32 | edu.device, BIT(2) | 7ull << 32); /* COMPLETE_PPR_REQUEST: success */
    CHECK(completes());
    put(PPR_HEAD, 32);
    put(IOMMU_STATUS, STATUS_PPR);
    __asm__ volatile("hlt");
    CHECK(SOON(taken[0x64] == 2) && get(PPR_TAIL) == 16);
    CHECK((get(IOMMU_STATUS) & (STATUS_PPR_OVERFLOW | STATUS_PPR_RUN)) == STATUS_PPR_OVERFLOW);
    put(IOMMU_STATUS, STATUS_PPR_OVERFLOW);
    entry[0] &= ~(BIT(52) | BIT(55));
    put_entry();
    command(2ull << 60 | edu.device, 0);
    put(IOMMU_CONTROL, get(IOMMU_CONTROL) | CONTROL_EVENT_INTERRUPT);
    CHECK(completes());
    __asm__ volatile("hlt");
    CHECK(SOON(taken[0x64] == 3) && event_is(EVENT(9, BIT(57) | BIT(50) | 9ull << 32 | 0x42 << 16), 0x1234000));
    uint64_t at = physical(unit->commands) + get(IOMMU_COMMAND_TAIL);
    command(7ull << 60 | 0x42ull << 32 | edu.device, BIT(2) | 9ull << 32);
    CHECK(event_is(EVENT(9, BIT(57) | BIT(48) | 9ull << 32 | 0x42 << 16), at) && completes());
    put(IOMMU_CONTROL, get(IOMMU_CONTROL) & ~CONTROL_PPR);
    at += 32;
    command(7ull << 60 | edu.device, 0); /* illegal without page requests */
    CHECK(event_is(5ull << 60, at) && !(get(IOMMU_STATUS) & STATUS_COMMAND_RUN));
}

const struct feature other_features[] = {
    {"stale-pages", "strict", stale_pages}, {"stale-directory", "strict", stale_directory}, {"stale-entry", "strict", stale_entry},
    {"stale-interrupt", "strict", stale_interrupt}, {"stale-everything", "strict", stale_everything},
    {"prefetch", "strict", prefetch}, {"two-units", "two", two_units}, {"segments", "segments", segments},
    {"alias", "alias", alias}, {"page-requests", "requests", page_requests}, {0, 0, 0},
};
