/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The same tables under two IOMMUs: each case makes a device table entry and page tables, has the edu device transfer four bytes,
   and prints what came of it and what the IOMMU has logged. Runs on the demo hypervisor's boot code.
   On the command line, `speed`: transfers instead of cases, with and without invalidations. */
#include "cpu.h"
#include "memory.h"
#include "pci.h"
#include "print.h"

#define EDU 0x11e81234u
#define BUFFER 0x40000ull
#define P 1ull
#define R (1ull << 61)
#define W (1ull << 62)
#define NEXT(n) ((uint64_t)(n) << 9)
#define MODE(n) ((uint64_t)(n) << 9)
#define IOVA 0x5000ull
#define ROUNDS 64

static volatile uint8_t *registers, *bar;
static uint8_t *commands, *events;
static uint64_t *device_table, *entry;
static volatile uint64_t done;
static uint32_t edu;

static volatile uint64_t *at(uint32_t offset)
{
    return (volatile uint64_t *)(registers + offset);
}

static void command(uint64_t first, uint64_t second)
{
    uint64_t tail = *at(0x2008);
    *(uint64_t *)(commands + tail) = first;
    *(uint64_t *)(commands + tail + 8) = second;
    *at(0x2008) = (tail + 16) % 4096;
}

static int wait(void)
{
    done = 0;
    command(1ull << 60 | (uint64_t)&done | 1, 1);
    for (int left = 20000; left && !done; left--)
        *at(0x2020);
    return done == 1;
}

static int flush(void)
{
    command(2ull << 60 | edu, 0);
    command(3ull << 60 | 7ull << 32, 0x7ffffffffffff001ull);
    return wait();
}

static void transfer(uint64_t source, uint64_t destination, uint32_t count, uint32_t kind)
{
    *(volatile uint32_t *)(bar + 0x80) = (uint32_t)source, *(volatile uint32_t *)(bar + 0x84) = source >> 32;
    *(volatile uint32_t *)(bar + 0x88) = (uint32_t)destination, *(volatile uint32_t *)(bar + 0x8c) = destination >> 32;
    *(volatile uint32_t *)(bar + 0x90) = count;
    *(volatile uint32_t *)(bar + 0x98) = kind;
    while (*(volatile uint32_t *)(bar + 0x98) & 1)
        ;
}

static void show(const char *name, const char *outcome)
{
    static uint64_t head;
    print("%s: %s", name, outcome);
    for (; *(uint64_t *)(events + head); head += 16)
        print(" event %016x %016x%s", *(uint64_t *)(events + head), *(uint64_t *)(events + head + 8),
              *at(0x2018) < head + 16 ? " beyond the tail" : "");
    *at(0x2010) = *at(0x2018);
    print("\n");
}

/* A write of the device to `iova`; `page` is where it should get. */
static void writes(const char *name, uint64_t iova, volatile uint32_t *page)
{
    static uint32_t mark = 0xabcd0000;
    static volatile uint32_t word;
    int flushed = flush();
    word = ++mark;
    uint64_t kept = *entry; /* the buffer is filled with translation off */
    *entry = 0;
    flush();
    transfer((uint64_t)&word, BUFFER, 4, 1);
    *entry = kept;
    flush();
    *page = 0;
    transfer(BUFFER, iova, 4, 3);
    show(name, !flushed ? "commands stopped" : *page == mark ? "arrived" : "blocked");
}

static void reads(const char *name, uint64_t iova, volatile uint32_t *page)
{
    static uint32_t mark = 0x600d0000;
    static volatile uint32_t word;
    flush();
    *page = ++mark;
    transfer(iova, BUFFER, 4, 1);
    uint64_t kept = *entry;
    *entry = 0;
    flush();
    word = 0;
    transfer(BUFFER, (uint64_t)&word, 4, 3);
    *entry = kept;
    flush();
    show(name, word == mark ? "arrived" : "blocked");
}

static void cases(void)
{
    uint64_t *l4 = allocate_page(), *l3 = allocate_page(), *l2 = allocate_page(), *l1 = allocate_page();
    volatile uint32_t *page = allocate_page();
    uint64_t root = physical(l4), table = P | R | W;
    entry = &device_table[4 * edu];
    entry[1] = 7;
    writes("V=0", physical((void *)page), page);
    *entry = P | 2 | R | W;
    writes("identity", physical((void *)page), page);
    *entry = P | 2 | R;
    writes("identity, IW=0", physical((void *)page), page);
    *entry = P;
    writes("TV=0", physical((void *)page), page);
    *entry = P | 2 | MODE(4) | root | R | W;
    writes("not present", IOVA, page);
    l4[0] = physical(l3) | NEXT(3) | table, l3[0] = physical(l2) | NEXT(2) | table, l2[0] = physical(l1) | NEXT(1) | table;
    l1[5] = physical((void *)page) | table;
    writes("4 KiB page", IOVA, page);
    reads("4 KiB page, read", IOVA, page);
    l1[5] = physical((void *)page) | P | R;
    writes("read-only page", IOVA, page);
    reads("read-only page, read", IOVA, page);
    l1[5] = physical((void *)page) | P | W;
    reads("write-only page, read", IOVA, page);
    l1[5] = physical((void *)page) | table;
    l3[0] &= ~W;
    writes("read-only level 3", IOVA, page);
    l3[0] |= W;
    l1[5] = physical((void *)page) | table | 1ull << 52;
    writes("reserved bit 52", IOVA, page);
    l1[5] = physical((void *)page) | table;
    l2[0] = physical(l1) | NEXT(3) | table;
    writes("NextLevel above", IOVA, page);
    l2[0] = physical(l1) | NEXT(1) | table;
    l4[0] = physical(l2) | NEXT(2) | table;
    writes("level 3 skipped", IOVA, page);
    writes("level 3 skipped, its bits not zero", IOVA | 0x40000000, page);
    l4[0] = physical(l3) | NEXT(3) | table;
    l2[1] = (physical((void *)page) & ~0x1fffffull) | table;
    writes("2 MiB page", 0x200000 | (physical((void *)page) & 0x1fffff), page);
    l2[1] = 0;
    for (unsigned i = 6; i < 8; i++)
        l1[i] = (physical((void *)page) & ~0x1fffull) | NEXT(7) | table; /* bit 12 is 0: 8 KiB */
    writes("8 KiB page", 0x6000 | (physical((void *)page) & 0x1fff), page);
    *entry = P | 2 | MODE(1) | physical(l1) | R | W;
    writes("beyond the reach of 1 level", 0x205000, page);
    *entry = P | 2 | MODE(7) | root | R | W;
    writes("Mode 7", IOVA, page);
    *entry = P | 2 | MODE(4) | root | R | W | 1ull << 63;
    writes("reserved bit 63 of the entry", IOVA, page);
    *entry = P | 2 | MODE(4) | root | R | W;
    entry[1] |= 1ull << 34; /* SA */
    writes("not present, SA", 0x9000, page);
    entry[1] &= ~(1ull << 34);
    command(0, 0);
    show("command 0", wait() ? "commands go on" : "commands stopped");
}

/* Timed from outside: the same transfers, with every page known, and with every page forgotten before it. */
static void speed(int cold)
{
    uint64_t *l1 = allocate_page(), *l2 = allocate_page();
    uint8_t *page = allocate_page();
    entry = &device_table[4 * edu];
    entry[1] = 7;
    l2[0] = physical(l1) | NEXT(1) | P | R | W;
    l1[5] = physical(page) | P | R | W;
    *entry = P | 2 | MODE(2) | physical(l2) | R | W;
    flush();
    print("start\n");
    for (int round = 0; round < ROUNDS; round++) {
        if (cold)
            flush();
        transfer(IOVA, BUFFER, 4, 1);
    }
    print("stop\n");
}

void timer_interrupt(void) /* traps.c calls it; no timer runs here */
{
}

_Noreturn void main(uint32_t information)
{
    serial_start();
    const uint32_t *multiboot = (const uint32_t *)(uint64_t)information;
    const char *line = multiboot[0] & 4 ? (const char *)(uint64_t)multiboot[4] : "";
    uint32_t device = 0, capability = 0;
    for (; device < 256 && !capability; device++)
        if ((pci_read(device, 0) & 0xffff) == 0x1022)
            capability = pci_capability(device, 0x0f);
    edu = pci_find(EDU);
    if (!capability || edu == NO_DEVICE)
        fatal("there is no IOMMU, or no edu device");
    uint64_t base = pci_read(device - 1, capability + 4) & 0xffffc000;
    if (!(pci_read(device - 1, capability + 4) & 1))
        pci_write(device - 1, capability + 4, (uint32_t)base | 1);
    registers = (volatile uint8_t *)base;
    bar = (volatile uint8_t *)(uint64_t)(pci_read(edu, 0x10) & ~0xfu);
    pci_write(edu, 4, 6);
    device_table = allocate_page();
    allocate_page();
    commands = allocate_page();
    events = allocate_page();
    *at(0x0000) = physical(device_table) | 1;
    *at(0x0008) = physical(commands) | 8ull << 56;
    *at(0x0010) = physical(events) | 8ull << 56;
    *at(0x0018) = 1 | 1 << 2 | 1 << 12;
    int slow = 0, cold = 0;
    for (; *line; line++) {
        slow |= line[0] == 's' && line[1] == 'p' && line[2] == 'e';
        cold |= line[0] == 'c' && line[1] == 'o' && line[2] == 'l';
    }
    if (slow)
        speed(cold);
    else
        cases();
    end(0);
}
