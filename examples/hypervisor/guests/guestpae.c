/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Guest 2: 32-bit code under PAE paging. It yields each round, prints by hypercall, and reads MSRs that do not exist. */
#include "../hypercall.h"
#include <stdint.h>

#define HIGH 0xc0000000u
#define VECTOR_GP 13
#define UNKNOWN_MSR 0xc0011fffu
/* Memory from gpa 200000 up: there when first touched. */
#define UPPER ((volatile uint32_t *)(HIGH + 0x200000))
#define PAGES 512

volatile uint32_t counter;
volatile uint32_t faults; /* #GP so far */

struct gate { uint16_t offset_low, selector, type, offset_high; };
static struct gate idt[VECTOR_GP + 1];
extern const uint8_t general_protection_entry[];

static char line[64];
static uint32_t line_length;

static void put(const char *text)
{
    for (; *text; text++) {
        line[line_length++] = *text;
        if (*text == '\n') {
            hypercall(HYPERCALL_PRINT, (uint32_t)line - HIGH, line_length); /* a gpa is wanted */
            line_length = 0;
        }
    }
}

static void put_number(uint32_t value)
{
    char digits[11];
    char *p = &digits[10];
    *p = 0;
    do
        *--p = (char)('0' + value % 10);
    while (value /= 10);
    put(p);
}

static int read_msr(uint32_t msr, uint32_t *low)
{
    uint32_t before = faults, high;
    __asm__ volatile("rdmsr" : "=a"(*low), "=d"(high) : "c"(msr) : "memory");
    return faults == before;
}

/* The hypervisor injects #GP for an MSR that it does not know. */
void general_protection(uint32_t *frame)
{
    faults++;
    frame[1] += 2; /* EIP, past RDMSR */
}

void touch(uint32_t page)
{
    volatile uint32_t *word = UPPER + page % PAGES * 1024;
    *word += page + 1;
}

static void vendor(char *text)
{
    uint32_t *words = (uint32_t *)text;
    uint32_t leaf = 0x40000000;
    __asm__ volatile("cpuid" : "+a"(leaf), "=b"(words[0]), "=c"(words[1]), "=d"(words[2]));
    text[12] = 0;
}

void main(uint32_t iterations)
{
    uint32_t entry = (uint32_t)general_protection_entry, number, ignored;
    char hypervisor[13];
    idt[VECTOR_GP] = (struct gate){(uint16_t)entry, 0x08, 0x8e00, (uint16_t)(entry >> 16)};
    struct { uint16_t limit; uint32_t base; } __attribute__((packed)) pointer = {sizeof idt - 1, (uint32_t)idt};
    __asm__ volatile("lidt %0" : : "m"(pointer));

    vendor(hypervisor);
    if (!read_msr(MSR_GUEST_NUMBER, &number) || faults)
        hypercall(HYPERCALL_DONE, 1, 0);
    put("32-bit PAE guest, number ");
    put_number(number);
    put(", on \"");
    put(hypervisor);
    put("\"\n");

    for (counter = 0; iterations == 0 || counter < iterations; counter++) {
        touch(counter);
        if (counter < PAGES && UPPER[counter * 1024] != counter + 1)
            hypercall(HYPERCALL_DONE, 2, 0);
        if (counter % 4 == 0 && read_msr(UNKNOWN_MSR, &ignored))
            hypercall(HYPERCALL_DONE, 3, 0);
        if (counter % 64 == 63) {
            put("counter ");
            put_number(counter + 1);
            put(", #GP taken ");
            put_number(faults);
            put("\n");
        }
        hypercall(HYPERCALL_YIELD, 0, 0);
    }
    /* A page given back is empty when it is touched next. */
    if (hypercall(HYPERCALL_RELEASE, 0x200000, 0) || *UPPER)
        hypercall(HYPERCALL_DONE, 4, 0);
    put("done\n");
    hypercall(HYPERCALL_DONE, 0, 0);
}
