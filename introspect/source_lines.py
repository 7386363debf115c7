"""Lines of source files, by the line programs of an ELF file: which one an address belongs to, where one begins."""

import os
import re
from bisect import bisect_right
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from elftools.common.exceptions import DWARFError, ELFError
from elftools.construct.core import ConstructError
from elftools.elf.elffile import ELFFile

from introspect.symbols import Symbols

__all__ = ["Place", "SourceLines", "is_line", "read_lines"]

_MOST_UNITS, _MOST_BYTES = 2000, 1 << 20
"""Compilation units, and bytes of a line program, that are looked at: a kernel's would take minutes."""
_LONGEST = 1 << 22
"""Bytes of a source file."""
_LINE = re.compile(r"(?:(?P<owner>host|\d+):)?(?P<file>[\w./+-]+\.\w+):(?P<line>\d+)")
_BAD = (
    ELFError, DWARFError, ConstructError, OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError,
    AssertionError, RecursionError, MemoryError,
)  # fmt: skip
"""pyelftools promises nothing about malformed files."""


class Place(NamedTuple):
    path: Path
    line: int

    def __str__(self) -> str:
        return f"{self.path.name}:{self.line}"


class _Row(NamedTuple):
    """From this address on; `place` is None behind the end of a sequence."""

    address: int
    place: Place | None


def is_line(text: str) -> tuple[str, str, int] | None:
    """(owner, file, line) of "exits.c:256" or "2:guest64.c:56"; None for what is no line of a file."""
    found = _LINE.fullmatch(text)
    return (found["owner"] or "", found["file"], int(found["line"])) if found is not None and len(found["line"]) < 10 else None


class SourceLines:
    """Those of one file. Line programs are decoded when an address in them is asked for."""

    def __init__(self, path: Path, offset: int = 0) -> None:
        self.path, self.offset = path, offset
        self._dwarf: Any = None
        self._units: list[tuple[int, int, int]] = []
        """(start, end, offset of the unit), ascending."""
        self._rows: dict[int, list[_Row]] = {}
        try:
            self._open()
        except _BAD:
            self._dwarf, self._units = None, []

    @classmethod
    def load(cls, path: Path, offset: int = 0) -> "SourceLines":
        """Those of a file, read once until it changes; none where it cannot be read, or has none."""
        try:
            return _load(path, os.stat(path).st_mtime_ns, offset)
        except (OSError, ValueError):
            return cls(Path(os.devnull), offset)

    @classmethod
    def of(cls, symbols: Symbols) -> "SourceLines":
        """Of the file that symbols are from."""
        return cls.load(symbols.path, symbols.offset) if symbols.path is not None else cls(Path(os.devnull))

    def _open(self) -> None:
        elf = ELFFile(self.path.open("rb"))
        if not elf.has_dwarf_info() or elf.get_section_by_name(".debug_aranges") is None:
            return
        dwarf = elf.get_dwarf_info()
        if dwarf.debug_line_sec is None or dwarf.debug_aranges_sec is None or dwarf.debug_aranges_sec.size > _MOST_BYTES:
            return
        ranges = dwarf.get_aranges()
        if ranges is None:
            return
        self._units = sorted((one.begin_addr, one.begin_addr + one.length, one.info_offset) for one in ranges.entries)
        self._dwarf = dwarf if len({unit for _, _, unit in self._units}) <= _MOST_UNITS else None

    def at(self, address: int) -> Place | None:
        """What an address was made from."""
        address -= self.offset
        index = bisect_right(self._units, (address, 1 << 64, 0)) - 1
        if self._dwarf is None or index < 0 or address >= self._units[index][1]:
            return None
        rows = self._of(self._units[index][2])
        found = bisect_right(rows, address, key=lambda row: row.address) - 1
        return rows[found].place if found >= 0 else None

    def address(self, file: str, line: int) -> int | None:
        """Where a line begins, or the next one that anything was made of; `file` is a path, or the end of one."""
        best: tuple[int, int] | None = None
        for unit in dict.fromkeys(unit for _, _, unit in self._units) if self._dwarf is not None else ():
            for row in self._of(unit):
                place = row.place
                if place is None or place.line < line or not f"/{place.path}".endswith(f"/{file}"):
                    continue
                if best is None or (place.line, row.address) < best:
                    best = place.line, row.address
        return best[1] + self.offset & (1 << 64) - 1 if best is not None else None

    def _of(self, unit: int) -> list[_Row]:
        if unit not in self._rows:
            try:
                self._rows[unit] = sorted(self._decoded(unit), key=lambda row: (row.address, row.place is not None))
            except _BAD:
                self._rows[unit] = []
        return self._rows[unit]

    def _decoded(self, offset: int) -> Iterator[_Row]:
        unit = self._dwarf.get_CU_at(offset)
        program = self._dwarf.line_program_for_CU(unit)
        if program is None or program.header["unit_length"] > _MOST_BYTES:
            return
        folder = unit.get_top_DIE().attributes.get("DW_AT_comp_dir")
        names = _Names(program.header, _text(folder.value) if folder is not None else "")
        for entry in program.get_entries():
            state = entry.state
            if state is not None:
                nothing = state.end_sequence or not state.line
                yield _Row(state.address, None if nothing else Place(names.path(state.file), state.line))


class _Names:
    """The files of a line program: their tables begin with 1 before DWARF 5, where 0 is the folder of the compilation."""

    def __init__(self, header: Any, folder: str) -> None:
        self._new = header["version"] >= 5
        self._folder = Path(folder)
        self._folders = [_text(one) for one in header["include_directory"]]
        self._files = [(_text(one.name), int(one.dir_index)) for one in header["file_entry"]]
        self._known: dict[int, Path] = {}

    def path(self, number: int) -> Path:
        if number not in self._known:
            name, index = self._files[number if self._new else number - 1]
            folder = self._folders[index if self._new else index - 1] if index or self._new else ""
            self._known[number] = self._folder / folder / name
        return self._known[number]


def _text(value: object) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


@lru_cache(maxsize=16)
def _load(path: Path, modified: int, offset: int) -> SourceLines:
    return SourceLines(path, offset)


def read_lines(path: Path, first: int, count: int) -> list[str]:
    """Lines of a source file, from a number (1) on; none where it is not there."""
    try:
        lines = _source(path, os.stat(path).st_mtime_ns)
    except (OSError, ValueError):
        return []
    return lines[max(first - 1, 0) : max(first - 1, 0) + count]


@lru_cache(maxsize=32)
def _source(path: Path, modified: int) -> list[str]:
    try:
        with path.open("rb") as file:
            text = file.read(_LONGEST).decode("utf-8", "replace")
    except OSError:
        return []
    return [line.expandtabs(4) for line in text.splitlines()]
