/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Round robin. A guest keeps the processor until a host tick, until it yields or halts, or until its end.
 */
#include "schedule.h"
#include "apic.h"
#include "exits.h"
#include "svm.h"

/* A virtual interrupt, the processor's own way (APM2 15.21.4): with V_IRQ set, VMRUN delivers the vector through the
   guest's IDT as soon as the guest has interrupts on, and clears V_IRQ. We need not look at the guest's IF. */
static void raise_timer(struct guest *guest)
{
    if (!guest->timer_vector)
        return;
    guest->vmcb->int_control |= V_IRQ | V_INTR_PRIO(15) | V_IGN_TPR;
    guest->vmcb->int_vector = (uint32_t)guest->timer_vector;
    guest->timer_ticks++;
    if (guest->state == HALTED)
        guest->state = RUNNABLE;
}

static void pass_ticks_on(void)
{
    static uint64_t seen;
    if (seen == host_ticks)
        return;
    seen = host_ticks; /* ticks that came while a guest had no time for them are one tick to it */
    for (unsigned n = 1; n <= MAX_GUESTS; n++)
        if (guests[n].state == RUNNABLE || guests[n].state == HALTED)
            raise_timer(&guests[n]);
}

static void run(struct guest *guest)
{
    uint64_t start = host_ticks;
    int turn;
    do {
        svm_enter(guest);
        turn = handle_exit(guest);
    } while (!turn && guest->state == RUNNABLE && host_ticks == start);
}

/* Everyone waits for the timer: so do we. STI takes effect behind HLT only, so no tick can slip in between. */
static void idle(void)
{
    uint64_t start = host_ticks;
    while (host_ticks == start) {
        __asm__ volatile("cli");
        if (host_ticks == start)
            __asm__ volatile("sti; hlt");
        else
            __asm__ volatile("sti");
    }
}

void schedule(void)
{
    for (;;) {
        int ran = 0, halted = 0;
        for (unsigned n = 1; n <= MAX_GUESTS; n++) {
            pass_ticks_on();
            if (guests[n].state == RUNNABLE) {
                run(&guests[n]);
                ran = 1;
            } else if (guests[n].state == HALTED) {
                halted = 1;
            }
        }
        if (!ran && !halted)
            return;
        if (!ran)
            idle();
    }
}
