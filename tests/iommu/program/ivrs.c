/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The IOMMU as ACPI describes it: where its registers are, and memory that has to stay mapped (48882, 5). */
#include "kit.h"
#include "pci.h"

#define RSDP 0x2052545020445352ull /* "RSD PTR " */
#define IVRS 0x53525649u
#define IVHD_SPECIAL 0x48
#define UNITY BIT(0)

struct rsdp {
    uint64_t signature;
    uint8_t checksum, oem[6], revision;
    uint32_t rsdt, length;
    uint64_t xsdt;
} __attribute__((packed));
struct table { uint32_t signature, length; uint8_t rest[28]; } __attribute__((packed));
struct block { uint8_t type, flags; uint16_t length, device; } __attribute__((packed));
struct ivhd { struct block block; uint16_t capability; uint64_t base; } __attribute__((packed));
struct ivmd { struct block block; uint8_t rest[2]; uint64_t reserved, start, length; } __attribute__((packed));

static const struct table *find(void)
{
    for (uint64_t at = 0xe0000; at < 0x100000; at += 16) {
        const struct rsdp *rsdp = (const struct rsdp *)at;
        if (rsdp->signature != RSDP)
            continue;
        const struct table *xsdt = (const struct table *)rsdp->xsdt;
        for (uint32_t i = 36; i < xsdt->length; i += 8) {
            uint64_t where = 0;
            copy(&where, (const uint8_t *)xsdt + i, 8);
            if (((const struct table *)where)->signature == IVRS)
                return (const struct table *)where;
        }
    }
    return 0;
}

/* The device number of the I/O APIC, a special device of variety 1. */
static uint32_t io_apic(const struct ivhd *ivhd)
{
    const uint8_t *first = (const uint8_t *)ivhd, *at = first + (ivhd->block.type == 0x10 ? 24 : 40);
    const uint8_t *end = first + ivhd->block.length;
    while (at < end) {
        if (*at == IVHD_SPECIAL && at[7] == 1)
            return (uint32_t)at[5] | (uint32_t)at[6] << 8;
        at += *at < 0x40 ? 4 : *at < 0x80 ? 8 : 22 + at[21];
    }
    return 0;
}

static void described(void)
{
    const struct table *ivrs = find();
    CHECK(ivrs);
    if (!ivrs)
        return;
    uint8_t sum = 0;
    for (uint32_t i = 0; i < ivrs->length; i++)
        sum = (uint8_t)(sum + ((const uint8_t *)ivrs)[i]);
    CHECK(sum == 0);
    begin(4);
    unsigned kinds = 0, reserved = 0;
    for (uint32_t i = 48; i < ivrs->length;) {
        const struct block *block = (const struct block *)((const uint8_t *)ivrs + i);
        CHECK(block->length);
        if (!block->length)
            return;
        i += block->length;
        if (block->type < 0x20 || block->type == 0x40) {
            const struct ivhd *ivhd = (const struct ivhd *)block;
            kinds |= block->type == 0x10 ? 1 : block->type == 0x11 ? 2 : 4;
            CHECK(block->device == unit->function && ivhd->base == (uint64_t)unit->registers);
            CHECK((pci_read(unit->function, ivhd->capability) & 0xff) == 0x0f);
            CHECK(io_apic(ivhd) == 0xa0);
        } else {
            const struct ivmd *ivmd = (const struct ivmd *)block;
            CHECK(block->type == 0x21 && block->device == edu.device && block->flags & UNITY);
            for (uint64_t at = ivmd->start; at < ivmd->start + ivmd->length; at += PAGE_SIZE, reserved++)
                iommu_map(root, 4, at, at, (block->flags & 2 ? PTE_READ : 0) | (block->flags & 4 ? PTE_WRITE : 0));
        }
    }
    CHECK(kinds == 7 && reserved == 3 * 2); /* an IVMD behind each type of IVHD */
    enable(0);
    CHECK(writes(DATA, DATA) && reads(DATA + PAGE_SIZE, DATA + PAGE_SIZE) && no_event());
    CHECK(!writes(DATA + 2 * PAGE_SIZE, DATA + 2 * PAGE_SIZE));
    CHECK(event_is(EVENT(2, FLAG_RW | DOMAIN << 32), DATA + 2 * PAGE_SIZE));
}

const struct feature ivrs_features[] = {{"ivrs", "ivrs", described}, {0, 0, 0}};
