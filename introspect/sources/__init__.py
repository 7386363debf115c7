"""Where physical memory and registers come from, without an emulator: dumps of several formats, a stub over the wire."""

from introspect.sources.dump import Dump
from introspect.sources.elfcore import open_core
from introspect.sources.files import FileMemory, Segment
from introspect.sources.lime import open_lime
from introspect.sources.memory import (
    BytesMemory,
    Memory,
    Ranged,
    SourceError,
    Sparse,
    Unreadable,
    Unwritable,
    data_ranges,
    memory_ranges,
)
from introspect.sources.opening import open_dump, open_raw

__all__ = [
    "BytesMemory", "Dump", "FileMemory", "Memory", "Ranged", "Segment", "SourceError", "Sparse", "Unreadable", "Unwritable",
    "data_ranges", "memory_ranges", "open_core", "open_dump", "open_lime", "open_raw",
]  # fmt: skip
