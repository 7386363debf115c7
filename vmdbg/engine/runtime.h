/* The state that the native runtime shares with Python and with whoever handles exits for it (vmdbg/svm/switch.c). */
#ifndef VMDBG_RUNTIME_H
#define VMDBG_RUNTIME_H
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "fingerprint.h"

typedef int (*emu_start_fn)(void *, uint64_t, uint64_t, uint64_t, size_t);
typedef int (*emu_stop_fn)(void *);
typedef int (*context_fn)(void *, void *);
typedef int (*ctl_fn)(void *, uint32_t, ...);
typedef int (*reg_fn)(void *, int, void *);
typedef int (*vmem_read_fn)(void *, uint64_t, uint32_t, void *, size_t);

/* The next entry is drafted over the oldest one: with twice the slots, the last 65536 are whole. */
#define RING_SLOTS (2 * 65536)

/* In this order: side by side, start and size would be copied with one load of 16 bytes from two stores of 8, a stall. */
struct branch { uint64_t from_block, to, from_size; };

/* No translated block is longer: it ends at the second page's end at the latest. */
#define BLOCK_CODE 8192

struct runtime;
/* Called for each EXIT and IO, with the context saved.  Returns the ticks that the instruction took if it was dealt with
 * and the run goes on, or a negative number: then the stop is Python's. */
typedef int64_t (*on_exit_fn)(struct runtime *, void *);
/* Called at an armed address; 1 if there is no need to stop. */
typedef uint32_t (*on_break_fn)(struct runtime *, uint64_t);

/* runtime.py declares the same fields with ctypes; the size is compared when an engine is made. */
struct runtime {
    void *uc;
    void *context;                 /* the uc_context whose CPU runs */
    emu_start_fn emu_start;
    emu_stop_fn emu_stop;
    context_fn context_save, context_restore;
    ctl_fn ctl;
    reg_fn reg_read, reg_write;
    vmem_read_fn vmem_read;
    int64_t budget;                /* ticks that may still be executed */
    int64_t executed;              /* ticks executed by the last run */
    uint32_t reason, intno;
    uint32_t window;               /* stop where RFLAGS.IF is set */
    uint32_t special;              /* what of step, window and mixed there is: one thing for each block to ask */
    uint32_t step;                 /* blocks of one instruction: 1 first block to come, 2 it ran */
    uint32_t flush;                /* before running: FLUSH, FORGET */
    uint32_t io_port, io_size, io_write, io_value;
    uint32_t error;                /* uc_err of the last run */
    uint64_t block_start, block_size;
    uint32_t tf;                   /* RFLAGS.TF before the stepped instruction */
    uint32_t rep;                  /* the stepped instruction: 0, or F2/F3 | 0x100 if it compares */
    uint64_t branches;             /* ever recorded; the ring keeps the last 65536 */
    uint32_t breakpoints;          /* stop at armed breakpoints */
    uint32_t record;               /* 1: keep the branch ring */
    uint64_t break_address;
    uint8_t code[16];              /* the instruction at RIP of an EXIT or IO, as far as its page goes */
    uint32_t code_size;
    uint32_t saved;                /* the context is that of the stop already */
    uint32_t reading;              /* save_code is at work */
    uint32_t mixed;                /* there are pages that are both written and executed */
    int64_t look;                  /* ticks after which to see whether there is input, 0 for never */
    int32_t input;                 /* a descriptor */
    uint64_t idle;                 /* how often execution came to a disarmed breakpoint */
    on_exit_fn on_exit;            /* NULL: every stop is Python's */
    void *on_exit_user;
    on_break_fn on_break;
    void *on_break_user;           /* NULL: every armed breakpoint is Python's */
    int64_t instructions;          /* executed while `counting`, ever; what a stop left undone is for Python to take off */
    uint32_t counting;             /* count them */
    uint32_t block_count;          /* those of the last block */
    uint32_t undone_from, undone;  /* where in the last block what the run has left undone begins, and its bytes */
    uint8_t block_code[BLOCK_CODE]; /* while counting: the last block */
    int64_t begun, entered;        /* guest time and budget when the engine was entered last; for on_break and fingerprints */
    struct fingerprint *fingerprint;   /* NULL: nobody wants one */
    uint64_t salt;                 /* of the CPU, for that */
    uint64_t summed;               /* guest time up to which code has been added */
    struct translations *translations;  /* NULL: none are held */
    struct branch ring[RING_SLOTS];
};

/* A breakpoint's hook: it stays in translated code while the breakpoint is disarmed. */
struct point {
    struct runtime *rt;
    uint32_t armed;
};

enum reason { BUDGET = 1, EXIT, IO, SYSCALL, SYSENTER, WINDOW, STEPPED, BREAK, FAILED, TABLES, ASKED, RECOUNT };
/* FLUSH: the engine's TLB, since what our tables say has changed.  FORGET: the processor flushes its own. */
enum { FLUSH = 1, FORGET = 2 };
enum { VMEXIT = 0x100, EXCEPTION = 0x40, NPF = 0x400 };

#define FIELD(rt, type, offset) (*(type *)((char *)(rt)->context + (offset)))

#endif
