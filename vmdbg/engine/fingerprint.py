# SPDX-License-Identifier: GPL-2.0-or-later
"""The part of a run's fingerprint that is made where blocks are executed and worlds switched, in Python; fingerprint.h is the
same in C.

**Code.** A debugger cuts a run into other blocks than the run alone has: at breakpoints, at each single step, at the end of its
slices.  So what is summed up must not know of blocks.  Each byte of code, executed at linear address `a` in tick `t`, adds

    mix(a - t + SALT * cpu) * (mix(t + 1) - mix(t))                            (mod 2^64)

and as long as code is executed straight on, `a - t` stays the same, and the differences add up: any stretch of n ticks is

    mix(a - t + SALT * cpu) * (mix(t + n) - mix(t))

which is a few multiplications for a block, and the same in sum however the stretch is cut.

**World switches** are always the same ones, so they are chained: every word of every VMRUN and #VMEXIT, in order.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable

FIRST, SECOND = 0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93
SALT = 0xA24BAED4963EE407
"""By which the same code on different CPUs differs."""
MASK = (1 << 64) - 1
VMRUN, VMEXIT = 1, 2
"""The first word of each kind of switch."""


class Sums(ctypes.Structure):
    """The `struct fingerprint` of fingerprint.h."""

    _fields_ = (("code", ctypes.c_uint64), ("switches", ctypes.c_uint64))


def mix(x: int) -> int:
    x = x * FIRST & MASK
    x = (x ^ x >> 32) * SECOND & MASK
    return x ^ x >> 32


def stretch(start: int, tick: int, size: int, salt: int) -> int:
    """What `size` bytes from linear address `start` on add, executed from a tick on."""
    return mix(start - tick + salt & MASK) * (mix(tick + size) - mix(tick)) & MASK


def chain(state: int, words: Iterable[int]) -> int:
    """`state` with these words, of 64 bits each, behind what it has."""
    for word in words:
        state = (state ^ word & MASK) * FIRST & MASK
        state ^= state >> 32
    return state
