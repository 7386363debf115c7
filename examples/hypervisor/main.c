/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The whole story: start the machine's parts, start the guests, run them, say what happened. */
#include "apic.h"
#include "guest.h"
#include "memory.h"
#include "options.h"
#include "print.h"
#include "schedule.h"
#include "svm.h"
#include "traps.h"

static const char *const columns[REASONS] = {
    "INTR", "CPUID", "IOIO", "MSR", "HLT", "VMMCALL", "NPF", "#PF", "CR0", "other",
};

static uint64_t known_guests(void)
{
    uint64_t count = 0;
    while (count < MAX_GUESTS && guest_kinds[count].name)
        count++;
    return count;
}

/* Returns how many guests did not end the way they should. */
static uint32_t summary(void)
{
    static const char *const ends[] = {"", "runs", "halted", "finished", "stopped"};
    uint64_t total = 0;
    uint32_t wrong = 0;
    print("hypervisor: #VMEXITs by reason\n  %-20s", "guest");
    for (int i = 0; i < REASONS; i++)
        print("%8s", columns[i]);
    print("%8s  end\n", "total");
    for (uint64_t n = 1; n <= MAX_GUESTS; n++) {
        const struct guest *guest = &guests[n];
        if (guest->state == ABSENT)
            continue;
        uint64_t sum = 0;
        print("  %u %-18s", n, guest->kind->name);
        for (int i = 0; i < REASONS; i++) {
            print("%8u", guest->exits[i]);
            sum += guest->exits[i];
        }
        int right = guest->state == (guest->kind->must_finish ? FINISHED : STOPPED);
        print("%8u  %s%s\n", sum, ends[guest->state], right ? "" : " (unexpected)");
        wrong += !right;
        total += sum;
    }
    print("hypervisor: %u #VMEXITs, %u host ticks\n", total, host_ticks);
    return wrong;
}

_Noreturn void main(uint32_t multiboot_information)
{
    serial_start();
    uint64_t count = known_guests();
    struct options options = read_options(multiboot_information, (uint32_t)((1u << (count + 1)) - 2));
    uint64_t need = GUEST_START + count * GUEST_STRIDE;
    if (options.memory && options.memory < need)
        fatal("too little memory: the guests need 16 MiB and 4 MiB for each (README.md)");
    traps_start();
    svm_start();
    for (uint64_t n = 1; n <= count; n++)
        if (options.guests >> n & 1)
            guest_start(n, options.loop);
    apic_start(options.tick);
    __asm__ volatile("sti"); /* and so it stays: CLGI in vmrun.S guards the one place that minds */
    schedule();
    __asm__ volatile("cli");
    uint32_t wrong = summary();
    if (wrong)
        fatal("CHECK FAILED: a guest did not end as it should");
    print("hypervisor: all well\n");
    end(0);
}
