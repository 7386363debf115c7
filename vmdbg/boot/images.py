"""Loads images: multiboot 1, Linux kernels, plain ELF, flat binaries, boot sectors."""

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from struct import pack

from vmdbg.boot import bzimage, elf, multiboot
from vmdbg.boot.image import BootImage, Extent, ImageError, Memory, Segment, Symbol, check_layout, find_space
from vmdbg.boot.state import CpuState, DescriptorTable, Mode, flat_state, real_state

__all__ = ["BootImage", "BootOptions", "ImageError", "Memory", "Module", "Segment", "Symbol", "load"]

MAX_FILE_SIZE = 1 << 31
BOOT_SECTOR_ADDRESS = 0x7C00
FIRST_DISK = 0x80

BOOT_AREA_ADDRESS = 0x10000
"""What a flat or plain ELF image finds set up: page tables (long mode), GDT, stack; or the next free page above it.
Page 0: PML4, page 1: PDPT (512 identity-mapped 1 GiB pages), page 2: GDT, page 3: stack."""
BOOT_AREA_PAGES = 4
GDT_ENTRIES = {
    "protected": (0, 0x00CF9B000000FFFF, 0x00CF93000000FFFF),
    "long": (0, 0x00AF9B000000FFFF, 0x00CF93000000FFFF),
}



@dataclass(frozen=True, slots=True)
class File:
    """A file that has been read.  `path`: as it was named; empty if it was given as bytes."""

    path: str
    data: bytes

    @property
    def name(self) -> str:
        return self.path or "image"


Source = str | os.PathLike[str] | bytes | File


@dataclass(frozen=True, slots=True)
class Module:
    """A multiboot module or an initrd: a file or bytes, and the string a multiboot image is given with it (the file's path if
    None)."""

    source: Source
    string: str | None = None


@dataclass(frozen=True, slots=True)
class BootOptions:
    """`mode` starts an ELF file in that mode even if it has a multiboot header, and chooses a Linux kernel's entry point; a
    flat image needs address and mode."""

    ram_size: int = 256 << 20
    command_line: str = ""
    modules: tuple[Module, ...] = ()
    flat_address: int | None = None
    mode: Mode | None = None


def load(source: Source, options: BootOptions | None = None) -> BootImage:
    """Detect the format of a file (or bytes) and lay it out for RAM of the given size.

    ImageError for everything that cannot be loaded; no other exception, whatever the bytes.
    """
    options = options or BootOptions()
    file = read(source)
    data, name, path = file.data, file.name, Path(file.path) if file.path else None
    if not data:
        raise ImageError(f"{name} is empty; build it again")
    if options.flat_address is not None:
        return _load_flat(data, options.flat_address, options)
    if bzimage.is_kernel(data):
        return _load_kernel(data, options)
    is_elf = data.startswith(elf.MAGIC)
    executable = elf.parse(data) if is_elf else None
    if executable and options.mode:
        return replace(_load_elf(data, executable, options), debug_file=path)
    header = multiboot.find_header(data)
    if header:
        return replace(_load_multiboot(data, header, executable, name, options), debug_file=path if is_elf else None)
    if executable:
        raise ImageError(
            f"{name} is an ELF file without a multiboot header in its first {multiboot.SEARCH} bytes; add one, or "
            "start it with --mode protected or --mode long"
        )
    if len(data) == 512 and data.endswith(b"\x55\xaa"):
        return _load_boot_sector(data, options)
    raise ImageError(
        f"{name} is not ELF, no Linux bzImage, has no multiboot header in its first {multiboot.SEARCH} bytes and is no "
        "boot sector (512 bytes ending in 55 aa); load it with --flat ADDRESS --mode real|protected|long"
    )


def read(source: Source) -> File:
    """The file that is meant.  Raises `ImageError`."""
    if isinstance(source, File):
        return source
    if isinstance(source, bytes):
        return File("", source)
    name = os.fspath(source)
    try:
        status = os.stat(name)
        if stat.S_ISDIR(status.st_mode):
            raise ImageError(f"{name} is a directory; name a file")
        if not stat.S_ISREG(status.st_mode):
            raise ImageError(f"{name} is not a regular file; copy its contents to one")
        if status.st_size > MAX_FILE_SIZE:
            raise ImageError(f"{name} has {status.st_size} bytes, more than {MAX_FILE_SIZE}; strip it")
        return File(name, Path(name).read_bytes())
    except OSError as error:
        raise ImageError(f"{name}: {error.strerror}; name a file that can be read") from error
    except ValueError as error:  # a NUL in the name
        raise ImageError(f"{name!r}: {error}; name a file that can be read") from error


def _load_multiboot(
    data: bytes, header: multiboot.Header, executable: elf.Elf | None, name: str, options: BootOptions
) -> BootImage:
    if header.flags & multiboot.FLAG_ADDRESSES:
        entry, image = header.entry_addr, [multiboot.load_by_addresses(data, header)]
        check_layout(image, options.ram_size)
    elif executable:
        entry, image = executable.entry, _cut(data, executable, options)
    else:
        raise ImageError(
            f"multiboot header at file offset {header.offset:#x} has no address fields (flag 16) and {name} is not "
            "ELF; link it as ELF or set the flag and the fields"
        )
    if entry >= 1 << 32:
        raise ImageError(f"multiboot entry point {entry:#x} is above 4 GiB, but starts in 32-bit mode; link it lower")
    contents = []
    for module in options.modules:
        file = read(module.source)
        module_data, module_name = file.data, file.name
        contents.append((module_data, module_name if module.string is None else module.string))
    modules = multiboot.place_modules(contents, _extents(image), options.ram_size)
    described = [(segment, string) for segment, (_, string) in zip(modules, contents, strict=True)]
    command_line = f"{Path(name).name} {options.command_line}".rstrip(" ")
    occupied = _extents([*image, *modules])
    information = multiboot.build_information(command_line, described, occupied, options.ram_size)
    segments = (*image, *modules, information)
    symbols = executable.symbols if executable else ()
    state = multiboot.entry_state(entry, information.address)
    return BootImage("multiboot", segments, entry, "protected", symbols, None, state)


def _load_kernel(data: bytes, options: BootOptions) -> BootImage:
    kernel = bzimage.parse(data)
    mode = options.mode or ("long" if kernel.has_64 else "protected")
    if mode == "real" or (mode == "long" and not kernel.has_64):
        raise ImageError(
            f"this Linux kernel does not start in {mode} mode here; leave --mode out or choose --mode protected"
        )
    initrds = [read(module.source).data for module in options.modules]
    segments, state = bzimage.place(kernel, mode, options.command_line, initrds, options.ram_size)
    return BootImage("bzImage", tuple(segments), state.rip, mode, (), None, state)


def _load_elf(data: bytes, executable: elf.Elf, options: BootOptions) -> BootImage:
    mode = options.mode
    if mode == "real" or mode is None:
        raise ImageError("an ELF file does not start in real mode; choose --mode protected or --mode long")
    if mode == "long" and executable.bits == 32:
        raise ImageError("a 32-bit ELF file does not start in long mode; choose --mode protected")
    if mode == "protected" and executable.entry >= 1 << 32:
        raise ImageError(f"ELF entry point {executable.entry:#x} is above 4 GiB; choose --mode long")
    _refuse_modules(options)
    image = _cut(data, executable, options)
    area, state = _boot_area(mode, executable.entry, _extents(image), options.ram_size)
    return BootImage("elf", (*image, area), executable.entry, mode, executable.symbols, None, state)


def _load_flat(data: bytes, address: int, options: BootOptions) -> BootImage:
    mode = options.mode
    if mode is None:
        raise ImageError("a flat image says nothing about its mode; add --mode real, protected or long")
    _refuse_modules(options)
    image = Segment("flat image", address, data, len(data))
    check_layout([image], options.ram_size)
    if mode == "real":
        if address >= 1 << 20:
            raise ImageError(f"flat image at {address:#x} cannot start in real mode; load it below 0x100000")
        cs, ip = (0, address) if address < 1 << 16 else (address >> 4, address & 0xF)
        return BootImage("flat", (image,), address, mode, (), None, real_state(cs, ip))
    if mode == "protected" and address >= 1 << 32:
        raise ImageError(f"flat image at {address:#x} cannot start in protected mode; load it below 4 GiB")
    area, state = _boot_area(mode, address, [image], options.ram_size)
    return BootImage("flat", (image, area), address, mode, (), None, state)


def _load_boot_sector(data: bytes, options: BootOptions) -> BootImage:
    """As a BIOS starts it: 0000:7c00, DL the disk, the stack below.  There is no BIOS to call."""
    _refuse_modules(options)
    image = Segment("boot sector", BOOT_SECTOR_ADDRESS, data, len(data))
    state = real_state(0, BOOT_SECTOR_ADDRESS)
    state.rdx = FIRST_DISK
    state.rsp = BOOT_SECTOR_ADDRESS
    return BootImage("boot sector", (image,), BOOT_SECTOR_ADDRESS, "real", (), None, state)


def _cut(data: bytes, executable: elf.Elf, options: BootOptions) -> list[Segment]:
    """The segments' bytes.  The layout is checked first: it bounds what overlapping file ranges can expand to."""
    check_layout(executable.segments, options.ram_size)
    return [
        Segment(part.name, part.address, data[part.offset : part.offset + part.file_size], part.memory_size)
        for part in executable.segments
    ]


def _boot_area(mode: Mode, entry: int, occupied: Sequence[Extent], ram_size: int) -> tuple[Segment, CpuState]:
    size = BOOT_AREA_PAGES * 4096
    address = find_space("the boot area", size, BOOT_AREA_ADDRESS, occupied, ram_size)
    present_writable, large = 3, 0x80
    pml4 = pack("<Q", address + 4096 | present_writable) if mode == "long" else b""
    pdpt = pack("<512Q", *(n << 30 | large | present_writable for n in range(512))) if mode == "long" else b""
    gdt = pack("<3Q", *GDT_ENTRIES[mode])
    data = b"".join(page.ljust(4096, b"\0") for page in (pml4, pdpt, gdt, b""))
    state = flat_state(mode, entry)
    state.cr3 = address if mode == "long" else 0
    state.gdtr = DescriptorTable(address + 2 * 4096, len(gdt) - 1)
    state.rsp = address + size
    return Segment("the boot area", address, data, size), state


def _refuse_modules(options: BootOptions) -> None:
    if options.modules or options.command_line:
        raise ImageError("modules and a command line need a multiboot image or a Linux kernel; leave them out")


def _extents(segments: Sequence[Segment]) -> list[Extent]:
    return list(segments)
