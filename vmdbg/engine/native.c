/* The native runtime: everything that must happen once a block, in C.
 *
 * Unicorn calls on_block before the body of every translated block; a stop requested there takes effect before that body
 * runs, so a budget of guest time is kept exactly, without decoding.  No link-time dependence on Unicorn: its functions
 * arrive as pointers.  vmdbg/engine/twin.py is the same runtime in Python; vmdbg/engine/runtime.py describes both.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <poll.h>
#include <string.h>

#include "offsets.h"
#include "runtime.h"
#include "translations.h"

/* uc_context layout, vmdbg/engine/layout.py; Python passes them so that they stand in one place. */
struct layout { uint32_t regs, eip, eflags, cc_src, hflags, segments, error_code, efer, star, lstar, sfmask; };
static struct layout at;

enum { HF_CPL = 3, HF_INHIBIT_IRQ = 1 << 3, HF_CS32 = 1 << 4, HF_TF = 1 << 8, HF_CS64 = 1 << 15 };
enum { EFLAGS_CC = 0x8d5, EFLAGS_TF = 0x100, EFLAGS_IF = 0x200, EFLAGS_ZF = 0x40, EFLAGS_RF = 1 << 16 };
enum { EFER_SCE = 1 };
enum { REG_EFLAGS = 25, REG_RCX = 38, REG_DR0 = 66 };
enum { PROT_EXEC_ = 4 };
#define CTL_TLB_FLUSH 0x4000000bu
#define CTL_TB_REQUEST_CACHE 0xc8000008u

struct segment { uint32_t selector, pad; uint64_t base; uint32_t limit, flags; };
#define SEGMENT(rt, number) FIELD(rt, struct segment, at.segments + sizeof(struct segment) * (number))
enum { CS = 1, SS };

static void stop(struct runtime *rt, enum reason reason)
{
    rt->reason = reason;
    rt->emu_stop(rt->uc);
}

static uint64_t eflags(struct runtime *rt)
{
    uint64_t value = 0;
    rt->reg_read(rt->uc, REG_EFLAGS, &value);
    return value;
}

/* REP string instruction?  Returns its prefix, | 0x100 for CMPS and SCAS, which also end by ZF. */
static uint32_t rep_of(const uint8_t *code, size_t size, bool cs64)
{
    uint32_t rep = 0;
    for (size_t i = 0; i < size; i++) {
        uint8_t b = code[i];
        if (b == 0xf2 || b == 0xf3)
            rep = b;
        else if (b == 0x66 || b == 0x67 || b == 0x2e || b == 0x36 || b == 0x3e || b == 0x26 || b == 0x64 || b == 0x65 ||
                 (cs64 && b >= 0x40 && b <= 0x4f))
            continue;
        else if (rep && (b == 0xa6 || b == 0xa7 || b == 0xae || b == 0xaf))
            return rep | 0x100;
        else if (rep && ((b >= 0x6c && b <= 0x6f) || b == 0xa4 || b == 0xa5 || (b >= 0xaa && b <= 0xad)))
            return rep;
        else
            return 0;
    }
    return 0;
}

/* Read code of the block at `address`, a page at a time: where a segment wraps, the next page is the first one. */
static bool block_code(struct runtime *rt, uint64_t address, uint8_t *code, size_t length, bool cs64)
{
    size_t first = 4096 - (address & 4095);
    if (length <= first)
        return rt->vmem_read(rt->uc, address, PROT_EXEC_, code, length) == 0;
    return block_code(rt, address, code, first, cs64) &&
           block_code(rt, cs64 ? address + first : (uint32_t)(address + first), code + first, length - first, cs64);
}

/* A store into the block that makes it ends that block in its middle: the engine goes back to the storing instruction and
 * runs it as a block of its own.  No jump within a block ends before the block does, so that shows it; what did not run is
 * given back.  (A store by the last instruction of its block is taken for a jump to it.) */
static inline uint64_t given_back(struct runtime *rt, uint64_t address, uint32_t size)
{
    uint64_t done = address - rt->block_start;
    return __builtin_expect((done < rt->block_size) & (done + size < rt->block_size), 0) ? rt->block_size - done : 0;
}

static inline void restarted(struct runtime *rt, uint64_t address, uint32_t size)
{
    uint64_t back = given_back(rt, address, size);
    rt->budget += back;
    rt->block_size -= back;
}

/* A block begins: its time, and the branch that led to it. */
static inline void account(struct runtime *rt, uint64_t address, uint32_t size)
{
    uint64_t start = rt->block_start, last = rt->block_size;
    struct branch *b = &rt->ring[rt->branches % RING_SLOTS];
    /* Always drafted, then kept or not: a jump here would be mispredicted as often as the guest's own. */
    b->from_block = start;
    b->to = address;
    b->from_size = last;
    rt->branches += (address != start + last) & (last != 0) & rt->record;
    rt->budget -= size;
    rt->block_start = address;
    rt->block_size = size;
}

/* What the engine knows of a translated block (uc_tb). */
struct tb { uint64_t pc; uint16_t instructions, size; };

/* Is the count of the REP instruction that is this block 0?  It is entered so behind its last iteration. */
static bool repeated(struct runtime *rt, uint32_t size, bool cs64)
{
    uint64_t count = 0;
    bool cs32 = FIELD(rt, uint32_t, at.hflags) & HF_CS32, other = memchr(rt->block_code, 0x67, size);
    rt->reg_read(rt->uc, REG_RCX, &count);
    if (!cs64 || other)
        count &= cs64 || cs32 != other ? 0xffffffffu : 0xffffu;
    return !count;
}

/* The instructions of the block that begins, and its code: for what a stop leaves undone of it. */
static __attribute__((noinline)) void count(struct runtime *rt, uint64_t address, uint32_t size)
{
    bool cs64 = FIELD(rt, uint32_t, at.hflags) & HF_CS64;
    uint32_t length = size < sizeof rt->block_code ? size : sizeof rt->block_code;
    struct tb tb = {0};
    rt->ctl(rt->uc, CTL_TB_REQUEST_CACHE, address, &tb);
    if (tb.size != size)   /* restarted: one instruction, which the engine does not keep as a block */
        tb.instructions = 1;
    if (block_code(rt, address, rt->block_code, length, cs64) && tb.instructions == 1 &&
        rep_of(rt->block_code, length, cs64) && repeated(rt, length, cs64))
        tb.instructions = 0;
    rt->instructions += rt->block_count = tb.instructions;
}

/* A block of so many bytes was restarted.  How many instructions there are before the one that it goes on with, Python knows:
 * true.  When the engine is entered anew, there is none. */
static bool recount(struct runtime *rt, uint64_t before)
{
    rt->undone_from = rt->block_size;
    rt->undone = before - rt->block_size;
    if (rt->block_size)
        stop(rt, RECOUNT);
    else
        rt->instructions -= rt->block_count;
    return rt->block_size;
}

enum special { MIXED = 1, PARTICULAR };

/* The rare cases of on_block, apart so that it stays short. */
static __attribute__((noinline)) void on_special_block(struct runtime *rt, uint64_t address, uint32_t size)
{
    if (rt->step == 2) {
        if (!rt->mixed || address != rt->block_start)   /* else it changed itself, see restarted() */
            stop(rt, STEPPED);
        return;
    }
    if (rt->step) {
        uint8_t code[15];
        size_t length = size < sizeof code ? size : sizeof code;
        bool cs64 = FIELD(rt, uint32_t, at.hflags) & HF_CS64;
        rt->step = 2;
        rt->tf = (eflags(rt) & EFLAGS_TF) != 0;
        rt->rep = block_code(rt, address, code, length, cs64) ? rep_of(code, length, cs64) : 0;
    } else {
        if (rt->mixed) {
            uint64_t before = rt->block_size;
            restarted(rt, address, size);
            if (rt->counting && rt->block_size != before && recount(rt, before))
                return;
        }
        if (rt->window && (eflags(rt) & EFLAGS_IF)) {   /* before the budget: what is left of that is stepped through */
            stop(rt, WINDOW);
            return;
        }
        if ((int64_t)size > rt->budget) {
            stop(rt, BUDGET);
            return;
        }
    }
    account(rt, address, size);
    if (rt->counting)
        count(rt, address, size);
}

/* With mixed pages every block comes here: counted on the spot.  A function of its own, since on_block loses by its bulk. */
static __attribute__((noinline)) void on_rare_block(struct runtime *rt, uint64_t address, uint32_t size)
{
    if (rt->special != MIXED || (int64_t)size > rt->budget) {
        on_special_block(rt, address, size);
    } else {
        restarted(rt, address, size);
        account(rt, address, size);
    }
}

static void on_block(void *uc, uint64_t address, uint32_t size, void *user)
{
    struct runtime *rt = user;
    (void)uc;
    if (__builtin_expect(rt->special | ((int64_t)size > rt->budget), 0))
        on_rare_block(rt, address, size);
    else
        account(rt, address, size);
}

/* Add the code up to the end of the last block, `unexecuted` bytes before it, to the fingerprint: all that was executed since
 * the last time, since this is called for each block.  fingerprint.py has the formula. */
static inline void sum_up(struct runtime *rt, uint64_t unexecuted)
{
    uint64_t time = (uint64_t)(rt->begun + rt->entered - rt->budget), to = time - unexecuted;
    rt->fingerprint->code += fp_mix(rt->block_start + rt->block_size - time + rt->salt) * (fp_mix(to) - fp_mix(rt->summed));
    rt->summed = to;
}

/* In place of on_block where there is a fingerprint: two functions, so that nobody else pays for it. */
static void on_summed_block(void *uc, uint64_t address, uint32_t size, void *user)
{
    struct runtime *rt = user;
    sum_up(rt, __builtin_expect(rt->mixed & !rt->step, 0) ? given_back(rt, address, size) : 0);
    on_block(uc, address, size, user);
}

static uint64_t linear_rip(struct runtime *rt)
{
    uint64_t eip = FIELD(rt, uint64_t, at.eip);
    if (FIELD(rt, uint32_t, at.hflags) & HF_CS64)
        return eip;
    return (SEGMENT(rt, CS).base + eip) & 0xffffffffu;
}

/* Save the context. */
static void save(struct runtime *rt)
{
    rt->context_save(rt->uc, rt->context);
    FIELD(rt, uint64_t, at.eflags) = eflags(rt);
    rt->saved = 1;
    rt->code_size = 0;
}

/* Read the bytes of the instruction, as far as its page goes: to be done last, since a read that faults does not return
 * but comes back to on_interrupt. */
static void save_code(struct runtime *rt)
{
    uint64_t rip = linear_rip(rt);
    uint32_t size = 4096 - (rip & 4095) < sizeof rt->code - 1 ? 4096 - (rip & 4095) : sizeof rt->code - 1;
    if (rip - rt->block_start >= rt->block_size)
        return;
    rt->reading = 1;
    if (rt->vmem_read(rt->uc, rip, PROT_EXEC_, rt->code, size) == 0)
        rt->code_size = size;
    rt->reading = 0;
}

static void on_interrupt(void *uc, uint32_t intno, void *user)
{
    struct runtime *rt = user;
    if (rt->reading)               /* the bytes of the instruction cannot be read: what stopped it stays what it was */
        rt->reading = 0;
    else if (rt->reason)           /* IN and OUT: the I/O breakpoint. SYSCALL and SYSENTER: the trap of TF, which we judge */
        ;
    else if (rt->step == 2 && intno == VMEXIT + EXCEPTION + 1 && !rt->tf)
        rt->reason = STEPPED;
    else {
        rt->reason = EXIT;
        rt->intno = intno;
        save(rt);
        rt->emu_stop(uc);
        if (intno != VMEXIT + NPF && intno != VMEXIT + EXCEPTION + 14)  /* their address would be lost */
            save_code(rt);
    }
    rt->emu_stop(uc);
}

static void io(struct runtime *rt, uint32_t port, uint32_t size, uint32_t write, uint32_t value)
{
    uint64_t address = port;
    rt->reason = IO;
    rt->io_port = port;
    rt->io_size = size;
    rt->io_write = write;
    rt->io_value = value;
    /* Unicorn has restored the precise state before the instruction for this hook: keep it.  The instruction itself is
     * then undone: the I/O breakpoint in DR0 raises #DB right behind it, and the saved state is what run() returns. */
    save(rt);
    rt->reg_write(rt->uc, REG_DR0, &address);
    save_code(rt);
}

static uint32_t on_in(void *uc, uint32_t port, int size, void *user)
{
    (void)uc;
    io(user, port, size, 0, 0);
    return 0;
}

static void on_out(void *uc, uint32_t port, int size, uint32_t value, void *user)
{
    (void)uc;
    io(user, port, size, 1, value);
}

static void on_syscall(void *uc, void *user)
{
    (void)uc;
    stop(user, SYSCALL);
}

static void on_sysenter(void *uc, void *user)
{
    (void)uc;
    stop(user, SYSENTER);
}

static void on_breakpoint(void *uc, uint64_t address, uint32_t size, void *user)
{
    const struct point *point = user;
    struct runtime *rt = point->rt;
    (void)uc;
    (void)size;
    rt->idle += !point->armed;
    if (point->armed && rt->breakpoints && !(rt->on_break_user && rt->on_break(rt, address))) {
        rt->break_address = address;
        stop(rt, BREAK);
    }
}

/* The part of the current block that did not run: from RIP to its end. */
static uint64_t unexecuted(struct runtime *rt)
{
    uint64_t rip, end;
    if (!rt->block_size || (rt->reason != EXIT && rt->reason != IO && rt->reason != BREAK))
        return 0;
    if (rt->reason == EXIT) {
        uint32_t code = rt->intno - VMEXIT;
        if (code == EXCEPTION + 1)                      /* single-step trap: the block is complete */
            return 0;
        if (code == EXCEPTION + 14 || code == NPF) {    /* a fetch faults between blocks */
            uint32_t error = FIELD(rt, uint32_t, at.error_code);
            if (error & 0x10)
                return 0;
        }
    }
    rip = linear_rip(rt);
    end = rt->block_start + rt->block_size;
    return rip - rt->block_start < rt->block_size ? end - rip : 0;
}

static void run_once(struct runtime *rt)
{
    int64_t before = rt->entered = rt->budget;
    struct translations *outer = translations_now;
    uint64_t rip, left = 0;
    rt->special = rt->step | rt->window | rt->counting ? PARTICULAR : rt->mixed ? MIXED : 0;
    rt->reason = 0;
    rt->block_size = 0;
    rt->summed = (uint64_t)rt->begun;
    rt->saved = rt->reading = 0;
    rt->context_restore(rt->uc, rt->context);
    if (rt->flush)
        rt->ctl(rt->uc, CTL_TLB_FLUSH);
    if (rt->flush & FORGET && rt->translations)
        translations_forget(rt->translations);
    rt->flush = 0;
    rip = FIELD(rt, uint64_t, at.eip);
    translations_now = rt->translations;
    rt->error = rt->emu_start(rt->uc, rip, 0, 0, 0);
    translations_now = outer;
    if (!rt->saved) {
        rt->context_save(rt->uc, rt->context);
        FIELD(rt, uint64_t, at.eflags) = eflags(rt);
    }
    /* The engine takes the arithmetic flags and DF from eflags when it is entered. */
    FIELD(rt, uint64_t, at.cc_src) = FIELD(rt, uint64_t, at.eflags) & EFLAGS_CC;
    if (rt->error)
        rt->reason = FAILED;
    rt->executed = before - rt->budget;
    if (rt->reason != RECOUNT) {
        rt->undone = left = unexecuted(rt);
        rt->undone_from = rt->block_size - rt->undone;
        rt->executed -= rt->undone;
    }
    if (rt->fingerprint)
        sum_up(rt, left);
    rt->budget = before - rt->executed;
    rt->begun += rt->executed;
}

/* SYSCALL from 64-bit code to the kernel's, as transfers.py has it; RIP is behind the instruction.  False for every
 * other: those are Python's. */
static bool syscall64(struct runtime *rt)
{
    uint32_t *hflags = &FIELD(rt, uint32_t, at.hflags), selector = FIELD(rt, uint64_t, at.star) >> 32 & 0xfffc;
    uint64_t *flags = &FIELD(rt, uint64_t, at.eflags), *eip = &FIELD(rt, uint64_t, at.eip), *regs = &FIELD(rt, uint64_t, at.regs);
    if (!(*hflags & HF_CS64) || *flags & EFLAGS_TF || !(FIELD(rt, uint64_t, at.efer) & EFER_SCE))
        return false;
    regs[1] = *eip;
    regs[11] = *flags & ~(uint64_t)EFLAGS_RF;
    *eip = FIELD(rt, uint64_t, at.lstar);
    *flags &= ~(FIELD(rt, uint64_t, at.sfmask) | EFLAGS_RF);
    SEGMENT(rt, CS) = (struct segment){selector, 0, 0, 0xffffffff, 0xa09b00};
    SEGMENT(rt, SS) = (struct segment){selector + 8, 0, 0, 0xffffffff, 0xc09300};
    *hflags &= ~(uint32_t)HF_CPL;
    return true;
}

/* Has the debugger's client said something? */
static bool asked(struct runtime *rt)
{
    struct pollfd input = {rt->input, POLLIN, 0};
    return poll(&input, 1, 0) > 0;
}

/* Until a stop that is Python's. */
static void run(struct runtime *rt)
{
    int64_t executed = 0, look = rt->look ? rt->look : INT64_MAX;
    for (;;) {
        int64_t ticks = -1, rest = rt->budget > look ? rt->budget - look : 0;
        bool fresh = look == rt->look;
        rt->budget -= rest;
        run_once(rt);
        rt->budget += rest;
        executed += rt->executed;
        look -= rt->executed;
        if (rest && rt->reason == BUDGET) {
            if (fresh && !rt->executed) {   /* a block that is longer than that */
                look = INT64_MAX;
                continue;
            }
            if (asked(rt)) {
                rt->reason = ASKED;
                break;
            }
            look = rt->look;
            continue;
        }
        if (!rt->on_exit)                   /* somebody looks at every stop */
            break;
        if (rt->reason == SYSCALL && syscall64(rt))
            ticks = 0;
        else if (rt->reason == EXIT || rt->reason == IO)
            ticks = rt->on_exit(rt, rt->on_exit_user);
        if (ticks < 0)
            break;
        executed += ticks;
        look -= ticks;
        rt->begun += ticks;
        rt->budget -= ticks;
        if (rt->budget <= 0) {
            rt->reason = BUDGET;
            break;
        }
    }
    rt->executed = executed;
}

/* Exactly one instruction (one iteration of a REP string instruction). */
static void step(struct runtime *rt)
{
    uint32_t hflags = FIELD(rt, uint32_t, at.hflags);
    uint64_t count = FIELD(rt, uint64_t, at.regs + 8);
    uint64_t start;
    rt->step = 1;
    rt->rep = 0;
    FIELD(rt, uint32_t, at.hflags) = hflags | HF_TF;
    run_once(rt);
    FIELD(rt, uint32_t, at.hflags) &= ~(uint32_t)HF_TF;
    rt->step = 0;
    /* A REP instruction whose count runs out is entered once more at full speed, to see the zero; a stepped one is not. */
    if (!(hflags & HF_CS64))
        count = (uint32_t)count;
    start = rt->block_start;
    if (rt->reason == STEPPED && rt->rep && !rt->tf && !(hflags & HF_INHIBIT_IRQ) && count &&
        linear_rip(rt) == start + rt->block_size) {
        bool zf = FIELD(rt, uint64_t, at.eflags) & EFLAGS_ZF;
        if (!(rt->rep & 0x100) || zf == ((rt->rep & 0xff) == 0xf3)) {
            rt->executed += rt->block_size;
            rt->begun += rt->block_size;
            rt->budget -= rt->block_size;
            rt->entered = rt->budget;
            if (rt->fingerprint)
                sum_up(rt, 0);
        }
    }
}

/* Instructions one by one until the budget is used up or something else ends it. */
static void step_through(struct runtime *rt)
{
    int64_t executed = 0;
    while (rt->budget > 0) {
        step(rt);
        executed += rt->executed;
        if (rt->reason != STEPPED)
            break;
        if (rt->window && (FIELD(rt, uint64_t, at.eflags) & EFLAGS_IF)) {
            rt->reason = WINDOW;
            break;
        }
    }
    if (rt->reason == STEPPED)
        rt->reason = BUDGET;
    rt->executed = executed;
}

/* The three entry points as Python sees them.  Hooks may call into Python, and other threads may run meanwhile. */
static PyObject *enter(PyObject *address, void (*entry)(struct runtime *))
{
    struct runtime *rt = PyLong_AsVoidPtr(address);
    if (!rt && PyErr_Occurred())
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    entry(rt);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyObject *py_run(PyObject *self, PyObject *address)
{
    (void)self;
    return enter(address, run);
}

static PyObject *py_step(PyObject *self, PyObject *address)
{
    (void)self;
    return enter(address, step);
}

static PyObject *py_step_through(PyObject *self, PyObject *address)
{
    (void)self;
    return enter(address, step_through);
}

static PyObject *symbols(PyObject *self, PyObject *args)
{
    Py_buffer layout;
    (void)self;
    if (!PyArg_ParseTuple(args, "y*", &layout) || !take_offsets(&layout, &at, sizeof at))
        return NULL;
#define ADDRESS(f) #f, (unsigned long long)(uintptr_t)f
    return Py_BuildValue("{sKsKsKsKsKsKsKsKsK}", ADDRESS(on_block), ADDRESS(on_summed_block), ADDRESS(on_interrupt),
                         ADDRESS(on_in), ADDRESS(on_out), ADDRESS(on_syscall), ADDRESS(on_sysenter), ADDRESS(on_breakpoint),
                         "size", (unsigned long long)sizeof(struct runtime));
}

static PyMethodDef methods[] = {
    {"symbols", symbols, METH_VARARGS, "Take the context layout; give the addresses of the hooks and the size of the state."},
    {"run", py_run, METH_O, "Run until the budget is used up or something happens; takes the state's address."},
    {"step", py_step, METH_O, "Execute one instruction."},
    {"step_through", py_step_through, METH_O, "Execute one by one until the budget is used up."},
    {NULL, NULL, 0, NULL},
};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_native", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__native(void)
{
    PyObject *made = PyModule_Create(&module);
    if (made && PyModule_AddFunctions(made, translations_methods) < 0)
        Py_CLEAR(made);
    return made;
}
