/* SPDX-License-Identifier: GPL-2.0-or-later */
/* An AMD IOMMU (AMD 48882): a device table for bus 0, page tables, commands, the event log. */
#ifndef IOMMU_H
#define IOMMU_H

#include <stdint.h>

#define IOMMU_CLASS 0x08060000u
#define IOMMU_BASE  0xfed80000ull /* where the emulators have its registers; firmware's IVRS table says so too */

/* Registers (48882, 3.4). */
#define IOMMU_DEVICE_TABLE   0x0000
#define IOMMU_COMMAND_BASE   0x0008
#define IOMMU_EVENT_BASE     0x0010
#define IOMMU_CONTROL        0x0018
#define IOMMU_EXCLUSION_BASE 0x0020
#define IOMMU_EXCLUSION_LIMIT 0x0028
#define IOMMU_FEATURES       0x0030
#define IOMMU_COMMAND_HEAD   0x2000
#define IOMMU_COMMAND_TAIL   0x2008
#define IOMMU_EVENT_HEAD     0x2010
#define IOMMU_EVENT_TAIL     0x2018
#define IOMMU_STATUS         0x2020

#define IOMMU_CONTROL_ENABLE   (1ull << 0)
#define IOMMU_CONTROL_EVENTS   (1ull << 2)
#define IOMMU_CONTROL_COMMANDS (1ull << 12)

#define IOMMU_ENTRIES   256 /* of each ring: a page */
#define IOMMU_DEVICES   256 /* of the device table: bus 0 */
#define IOMMU_RING_SIZE (8ull << 56)

/* Device table entry, 2.2.2: the first three quadwords are of use here. */
#define DTE_VALID       (1ull << 0)
#define DTE_TRANSLATION (1ull << 1)
#define DTE_MODE(n)     ((uint64_t)(n) << 9)
#define DTE_SIZE        32
/* Its third quadword: interrupts are checked, and (IntCtl) denied unless a table decides. A table of length 0 has one entry. */
#define DTE_INTERRUPTS       (1ull << 0)
#define DTE_INTERRUPTS_TABLE (2ull << 60)

/* Interrupt table entry, 2.2.5. */
#define IRTE_REMAP     (1u << 0)
#define IRTE_VECTOR(n) ((uint32_t)(n) << 16)
#define IRTE_APIC(n)   ((uint32_t)(n) << 8)

/* Host page table entry, 2.2.3. Read and write are in the same place in a device table entry. */
#define PTE_PRESENT  (1ull << 0)
#define PTE_NEXT(n)  ((uint64_t)(n) << 9)
#define PTE_READ     (1ull << 61)
#define PTE_WRITE    (1ull << 62)
#define PTE_ADDRESS  0x000ffffffffff000ull

#define EVENT_IO_PAGE_FAULT 2

struct event { uint64_t low, high; };

/* Is there one? */
int iommu_present(void);
/* Rings, a device table in which no access is allowed, and on. `interrupts`: of every entry the third quadword; 0 lets all
   interrupts pass, DTE_INTERRUPTS none. */
void iommu_start(uint64_t interrupts);
uint64_t *iommu_entry(uint32_t device);
/* Map a 4 KiB page in a table of `levels` levels. */
void iommu_map(uint64_t *root, int levels, uint64_t iova, uint64_t spa, uint64_t rights);
/* Give a device these tables. */
void iommu_assign(uint32_t device, uint16_t domain, const uint64_t *root, int levels);
/* Have the device's only interrupt message, whose data is 0, become this vector of this processor. */
void iommu_remap(uint32_t device, uint8_t vector, uint8_t apic);
/* One command; `iommu_wait` returns when all before it are done, 0 if that does not happen. */
void iommu_command(uint64_t low, uint64_t high);
int iommu_wait(void);
void iommu_forget_device(uint32_t device);
void iommu_forget_domain(uint16_t domain);
/* The next event of the log, or 0. */
int iommu_event(struct event *event);

static inline uint64_t iommu_read(uint32_t offset)
{
    return *(volatile uint64_t *)(IOMMU_BASE + offset);
}

static inline void iommu_write(uint32_t offset, uint64_t value)
{
    *(volatile uint64_t *)(IOMMU_BASE + offset) = value;
}

#endif
