/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Command buffer, event log, and the IOMMU's own interrupts. */
#include "kit.h"

#define MESSAGE 0xfee00000ull

static volatile uint64_t stored __attribute__((aligned(8)));

static uint64_t store(void)
{
    stored = 0;
    return 1ull << 60 | physical((void *)&stored) | 1;
}

static void completion_wait(void)
{
    begin(4);
    messages(unit->function, MESSAGE, 0x61);
    enable(CONTROL_WAIT_INTERRUPT);
    command(store(), 0x123456789abcdef0);
    CHECK(SOON(stored == 0x123456789abcdef0) && !(get(IOMMU_STATUS) & STATUS_WAIT));
    unsigned before = taken[0x61];
    for (unsigned n = 1; n <= 2; n++) {
        command(1ull << 60 | 2, 0); /* an interrupt, no store */
        CHECK(SOON(taken[0x61] == before + n) && get(IOMMU_STATUS) & STATUS_WAIT);
        put(IOMMU_STATUS, STATUS_WAIT);
        CHECK(!(get(IOMMU_STATUS) & STATUS_WAIT));
    }
    put(IOMMU_CONTROL, ON); /* ComWaitIntEn is 0: the bit only */
    command(1ull << 60 | 2, 0);
    CHECK(SOON(get(IOMMU_STATUS) & STATUS_WAIT) && taken[0x61] == before + 2);
}

static void command_wrap(void)
{
    begin(4);
    enable(0);
    for (int i = 0; i < 600; i++) { /* more than twice around */
        command(5ull << 60 | edu.device, 0);
        if (i % 100 == 99)
            CHECK(completes());
    }
    CHECK(get(IOMMU_COMMAND_HEAD) == get(IOMMU_COMMAND_TAIL) && no_event());
}

/* The ring stops in front of what is wrong, and goes on when it is put right and the ring turned on again. */
static void illegal_command(void)
{
    static const uint64_t wrong[] = {15ull << 60, 2ull << 60 | 1ull << 40}; /* no such command; a reserved bit */
    for (int i = 0; i < 2; i++) {
        begin(4);
        enable(0);
        uint64_t at = get(IOMMU_COMMAND_TAIL);
        command(wrong[i], 0);
        CHECK(!completes());
        CHECK(!(get(IOMMU_STATUS) & STATUS_COMMAND_RUN) && get(IOMMU_COMMAND_HEAD) == at);
        CHECK(event_is(5ull << 60, physical(unit->commands) + at));
        unit->commands[at / 8] = store();
        unit->commands[at / 8 + 1] = 7;
        put(IOMMU_CONTROL, ON & ~IOMMU_CONTROL_COMMANDS);
        CHECK(stored == 0);
        put(IOMMU_CONTROL, ON);
        CHECK(get(IOMMU_STATUS) & STATUS_COMMAND_RUN);
        CHECK(SOON(stored == 7 && get(IOMMU_COMMAND_HEAD) == get(IOMMU_COMMAND_TAIL)) && no_event());
    }
}

static void command_nowhere(void)
{
    begin(4);
    put(IOMMU_COMMAND_BASE, 0x000ffffffffff000ull | IOMMU_RING_SIZE);
    put(IOMMU_CONTROL, ON);
    put(IOMMU_COMMAND_TAIL, 16);
    CHECK(event_is(6ull << 60 | BIT(57), 0x000ffffffffff000ull));
    CHECK(!(get(IOMMU_STATUS) & STATUS_COMMAND_RUN));
    begin(4);
    enable(0);
    uint64_t at = get(IOMMU_COMMAND_TAIL);
    command(1ull << 60 | 0x000ffffffffff000ull | 1, 1); /* a store to where nothing is */
    CHECK(event_is(6ull << 60 | BIT(57), physical(unit->commands) + at));
}

/* A device without a cache of its own does not answer: the wait for it ends by InvTimeOut, 1 ms. */
static void iotlb_timeout(void)
{
    begin(4);
    enable(CONTROL_TIMEOUT(1));
    uint64_t at = physical(unit->commands) + get(IOMMU_COMMAND_TAIL);
    command(4ull << 60 | edu.device, IOVA);
    command(store(), 1); /* waits for it */
    CHECK(NEVER(stored == 1) && no_event());
    for (int i = 0; i < 200 && no_event(); i++)
        SOON(0);
    CHECK(event_is(EVENT(7, 0), at) && SOON(stored == 1));
}

static void event_log_overflow(void)
{
    begin(4);
    messages(unit->function, MESSAGE, 0x62);
    enable(CONTROL_EVENT_INTERRUPT);
    unsigned before = taken[0x62];
    put(IOMMU_EVENT_HEAD, 48); /* two entries are free: one stays so between tail and head */
    CHECK(!writes(IOVA, DATA) && SOON(taken[0x62] == before + 1) && get(IOMMU_EVENT_TAIL) == 16);
    put(IOMMU_STATUS, STATUS_EVENT);
    CHECK(!writes(IOVA, DATA) && SOON(taken[0x62] == before + 2) && get(IOMMU_EVENT_TAIL) == 32);
    put(IOMMU_STATUS, STATUS_EVENT);
    CHECK(get(IOMMU_STATUS) & STATUS_EVENT_RUN);
    CHECK(!writes(IOVA, DATA) && SOON(taken[0x62] == before + 3));
    CHECK(get(IOMMU_STATUS) & STATUS_OVERFLOW && !(get(IOMMU_STATUS) & STATUS_EVENT_RUN) && get(IOMMU_EVENT_TAIL) == 32);
    put(IOMMU_EVENT_HEAD, 32);
    CHECK(!writes(IOVA, DATA) && no_event()); /* room does not start it again */
    put(IOMMU_CONTROL, ON & ~IOMMU_CONTROL_EVENTS);
    put(IOMMU_STATUS, STATUS_OVERFLOW | STATUS_EVENT);
    put(IOMMU_CONTROL, ON | CONTROL_EVENT_INTERRUPT);
    CHECK(get(IOMMU_STATUS) & STATUS_EVENT_RUN);
    CHECK(!writes(IOVA + PAGE_SIZE, DATA) && SOON(taken[0x62] == before + 4));
    CHECK(event_is(EVENT(2, FLAG_RW | DOMAIN << 32), IOVA + PAGE_SIZE));
}

static void event_log_wrap(void)
{
    begin(4);
    enable(0);
    for (int i = 0; i < 300; i++) {
        edu_to_memory(&edu, IOVA + (uint64_t)i * PAGE_SIZE, 0, LENGTH);
        CHECK(event_is(EVENT(2, FLAG_RW | DOMAIN << 32), IOVA + (uint64_t)i * PAGE_SIZE));
    }
    CHECK(no_event() && !(get(IOMMU_STATUS) & STATUS_OVERFLOW));
}

/* The MSI capability as registers of the IOMMU has it (EFR.MsiCapMmioSup). */
static void msi_registers(void)
{
    begin(4);
    messages(unit->function, MESSAGE, 0x65);
    volatile uint32_t *data = (volatile uint32_t *)(unit->registers + 0x164);
    CHECK(*data == 0x65 && *(volatile uint32_t *)(unit->registers + 0x15c) == MESSAGE);
    *data = 0x66;
    enable(CONTROL_WAIT_INTERRUPT);
    unsigned old = taken[0x65], now = taken[0x66];
    command(1ull << 60 | 2, 0);
    CHECK(SOON(taken[0x66] == now + 1) && taken[0x65] == old);
}

/* With IntCapXTEn registers say where interrupts go, and the MSI capability does not (3.4.10). */
static void x2apic_registers(void)
{
    begin(4);
    messages(unit->function, MESSAGE, 0x63);
    put(X2APIC_GENERAL, 0x71ull << 32);
    enable(CONTROL_EVENT_INTERRUPT | CONTROL_WAIT_INTERRUPT | CONTROL_X2APIC);
    unsigned by_message = taken[0x63], by_register = taken[0x71];
    CHECK(!writes(IOVA, DATA) && SOON(taken[0x71] == by_register + 1));
    command(1ull << 60 | 2, 0);
    CHECK(SOON(taken[0x71] == by_register + 2));
    CHECK(taken[0x63] == by_message);
}

const struct feature ring_features[] = {
    {"completion-wait", "all", completion_wait}, {"command-wrap", "all", command_wrap},
    {"illegal-command", "all", illegal_command}, {"command-nowhere", "all", command_nowhere},
    {"iotlb-timeout", "all", iotlb_timeout}, {"event-log-overflow", "all", event_log_overflow},
    {"event-log-wrap", "all", event_log_wrap}, {"msi-registers", "all", msi_registers},
    {"x2apic-registers", "all", x2apic_registers}, {0, 0, 0},
};
