/* Offsets in structures that are not ours are found by Python (layout.py) and given to each module once. */
#ifndef VMDBG_OFFSETS_H
#define VMDBG_OFFSETS_H
#include <Python.h>
#include <stdbool.h>
#include <string.h>

/* Take over a buffer of uint32_t, and release it.  False, with ValueError, if it is not of this size. */
static inline bool take_offsets(Py_buffer *given, void *offsets, size_t size)
{
    bool fits = given->len == (Py_ssize_t)size;
    if (fits)
        memcpy(offsets, given->buf, size);
    else
        PyErr_Format(PyExc_ValueError, "%zd bytes of offsets, not %zu", given->len, size);
    PyBuffer_Release(given);
    return fits;
}

#endif
