"""ELF executables, read with every offset checked: the file may be hostile (System V ABI, chapter 4 and 5).

pyelftools is for the debugger's use of files that this module has accepted; it promises nothing about malformed ones.
"""

from dataclasses import dataclass
from pathlib import Path
from struct import Struct
from typing import NamedTuple

from vmdbg.boot.image import ImageError, Symbol

MAGIC = b"\x7fELF"
ET_EXEC = 2
PT_LOAD = 1
SHT_SYMTAB, SHT_STRTAB = 2, 3
SHF_EXECINSTR = 4
STT_SECTION, STT_FILE = 3, 4
EM_386, EM_X86_64 = 3, 62

MAX_NAME_BYTES = 1 << 26
"""Limit of all symbol names together: names may overlap in a hostile file and expand without bound."""


@dataclass(frozen=True, slots=True)
class Layout:
    """The structures of one ELF class.  Field order is normalised by the accessors below."""

    bits: int
    machine: int
    header: Struct  # e_type .. e_shstrndx
    program: Struct
    section: Struct
    symbol: Struct


LAYOUTS = {
    1: Layout(32, EM_386, Struct("<HHIIIIIHHHHHH"), Struct("<IIIIIIII"), Struct("<IIIIIIIIII"), Struct("<IIIBBH")),
    2: Layout(64, EM_X86_64, Struct("<HHIQQQIHHHHHH"), Struct("<IIQQQQQQ"), Struct("<IIQQQQIIQQ"), Struct("<IBBHQQ")),
}


@dataclass(frozen=True, slots=True)
class LoadSegment:
    """A PT_LOAD program header: where its bytes are in the file, and where they go."""

    name: str
    offset: int
    file_size: int
    address: int
    virtual: int
    memory_size: int

    @property
    def end(self) -> int:
        return self.address + self.memory_size


@dataclass(frozen=True, slots=True)
class Elf:
    """`entry` is physical."""

    bits: int
    entry: int
    segments: tuple[LoadSegment, ...]
    symbols: tuple[Symbol, ...]


def is_elf(path: Path, magic: bytes = MAGIC) -> bool:
    """Whether a file can be read and begins as an ELF file does."""
    try:
        with path.open("rb") as file:
            return file.read(len(magic)) == magic
    except OSError:
        return False


def is_elf64(path: Path) -> bool:
    """Whether a file can be read and says that it is 64-bit ELF."""
    return is_elf(path, MAGIC + b"\2")


class Linked(NamedTuple):
    """Virtual addresses that a file with symbols is linked at: of its first loaded segment, and of its first code, .text."""

    segment: int
    code: int


def linked_at(path: Path) -> Linked:
    """Of a file which may be position-independent.  ImageError if it cannot be read, or is no ELF file of x86."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ImageError(f"{path}: {error.strerror}; give an ELF file") from None
    layout = LAYOUTS.get(data[4]) if data.startswith(MAGIC) and len(data) > len(MAGIC) else None
    if layout is None:
        raise ImageError(f"{path} is no ELF file: its symbols have no address; give an ELF file")
    header = _unpack(layout.header, data, 16, "ELF header")
    e_phoff, e_shoff, e_phentsize, e_phnum, e_shentsize, e_shnum = *header[4:6], *header[8:12]
    programs = [
        _unpack(layout.program, data, e_phoff + index * e_phentsize, f"ELF program header {index}") for index in range(e_phnum)
    ]
    sections = [
        _unpack(layout.section, data, e_shoff + index * e_shentsize, f"ELF section header {index}") for index in range(e_shnum)
    ]
    virtual = 2 if layout.bits == 32 else 3
    segment = next((fields[virtual] for fields in programs if fields[0] == PT_LOAD), None)
    if segment is None:
        raise ImageError(f"{path} has no PT_LOAD segment: its symbols have no address; link it as an executable")
    return Linked(segment, next((fields[3] for fields in sections if fields[2] & SHF_EXECINSTR), segment))


def parse(data: bytes) -> Elf:
    """Headers and symbols of an x86 ELF executable.  ImageError for anything that is not one."""
    layout, header, found = _headers(data)
    symbols = _symbols(layout, data, header[5], header[10], header[11])
    return Elf(layout.bits, _physical(header[3], list(found)), found, symbols)


def segments(data: bytes) -> tuple[LoadSegment, ...]:
    """What an x86 ELF executable loads.  ImageError for anything that is not one."""
    return _headers(data)[2]


def _headers(data: bytes) -> tuple[Layout, tuple[int, ...], tuple[LoadSegment, ...]]:
    if len(data) < 16:
        raise ImageError(f"ELF file is truncated: {len(data)} bytes, its identification has 16; copy it again")
    layout = LAYOUTS.get(data[4])
    if layout is None or data[5] != 1:
        raise ImageError(f"ELF class {data[4]}, data encoding {data[5]}: build for 32-bit or 64-bit little-endian x86")
    header = _unpack(layout.header, data, 16, "ELF header")
    e_type, e_machine, _, _, e_phoff, _, _, _, e_phentsize, e_phnum, _, _, _ = header
    if e_machine != layout.machine:
        raise ImageError(
            f"ELF machine {e_machine} in a {layout.bits}-bit file: build for i386 ({EM_386}, 32 bits) or "
            f"x86-64 ({EM_X86_64}, 64 bits)"
        )
    if e_type != ET_EXEC:
        raise ImageError(f"ELF type {e_type} is not an executable ({ET_EXEC}); link it at fixed addresses (-no-pie)")
    if e_phnum and e_phentsize != layout.program.size:
        raise ImageError(f"ELF program header size {e_phentsize} is not {layout.program.size}; link it again")
    found = []
    for index in range(e_phnum):
        fields = _unpack(layout.program, data, e_phoff + index * e_phentsize, f"ELF program header {index}")
        if layout.bits == 32:
            p_type, p_offset, p_vaddr, p_paddr, p_filesz, p_memsz = fields[:6]
        else:
            p_type, _, p_offset, p_vaddr, p_paddr, p_filesz, p_memsz, _ = fields
        if p_type != PT_LOAD or p_memsz == 0:
            continue
        name = f"ELF segment {index}"
        if p_filesz > p_memsz:
            raise ImageError(f"{name} has {p_filesz:#x} bytes in the file but {p_memsz:#x} in memory; link it again")
        if p_offset + p_filesz > len(data):
            raise ImageError(
                f"{name} ends at file offset {p_offset + p_filesz:#x}, the file at {len(data):#x}: truncated; "
                "copy it again"
            )
        found.append(LoadSegment(name, p_offset, p_filesz, p_paddr, p_vaddr, p_memsz))
    return layout, header, tuple(found)


def _physical(entry: int, segments: list[LoadSegment]) -> int:
    """Control is given with paging off or an identity map, so a virtual entry point is translated by its segment."""
    if not segments:
        raise ImageError("ELF file has no PT_LOAD segment; link it as an executable")
    for segment in segments:
        if 0 <= entry - segment.virtual < segment.memory_size:
            return entry - segment.virtual + segment.address
    for segment in segments:
        if segment.address <= entry < segment.end:
            return entry
    raise ImageError(f"ELF entry point {entry:#x} is in no PT_LOAD segment; name it with ENTRY() in the linker script")


def _symbols(layout: Layout, data: bytes, offset: int, entry_size: int, count: int) -> tuple[Symbol, ...]:
    if not offset or not count:
        return ()
    if entry_size != layout.section.size:
        raise ImageError(f"ELF section header size {entry_size} is not {layout.section.size}; link it again")
    sections = [
        _unpack(layout.section, data, offset + index * entry_size, f"ELF section header {index}")
        for index in range(count)
    ]
    symbols: list[Symbol] = []
    budget = MAX_NAME_BYTES
    for index, (_, sh_type, _, _, sh_offset, sh_size, sh_link, *_) in enumerate(sections):
        if sh_type != SHT_SYMTAB:
            continue
        if sh_link >= count or sections[sh_link][1] != SHT_STRTAB:
            raise ImageError(f"ELF symbol table {index} links to section {sh_link}, no string table; link it again")
        strings, strings_end = sections[sh_link][4], sections[sh_link][4] + sections[sh_link][5]
        if sh_offset + sh_size > len(data) or strings_end > len(data):
            raise ImageError(f"ELF symbol table {index} or its names end beyond the file: truncated; copy it again")
        for at in range(sh_offset, sh_offset + sh_size - layout.symbol.size + 1, layout.symbol.size):
            if layout.bits == 32:
                st_name, st_value, st_size, st_info, _, st_shndx = layout.symbol.unpack_from(data, at)
            else:
                st_name, st_info, _, st_shndx, st_value, st_size = layout.symbol.unpack_from(data, at)
            if not st_name or not st_shndx or st_info & 0xF in (STT_SECTION, STT_FILE):
                continue
            end = data.find(b"\0", strings + st_name, strings_end)
            if end < 0:
                raise ImageError(f"ELF symbol name at {st_name:#x} leaves its string table; link the image again")
            budget -= end - strings - st_name
            if budget < 0:
                raise ImageError(f"ELF symbol names exceed {MAX_NAME_BYTES:#x} bytes together; strip the image")
            name = data[strings + st_name : end].decode("utf-8", "replace")
            symbols.append(Symbol(name, st_value, st_size))
        break  # the ABI allows one symbol table
    return tuple(symbols)


def _unpack(structure: Struct, data: bytes, offset: int, name: str) -> tuple[int, ...]:
    if offset + structure.size > len(data):
        raise ImageError(
            f"{name} ends at file offset {offset + structure.size:#x}, the file at {len(data):#x}: truncated; "
            "copy it again"
        )
    return structure.unpack_from(data, offset)
