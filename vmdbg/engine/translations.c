/* Translations are held: a table of what the engine's walks of a guest's own tables have found since the guest's last flush.
 *
 * Trampolines in Unicorn's code (translations.py) ask `look` before such a walk, tell `record` what it found, and tell
 * `forget_all` and `forget_page` of the engine's own flushes.  The engine's TLB is then a cache of this table: what it loses for
 * its size, for a conflict or because a nested table has changed comes back from here, without a walk.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

#include "translations.h"

enum { PAGE_BITS = 12, SMALLEST = 12, MODES = 3, READ = 1, WRITE = 2, EXECUTE = 4, RIGHTS = 7, SIZE_SHIFT = 4 };
#define PAGE_MASK (~(uint64_t)0 << PAGE_BITS)
/* No more are held, 4 GiB of linear addresses: with the next one, all are forgotten. */
#define MOST ((uint64_t)1 << 20)
#define NO_REGION (~(uint64_t)0)

static const uint64_t sizes[] = {1 << 12, 1 << 21, 1 << 22, 1 << 30};
enum { SIZES = sizeof sizes / sizeof *sizes };

/* `from`: linear page | the engine's mode of access (user, supervisor, supervisor under SMAP); `to`: guest-physical page | index of
 * the page's size << SIZE_SHIFT | rights, without any if it was taken out. */
struct slot { uint64_t from, to, epoch; };

struct translations {
    struct slot *slots;
    uint64_t epoch;                /* slots of another one are empty */
    uint64_t used, hits;
    uint64_t region, mask;         /* what all large pages lie in; a mask of NO_REGION: there are none */
    uint64_t factor;               /* of the hash: random, since guests choose addresses; nothing else depends on it */
    uint32_t bits;                 /* of the number of slots */
    void *cpu;                     /* the engine's, of which the first walk tells */
    void (*flush)(void *);         /* the engine's, of the whole TLB of a CPU */
};

__thread struct translations *translations_now;

/* Where translations of a CPU of the engine's are held, if they are now.  While one engine runs, others may flush: when Python's
 * collector closes one, for instance. */
static struct translations *now_of(void *cpu)
{
    struct translations *held = translations_now;
    return held && (!held->cpu || held->cpu == cpu) ? held : NULL;
}

struct found { uint64_t gpa, size; uint32_t rights; };
static __thread struct found found;

void translations_forget(struct translations *held)
{
    held->epoch++;
    held->used = 0;
    held->mask = NO_REGION;
}

/* Where a translation is, or is to be put. */
static struct slot *place(const struct translations *held, uint64_t from)
{
    uint64_t last = ((uint64_t)1 << held->bits) - 1, at = (from >> PAGE_BITS ^ from << 52) * held->factor >> (64 - held->bits);
    while (held->slots[at].epoch == held->epoch && held->slots[at].from != from)
        at = (at + 1) & last;
    return &held->slots[at];
}

static bool grow(struct translations *held)
{
    struct translations larger = *held;
    larger.bits++;
    larger.slots = calloc((size_t)1 << larger.bits, sizeof *larger.slots);
    if (!larger.slots)
        return false;
    for (size_t i = 0; i < (size_t)1 << held->bits; i++)
        if (held->slots[i].epoch == held->epoch)
            *place(&larger, held->slots[i].from) = held->slots[i];
    free(held->slots);
    *held = larger;
    return true;
}

/* False if there is no room. */
static bool put(struct translations *held, uint64_t from, uint64_t to)
{
    struct slot *slot = place(held, from);
    if (slot->epoch != held->epoch) {
        if (held->used == MOST || (held->used >= (uint64_t)1 << (held->bits - 1) && !grow(held)))
            return false;
        held->used++;
        slot = place(held, from);
    }
    *slot = (struct slot){from, to, held->epoch};
    if (to >> SIZE_SHIFT & (SIZES - 1)) {   /* as the engine does: it knows large pages by one region around all of them */
        uint64_t mask = -sizes[to >> SIZE_SHIFT & (SIZES - 1)];
        if (held->mask != NO_REGION) {
            mask &= held->mask;
            while ((held->region ^ from) & mask)
                mask <<= 1;
        }
        held->mask = mask;
        held->region = from & mask;
    }
    return true;
}

/* The engine's TLB has no translation of `address`: what is held of it, if that allows the access (0 read, 1 write, 2 fetch). */
static const struct found *look(uint64_t address, uint32_t access, uint32_t mode, void *cpu)
{
    struct translations *held = now_of(cpu);
    const struct slot *slot;
    if (!held)
        return NULL;
    slot = place(held, (address & PAGE_MASK) | mode);
    if (slot->epoch != held->epoch || !(slot->to >> access & 1))
        return NULL;
    held->hits++;
    found.gpa = (slot->to & PAGE_MASK) | (address & ~PAGE_MASK);
    found.size = sizes[slot->to >> SIZE_SHIFT & (SIZES - 1)];
    found.rights = slot->to & RIGHTS;
    return &found;
}

/* A walk of the guest's tables has led from `address` to `gpa`. */
static void record(void *cpu, uint64_t address, uint64_t gpa, uint64_t size, uint32_t rights, uint32_t mode)
{
    struct translations *held = now_of(cpu);
    uint64_t index = 0, to;
    if (!held)
        return;
    held->cpu = cpu;
    while (index < SIZES && sizes[index] != size)
        index++;
    to = (gpa & PAGE_MASK) | (index & (SIZES - 1)) << SIZE_SHIFT | (rights & RIGHTS);
    if (index < SIZES && mode < MODES && !put(held, (address & PAGE_MASK) | mode, to)) {
        translations_forget(held);
        held->flush(cpu);
        put(held, (address & PAGE_MASK) | mode, to);
    }
}

/* The engine itself flushes. */
static void forget_all(void *cpu)
{
    struct translations *held = now_of(cpu);
    if (held)
        translations_forget(held);
}

static void forget_page(void *cpu, uint64_t address)
{
    struct translations *held = now_of(cpu);
    if (!held)
        return;
    if (held->mask != NO_REGION && (address & held->mask) == held->region) {
        translations_forget(held);
        held->flush(cpu);
        return;
    }
    for (uint32_t mode = 0; mode < MODES; mode++) {
        struct slot *slot = place(held, (address & PAGE_MASK) | mode);
        if (slot->epoch == held->epoch)
            slot->to = 0;
    }
}

/* For Python */

static struct translations *given(PyObject *address)
{
    return PyLong_AsVoidPtr(address);
}

static PyObject *py_new(PyObject *self, PyObject *flush)
{
    struct translations *held = calloc(1, sizeof *held);
    (void)self;
    if (held)
        held->slots = calloc((size_t)1 << SMALLEST, sizeof *held->slots);
    if (!held || !held->slots || getrandom(&held->factor, sizeof held->factor, 0) != sizeof held->factor) {
        if (held)
            free(held->slots);
        free(held);
        return PyErr_NoMemory();
    }
    held->factor |= 1;
    held->bits = SMALLEST;
    held->epoch = 1;
    held->mask = NO_REGION;
    held->flush = (void (*)(void *))PyLong_AsVoidPtr(flush);
    return PyLong_FromVoidPtr(held);
}

static PyObject *py_free(PyObject *self, PyObject *address)
{
    struct translations *held = given(address);
    (void)self;
    if (held)
        free(held->slots);
    free(held);
    Py_RETURN_NONE;
}

/* Have this thread hold translations there, or (0) none; returns where it did before. */
static PyObject *py_enter(PyObject *self, PyObject *address)
{
    struct translations *before = translations_now;
    (void)self;
    translations_now = given(address);
    return PyLong_FromVoidPtr(before);
}

static PyObject *py_clear(PyObject *self, PyObject *address)
{
    (void)self;
    translations_forget(given(address));
    Py_RETURN_NONE;
}

static PyObject *py_hits(PyObject *self, PyObject *address)
{
    (void)self;
    return PyLong_FromUnsignedLongLong(given(address)->hits);
}

/* All that is held: region and mask, then pairs of `from` and `to` in no order. */
static PyObject *py_dump(PyObject *self, PyObject *address)
{
    const struct translations *held = given(address);
    PyObject *bytes = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)((held->used + 1) * 16));
    uint64_t *out = bytes ? (uint64_t *)PyBytes_AS_STRING(bytes) : NULL;
    (void)self;
    if (out) {
        *out++ = held->mask == NO_REGION ? 0 : held->region;
        *out++ = held->mask;
    }
    for (size_t i = 0; out && i < (size_t)1 << held->bits; i++)
        if (held->slots[i].epoch == held->epoch) {
            *out++ = held->slots[i].from;
            *out++ = held->slots[i].to;
        }
    return bytes;
}

/* Hold what `dump` gave and nothing else. */
static PyObject *py_load(PyObject *self, PyObject *args)
{
    PyObject *address;
    Py_buffer pairs;
    struct translations *held;
    bool room = true;
    (void)self;
    if (!PyArg_ParseTuple(args, "Oy*", &address, &pairs))
        return NULL;
    held = given(address);
    translations_forget(held);
    for (Py_ssize_t i = 16; room && i + 16 <= pairs.len; i += 16) {
        uint64_t pair[2];
        memcpy(pair, (char *)pairs.buf + i, 16);
        room = put(held, pair[0], pair[1]);
    }
    if (pairs.len >= 16) {
        memcpy(&held->region, pairs.buf, 8);   /* of pages, too, that are others now */
        memcpy(&held->mask, (char *)pairs.buf + 8, 8);
    }
    PyBuffer_Release(&pairs);
    if (!room)
        return PyErr_NoMemory();
    Py_RETURN_NONE;
}

/* What the trampolines call. */
static PyObject *py_symbols(PyObject *self, PyObject *none)
{
    (void)self;
    (void)none;
#define ADDRESS(f) #f, (unsigned long long)(uintptr_t)f
    return Py_BuildValue("{sKsKsKsK}", ADDRESS(look), ADDRESS(record), ADDRESS(forget_all), ADDRESS(forget_page));
}

PyMethodDef translations_methods[] = {
    {"translations_symbols", py_symbols, METH_NOARGS, "The addresses of what trampolines call."},
    {"translations_new", py_new, METH_O, "A table that holds nothing; takes the address of the engine's flush, gives the table's."},
    {"translations_free", py_free, METH_O, "Free it."},
    {"translations_enter", py_enter, METH_O, "Have this thread hold translations there, 0 for none; gives where it did before."},
    {"translations_clear", py_clear, METH_O, "Forget all."},
    {"translations_hits", py_hits, METH_O, "How often a walk was spared."},
    {"translations_dump", py_dump, METH_O, "All that is held: pairs of uint64_t, behind the first in no order."},
    {"translations_load", py_load, METH_VARARGS, "Hold these pairs and nothing else."},
    {NULL, NULL, 0, NULL},
};
