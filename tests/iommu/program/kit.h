/* SPDX-License-Identifier: GPL-2.0-or-later */
/* What the features' programs share: IOMMUs, an edu device, interrupts that are counted, and a verdict for each feature. */
#ifndef KIT_H
#define KIT_H

#include "edu.h"
#include "iommu.h"
#include "memory.h"

/* The feature fails, and says why, unless `what`. */
#define CHECK(what) check(!!(what), #what, __FILE__, __LINE__)
/* Whether it comes to that within some guest time. */
#define SOON(what) ({ for (int i_ = 0; i_ < 4000 && !(what); i_++) __asm__ volatile("pause"); !!(what); })
#define NEVER(what) (!SOON(what))

#define BIT(n)  (1ull << (n))
#define RW      (PTE_READ | PTE_WRITE)
#define DOMAIN  0x5aull
#define IOVA    0x00345000ull
#define DATA    0x02000000ull /* memory that is mapped */
#define DATA2   0x02200000ull
#define LENGTH  16
#define EDU_BUFFER 0x40000
#define RING    PAGE_SIZE
#define ON      (IOMMU_CONTROL_ENABLE | IOMMU_CONTROL_EVENTS | IOMMU_CONTROL_COMMANDS)

/* Registers that iommu.h has not (48882, 3.4). */
#define PPR_BASE        0x0038
#define HARDWARE_HIGH   0x0040
#define HARDWARE_LOW    0x0048
#define HARDWARE_STATUS 0x0050
#define GA_BASE         0x00e0
#define GA_TAIL_ADDRESS 0x00e8
#define X2APIC_GENERAL  0x0170
#define X2APIC_PPR      0x0178
#define X2APIC_GA       0x0180
#define PPR_HEAD        0x2030
#define PPR_TAIL        0x2038
#define GA_HEAD         0x2040
#define GA_TAIL         0x2048

#define CONTROL_EVENT_INTERRUPT BIT(3)
#define CONTROL_WAIT_INTERRUPT  BIT(4)
#define CONTROL_TIMEOUT(n)      ((uint64_t)(n) << 5)
#define CONTROL_PPR             (BIT(13) | BIT(14) | BIT(15)) /* log, interrupt, requests */
#define CONTROL_GUEST_TABLES    BIT(16)
#define CONTROL_WIDE_ENTRIES    BIT(17) /* GAEn */
#define CONTROL_GUEST_APIC      (BIT(17) | BIT(25) | BIT(28) | BIT(29)) /* GAEn, GAMEn 1, log, interrupt */
#define CONTROL_WIDE_DESTINATIONS BIT(50) /* XTEn */
#define CONTROL_X2APIC          BIT(51)

#define STATUS_OVERFLOW  BIT(0)
#define STATUS_EVENT     BIT(1)
#define STATUS_WAIT      BIT(2)
#define STATUS_EVENT_RUN BIT(3)
#define STATUS_COMMAND_RUN BIT(4)
#define STATUS_PPR_OVERFLOW BIT(5)
#define STATUS_PPR       BIT(6)
#define STATUS_PPR_RUN   BIT(7)
#define STATUS_GA_RUN    BIT(8)
#define STATUS_GA_OVERFLOW BIT(9)
#define STATUS_GA        BIT(10)

/* Events (2.5): flags in the low quadword. */
#define FLAG_GN BIT(48)
#define FLAG_US BIT(50)
#define FLAG_I  BIT(51)
#define FLAG_PR BIT(52)
#define FLAG_RW BIT(53)
#define FLAG_PE BIT(54)
#define FLAG_RZ BIT(55)
#define EVENT(code, flags) ((uint64_t)(code) << 60 | (flags) | edu.device)

struct unit {
    volatile uint8_t *registers;
    uint32_t function; /* on PCI */
    uint64_t *table, *commands;
    volatile uint64_t *events, *ppr, *ga;
};

extern struct edu edu;
extern struct unit *unit; /* the one that is spoken to */
extern uint64_t *root;
extern uint64_t entry[4]; /* what the device's entry shall be */
extern volatile unsigned taken[256];

struct feature { const char *name, *when; void (*run)(void); };
extern const struct feature memory_features[], ring_features[], interrupt_features[], other_features[], ivrs_features[];
extern const struct feature service_features[];

void check(int holds, const char *what, const char *file, int line);

uint64_t get(uint32_t offset);
void put(uint32_t offset, uint64_t value);
/* Off, rings empty, all devices untranslated but edu, which gets a root without entries. */
void begin(int levels);
/* Write the entry, and on, with these control bits besides. */
void enable(uint64_t more);
/* Write the entry of a running IOMMU, and tell it nothing. */
void put_entry(void);
uint64_t *leaf(uint64_t iova, int levels);
/* Four levels, one page at IOVA with this entry. */
void page(uint64_t value);

/* Tables of a process, in memory.c. */
volatile uint64_t *guest(uint64_t gva, int n, int nested, uint64_t glx, uint64_t pasid);

/* Whether what the device writes arrives, and whether it reads what memory has. */
int writes(uint64_t iova, uint64_t spa);
int reads(uint64_t iova, uint64_t spa);

void command(uint64_t low, uint64_t high);
int completes(void); /* a COMPLETION_WAIT stores */
void forget_all(void);
/* The next event is this one; it is taken out. Or there is none. */
int event_is(uint64_t low, uint64_t high);
int no_event(void);

/* Where a function's interrupts go. */
void messages(uint32_t function, uint64_t address, uint32_t data);
/* Let the device raise its interrupt with this data, and whether the handler of `vector` has been entered for it. */
int arrives(uint32_t data, int vector);
#endif
