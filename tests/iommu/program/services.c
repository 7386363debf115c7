/* SPDX-License-Identifier: GPL-2.0-or-later */
/* A device with address translation services: what it keeps of translations, the pages that it asks for, its PASIDs. */
#include "kit.h"
#include "pci.h"

#define MMCONFIG 0xe0000000ull
#define ATS  0x0f
#define PRI  0x13
#define PASID 0x1b
#define EDU_PASID  0xa0
#define EDU_RESULT 0xa8
#define NOT_MAPPED 2
#define INVALID    3

#define I_BIT (1ull << 32) /* of the second quadword of an entry */
#define PAGES (3ull << 60 | DOMAIN << 32)
#define IOTLB (4ull << 60 | edu.device)
#define ALL_PAGES 0x7ffffffffffff001ull
#define GVA   0x00007f1234567000ull
#define PROCESS 5ull

/* The second word of an extended capability: what it can in 15:0, control in 31:16 (of page requests the other way round). */
static volatile uint32_t *extended(uint32_t id)
{
    volatile uint8_t *space = (volatile uint8_t *)(MMCONFIG + (uint64_t)edu.device * PAGE_SIZE);
    for (uint32_t at = 0x100; at; at = *(volatile uint32_t *)(space + at) >> 20)
        if ((*(volatile uint32_t *)(space + at) & 0xffff) == id)
            return (volatile uint32_t *)(space + at + 4);
    return 0;
}

static void ats(int on)
{
    *extended(ATS) = (uint32_t)on << 31;
}

static void page_requests(int on)
{
    volatile uint32_t *at = extended(PRI);
    at[2] = 8; /* allocation */
    at[0] = (uint32_t)on;
}

static void as_process(uint32_t prefix)
{
    *extended(PASID) = prefix ? 1 << 16 : 0;
    *(volatile uint32_t *)(edu.registers + EDU_PASID) = prefix;
}

static uint64_t result(void)
{
    return *(volatile uint64_t *)(edu.registers + EDU_RESULT);
}

static void translations(void)
{
    page(DATA | PTE_PRESENT | RW);
    uint64_t *at = leaf(IOVA, 4);
    *at = DATA | PTE_PRESENT | RW;
    ats(1);
    CHECK(!writes(IOVA, DATA) && event_is(EVENT(8, BIT(56)), IOVA)); /* I is 0: TR, and type 0 */
    entry[1] |= I_BIT;
    enable(0);
    CHECK(writes(IOVA, DATA) && reads(IOVA, DATA) && no_event());
    *at = DATA2 | PTE_PRESENT | RW;
    forget_all(); /* the IOMMU, not the device (1.3.3) */
    command(PAGES, IOVA);
    CHECK(completes() && writes(IOVA, DATA));
    command(IOTLB, IOVA + PAGE_SIZE); /* another page */
    CHECK(completes() && writes(IOVA, DATA));
    command(IOTLB, IOVA);
    CHECK(completes() && writes(IOVA, DATA2) && no_event());
    *at = DATA | PTE_PRESENT | RW;
    command(PAGES, IOVA);
    command(IOTLB, ALL_PAGES);
    CHECK(completes() && writes(IOVA, DATA));
    *at = DATA | PTE_PRESENT | PTE_READ;
    command(PAGES, IOVA);
    command(IOTLB, IOVA);
    CHECK(completes() && reads(IOVA, DATA) && !writes(IOVA, DATA) && result() == (IOVA | NOT_MAPPED));
    CHECK(!writes(IOVA + PAGE_SIZE, DATA) && result() == ((IOVA + PAGE_SIZE) | NOT_MAPPED) && no_event());
    *at = 0;
    command(PAGES, IOVA);
    CHECK(completes() && reads(IOVA, DATA)); /* the device has it still */
    ats(0);
    CHECK(!reads(IOVA, DATA) && event_is(EVENT(2, DOMAIN << 32), IOVA)); /* and now not: its address is not translated */
    ats(1);
    CHECK(!reads(IOVA, DATA) && result() == (IOVA | NOT_MAPPED) && no_event());
    ats(0);
}

/* A translated address passes while I says so, whatever the tables have. */
static void translated_addresses(void)
{
    page(DATA | PTE_PRESENT | RW);
    entry[1] |= I_BIT;
    enable(0);
    ats(1);
    CHECK(writes(IOVA, DATA));
    entry[0] &= ~BIT(1); /* TV */
    put_entry();
    command(2ull << 60 | edu.device, 0);
    CHECK(completes() && writes(IOVA, DATA) && no_event());
    entry[1] &= ~I_BIT;
    put_entry();
    command(2ull << 60 | edu.device, 0);
    CHECK(completes() && !writes(IOVA, DATA) && event_is(EVENT(8, 1ull << 57), DATA)); /* it is DATA that was sent */
    entry[0] = 0;
    put_entry();
    command(2ull << 60 | edu.device, 0);
    CHECK(completes() && !writes(IOVA, DATA) && event_is(EVENT(8, 1ull << 57), DATA) && no_event());
    ats(0);
}

/* What its page request has: a write to this page, the last of its group. */
static int asks(uint64_t where, uint64_t more, uint64_t group)
{
    uint64_t head = get(PPR_HEAD);
    if (!SOON(get(PPR_TAIL) != head))
        return 0;
    uint64_t low = unit->ppr[head / 8], high = unit->ppr[head / 8 + 1];
    put(PPR_HEAD, (head + 16) % RING);
    return low == (1ull << 60 | BIT(53) | BIT(41) | group << 32 | more | edu.device) && high == where;
}

static int done(void)
{
    return SOON(!edu_busy(&edu));
}

static void device_page_requests(void)
{
    begin(4);
    uint64_t *at = leaf(IOVA, 4);
    messages(unit->function, 0xfee00000, 0x65);
    entry[0] |= BIT(52); /* PPR */
    entry[1] |= I_BIT;
    enable(CONTROL_PPR);
    page_requests(1);
    ats(1);
    *(volatile uint64_t *)DATA = 0;
    edu_begin(&edu, IOVA, 0, 8, 1, 0);
    CHECK(SOON(taken[0x65] == 1) && asks(IOVA, 0, 0) && edu_busy(&edu));
    *at = DATA | PTE_PRESENT | RW;
    CHECK(NEVER(!edu_busy(&edu))); /* it waits to be told */
    command(7ull << 60 | edu.device, 0);
    CHECK(done() && result() == 0 && *(volatile uint64_t *)DATA == *(volatile uint64_t *)(edu.registers + EDU_BUFFER));
    *at = DATA | PTE_PRESENT | PTE_READ; /* the page is there, the right is not */
    command(PAGES, IOVA);
    command(IOTLB, IOVA);
    CHECK(completes());
    edu_begin(&edu, IOVA, 0, 8, 1, 0);
    CHECK(asks(IOVA, 0, 1));
    command(7ull << 60 | edu.device, 1ull << 32); /* success, and yet nothing is different: it asks again */
    CHECK(asks(IOVA, 0, 2));
    command(7ull << 60 | edu.device, (2ull | 1 << 12) << 32); /* invalid */
    CHECK(done() && result() == (IOVA | INVALID) && no_event());
    page_requests(0);
    ats(0);
}

static void device_pasids(void)
{
    begin(4);
    volatile uint64_t *last = guest(GVA, 4, 1, 0, PROCESS);
    entry[0] = (entry[0] & ~BIT(54)) | BIT(52); /* no GIoV: by the prefix alone */
    entry[1] |= I_BIT;
    enable(CONTROL_GUEST_TABLES | CONTROL_PPR);
    as_process(1u << 31 | (uint32_t)PROCESS);
    CHECK(writes(GVA, DATA) && reads(GVA, DATA) && no_event());
    CHECK(!writes(GVA + PAGE_SIZE, DATA));
    CHECK(event_is(EVENT(2, FLAG_GN | FLAG_US | FLAG_RW | PROCESS << 32), GVA + PAGE_SIZE));
    as_process(0);
    CHECK(!writes(GVA, DATA) && event_is(EVENT(2, FLAG_RW | DOMAIN << 32), GVA));
    as_process(1u << 31 | 6); /* another process, which has no tables */
    CHECK(!writes(GVA, DATA) && event_is(EVENT(2, FLAG_GN | FLAG_US | FLAG_RW | 6ull << 32), GVA));

    as_process(1u << 31 | (uint32_t)PROCESS);
    page_requests(1);
    ats(1);
    uint64_t group = 0;
    CHECK(writes(GVA, DATA) && (*last & 0x60) == 0x60);
    *last = DATA2 | 7;
    forget_all();
    command(IOTLB | 6ull << 48, GVA | BIT(2)); /* another process's */
    CHECK(completes() && writes(GVA, DATA));
    command(IOTLB | PROCESS << 48, GVA | BIT(2));
    CHECK(completes() && writes(GVA, DATA2));
    *last = 0;
    forget_all();
    command(IOTLB, 0x5000); /* a page of the host's: it may be any of a process's (2.4.4) */
    CHECK(completes());
    *(volatile uint64_t *)DATA = 0;
    edu_begin(&edu, GVA, 0, 8, 1, 0);
    uint64_t head = get(PPR_HEAD);
    CHECK(SOON(get(PPR_TAIL) != head));
    group = unit->ppr[head / 8] >> 32 & 0x1ff;
    CHECK(asks(GVA, BIT(56) | BIT(54) | PROCESS << 16, group)); /* GN, US */
    *last = DATA | 7;
    command(7ull << 60 | PROCESS << 32 | edu.device, BIT(2) | group << 32);
    CHECK(done() && result() == 0 && *(volatile uint64_t *)DATA == *(volatile uint64_t *)(edu.registers + EDU_BUFFER));
    CHECK(no_event());
    page_requests(0);
    ats(0);
    as_process(0);
}

const struct feature service_features[] = {
    {"translations", "services", translations}, {"translated-addresses", "services", translated_addresses},
    {"device-page-requests", "services", device_page_requests}, {"device-pasids", "services", device_pasids}, {0, 0, 0},
};
