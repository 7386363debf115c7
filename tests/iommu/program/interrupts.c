/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Interrupt messages of devices through interrupt tables, as the program's own handlers see them. */
#include "cpu.h"
#include "kit.h"

#define INDEX       5
#define REMAPPED    0x91
#define ENTRY       (1ull | (uint64_t)REMAPPED << 16) /* 32 bits, RemapEn, to APIC 0 */
#define GUEST_ENTRY (BIT(0) | BIT(2) | BIT(7) | 0xcafeull << 32) /* RemapEn, GALogIntr, GuestMode, a tag */
#define LAPIC_LOGICAL 0xfee000d0
#define REMAP       (2ull << 60) /* IntCtl */

static volatile uint32_t *table;

/* 256 entries, and the device's entry leads there. */
static void start(uint64_t control)
{
    begin(4);
    table = allocate_page();
    entry[2] = 1 | 8 << 1 | physical((void *)table) | REMAP;
    enable(control);
}

static void changed(void)
{
    command(5ull << 60 | edu.device, 0); /* INVALIDATE_INTERRUPT_TABLE */
    CHECK(completes());
}

static void set(uint32_t index, uint32_t value)
{
    table[index] = value;
    changed();
}

static void set_wide(uint64_t low, uint64_t high)
{
    ((volatile uint64_t *)table)[2 * INDEX] = low;
    ((volatile uint64_t *)table)[2 * INDEX + 1] = high;
    changed();
}

/* It does not arrive, and there is one event, which has the address of the message. */
static int refused(uint32_t data, uint64_t flags)
{
    return !arrives(data, (int)(data & 0xff)) && event_is(EVENT(2, FLAG_I | flags | DOMAIN << 32), 0xfee00000) && no_event();
}

static void narrow_entries(void)
{
    start(0);
    set(INDEX, ENTRY);
    CHECK(arrives(INDEX, REMAPPED) && no_event());
    set(INDEX, ENTRY + 0x10000);
    CHECK(arrives(INDEX, REMAPPED + 1));
    set(0x25, ENTRY | 1 << 2); /* arbitrated */
    CHECK(arrives(0x25, REMAPPED) && no_event());
    set(INDEX, ENTRY | 3 << 8); /* to APIC 3, which there is not */
    CHECK(!arrives(INDEX, REMAPPED));
    *(volatile uint32_t *)LAPIC_LOGICAL = 0x40000000;
    set(INDEX, ENTRY | BIT(6) | 0x40 << 8); /* DM: a logical destination */
    CHECK(arrives(INDEX, REMAPPED));
    set(INDEX, ENTRY | BIT(6) | 0x20 << 8);
    CHECK(!arrives(INDEX, REMAPPED) && no_event());
}

static void wide_entries(void)
{
    start(CONTROL_WIDE_ENTRIES);
    set_wide(1, 0x92);
    CHECK(arrives(INDEX, 0x92) && no_event());
    start(CONTROL_WIDE_ENTRIES | CONTROL_WIDE_DESTINATIONS);
    set_wide(1, 0x93);
    CHECK(arrives(INDEX, 0x93));
    set_wide(1, 0x93 | BIT(56)); /* to x2APIC 1000000 */
    CHECK(!arrives(INDEX, 0x93) && no_event());
}

static void refusals(void)
{
    start(0);
    CHECK(refused(0x45, 0)); /* RemapEn is 0 */
    set(0x45, ENTRY | BIT(31)); /* reserved */
    CHECK(refused(0x45, FLAG_PR | FLAG_RZ));
    CHECK(refused(0x145, 0)); /* beyond the table */
    set(0x45, 2); /* SupIOPF */
    CHECK(!arrives(0x45, 0x45) && no_event());
    set(0x45, 0);
    entry[2] |= BIT(5); /* IG */
    enable(0);
    CHECK(!arrives(0x45, 0x45) && no_event());
    entry[2] = 1; /* IntCtl 0 */
    enable(0);
    CHECK(!arrives(0x45, 0x45) && event_is(EVENT(8, 5ull << 57), 0xfee00000) && no_event());
    entry[2] |= BIT(5); /* IG is for these, too */
    enable(0);
    CHECK(!arrives(0x45, 0x45) && no_event());
}

static void untouched(void)
{
    start(0);
    entry[2] = 0; /* IV is 0 */
    enable(0);
    CHECK(arrives(0x46, 0x46));
    entry[2] = 1 | 1ull << 60; /* IntCtl 1: forwarded */
    enable(0);
    CHECK(arrives(0x47, 0x47) && no_event());
    entry[2] = 1 | 8 << 1 | physical((void *)table) | REMAP;
    enable(0);
    CHECK(!arrives(4 << 8, 2)); /* an NMI */
    begin(4);
    entry[2] = 1 | 8 << 1 | physical((void *)table) | REMAP | BIT(58); /* NMIPass */
    enable(0);
    CHECK(arrives(4 << 8, 2) && no_event());
}

/* The timer's pin of the I/O APIC: what it sends goes through the entry of the I/O APIC as a device. */
static void io_apic(void)
{
    static const uint64_t select = 0xfec00000, window = 0xfec00010;
    start(0);
    uint32_t device = 0xa0; /* 00:14.0, as the IVRS says */
    for (int i = 0; i < 4; i++)
        unit->table[device * 4 + (uint32_t)i] = entry[i];
    table[7] = 1 | 0x97 << 16;
    forget_all();
    *(volatile uint32_t *)select = 0x10 + 2 * 2 + 1;
    *(volatile uint32_t *)window = 0;
    *(volatile uint32_t *)select = 0x10 + 2 * 2;
    *(volatile uint32_t *)window = 7; /* the vector's place has the index */
    unsigned before = taken[0x97];
    outb(0x43, 0x30); /* counter 0, once */
    outb(0x40, 0x10);
    outb(0x40, 0);
    CHECK(SOON(taken[0x97] == before + 1));
    *(volatile uint32_t *)select = 0x10 + 2 * 2;
    *(volatile uint32_t *)window = 0x10000;
}

/* GuestMode: into the IRR of the guest's virtual APIC page; a guest that does not run is logged, and the host interrupted. */
static void guest_apic(void)
{
    start(CONTROL_GUEST_APIC);
    messages(unit->function, 0xfee00000, 0x6a);
    volatile uint32_t *page = allocate_page();
    set_wide(GUEST_ENTRY, 0xa5 | physical((void *)page));
    unsigned before = taken[0x6a], direct = taken[0xa5];
    arrives(INDEX, 0xa5);
    CHECK(SOON(taken[0x6a] == before + 1));
    CHECK(page[0x250 / 4] == 1 << 5 && taken[0xa5] == direct);
    CHECK(get(GA_HEAD) == 0 && get(GA_TAIL) == 8 && unit->ga[0] == (1ull << 60 | (uint64_t)edu.device << 32 | 0xcafe));
    CHECK(get(IOMMU_STATUS) & STATUS_GA);
    put(GA_HEAD, 8);
    put(IOMMU_STATUS, STATUS_GA);
    set_wide(GUEST_ENTRY | BIT(6), 0xa6 | physical((void *)page)); /* IsRun: a doorbell, and no log */
    arrives(INDEX, 0xa6);
    CHECK(page[0x250 / 4] == 3 << 5 && get(GA_TAIL) == 8 && taken[0x6a] == before + 1);
    set_wide(GUEST_ENTRY, 0xa7 | physical((void *)page));
    put(X2APIC_GA, 0x72ull << 32);
    put(IOMMU_CONTROL, ON | CONTROL_GUEST_APIC | CONTROL_X2APIC);
    unsigned wide = taken[0x72];
    arrives(INDEX, 0xa7);
    CHECK(SOON(taken[0x72] == wide + 1) && taken[0x6a] == before + 1 && no_event());
}

static void guest_apic_overflow(void)
{
    start(CONTROL_GUEST_APIC);
    messages(unit->function, 0xfee00000, 0x6b);
    volatile uint32_t *page = allocate_page();
    set_wide(GUEST_ENTRY, 0xa5 | physical((void *)page));
    unsigned before = taken[0x6b];
    put(GA_HEAD, 8); /* no room: one entry stays free between tail and head */
    arrives(INDEX, 0xa5);
    CHECK(SOON(page[0x250 / 4] == 1 << 5) && get(GA_TAIL) == 0 && NEVER(taken[0x6b] != before));
    CHECK((get(IOMMU_STATUS) & (STATUS_GA_RUN | STATUS_GA_OVERFLOW)) == STATUS_GA_OVERFLOW);
    put(GA_HEAD, 0);
    put(IOMMU_CONTROL, get(IOMMU_CONTROL) & ~BIT(28));
    put(IOMMU_STATUS, STATUS_GA_OVERFLOW);
    put(IOMMU_CONTROL, get(IOMMU_CONTROL) | BIT(28));
    CHECK((get(IOMMU_STATUS) & (STATUS_GA_RUN | STATUS_GA_OVERFLOW)) == STATUS_GA_RUN);
    uint64_t *shadow = allocate_page();
    put(GA_TAIL_ADDRESS, physical(shadow));
    arrives(INDEX, 0xa5);
    CHECK(SOON(taken[0x6b] == before + 1) && get(GA_TAIL) == 8 && *(volatile uint64_t *)shadow == 8);
    for (int i = 0; i < 600; i++) { /* a log of 4 KiB has 512 entries */
        put(GA_HEAD, get(GA_TAIL));
        arrives(INDEX, 0xa5);
    }
    CHECK(get(GA_TAIL) == 601 % 512 * 8 && !(get(IOMMU_STATUS) & STATUS_GA_OVERFLOW));
}

const struct feature interrupt_features[] = {
    {"remap-32", "all", narrow_entries}, {"remap-128", "all", wide_entries}, {"remap-refused", "all", refusals},
    {"remap-untouched", "all", untouched}, {"remap-io-apic", "all", io_apic}, {"guest-apic", "all", guest_apic},
    {"guest-apic-overflow", "all", guest_apic_overflow}, {0, 0, 0},
};
