"""VMCOREINFO: what a Linux kernel tells the readers of its dumps, kept in its memory as an ELF note on a page of its own."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import numpy as np

from introspect.sources import Memory, Unreadable, data_ranges
from introspect.sources.notes import make_note

__all__ = ["find_vmcoreinfo"]

PAGE = 0x1000
CHUNK = 4 << 20
NAME = b"VMCOREINFO"
MAX_SIZE = 0x10000
_MOST = 64
_FIRST = len(NAME) + 1
_SECOND = int.from_bytes(b"\0\0\0\0" + NAME[:4], "little")
"""The second 8 bytes of the note: type 0, and the name's beginning."""
_START_KERNEL_MAP = 0xFFFF_FFFF_8000_0000
_SWAPPER = re.compile(rb"^SYMBOL\(swapper_pg_dir\)=([0-9a-f]{1,16})$", re.MULTILINE)
_PHYS_BASE = re.compile(rb"^NUMBER\(phys_base\)=(-?[0-9]{1,20})$", re.MULTILINE)


def find_vmcoreinfo(
    memory: Memory, translate: Callable[[int], int | None], progress: Callable[[float], object] | None = None
) -> bytes:
    """The contents of the note in a memory; empty if there is none.

    `translate`: how the kernel's own page tables translate a linear address. By them a kernel's own note is told from those of
    guests and of kernels that ran before.
    """
    doubtful = b""
    for contents in _notes(memory, progress):
        fits = _fits(contents, translate)
        if fits:
            return contents
        if fits is None:
            doubtful = doubtful or contents
    return doubtful


def _fits(contents: bytes, translate: Callable[[int], int | None]) -> bool | None:
    """Whether its page tables lie where it says; None if that cannot be told."""
    swapper, base = _SWAPPER.search(contents), _PHYS_BASE.search(contents)
    if swapper is None or base is None:
        return None
    linear = int(swapper[1], 16)
    found = translate(linear)
    return None if found is None else found == linear - _START_KERNEL_MAP + int(base[1])


def _notes(memory: Memory, progress: Callable[[float], object] | None) -> Iterator[bytes]:
    seen = 0
    stretches = list(data_ranges(memory))
    total = sum(end - first for first, end in stretches) or 1
    done = 0
    for first, end in stretches:
        at = first & -PAGE
        while at < end:
            count = min(CHUNK, (end - at + PAGE - 1) & -PAGE)
            try:
                data, following = memory.read(at, count), at + count
            except Unreadable as error:
                data = error.readable_prefix[: len(error.readable_prefix) & -PAGE]
                following = max(error.address & -PAGE, at) + PAGE
            words = np.frombuffer(data, np.uint64).reshape(-1, PAGE // 8)
            for page in np.flatnonzero((words[:, 0] & 0xFFFF_FFFF == _FIRST) & (words[:, 1] == _SECOND)).tolist():
                contents = _contents(memory, at + page * PAGE)
                if contents and seen < _MOST:
                    seen += 1
                    yield contents
            done += following - at
            at = following
            if progress is not None:
                progress(min(done / total, 1.0))


def _contents(memory: Memory, spa: int) -> bytes:
    try:
        size = int.from_bytes(memory.read(spa + 4, 4), "little")
        if size > MAX_SIZE:
            return b""
        contents = memory.read(spa + 12 + 12, size)
        name = memory.read(spa + 12, 12)
    except Unreadable:
        return b""
    return contents if name == NAME + b"\0\0" and contents.startswith(b"OSRELEASE=") else b""


def make_vmcoreinfo(contents: bytes) -> bytes:
    """The note as it stands in a core."""
    return make_note(NAME, 0, contents)
