"""The first pass of a search: every page is compared with what a VMCB must be, many pages at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from introspect.layout import bits
from introspect.registers import CR0, CR4, EFER, RFLAGS
from introspect.sources import Memory, Unreadable, data_ranges
from introspect.vmcb import INT_STATE, SAVE_AREA, VMCB

__all__ = ["MOST", "SAVE_RESERVED", "Progress", "candidates", "look"]

PAGE = 0x1000
CHUNK = 4 << 20
MOST = 4096
"""Pages that are judged: a dump that is full of what looks like VMCBs was made to be."""

Words: TypeAlias = npt.NDArray[np.uint64]
Pages: TypeAlias = npt.NDArray[np.intp]
Progress: TypeAlias = Callable[[float], bool]
"""Told which share is done; says whether to go on."""


def _reserved(first: int, end: int) -> list[int]:
    """Indices of the 8-byte words within a stretch of the VMCB that no field has a part of."""
    used = {at // 8 for field in VMCB for at in range(field.offset, field.offset + field.size)}
    return [word for word in range(first // 8, end // 8) if word not in used]


_HOST_USE = 0x3E0
"""What lies from here up to the save area is software's (APM2 appendix B)."""
_CONTROL_RESERVED = np.array(_reserved(0, _HOST_USE))
SAVE_RESERVED = np.array(_reserved(SAVE_AREA, VMCB.offset_of("spec_ctrl")))
_RFLAGS_FIXED = bits(63, 32) | RFLAGS.ones | 1 << 3 | 1 << 5 | 1 << 15


def _word(name: str) -> int:
    return VMCB.offset_of(name) // 8


def candidates(words: Words) -> tuple[Pages, Pages]:
    """Pages (rows of 512 words) that may be VMCBs, and that may be host save areas."""
    efer, rflags = words[:, _word("efer")], words[:, _word("rflags")]
    state = efer & (EFER.SVME | ~EFER.defined & bits(63, 0)) == EFER.SVME
    state &= rflags & _RFLAGS_FIXED == RFLAGS.ones
    near = np.flatnonzero(state)
    if not len(near):
        return near, near
    page = words[near]
    state = page[:, _word("cr0")] >> 32 == 0
    state &= page[:, _word("cr4")] & (~CR4.defined & bits(63, 0)) == 0
    state &= page[:, _word("cr3")] >> 52 == 0
    run = state & (page[:, _word("intercept_misc2")] & 1 == 1) & (page[:, _word("guest_asid")] & bits(31, 0) != 0)
    run &= (page[:, _CONTROL_RESERVED] == 0).all(axis=1)
    run &= page[:, _word("int_state")] & (~INT_STATE.defined & bits(63, 0)) == 0
    run &= (page[:, _word("dr6")] | page[:, _word("dr7")]) >> 32 == 0
    save = state & (page[:, : SAVE_AREA // 8] == 0).all(axis=1)
    save &= page[:, _word("cr0")] & (CR0.PE | CR0.PG) == CR0.PE | CR0.PG
    return near[run], near[save]


def _pages(memory: Memory, first: int, end: int) -> Iterator[tuple[int, bytes]]:
    """Whole pages as far as they can be read: (address of the first, their bytes)."""
    at, step = first & -PAGE, CHUNK
    while at < end:
        count = min(step, (end - at + PAGE - 1) & -PAGE)
        try:
            data, following = memory.read(at, count), at + count
            step = CHUNK
        except Unreadable as error:
            data = error.readable_prefix[: len(error.readable_prefix) & -PAGE]
            following = max(error.address & -PAGE, at) + PAGE
        if data:
            yield at, data
        elif count > PAGE and following - at == PAGE:
            step = PAGE  # a page of a large stretch that is not there: look at what follows alone
        at = following


def look(memory: Memory, progress: Progress | None) -> tuple[list[int], list[int], int, str]:
    """Addresses of what may be VMCBs, and of what may be host save areas; the bytes read; why that is not all, if it is not."""
    stretches = list(data_ranges(memory))
    total = sum(end - first for first, end in stretches) or 1
    done, seen = 0, -1
    vmcbs: list[int] = []
    saves: list[int] = []
    for first, end in stretches:
        for at, data in _pages(memory, max(first, seen), end):
            words = np.frombuffer(data, np.uint64).reshape(-1, PAGE // 8)
            for into, pages in zip((vmcbs, saves), candidates(words), strict=True):
                into += (at + pages * PAGE).tolist()
            seen = at + len(data)
            done += len(data)
            if len(vmcbs) + len(saves) > MOST:
                return vmcbs, saves, done, f"more than {MOST} pages look like VMCBs: those from {seen:#x} on were not looked at"
            if progress is not None and not progress(min(done / total, 1.0)):
                return vmcbs, saves, done, f"ended on request at {seen:#x}"
    return vmcbs, saves, done, ""
