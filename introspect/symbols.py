"""Symbols of ELF files: names to addresses, addresses to names."""

import os
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from struct import Struct, error
from typing import NamedTuple

from elftools.common.exceptions import ELFError
from elftools.elf.elffile import ELFFile

__all__ = ["Symbol", "Symbols"]

_ENTRY = {32: Struct("<IIIBBH"), 64: Struct("<IBBHQQ")}
_SECTION, _FILE, _TLS = 3, 4, 6
_MAX_BYTES = 1 << 28
"""Of a symbol table, and of its names."""
MOST_GUESSES = 20_000
_NAME = re.compile(rb"[^\0]*")


class Symbol(NamedTuple):
    """`size` in bytes, 0 if the file does not say."""

    name: str
    address: int
    size: int


class Symbols:
    """Those of one inferior. Addresses are where they are now: `offset` is already added."""

    def __init__(self, symbols: Iterable[Symbol], path: Path | None = None, offset: int = 0) -> None:
        """Of names that occur twice the first counts."""
        self.path, self.offset = path, offset
        self._sorted = sorted(symbols, key=lambda symbol: (symbol.address, symbol.size))
        self._addresses = [symbol.address for symbol in self._sorted]
        self._by_name: dict[str, Symbol] = {}
        for symbol in self._sorted:
            self._by_name.setdefault(symbol.name, symbol)

    @classmethod
    def load(cls, path: Path, offset: int = 0) -> "Symbols":
        """Those of a file; none where it cannot be read. Files are read once, until they change."""
        try:
            return _load(path, os.stat(path).st_mtime_ns, offset)
        except OSError:
            return cls((), path, offset)

    def __len__(self) -> int:
        return len(self._sorted)

    def __iter__(self) -> Iterator[Symbol]:
        return iter(self._sorted)

    def get(self, name: str) -> Symbol | None:
        return self._by_name.get(name)

    @property
    def guesses(self) -> Iterable[str]:
        """All names, for who has mistyped one; none where there are too many to look through for that."""
        return self._by_name if len(self._by_name) <= MOST_GUESSES else ()

    def address(self, name: str) -> int | None:
        found = self._by_name.get(name)
        return None if found is None else found.address

    def at(self, address: int) -> tuple[Symbol, int] | None:
        """The symbol that an address belongs to and how far behind its start it is; None if it belongs to none.

        A symbol without a size reaches to the next one, but not over more than 64 KiB.
        """
        index = bisect_right(self._addresses, address) - 1
        while index >= 0 and address - self._addresses[index] < 1 << 20:
            symbol = self._sorted[index]
            behind = address - symbol.address
            if behind < symbol.size or (not symbol.size and behind < 1 << 16):
                return symbol, behind
            if symbol.size and index and self._addresses[index - 1] != symbol.address:
                return None
            index -= 1
        return None

    def name(self, address: int) -> str:
        """ "tick+0x10"; empty if the address belongs to no symbol."""
        found = self.at(address)
        if found is None:
            return ""
        return found[0].name + (f"+{found[1]:#x}" if found[1] else "")

    def matching(self, text: str) -> Iterator[Symbol]:
        """Symbols with this text in their names."""
        return (symbol for symbol in self._sorted if text in symbol.name)


@lru_cache(maxsize=16)
def _load(path: Path, modified: int, offset: int) -> Symbols:
    try:
        with path.open("rb") as file:
            return Symbols(_read(ELFFile(file), offset), path, offset)
    except (ELFError, OSError, error, ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError):
        return Symbols((), path, offset)  # pyelftools promises nothing about malformed files


def _read(elf: ELFFile, offset: int) -> list[Symbol]:
    table = elf.get_section_by_name(".symtab")
    if table is None or table["sh_size"] > _MAX_BYTES:
        return []
    strings = elf.get_section(table["sh_link"])
    if strings["sh_size"] > _MAX_BYTES:
        return []
    names, data, entry = strings.data(), table.data(), _ENTRY[elf.elfclass]
    found, total = [], 0
    for fields in entry.iter_unpack(data[: len(data) // entry.size * entry.size]):
        if elf.elfclass == 64:
            at, info, _, section, value, size = fields
        else:
            at, value, size, info, _, section = fields
        if not section or not at or info & 15 in (_SECTION, _FILE, _TLS):
            continue
        name = _NAME.match(names, at)
        if name is None or not name[0]:
            continue
        total += len(name[0])
        if total > _MAX_BYTES:  # names that overlap, in a file made for that
            break
        found.append(Symbol(name[0].decode("utf-8", "replace"), value + offset & (1 << 64) - 1, size))
    return found
