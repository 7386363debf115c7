/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Guest 1: 64-bit code in the upper half, with a timer. Its output goes to a serial port that only seems to be there. */
#include "../hypercall.h"
#include <stdint.h>

#define COM1 0x3f8
#define TIMER_VECTOR 32
#define WINDOW ((volatile uint64_t *)0xffffffffa0000000)
#define WINDOW_WORDS (8 * 4096 / 8)

volatile uint64_t counter; /* rounds of the main loop so far */
volatile uint64_t ticks;   /* timer interrupts so far */
volatile uint64_t checksum;

struct gate {
    uint16_t offset_low, selector;
    uint8_t ist, type;
    uint16_t offset_middle;
    uint32_t offset_high, reserved;
} __attribute__((packed));

static struct gate idt[TIMER_VECTOR + 1];
extern const uint8_t timer_entry[];

static void put(const char *text)
{
    for (; *text; text++)
        __asm__ volatile("outb %0, %1" : : "a"(*text), "Nd"((uint16_t)COM1));
}

static void put_number(uint64_t value)
{
    char digits[21];
    char *p = &digits[20];
    *p = 0;
    do
        *--p = (char)('0' + value % 10);
    while (value /= 10);
    put(p);
}

/* Called by timer_entry (guest64.S) for each virtual timer interrupt. */
void tick(void)
{
    ticks++;
}

/* Fill the window with a pattern and add it up again. */
uint64_t work(uint64_t round)
{
    uint64_t sum = 0;
    for (uint64_t i = 0; i < WINDOW_WORDS; i += 2)
        WINDOW[i] = round + i;
    for (uint64_t i = 0; i < WINDOW_WORDS; i += 2)
        sum += WINDOW[i];
    return sum;
}

static uint64_t expected_work(uint64_t round)
{
    uint64_t n = WINDOW_WORDS / 2;
    return n * round + 2 * (n * (n - 1) / 2);
}

static void start_timer(void)
{
    uint64_t entry = (uint64_t)timer_entry;
    idt[TIMER_VECTOR] = (struct gate){
        .offset_low = (uint16_t)entry,
        .selector = 0x08,
        .type = 0x8e,
        .offset_middle = (uint16_t)(entry >> 16),
        .offset_high = (uint32_t)(entry >> 32),
    };
    struct { uint16_t limit; uint64_t base; } __attribute__((packed)) pointer = {sizeof idt - 1, (uint64_t)idt};
    __asm__ volatile("lidt %0" : : "m"(pointer));
    hypercall(HYPERCALL_TIMER, TIMER_VECTOR, 0);
    __asm__ volatile("sti");
}

static void wait_for_tick(void)
{
    uint64_t before = ticks;
    while (ticks == before)
        __asm__ volatile("hlt");
}

void main(uint32_t iterations)
{
    put("64-bit guest at ");
    put("FFFFFFFF80100000, paging on\n");
    start_timer();
    for (counter = 0; iterations == 0 || counter < iterations; counter++) {
        uint64_t sum = work(counter);
        if (sum != expected_work(counter))
            hypercall(HYPERCALL_DONE, 1, 0);
        checksum += sum;
        if (counter % 8 == 7)
            wait_for_tick();
        if (counter % 32 == 31) {
            put("counter ");
            put_number(counter + 1);
            put(", checksum ");
            put_number(checksum);
            put("\n");
        }
    }
    put("done\n");
    hypercall(HYPERCALL_DONE, ticks == 0, 0);
}
