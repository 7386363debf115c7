"""ELF cores whose program headers carry physical addresses: ours, QEMU's `dump-guest-memory`, Linux's vmcore.

Read here rather than by a library: a damaged header must neither escape nor cost time.
"""

import os
import struct
from pathlib import Path
from typing import BinaryIO, NamedTuple

from introspect.sources.dump import Dump, assemble
from introspect.sources.files import ADDRESSES, Segment
from introspect.sources.memory import SourceError
from introspect.sources.notes import Annotations, read_notes

__all__ = ["ELF_MAGIC", "open_core"]

ELF_MAGIC = b"\x7fELF"
ET_CORE = 4
PT_LOAD, PT_NOTE = 1, 4
PN_XNUM = 0xFFFF
EM_X86_64 = 62
MAX_HEADERS = 1 << 20
MAX_NOTE_BYTES = 64 << 20


class _Class(NamedTuple):
    header: struct.Struct
    """e_type, e_machine, e_phoff, e_shoff, e_phentsize, e_phnum."""
    program: struct.Struct
    fields: tuple[str, ...]
    first_section: struct.Struct
    """sh_info, which holds the count of program headers from 65535 on."""


_CLASSES = {
    1: _Class(
        struct.Struct("<16xHH8xII6xHH6x"), struct.Struct("<IIIIIIII"),
        ("type", "offset", "vaddr", "paddr", "filesz", "memsz", "flags", "align"), struct.Struct("<28xI8x"),
    ),
    2: _Class(
        struct.Struct("<16xHH12xQQ6xHH6x"), struct.Struct("<IIQQQQQQ"),
        ("type", "flags", "offset", "vaddr", "paddr", "filesz", "memsz", "align"), struct.Struct("<44xI16x"),
    ),
}  # fmt: skip


def open_core(path: Path) -> Dump:
    """The core in a file. OSError if it cannot be opened, SourceError if it is none.

    Segments may overlap, as a vmcore's kernel text does its direct map: they show the same memory.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(64)
        form = _CLASSES.get(start[4]) if len(start) > 5 and start.startswith(ELF_MAGIC) and start[5] == 1 else None
        if form is None or len(start) < form.header.size:
            raise SourceError(f"{path}: not a little-endian ELF file; open it as a raw dump if it is one")
        kind, machine, table, sections, entry_size, count = form.header.unpack_from(start)
        if kind != ET_CORE:
            raise SourceError(f"{path}: an ELF file of type {kind}, not a core ({ET_CORE}); `vmdbg run` boots executables")
        if count == PN_XNUM and sections + form.first_section.size <= size:
            (count,) = form.first_section.unpack(_pread(file, sections, form.first_section.size))
        if entry_size < form.program.size or table + count * entry_size > size:
            raise SourceError(f"{path}: {count} program headers at {table:#x} do not fit the file; dump it again")
        if count > MAX_HEADERS:
            raise SourceError(f"{path}: {count} program headers; a core has at most {MAX_HEADERS}: dump it again")
        headers = _pread(file, table, count * entry_size)
        segments, notes, remarks = [], [], []
        for number in range(len(headers) // entry_size):
            entry = dict(zip(form.fields, form.program.unpack_from(headers, number * entry_size), strict=True))
            if entry["type"] == PT_LOAD:
                segments.append(_segment(entry, size))
            elif entry["type"] == PT_NOTE and entry["filesz"]:
                notes.append((entry["offset"], entry["filesz"]))
        annotations = Annotations()
        if notes:
            if sum(length for _, length in notes) > MAX_NOTE_BYTES:
                remarks.append(f"more than {MAX_NOTE_BYTES >> 20} MiB of notes: left out")
            else:
                data = b"".join(_pread(file, offset, length) for offset, length in notes if offset < size)
                if len(data) < sum(length for _, length in notes):
                    remarks.append("the notes were cut off: registers may be missing")
                annotations = read_notes(data, long_mode=machine == EM_X86_64)
    if not any(segment.present > segment.first for segment in segments):
        if segments:
            raise SourceError(f"{path}: the core ends before the memory that its headers announce: copy or dump it again")
        raise SourceError(f"{path}: the core has no PT_LOAD segment; dump it with memory included")
    return assemble(path, "ELF core", segments, annotations, remarks)


def _pread(file: BinaryIO, offset: int, length: int) -> bytes:
    return os.pread(file.fileno(), length, offset) if offset < 1 << 63 else b""


def _segment(entry: dict[str, int], size: int) -> Segment:
    """Where its bytes are. What it has in memory beyond those in the file was left out of the dump, and is not known."""
    first, offset = entry["paddr"], entry["offset"]
    end = min(first + entry["filesz"], ADDRESSES)
    return Segment(first, end, offset, first + max(min(end - first, size - offset), 0))
