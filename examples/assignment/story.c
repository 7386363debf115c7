/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What is different from the demo hypervisor, whose sources this one is made of: the linker leads calls of its functions
 * through those here (ld --wrap), so that not a line of it had to be changed.
 *
 *   read_options   two words more on the command line
 *   apic_start     the last thing before the guests run: the device is given away here
 *   handle_exit    first configuration space, waiting for the device, and what the IOMMU has to say
 *   trap           first the device's interrupt
 */
#include "apic.h"
#include "assign.h"
#include "edu.h"
#include "exits.h"
#include "iommu.h"
#include "memory.h"
#include "npt.h"
#include "options.h"
#include "print.h"
#include "../bench/arguments.h"

#define HIGH_MEMORY 0x100000000ull
#define DRIVER      1 /* the guest with the driver */
#define PTE_TABLE   3ull
#define PTE_LARGE   0x83ull

static int unguarded;

struct options __real_read_options(uint32_t information, uint32_t all_guests);
void __real_apic_start(uint32_t count);
int __real_handle_exit(struct guest *guest);

struct options __wrap_read_options(uint32_t information, uint32_t all_guests)
{
    unguarded = has_argument(information, "unguarded");
    return __real_read_options(information, all_guests);
}

/* boot.S maps 4 GiB to themselves; one more follows. Returns 0 if there is no memory. */
static int map_high_memory(void)
{
    uint64_t *pml4, *directory = allocate_page();
    __asm__ volatile("mov %%cr3, %0" : "=r"(pml4));
    uint64_t *pdpt = (uint64_t *)(*pml4 & PTE_ADDRESS);
    for (uint64_t i = 0; i < 512; i++)
        directory[i] = (HIGH_MEMORY + i * LARGE_PAGE) | PTE_LARGE;
    pdpt[4] = physical(directory) | PTE_TABLE;
    volatile uint64_t *word = (volatile uint64_t *)HIGH_MEMORY;
    *word = 0x6d656d6f7279ull;
    return *word == 0x6d656d6f7279ull;
}

/* To where a device with 28 address bits would never reach by itself. */
static void move_up(struct guest *guest)
{
    struct guest before = *guest;
    if (!map_high_memory()) {
        print("hypervisor: no memory above 4 GiB: guest %u stays where it is\n", guest->number);
        return;
    }
    guest->base = HIGH_MEMORY + LARGE_PAGE;
    npt_create(guest);
    for (uint64_t gpa = 0; gpa < guest->kind->size; gpa += PAGE_SIZE)
        copy((void *)guest_to_system(guest, gpa), (void *)guest_to_system(&before, gpa), PAGE_SIZE);
    print("hypervisor: guest %u: now at spa %x, nCR3 %x\n", guest->number, guest->base, physical(guest->table));
}

void __wrap_apic_start(uint32_t count)
{
    struct guest *guest = &guests[DRIVER];
    if (guest->state == RUNNABLE) {
        int guarded = !unguarded;
        if (guarded && !iommu_present())
            fatal("no IOMMU: a device that reaches all memory is not given to a guest (README.md, \"unguarded\")");
        move_up(guest);
        if (guarded)
            iommu_start(DTE_INTERRUPTS); /* a device that writes to FEE00000 interrupts, whatever its driver has set up */
        assign(guest, EDU_IDENTITY, guarded);
    }
    __real_apic_start(count);
}

int __wrap_handle_exit(struct guest *guest)
{
    if (!unguarded)
        assign_report();
    if (assign_port(guest))
        return 0;
    if (assign_halt(guest))
        return 1;
    return __real_handle_exit(guest);
}

/* What traps.S has pushed. */
struct frame { uint64_t registers[15], vector; };

void __real_trap(struct frame *frame);

void __wrap_trap(struct frame *frame)
{
    if (frame->vector == DEVICE_VECTOR)
        assign_interrupt();
    else
        __real_trap(frame);
}
