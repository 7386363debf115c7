/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Two guests above 4 GiB; the edu device belongs to the first. */
#include "apic.h"
#include "guest.h"
#include "iommu.h"
#include "memory.h"
#include "pci.h"
#include "print.h"
#include "schedule.h"
#include "svm.h"
#include "traps.h"

#define EDU 0x11e81234u
#define DRIVER 1
#define DEVICE_GPA 0xc0000000ull /* where the driver finds the registers */
#define TICK 200000
#define PRESENT 1ull
#define WRITABLE 2ull
#define USER 4ull
#define LARGE 0x80ull
#define ADDRESS 0x000ffffffffff000ull
#define GIB 0x40000000ull

/* boot.S maps 4 GiB; this adds the GiB in which the guests are. */
static void map_high(void)
{
    uint64_t *table, *directory = allocate_page();
    __asm__("mov %%cr3, %0" : "=r"(table));
    uint64_t *pointers = (uint64_t *)(table[0] & ADDRESS);
    for (uint64_t i = 0; i < 512; i++)
        directory[i] = (GUEST_START & ~(GIB - 1)) + i * LARGE_PAGE + (PRESENT | WRITABLE | LARGE);
    pointers[GUEST_START / GIB] = physical(directory) | PRESENT | WRITABLE;
}

/* One page of a device's registers, in a guest's nested table. */
static void map_device(struct guest *guest, uint64_t gpa, uint64_t spa)
{
    uint64_t *table = guest->table;
    for (int level = 3; level; level--) {
        uint64_t *entry = &table[gpa >> (12 + 9 * level) & 511];
        if (!(*entry & PRESENT))
            *entry = physical(allocate_page()) | PRESENT | WRITABLE | USER;
        table = (uint64_t *)(*entry & ADDRESS);
    }
    table[gpa >> 12 & 511] = spa | PRESENT | WRITABLE | USER;
}

_Noreturn void main(void)
{
    serial_start();
    map_high();
    traps_start();
    svm_start();
    uint32_t edu = pci_find(EDU);
    if (edu == NO_DEVICE)
        fatal("there is no edu device; start with --device edu,slot=03.0");
    iommu_start();
    for (uint64_t n = 1; n < MAX_GUESTS && guest_kinds[n - 1].name; n++)
        guest_start(n, 1);
    iommu_assign(edu, &guests[DRIVER]);
    map_device(&guests[DRIVER], DEVICE_GPA, pci_read(edu, 0x10) & ~0xfull);
    pci_write(edu, 4, 6); /* memory and bus mastering; interrupts of it are remapped to nowhere */
    apic_start(TICK);
    __asm__ volatile("sti");
    schedule();
    __asm__ volatile("cli");
    if (iommu_report() != 2)
        fatal("CHECK FAILED: two errant writes are to be in the log");
    for (uint64_t n = 1; n < MAX_GUESTS && guest_kinds[n - 1].name; n++)
        if (guests[n].state != FINISHED)
            fatal("CHECK FAILED: a guest did not end as it should");
    print("hypervisor: all well\n");
    end(0);
}
