/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Transfers of half a page by an edu device, each across a border of pages and so through two translations.
 *
 *   mode=off    the IOMMU is off: what device and processor cost by themselves
 *   mode=hot    always the same two pages
 *   mode=cold   pages that no translation is kept of: others each time, and all are invalidated before they come again
 *   n=N         so many transfers, of which those before the line "start" do not count
 */
#include "apic.h"
#include "arguments.h"
#include "edu.h"
#include "iommu.h"
#include "memory.h"
#include "pci.h"
#include "print.h"
#include "traps.h"

#define IOVA   0x04000000ull
#define PAGES  512 /* that IOVA maps, to as many of memory */
#define DATA   0x02000000ull
#define LEVELS 4
#define DOMAIN 1
#define LENGTH (EDU_SIZE / 2)

#define MSI_CAPABILITY 5
#define APIC_TIMER_LVT 0xfee00320ull

static struct edu edu;

/* The device's MSI on the vector that traps.c counts ticks of. */
static void use_msi(void)
{
    uint32_t at = pci_read(edu.device, 0x34) & 0xfc;
    while (at && (pci_read(edu.device, at) & 0xff) != MSI_CAPABILITY)
        at = pci_read(edu.device, at) >> 8 & 0xfc;
    if (!at)
        fatal("the edu device has no MSI");
    pci_write(edu.device, at + 4, 0xfee00000);
    pci_write(edu.device, at + 8, 0);
    pci_write(edu.device, at + 12, TIMER_VECTOR);
    pci_write(edu.device, at, pci_read(edu.device, at) | 1 << 16);
}

/* The processor sleeps meanwhile: a machine that counts instructions for time goes straight to the transfer's end. */
static void transfer(uint64_t address)
{
    edu_begin(&edu, address, 0, LENGTH, 1, 1);
    while (edu_busy(&edu))
        __asm__ volatile("sti; hlt; cli");
    edu_acknowledge(&edu);
}

static void transfers(uint64_t count, uint64_t base, int cold)
{
    uint64_t page = 0;
    for (uint64_t i = 0; i < count; i++) {
        transfer(base + page * PAGE_SIZE + PAGE_SIZE - LENGTH / 2);
        if (!cold)
            continue;
        page += 2;
        if (page + 2 >= PAGES) {
            page = 0;
            iommu_forget_domain(DOMAIN);
            if (!iommu_wait())
                fatal("the IOMMU does not answer");
        }
    }
}

_Noreturn void main(uint32_t information)
{
    serial_start();
    traps_start();
    uint64_t count = number_argument(information, "n=", 1000);
    int off = has_argument(information, "mode=off"), cold = has_argument(information, "mode=cold");
    if (!edu_start(&edu))
        fatal("there is no edu device");
    use_msi();
    apic_start(0xffffffff);
    *(volatile uint32_t *)APIC_TIMER_LVT |= 1 << 16; /* no ticks */
    if (!off) {
        if (!iommu_present())
            fatal("there is no IOMMU");
        uint64_t *root = allocate_page();
        for (uint64_t i = 0; i < PAGES; i++)
            iommu_map(root, LEVELS, IOVA + i * PAGE_SIZE, DATA + i * PAGE_SIZE, PTE_READ | PTE_WRITE);
        iommu_start(0);
        iommu_assign(edu.device, DOMAIN, root, LEVELS);
    }
    transfers(PAGES / 2 + 2, off ? DATA : IOVA, cold);
    print("iommuspeed: start\n");
    transfers(count, off ? DATA : IOVA, cold);
    print("iommuspeed: done\n");
    end(0);
}
