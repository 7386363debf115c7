"""Call frame information of ELF files: how to find the caller of the code at an address (DWARF 5 6.4, LSB .eh_frame).

pyelftools finds the sections; the tables are read here, since a kernel has tens of thousands of them and one is wanted: the
first question about a file makes an index of their headers, and only the entry that is asked for is interpreted.
"""

import os
import struct
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from elftools.common.exceptions import ELFError
from elftools.elf.elffile import ELFFile

__all__ = ["Cfi", "CfiError", "Row", "Rule"]

_MAX_BYTES = 1 << 28
_MAX_INSTRUCTIONS = 1 << 16
_MAX_ENTRIES = 1 << 20
_SIZES = {1: "B", 2: "H", 4: "I", 8: "Q"}
_NAMES = {
    "EM_X86_64": ("rax", "rdx", "rcx", "rbx", "rsi", "rdi", "rbp", "rsp", *(f"r{n}" for n in range(8, 16)), "rip"),
    "EM_386": ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "rip"),
}
"""Registers by their DWARF numbers (psABI); the last one is the return address."""

# Pointer encodings of .eh_frame (LSB 10.5): the low four bits are the format, the next three what it is relative to.
_FORMATS = {0x2: "<H", 0x3: "<I", 0x4: "<Q", 0xA: "<h", 0xB: "<i", 0xC: "<q"}
_PCREL, _INDIRECT, _OMIT = 0x10, 0x80, 0xFF


class CfiError(Exception):
    """Tables that cannot be read, in words."""


class Rule(NamedTuple):
    """Where the caller's value of a register is: "undefined", "same", "offset" (in memory at CFA + value), "value" (CFA + value),
    "register" (in the one named), or "expression", which is not evaluated."""

    kind: str
    value: int = 0
    register: str = ""


@dataclass
class Row:
    """What holds at one address. The canonical frame address is `register` + `offset`; empty where an expression gives it."""

    register: str = ""
    offset: int = 0
    rules: dict[str, Rule] = field(default_factory=dict)

    def copy(self) -> "Row":
        return Row(self.register, self.offset, dict(self.rules))


class _Cie(NamedTuple):
    code_factor: int
    data_factor: int
    return_register: int
    encoding: int
    augmented: bool
    signal: bool
    program: tuple[int, int]


class _Reader:
    """Numbers of a section, from a position on.  CfiError behind its end."""

    def __init__(self, data: bytes, at: int, end: int) -> None:
        self.data, self.at, self.end = data, at, min(end, len(data))

    def number(self, size: int) -> int:
        if self.at + size > self.end:
            raise CfiError("an entry ends too early")
        value = int.from_bytes(self.data[self.at : self.at + size], "little")
        self.at += size
        return value

    def uleb(self) -> int:
        value = shift = 0
        while shift < 70:
            byte = self.number(1)
            value |= (byte & 0x7F) << shift
            shift += 7
            if not byte & 0x80:
                return value
        raise CfiError("a number has more than 64 bits")

    def sleb(self) -> int:
        start = self.at
        value = self.uleb()
        width = 7 * (self.at - start)
        return value - (1 << width) if value >> width - 1 else value

    def skip(self, size: int) -> None:
        if self.at + size > self.end:
            raise CfiError("an entry ends too early")
        self.at += size

    def text(self) -> bytes:
        end = self.data.find(b"\0", self.at, self.end)
        if end < 0:
            raise CfiError("an augmentation does not end")
        found = self.data[self.at : end]
        self.at = end + 1
        return found


class _Section:
    """.eh_frame or .debug_frame."""

    def __init__(self, data: bytes, address: int, eh: bool, names: tuple[str, ...], word: int) -> None:
        self.data, self.address, self.eh, self.names, self.word = data, address, eh, names, word
        self._cies: dict[int, _Cie | None] = {}

    def entries(self) -> Iterator[tuple[int, int, int]]:
        """(start, end, position) of all functions. A damaged entry ends the list."""
        at, data = 0, self.data
        for _ in range(_MAX_ENTRIES):
            head = self._head(at)
            if head is None:
                return
            start, end, pointer = head
            cie_at = self._cie_at(start, pointer)
            if cie_at is not None:
                cie = self._known(cie_at)
                where = start + (4 if self._wide(at) == 4 else 8)
                try:
                    first, size = self._range(_Reader(data, where, end), cie)
                except CfiError:
                    first = size = 0
                if size and cie is not None:
                    yield first, first + size, at
            at = end

    def _wide(self, at: int) -> int:
        return 8 if self.data[at : at + 4] == b"\xff\xff\xff\xff" else 4

    def _head(self, at: int) -> tuple[int, int, int] | None:
        """Of an entry: where its id is, its end, the id; None behind the last."""
        data = self.data
        if at + 8 > len(data):
            return None
        (length,) = struct.unpack_from("<I", data, at)
        start = at + 4
        if length == 0xFFFFFFFF:
            if at + 20 > len(data):
                return None
            (length,) = struct.unpack_from("<Q", data, start)
            start += 8
        size = start - at if start - at == 4 else 8
        if not length or start + length > len(data) or length < size:
            return None
        return start, start + length, int.from_bytes(data[start : start + size], "little")

    def _cie_at(self, start: int, pointer: int) -> int | None:
        """Where the CIE of an FDE is; None for a CIE."""
        if self.eh:
            return start - pointer if pointer else None
        return None if pointer in (0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF) else pointer

    def _known(self, at: int) -> _Cie | None:
        if at not in self._cies:
            try:
                self._cies[at] = self._cie(at)
            except (CfiError, struct.error):
                self._cies[at] = None
        return self._cies[at]

    def _cie(self, at: int) -> _Cie:
        head = self._head(at) if at >= 0 else None
        if head is None or self._cie_at(head[0], head[2]) is not None:
            raise CfiError("an entry names no CIE")
        start, end, _ = head
        reader = _Reader(self.data, start + (4 if start - at == 4 else 8), end)
        version = reader.number(1)
        augmentation = reader.text()
        if version not in (1, 3, 4):
            raise CfiError(f"its version {version} is none of 1, 3 and 4")
        if version == 4:
            address_size, segment_size = reader.number(1), reader.number(1)
            if address_size != self.word or segment_size:
                raise CfiError(f"it has addresses of {address_size} bytes and segments of {segment_size}")
        code_factor, data_factor = reader.uleb(), reader.sleb()
        return_register = reader.number(1) if version == 1 else reader.uleb()
        encoding, augmented = 0, augmentation.startswith(b"z")
        if augmented:
            length = reader.uleb()
            body = reader.at
            for letter in augmentation[1:].decode("latin-1"):
                if letter == "R":
                    encoding = reader.number(1)
                elif letter == "P":
                    self._pointer(reader, reader.number(1))
                elif letter == "L":
                    reader.skip(1)
            reader.at = body
            reader.skip(length)
        elif augmentation:
            raise CfiError(f"its augmentation {augmentation[:16]!r} is not known")
        program = reader.at, end
        return _Cie(code_factor, data_factor, return_register, encoding, augmented, b"S" in augmentation, program)

    def _pointer(self, reader: _Reader, encoding: int) -> int:
        at = reader.at
        if encoding == _OMIT:
            return 0
        form = encoding & 0xF
        if form == 0:
            value = reader.number(self.word)
        elif form == 1:
            value = reader.uleb()
        elif form == 9:
            value = reader.sleb()
        elif form in _FORMATS:
            size = struct.calcsize(_FORMATS[form])
            value = struct.unpack(_FORMATS[form], reader.number(size).to_bytes(size, "little"))[0]
        else:
            raise CfiError(f"pointer encoding {encoding:#x} is not known")
        if encoding & 0x70 == _PCREL:
            value += self.address + at
        return value & (1 << 8 * self.word) - 1

    def _range(self, reader: _Reader, cie: _Cie | None) -> tuple[int, int]:
        """First address and size of a function."""
        if cie is None or cie.encoding & _INDIRECT or cie.encoding & 0x70 not in (0, _PCREL):
            return 0, 0
        first = self._pointer(reader, cie.encoding)
        return first, self._pointer(reader, cie.encoding & 0xF)

    def row(self, at: int, address: int) -> tuple[Row, str, bool]:
        """What holds at an address of the FDE at a position; the name of the return address, and whether it is a signal's
        (or an interrupt's) frame."""
        head = self._head(at)
        cie_at = self._cie_at(head[0], head[2]) if head is not None else None
        cie = self._known(cie_at) if cie_at is not None else None
        if head is None or cie is None:
            raise CfiError("an entry names no CIE")
        start, end, _ = head
        reader = _Reader(self.data, start + (4 if start - at == 4 else 8), end)
        first, _ = self._range(reader, cie)
        if cie.augmented:
            reader.skip(reader.uleb())
        row = Row()
        self._execute(row, _Reader(self.data, *cie.program), cie, first, None, Row())
        self._execute(row, reader, cie, first, address, row.copy())
        return row, self._name(cie.return_register), cie.signal

    def _name(self, number: int) -> str:
        return self.names[number] if number < len(self.names) else f"register {number}"

    def _execute(self, row: Row, reader: _Reader, cie: _Cie, location: int, address: int | None, initial: Row) -> None:
        """Call frame instructions up to what holds at `address`, all of them without one (DWARF 5 6.4.2)."""
        kept: list[Row] = []
        for _ in range(_MAX_INSTRUCTIONS):
            if reader.at >= reader.end:
                return
            opcode = reader.number(1)
            low, high = opcode & 0x3F, opcode & 0xC0
            advance = None
            if high == 0x40:
                advance = low
            elif high == 0x80:
                row.rules[self._name(low)] = Rule("offset", reader.uleb() * cie.data_factor)
            elif high == 0xC0:
                self._restore(row, initial, low)
            elif opcode in (0x02, 0x03, 0x04):  # advance_loc1, 2, 4
                advance = reader.number(1 << opcode - 2)
            elif opcode == 0x01:  # set_loc
                location = self._pointer(reader, cie.encoding)
                if address is not None and location > address:
                    return
            else:
                self._other(opcode, row, reader, cie, initial, kept)
            if advance is not None:
                location += advance * cie.code_factor
                if address is not None and location > address:
                    return
        raise CfiError(f"it has more than {_MAX_INSTRUCTIONS} instructions")

    def _restore(self, row: Row, initial: Row, number: int) -> None:
        name = self._name(number)
        row.rules.pop(name, None)
        if name in initial.rules:
            row.rules[name] = initial.rules[name]

    def _other(self, opcode: int, row: Row, reader: _Reader, cie: _Cie, initial: Row, kept: list[Row]) -> None:
        rules, name = row.rules, self._name
        match opcode:
            case 0x00:  # nop
                pass
            case 0x05:  # offset_extended
                rules[name(reader.uleb())] = Rule("offset", reader.uleb() * cie.data_factor)
            case 0x06:  # restore_extended
                self._restore(row, initial, reader.uleb())
            case 0x07:
                rules[name(reader.uleb())] = Rule("undefined")
            case 0x08:
                rules[name(reader.uleb())] = Rule("same")
            case 0x09:
                rules[name(reader.uleb())] = Rule("register", 0, name(reader.uleb()))
            case 0x0A:  # remember_state
                if len(kept) > 64:
                    raise CfiError("it remembers more than 64 states")
                kept.append(row.copy())
            case 0x0B:  # restore_state
                if not kept:
                    raise CfiError("it restores a state that it has not remembered")
                back = kept.pop()
                row.register, row.offset, row.rules = back.register, back.offset, back.rules
            case 0x0C:  # def_cfa
                row.register, row.offset = name(reader.uleb()), reader.uleb()
            case 0x0D:  # def_cfa_register
                row.register = name(reader.uleb())
            case 0x0E:  # def_cfa_offset
                row.offset = reader.uleb()
            case 0x0F:  # def_cfa_expression
                row.register = ""
                reader.skip(reader.uleb())
            case 0x10 | 0x16:  # expression, val_expression
                rules[name(reader.uleb())] = Rule("expression")
                reader.skip(reader.uleb())
            case 0x11:  # offset_extended_sf
                rules[name(reader.uleb())] = Rule("offset", reader.sleb() * cie.data_factor)
            case 0x12:  # def_cfa_sf
                row.register, row.offset = name(reader.uleb()), reader.sleb() * cie.data_factor
            case 0x13:  # def_cfa_offset_sf
                row.offset = reader.sleb() * cie.data_factor
            case 0x14:  # val_offset
                rules[name(reader.uleb())] = Rule("value", reader.uleb() * cie.data_factor)
            case 0x15:  # val_offset_sf
                rules[name(reader.uleb())] = Rule("value", reader.sleb() * cie.data_factor)
            case 0x2E:  # GNU_args_size
                reader.uleb()
            case _:
                raise CfiError(f"instruction {opcode:#x} is not known")


class Cfi:
    """Of one file. Addresses are where they are now: `offset` is already added."""

    def __init__(self, sections: list[_Section], offset: int = 0) -> None:
        self.offset = offset
        self._sections = sections
        found = [(first, end, n, at) for n, section in enumerate(sections) for first, end, at in section.entries()]
        found.sort()
        self._entries = found
        self._starts = [entry[0] for entry in found]

    @classmethod
    def load(cls, path: Path, offset: int = 0) -> "Cfi":
        """Of a file; empty where it has none, or cannot be read. Files are read once, until they change."""
        try:
            return _load(path, os.stat(path).st_mtime_ns, offset)
        except OSError:
            return cls([], offset)

    def __len__(self) -> int:
        return len(self._entries)

    def row(self, address: int) -> tuple[Row, str, bool] | None:
        """What holds at an address, the register with the return address, whether the frame is a signal's; None if no entry
        has it.  CfiError for one that cannot be read."""
        address = address - self.offset & (1 << 64) - 1
        index = bisect_right(self._starts, address) - 1
        if index < 0 or address >= self._entries[index][1]:
            return None
        _, _, number, at = self._entries[index]
        return self._sections[number].row(at, address)

    def function(self, address: int) -> int | None:
        """Where the function that has an address begins, if an entry has it."""
        address = address - self.offset & (1 << 64) - 1
        index = bisect_right(self._starts, address) - 1
        if index < 0 or address >= self._entries[index][1]:
            return None
        return self._starts[index] + self.offset & (1 << 64) - 1


@lru_cache(maxsize=16)
def _load(path: Path, modified: int, offset: int) -> Cfi:
    try:
        with path.open("rb") as file:
            elf = ELFFile(file)
            names = _NAMES.get(elf["e_machine"])
            if names is None or not elf.little_endian:
                return Cfi([], offset)
            sections = []
            for name in (".debug_frame", ".eh_frame"):
                section = elf.get_section_by_name(name)
                if section is None or section["sh_type"] == "SHT_NOBITS" or not 0 < section.data_size <= _MAX_BYTES:
                    continue
                sections.append(_Section(section.data(), section["sh_addr"], name == ".eh_frame", names, elf.elfclass // 8))
            return Cfi(sections, offset)
    except (
        ELFError, OSError, struct.error, ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError, MemoryError
    ):  # fmt: skip
        return Cfi([], offset)  # pyelftools promises nothing about malformed files
