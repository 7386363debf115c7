/* What a breakpoint's conditions and tracepoints do at a hit, without a return to Python.
 *
 * The runtime calls `judge` at each armed address before it stops there.  It knows no rule of its own: vmdbg/judge.py has
 * decided what a hit means for one address in one address space, and left a *view* with what follows: programs to evaluate,
 * what to collect, and the tables to translate by.  Whatever is out of the common (no view, a condition that is met, an
 * error, no room) is left to Python by returning 0, before anything is changed; Python then does all of it.
 * The twin is gdbstub's evaluation of the same programs, which runs where this was not built.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <string.h>

#include "offsets.h"
#include "runtime.h"
#include "walk.h"

enum { VIEWS = 1024, PROBES = 16, ACTIONS = 4096, WORDS = 65536, COUNTERS = 4096, VARIABLES = 1024, SOURCES = 256, LAYOUTS = 16 };
enum { STACK = 128, BUDGET_ = 1 << 16, LONGEST_BLOCK = 0xffff };

/* Declared once more in judge.py, by ctypes; the size is compared. */
struct source { uint32_t kind, offset, size, width; uint64_t flip; };                  /* where a register is in a context */
struct layout { uint64_t count, size; struct source source[SOURCES]; };

struct action {
    uint32_t kind, code;                /* its program, or what to collect: index in `words`, 0 for none */
    uint32_t actions, counter;          /* of a tracepoint; counters: passes of a breakpoint, hits and usage of a tracepoint */
    uint64_t page;                      /* SHARED: the guest-physical page the breakpoint belongs to */
    uint64_t number, limit;             /* of a tracepoint; hits that Python must see */
};

struct view {                           /* of an armed address in an address space; unused: context NULL */
    uint64_t address;
    void *context;                      /* the CPU */
    uint64_t nested_cr3, cr0, cr4, efer, pid;
    struct space space;
    uint32_t first, count;              /* its actions */
    uint32_t layout, pad;
};

struct cpu { void *context; uint64_t *v_intr; uint64_t cr8, host_root; };

struct judge {
    struct memory memory;
    void *scratch;                      /* a uc_context */
    uint64_t hits;                      /* ever dealt with here */
    uint64_t last_now, last_address;    /* the last of them: an instruction that is begun again is met again */
    void *last_context;
    uint64_t wrote;                     /* variables were set since Python looked */
    uint8_t *frames;                    /* frames collected since Python looked */
    uint64_t size, used, count;
    struct cpu cpu[256];
    struct view view[VIEWS];
    struct action action[ACTIONS];
    struct layout layout[LAYOUTS];
    uint64_t counter[COUNTERS];
    int64_t variable[VARIABLES], next[VARIABLES];
    uint64_t words[WORDS];
};

enum { CONDITION = 1, OWN_CONDITION, PASSED, TRACEPOINT };
enum { FIELD_ = 1, LINEAR_RIP, CR8, ST, FSTAT, FTAG, ZERO };
enum { COLLECT_REGISTERS = 1, COLLECT_MEMORY, COLLECT_PROGRAM };

/* Offsets in a uc_context: from layout.py. */
static struct { uint32_t regs, eip, eflags, hflags, segments, cr, efer, nested_cr3, fpu; } at;
enum { HF_CS64 = 1 << 15, REG_EFLAGS = 25, V_INTR_MASKING = 1 << 24 };

struct hit {                            /* a hit that is looked at */
    struct judge *j;
    const struct view *view;
    char *context;
    const struct cpu *cpu;
    uint64_t now;
    bool copied;                        /* `next` holds what the variables are to become */
    bool collecting;
    uint64_t used;                      /* of `frames` */
    uint64_t cached, cached_spa;        /* the last page translated; ~0: none */
};

#define IN(h, type, offset) (*(type *)((h)->context + (offset)))

/* The longest readable prefix of a range, copied. */
static uint64_t read_memory(struct hit *h, uint64_t address, uint8_t *to, uint64_t length)
{
    uint64_t done = 0;
    while (done < length && address + done >= address) {
        uint64_t here = address + done, size = PAGE - here % PAGE, gpa, spa;
        if (size > length - done)
            size = length - done;
        if (h->cached != here / PAGE) {
            if (!guest_physical(&h->j->memory, &h->view->space, here & -(uint64_t)PAGE, &gpa) || !nested_to_spa(&h->j->memory, &h->view->space, gpa, 0, &spa))
                break;
            h->cached = here / PAGE;
            h->cached_spa = spa;
        }
        spa = h->cached_spa + here % PAGE;
        if (!in_ram(&h->j->memory, spa, size))
            break;
        memcpy(to + done, h->j->memory.ram + spa, size);
        done += size;
    }
    return done;
}

static uint64_t linear_rip(const struct hit *h)
{
    uint64_t eip = IN(h, uint64_t, at.eip);
    if (IN(h, uint32_t, at.hflags) & HF_CS64)
        return eip;
    return (IN(h, uint64_t, at.segments + 24 + 8) + eip) & 0xffffffffu;
}

/* `size` bytes of a register. */
static void read_source(const struct hit *h, const struct source *s, uint8_t *to)
{
    uint64_t value = 0;
    uint32_t top = IN(h, uint32_t, at.fpu + 4) & 7;
    uint64_t v_intr;
    switch (s->kind) {
    case LINEAR_RIP:
        value = linear_rip(h);
        break;
    case CR8:
        v_intr = *h->cpu->v_intr;
        value = IN(h, uint64_t, at.nested_cr3) != h->cpu->host_root && v_intr & V_INTR_MASKING ? v_intr & 15 : h->cpu->cr8;
        break;
    case ST:
        memcpy(to, h->context + at.fpu + 24 + 16 * ((top + s->offset) & 7), s->size);
        return;
    case FSTAT:
        value = (IN(h, uint16_t, at.fpu + 8) & ~0x3800u) | top << 11;
        break;
    case FTAG:
        for (uint32_t n = 0; n < 8; n++)
            value |= (uint64_t)(IN(h, uint8_t, at.fpu + 12 + n) ? 3 : 0) << 2 * n;
        break;
    case ZERO:
        break;
    default:
        if (s->width > 8) {
            memcpy(to, h->context + s->offset, s->size);
            return;
        }
        memcpy(&value, h->context + s->offset, s->width);
        value ^= s->flip;
    }
    memset(to, 0, s->size);
    memcpy(to, &value, s->size < 8 ? s->size : 8);
}

static bool reg(const struct hit *h, uint64_t number, uint64_t *value)
{
    const struct layout *l = &h->j->layout[h->view->layout];
    uint8_t bytes[64];
    if (number >= l->count || !l->source[number].kind || l->source[number].size > sizeof bytes)
        return false;
    read_source(h, &l->source[number], bytes);
    *value = 0;
    memcpy(value, bytes, l->source[number].size < 8 ? l->source[number].size : 8);
    return true;
}

/* Room in the frame for `size` bytes more. */
static uint8_t *room(struct hit *h, uint64_t size)
{
    uint8_t *to = h->j->frames + h->used;
    if (size > h->j->size - h->used)
        return NULL;
    h->used += size;
    return to;
}

/* The readable prefix of a range into the frame, in blocks; `string`: up to its first zero. */
static bool collect(struct hit *h, uint64_t address, uint64_t length, bool string)
{
    while (length) {
        uint64_t size = string ? PAGE - address % PAGE : LONGEST_BLOCK, got;
        uint8_t *to, *end = NULL;
        uint16_t kept;
        if (size > length)
            size = length;
        if (size > h->j->size || !(to = room(h, 11 + size)))
            return false;
        got = read_memory(h, address, to + 11, size);
        if (string && (end = memchr(to + 11, 0, got)))
            h->used -= size - (kept = end - (to + 11) + 1);
        else
            h->used -= size - (kept = got);
        if (!kept)
            h->used -= 11;
        *to = 'M';
        memcpy(to + 1, &address, 8);
        memcpy(to + 9, &kept, 2);
        if (end || got < size || address + size < address)
            break;
        address += size;
        length -= size;
    }
    return true;
}

static int64_t *variables(struct hit *h)
{
    if (!h->copied)
        memcpy(h->j->next, h->j->variable, sizeof h->j->next);
    h->copied = true;
    return h->j->next;
}

/* Evaluate a program: pairs of opcode and operand, jumps are indices of pairs.  False: Python must. */
static bool evaluate(struct hit *h, const uint64_t *code, uint64_t *result)
{
    uint64_t stack[STACK] = {0}, *top = stack, budget = BUDGET_;    /* checked by gdbstub/agent.py: it never leaves the array */
    for (const uint64_t *pc = code;; pc += 2) {
        uint64_t op = pc[0], n = pc[1], a = top > stack ? top[-1] : 0, b = *top;
        if (!budget--)
            return false;
        switch (op) {
        case 0x02: *--top = a + b; break;
        case 0x03: *--top = a - b; break;
        case 0x04: *--top = a * b; break;
        case 0x05: case 0x07:
            if (!b)
                return false;
            if (b == ~(uint64_t)0)
                *--top = op == 5 ? -a : 0;
            else
                *--top = op == 5 ? (uint64_t)((int64_t)a / (int64_t)b) : (uint64_t)((int64_t)a % (int64_t)b);
            break;
        case 0x06: case 0x08:
            if (!b)
                return false;
            *--top = op == 6 ? a / b : a % b;
            break;
        case 0x09: *--top = b < 64 ? a << b : 0; break;
        case 0x0a: *--top = (int64_t)a >> (b < 63 ? b : 63); break;
        case 0x0b: *--top = b < 64 ? a >> b : 0; break;
        case 0x0c: case 0x2f:
            top -= 2;
            if (h->collecting && !collect(h, a, b, op == 0x2f))
                return false;
            break;
        case 0x0d: case 0x30:
            if (h->collecting && !collect(h, b, n, false))
                return false;
            break;
        case 0x0e: *top = !b; break;
        case 0x0f: *--top = a & b; break;
        case 0x10: *--top = a | b; break;
        case 0x11: *--top = a ^ b; break;
        case 0x12: *top = ~b; break;
        case 0x13: *--top = a == b; break;
        case 0x14: *--top = (int64_t)a < (int64_t)b; break;
        case 0x15: *--top = a < b; break;
        case 0x16: *top = n && n < 64 ? (uint64_t)((int64_t)(b << (64 - n)) >> (64 - n)) : n ? b : 0; break;
        case 0x2a: *top = n < 64 ? b & (((uint64_t)1 << n) - 1) : b; break;
        case 0x17: case 0x18: case 0x19: case 0x1a: {
            uint64_t size = 1 << (op - 0x17), value = 0;
            if (read_memory(h, b, (uint8_t *)&value, size) != size)
                return false;
            *top = value;
            break;
        }
        case 0x20:
            top--;
            if (b)
                pc = code + 2 * n - 2;
            break;
        case 0x21: pc = code + 2 * n - 2; break;
        case 0x22: case 0x23: case 0x24: case 0x25: *++top = n; break;
        case 0x26: {
            uint64_t value;
            if (!reg(h, n, &value))
                return false;
            *++top = value;
            break;
        }
        case 0x27: *result = *top; return true;
        case 0x28: top[1] = b; top++; break;
        case 0x29: top--; break;
        case 0x2b: *top = a; top[-1] = b; break;
        case 0x2c: *++top = n ? (uint64_t)variables(h)[n] : h->now; break;     /* variable 0 is the clock */
        case 0x2d:
            if (n)
                variables(h)[n] = b;
            break;
        case 0x2e: {
            uint8_t *to;
            uint64_t value = n >> 32 ? (uint64_t)variables(h)[n >> 32] : h->now;
            uint32_t number = n;
            if (!h->collecting)
                break;
            if (!(to = room(h, 13)))
                return false;
            *to = 'V';
            memcpy(to + 1, &number, 4);
            memcpy(to + 5, &value, 8);
            break;
        }
        case 0x32: top[1] = top[-(int64_t)n]; top++; break;
        case 0x33: *top = a; top[-1] = top[-2]; top[-2] = b; break;
        default: return false;
        }
    }
}

/* One frame of a tracepoint behind those that there are. */
static bool collect_frame(struct hit *h, const struct action *t)
{
    const uint64_t *w = h->j->words + t->actions;
    uint64_t start = h->used, ignored;
    uint8_t *to = room(h, 12);
    uint32_t size, pid = h->view->pid;
    uint16_t number = t->number, length;
    if (!to)
        return false;
    h->collecting = true;
    for (uint64_t n = *w++; n; n--, w += 3) {
        if (w[0] == COLLECT_REGISTERS) {
            const struct layout *l = &h->j->layout[h->view->layout];
            uint8_t *block = room(h, 3 + l->size), *place = block + 3;
            if (!block)
                return false;
            for (const struct source *s = l->source, *end = s + l->count; s < end; place += s++->size)
                if (s->kind == FIELD_ && s->size == 8 && s->width == 8 && !s->flip)
                    memcpy(place, h->context + s->offset, 8);
                else
                    read_source(h, s, place);
            *block = 'R';
            length = l->size;
            memcpy(block + 1, &length, 2);
        } else if (w[0] == COLLECT_MEMORY) {
            if (!collect(h, w[1], w[2], false))
                return false;
        } else if (!evaluate(h, h->j->words + w[1], &ignored)) {
            return false;
        }
    }
    h->collecting = false;
    size = h->used - start - 12;
    memcpy(to, &size, 4);
    memcpy(to + 4, &number, 2);
    memset(to + 6, 0, 2);
    memcpy(to + 8, &pid, 4);
    return true;
}

static struct view *slot(struct judge *j, uint64_t address, uint64_t cr3, uint64_t nested_cr3)
{
    uint64_t hash = (address ^ cr3 ^ nested_cr3 << 7) * 0x9e3779b97f4a7c15ull;
    return &j->view[hash >> 54];
}

static struct view *find(struct judge *j, const struct hit *h, void *context, uint64_t address)
{
    const char *of = h->context;
    uint64_t *cr = (uint64_t *)(of + at.cr), efer = *(uint64_t *)(of + at.efer), root = *(uint64_t *)(of + at.nested_cr3);
    struct view *v = slot(j, address, cr[3], root);
    for (uint32_t n = 0; n < PROBES; n++) {
        struct view *found = &j->view[(v - j->view + n) % VIEWS];
        if (!found->context)
            return NULL;
        if (found->address == address && found->context == context && found->nested_cr3 == root && found->cr0 == cr[0] &&
            found->space.cr3 == cr[3] && found->cr4 == cr[4] && found->efer == efer)
            return found;
    }
    return NULL;
}

static bool leads_to(const struct judge *j, const struct view *v, uint64_t address, uint64_t page)
{
    uint64_t gpa;
    return guest_physical(&j->memory, &v->space, address, &gpa) && (gpa & -(uint64_t)PAGE) == page;
}

/* 1: the instruction at `address` may execute, all that there was to do is done. */
static uint32_t judge(struct runtime *rt, uint64_t address)
{
    struct judge *j = rt->on_break_user;
    struct hit h = {.j = j, .context = j->scratch, .used = j->used, .cached = ~(uint64_t)0};
    uint64_t flags = 0, value, frames = 0, count[64];
    const struct view *v;
    h.now = rt->begun + (uint64_t)(rt->entered - rt->budget) - (rt->block_start + rt->block_size - address);
    if (j->last_now == h.now && j->last_address == address && j->last_context == rt->context)
        return 1;
    rt->context_save(rt->uc, j->scratch);
    rt->reg_read(rt->uc, REG_EFLAGS, &flags);
    IN(&h, uint64_t, at.eflags) = flags | 2;
    h.view = v = find(j, &h, rt->context, address);
    if (!v || v->count > 64)
        return 0;
    for (h.cpu = j->cpu; h.cpu->context != rt->context; h.cpu++)
        ;
    for (uint32_t n = 0; n < v->count; n++) {
        const struct action *a = &j->action[v->first + n];
        count[n] = 0;
        if (a->kind == TRACEPOINT) {
            uint64_t before = h.used;
            if (a->code && !evaluate(&h, j->words + a->code, &value))
                return 0;
            if (a->code && !value)
                continue;
            if ((a->limit && j->counter[a->counter] + 1 >= a->limit) || !collect_frame(&h, a))
                return 0;
            count[n] = h.used - before;
            frames++;
            continue;
        }
        if (a->kind == PASSED || (a->kind == OWN_CONDITION && !leads_to(j, v, address, a->page))) {
            if (!j->counter[a->counter])
                return 0;               /* Python tells the user of the first */
            count[n] = 1;
            continue;
        }
        if (!evaluate(&h, j->words + a->code, &value) || value)
            return 0;
    }
    for (uint32_t n = 0; n < v->count; n++) {
        const struct action *a = &j->action[v->first + n];
        if (a->kind == TRACEPOINT && count[n]) {
            j->counter[a->counter]++;
            j->counter[a->counter + 1] += count[n];
        } else {
            j->counter[a->counter] += count[n];
        }
    }
    j->used = h.used;
    j->count += frames;
    if (h.copied && memcmp(j->variable, j->next, sizeof j->next)) {
        memcpy(j->variable, j->next, sizeof j->next);
        j->wrote = 1;
    }
    j->hits++;
    j->last_now = h.now;
    j->last_address = address;
    j->last_context = rt->context;
    return 1;
}

static PyObject *symbols(PyObject *self, PyObject *args)
{
    Py_buffer layout;
    (void)self;
    if (!PyArg_ParseTuple(args, "y*", &layout) || !take_offsets(&layout, &at, sizeof at))
        return NULL;
    return Py_BuildValue("{sKsK}", "judge", (unsigned long long)(uintptr_t)judge, "size", (unsigned long long)sizeof(struct judge));
}

/* An unused slot for a view of this address in these tables; None if there is none nearby. */
static PyObject *py_slot(PyObject *self, PyObject *args)
{
    unsigned long long state, address, cr3, nested_cr3;
    struct judge *j;
    struct view *v;
    (void)self;
    if (!PyArg_ParseTuple(args, "KKKK", &state, &address, &cr3, &nested_cr3))
        return NULL;
    j = (struct judge *)(uintptr_t)state;
    v = slot(j, address, cr3, nested_cr3);
    for (uint32_t n = 0; n < PROBES; n++) {
        uint32_t index = (v - j->view + n) % VIEWS;
        if (!j->view[index].context)
            return PyLong_FromUnsignedLong(index);
    }
    Py_RETURN_NONE;
}

/* Memory as a view's address space has it: the readable prefix.  For tests. */
static PyObject *py_read(PyObject *self, PyObject *args)
{
    unsigned long long state, address;
    unsigned int index, length;
    struct hit h = {.cached = ~(uint64_t)0};
    PyObject *bytes;
    uint64_t got;
    (void)self;
    if (!PyArg_ParseTuple(args, "KIKI", &state, &index, &address, &length))
        return NULL;
    h.j = (struct judge *)(uintptr_t)state;
    h.view = &h.j->view[index % VIEWS];
    bytes = PyBytes_FromStringAndSize(NULL, length);
    if (!bytes)
        return NULL;
    got = read_memory(&h, address, (uint8_t *)PyBytes_AS_STRING(bytes), length);
    _PyBytes_Resize(&bytes, got);
    return bytes;
}

static PyMethodDef methods[] = {
    {"symbols", symbols, METH_VARARGS, "Take the offsets in a context; give the function and the size of the state."},
    {"slot", py_slot, METH_VARARGS, "Take the state's address, an address, CR3 and the nested root; give the index of a free view."},
    {"read", py_read, METH_VARARGS, "Read memory through a view."},
    {NULL, NULL, 0, NULL},
};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_judge", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__judge(void)
{
    return PyModule_Create(&module);
}
