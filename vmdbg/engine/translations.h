/* Translations of guests' own tables, held from their making until the guest flushes them: see translations.py. */
#ifndef VMDBG_TRANSLATIONS_H
#define VMDBG_TRANSLATIONS_H
#include <Python.h>

struct translations;

/* Those of the machine that this thread executes; NULL: none are held. */
extern __thread struct translations *translations_now __attribute__((visibility("hidden")));

/* The processor flushes its TLB. */
void translations_forget(struct translations *held) __attribute__((visibility("hidden")));

/* The functions of the module for Python. */
extern PyMethodDef translations_methods[] __attribute__((visibility("hidden")));

#endif
