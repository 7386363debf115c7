/* SPDX-License-Identifier: GPL-2.0-or-later */
/* What the hypervisor knows about each guest. */
#ifndef GUEST_H
#define GUEST_H

#include "vmcb.h"
#include "vmrun.h"

/* How a guest begins its life. */
enum start {
    START_PROTECTED, /* 32-bit protected mode, flat segments, no paging, no GDT in memory: as a multiboot kernel */
    START_REAL,      /* real mode, CS:IP = 0:load, which the processor runs as paged real mode */
};

/* In which size of page a guest's memory is mapped, and when. */
enum mapping {
    MAP_REVERSED, /* 4 KiB pages at once, the last frame first: neighbours for the guest are never neighbours in memory */
    MAP_SMALL,    /* 4 KiB pages at once, in order */
    MAP_LARGE,    /* the first 2 MiB as one large page, what follows in 4 KiB pages at first touch (#NPF) */
    MAP_SHADOW,   /* no nested paging: 4 KiB pages of a shadow table at first touch (#PF) */
};

/* The fixed part: guests.c lists them. */
struct guest_kind {
    const char *name;
    const uint8_t *image, *image_end; /* a flat binary, loaded and entered at `load` */
    uint64_t load;                    /* gpa */
    uint64_t size;                    /* bytes of guest memory from gpa 0 up */
    uint64_t iterations;              /* its usual work, handed over in EBX */
    enum start start;
    enum mapping mapping;
    int must_finish;                  /* 1: it has to call DONE with 0; 0: it has to be stopped by the hypervisor */
};

enum state { ABSENT, RUNNABLE, HALTED, FINISHED, STOPPED };

/* The columns of the summary. */
enum reason { BY_INTR, BY_CPUID, BY_IOIO, BY_MSR, BY_HLT, BY_VMMCALL, BY_NPF, BY_PF, BY_CR0, BY_OTHER, REASONS };

struct guest {
    uint64_t number;
    const struct guest_kind *kind;
    struct vmcb *vmcb;
    struct registers registers;
    enum state state;
    uint64_t base;         /* spa of the 4 MiB its memory is taken from */
    void *table;           /* nested PML4 or shadow page directory */
    uint64_t timer_vector; /* 0: it has asked for no timer */
    uint64_t timer_ticks;
    uint64_t exits[REASONS];
    char line[120]; /* output not yet shown: a line of a guest is never mixed with another's */
    unsigned line_length;
};

#define MAX_GUESTS 8
extern const struct guest_kind guest_kinds[MAX_GUESTS]; /* guest n is entry n - 1; an entry without a name ends the list */
extern struct guest guests[MAX_GUESTS + 1];             /* guest n is entry n */

/* Make guest `number` ready to run. */
void guest_start(uint64_t number, uint64_t loop);
/* Take it out of the schedule for good. */
void guest_stop(struct guest *guest, const char *why);
/* One character of its output. */
void guest_put(struct guest *guest, char c);
void guest_flush(struct guest *guest);

#define NO_PAGE (~0ull)
/* Where a guest-physical address lies in system memory, or NO_PAGE beyond its memory. This is the hypervisor's own
   book-keeping; npt.c and shadow.c put it into tables for the processor. */
uint64_t guest_to_system(const struct guest *guest, uint64_t gpa);

#endif
