"""The Linux/x86 boot protocol, version 2.10 and later: bzImage kernels (Documentation/arch/x86/boot.rst of Linux)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from struct import pack, pack_into, unpack_from

from vmdbg.boot.image import ImageError, Segment, c_string, find_space
from vmdbg.boot.memory_map import memory_map, ram_ranges
from vmdbg.boot.state import (
    FLAT_CODE32,
    FLAT_CODE64,
    FLAT_DATA,
    CpuState,
    DescriptorTable,
    Mode,
    SegmentRegister,
    flat_state,
)

BOOT_FLAG, MAGIC = b"\x55\xaa", b"HdrS"
OLDEST = 0x20A
"""Linux 2.6.31: the first to say how much memory it needs before it can look for itself."""
FIRST_XLOADFLAGS = 0x20C

FIELDS = {
    "setup_sects": (0x1F1, "<B"),
    "syssize": (0x1F4, "<I"),
    "jump": (0x201, "<B"),
    "version": (0x206, "<H"),
    "type_of_loader": (0x210, "<B"),
    "loadflags": (0x211, "<B"),
    "code32_start": (0x214, "<I"),
    "ramdisk_image": (0x218, "<I"),
    "ramdisk_size": (0x21C, "<I"),
    "cmd_line_ptr": (0x228, "<I"),
    "initrd_addr_max": (0x22C, "<I"),
    "kernel_alignment": (0x230, "<I"),
    "relocatable_kernel": (0x234, "<B"),
    "xloadflags": (0x236, "<H"),
    "cmdline_size": (0x238, "<I"),
    "pref_address": (0x258, "<Q"),
    "init_size": (0x260, "<I"),
}
"""Offset and form of the setup header's fields, in the file as in the zero page."""
HEADER_START, HEADER_LEAST, HEADER_LIMIT = 0x1F1, 0x264, 0x290
"""Where it begins, where it ends at least in version 2.10, and where the zero page goes on with other things."""
E820_ENTRIES, E820_TABLE = 0x1E8, 0x2D0
"""In the zero page only."""

LOADED_HIGH = 1 << 0
XLF_KERNEL_64 = 1 << 0
ENTRY_64 = 0x200
UNDEFINED_LOADER = 0xFF
LOWEST = 1 << 20

BOOT_AREA_ADDRESS = 0x10000
"""What the kernel is given: the zero page, and from a page of their own each GDT, page tables and command line."""
CODE_SELECTOR, DATA_SELECTOR = 0x10, 0x18
GDT = {"long": (0, 0, 0x00AF9B000000FFFF, 0x00CF93000000FFFF), "protected": (0, 0, 0x00CF9B000000FFFF, 0x00CF93000000FFFF)}

@dataclass(frozen=True, slots=True)
class Kernel:
    """What a kernel's setup header says; `header` is what the zero page gets, `code` what is loaded; `has_64` if it has the
    64-bit entry point besides the 32-bit one.
    """

    header: bytes
    code: bytes
    has_64: bool
    command_line_size: int
    initrd_limit: int
    relocatable: bool
    alignment: int
    address: int
    size: int


def is_kernel(data: bytes) -> bool:
    """Whether this is a Linux kernel with a setup header, of whatever version."""
    return data[0x1FE:0x200] == BOOT_FLAG and data[0x202:0x206] == MAGIC


def parse(data: bytes) -> Kernel:
    """Read the setup header.  ImageError for a kernel that this loader cannot start."""
    if len(data) < HEADER_LEAST:
        raise ImageError(f"Linux setup header ends beyond the file's {len(data):#x} bytes: truncated; copy the kernel again")
    field = {name: unpack_from(form, data, offset)[0] for name, (offset, form) in FIELDS.items()}
    version, flags, size, alignment = (field[name] for name in ("version", "loadflags", "init_size", "kernel_alignment"))
    protocol = f"{version >> 8}.{version & 0xFF:02}"
    if version < OLDEST:
        raise ImageError(
            f"Linux boot protocol {protocol} does not say what memory the kernel needs; take a kernel with 2.10 or later "
            "(Linux 2.6.31)"
        )
    if not flags & LOADED_HIGH:
        raise ImageError(f"Linux loadflags {flags:#x} say that the kernel loads below 640 KiB (zImage); build a bzImage")
    end = 0x202 + field["jump"]
    if not HEADER_LEAST <= end <= HEADER_LIMIT or end > len(data):
        raise ImageError(
            f"Linux setup header of protocol {protocol} ends at {end:#x}, not between {HEADER_LEAST:#x} and "
            f"{HEADER_LIMIT:#x}; build the kernel again"
        )
    start, length = ((field["setup_sects"] or 4) + 1) * 512, 16 * field["syssize"]
    code = data[start : start + length]
    if not code or len(code) < length - 15:  # the last paragraph may be a part of one
        raise ImageError(
            f"Linux kernel begins at file offset {start:#x} and has {length:#x} bytes, the file ends at {len(data):#x}: "
            "truncated; copy it again"
        )
    if size < len(code):
        raise ImageError(f"Linux init_size {size:#x} is less than the kernel's own {len(code):#x} bytes; build it again")
    if field["relocatable_kernel"] and (alignment < 4096 or alignment & alignment - 1):
        raise ImageError(f"Linux kernel_alignment {alignment:#x} is not a power of two of at least a page; build it again")
    has_64 = version >= FIRST_XLOADFLAGS and bool(field["xloadflags"] & XLF_KERNEL_64)
    if has_64 and len(code) <= ENTRY_64:
        raise ImageError(f"Linux kernel of {len(code):#x} bytes has no 64-bit entry point at {ENTRY_64:#x}; build it again")
    return Kernel(
        data[HEADER_START:end], code, has_64, field["cmdline_size"], field["initrd_addr_max"] + 1,
        bool(field["relocatable_kernel"]), alignment, field["pref_address"], size,
    )  # fmt: skip


def place(
    kernel: Kernel, mode: Mode, command_line: str, initrds: Sequence[bytes], ram_size: int
) -> tuple[list[Segment], CpuState]:
    """Lay out the kernel, its initrd (several are one after the other, as the kernel takes them) and what it is told.

    `mode` long or protected: which of its entry points it is started at.
    """
    room = _room(kernel, ram_size)
    segments = [Segment("the Linux kernel", room.address, kernel.code, len(kernel.code))]
    initrd = _initrd(kernel, initrds, room, ram_size)
    if initrd is not None:
        segments.append(initrd)
    area = _boot_area(kernel, mode, command_line, room, initrd, ram_size)
    state = flat_state(mode, room.address + (ENTRY_64 if mode == "long" else 0))
    code = FLAT_CODE64 if mode == "long" else FLAT_CODE32
    state.cs = SegmentRegister(CODE_SELECTOR, code, 0xFFFFFFFF, 0)
    state.ds = state.es = state.ss = state.fs = state.gs = SegmentRegister(DATA_SELECTOR, FLAT_DATA, 0xFFFFFFFF, 0)
    state.rsi = area.address
    state.gdtr = DescriptorTable(area.address + 4096, 8 * len(GDT[mode]) - 1)
    state.cr3 = area.address + 2 * 4096 if mode == "long" else 0
    return [*segments, area], state


def _room(kernel: Kernel, ram_size: int) -> Segment:
    """Where the kernel is loaded and unpacks itself, below 4 GiB: where it prefers, else the lowest place."""
    name = "the Linux kernel with the memory it unpacks to"
    low = ram_ranges(ram_size)[0][1]
    if kernel.address >= LOWEST and kernel.address + kernel.size <= low:
        return Segment(name, kernel.address, b"", kernel.size)
    if not kernel.relocatable:
        raise ImageError(
            f"{name}, {kernel.size:#x} bytes, loads at {kernel.address:#x} only, and RAM for it is {LOWEST:#x}..{low - 1:#x}; "
            "give the machine more or build the kernel with CONFIG_RELOCATABLE"
        )
    found = find_space(name, kernel.size + kernel.alignment, LOWEST, [], ram_size)
    return Segment(name, found + kernel.alignment - 1 & -kernel.alignment, b"", kernel.size)


def _initrd(kernel: Kernel, files: Sequence[bytes], below: Segment, ram_size: int) -> Segment | None:
    """As high as the kernel allows, out of the way of what it unpacks and allocates first."""
    data = b"".join(file + bytes(-len(file) % 4) for file in files)
    if not data:
        return None
    limit = min(kernel.initrd_limit, ram_ranges(ram_size)[0][1])
    address = limit - len(data) & -4096
    if address < below.end:
        raise ImageError(
            f"the initrd, {len(data):#x} bytes, finds no room between the kernel's end {below.end:#x} and {limit:#x}; "
            "give the machine more RAM"
        )
    return Segment("the initrd", address, data, len(data))


def _boot_area(
    kernel: Kernel, mode: Mode, command_line: str, room: Segment, initrd: Segment | None, ram_size: int
) -> Segment:
    line = c_string("the command line", command_line)
    if len(line) - 1 > kernel.command_line_size:
        raise ImageError(
            f"the command line has {len(line) - 1} bytes, this kernel takes {kernel.command_line_size}; shorten it"
        )
    size = 4 * 4096 + len(line)
    area = find_space("the boot area", size, BOOT_AREA_ADDRESS, [room, *([initrd] if initrd else [])], ram_size)
    present_writable, large = 3, 0x80
    gdt = pack("<4Q", *GDT[mode])
    pml4 = pack("<Q", area + 3 * 4096 | present_writable)
    pdpt = pack("<512Q", *(n << 30 | large | present_writable for n in range(512)))
    zero_page = bytearray(4096)
    zero_page[HEADER_START : HEADER_START + len(kernel.header)] = kernel.header
    ours = {"type_of_loader": UNDEFINED_LOADER, "code32_start": room.address, "cmd_line_ptr": area + 4 * 4096}
    if initrd is not None:
        ours |= {"ramdisk_image": initrd.address, "ramdisk_size": initrd.size}
    for name, value in ours.items():
        offset, form = FIELDS[name]
        pack_into(form, zero_page, offset, value)
    ranges = memory_map(ram_size)
    zero_page[E820_ENTRIES] = len(ranges)
    for index, entry in enumerate(ranges):
        pack_into("<QQI", zero_page, E820_TABLE + 20 * index, *entry)
    data = b"".join(page.ljust(4096, b"\0") for page in (bytes(zero_page), gdt, pml4, pdpt)) + line
    return Segment("the boot area", area, data, size)
