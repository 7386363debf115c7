"""The Multiboot Specification, version 0.6.96 (multiboot 1): header, machine state, information structure."""

from dataclasses import dataclass
from struct import Struct, pack

from vmdbg.boot.image import Extent, ImageError, Segment, c_string, find_space
from vmdbg.boot.memory_map import EBDA, HIGH_RAM, LEGACY_HOLE, memory_map, ram_ranges
from vmdbg.boot.state import CpuState, DescriptorTable, flat_state

HEADER_MAGIC = 0x1BADB002
LOADER_MAGIC = 0x2BADB002
SEARCH = 8192

FLAG_PAGE_ALIGN, FLAG_MEMORY_INFO, FLAG_VIDEO = 1 << 0, 1 << 1, 1 << 2
FLAG_ADDRESSES = 1 << 16
KNOWN_REQUIRED = FLAG_PAGE_ALIGN | FLAG_MEMORY_INFO

INFO_MEMORY, INFO_CMDLINE, INFO_MODS, INFO_MMAP, INFO_LOADER_NAME = 1 << 0, 1 << 2, 1 << 3, 1 << 6, 1 << 9
INFO_STRUCT = Struct("<IIIIIII16sIIIIIII")  # flags .. apm_table
LOADER_NAME = b"vmdbg\0"

INFO_ADDRESS = 0x10000
"""The information structure and all it points to but modules, or the next free page above it."""


@dataclass(frozen=True, slots=True)
class Header:
    """`offset` in the file; the address fields only if `flags` has FLAG_ADDRESSES."""

    offset: int
    flags: int
    header_addr: int
    load_addr: int
    load_end_addr: int
    bss_end_addr: int
    entry_addr: int


def find_header(data: bytes) -> Header | None:
    """The header in the first 8192 bytes.  ImageError if one is there but wrong or asks for what is not offered."""
    magic = HEADER_MAGIC.to_bytes(4, "little")
    wrong = None
    window = data[:SEARCH]
    offset = window.find(magic)
    while offset >= 0:
        fields = window[offset : offset + 12]
        if offset % 4 == 0 and len(fields) == 12:
            flags = int.from_bytes(fields[4:8], "little")
            checksum = int.from_bytes(fields[8:12], "little")
            if (HEADER_MAGIC + flags + checksum) & 0xFFFFFFFF == 0:
                return _read_header(window, offset, flags)
            wrong = wrong or (offset, flags, checksum)
        offset = window.find(magic, offset + 1)
    if wrong:
        offset, flags, checksum = wrong
        raise ImageError(
            f"multiboot header at file offset {offset:#x} has checksum {checksum:#x}; with flags {flags:#x} it must be "
            f"{-(HEADER_MAGIC + flags) & 0xFFFFFFFF:#x}"
        )
    return None


def _read_header(window: bytes, offset: int, flags: int) -> Header:
    unsupported = flags & 0xFFFF & ~KNOWN_REQUIRED
    if unsupported:
        what = "a video mode, and there is no display" if unsupported == FLAG_VIDEO else "what no loader knows"
        raise ImageError(f"multiboot header flags {flags:#x} ask for {what}; clear bits {unsupported:#x}")
    addresses = [0] * 5
    if flags & FLAG_ADDRESSES:
        raw = window[offset + 12 : offset + 32]
        if len(raw) < 20:
            raise ImageError(
                f"multiboot header at file offset {offset:#x} lacks its address fields: they end beyond the file or "
                f"its first {SEARCH} bytes; move the header to the front"
            )
        addresses = [int.from_bytes(raw[at : at + 4], "little") for at in range(0, 20, 4)]
    return Header(offset, flags, *addresses)


def load_by_addresses(data: bytes, header: Header) -> Segment:
    """The single segment that the header's address fields describe ("a.out kludge")."""
    start = header.offset - (header.header_addr - header.load_addr)
    if header.load_addr > header.header_addr or start < 0:
        raise ImageError(
            f"multiboot load_addr {header.load_addr:#x} does not fit header_addr {header.header_addr:#x} and the "
            f"header's file offset {header.offset:#x}: loading would start {-start:#x} bytes before the file; "
            "correct load_addr"
        )
    length = header.load_end_addr - header.load_addr if header.load_end_addr else len(data) - start
    if length <= 0 or start + length > len(data):
        raise ImageError(
            f"multiboot load_end_addr {header.load_end_addr:#x} asks for {length:#x} bytes from file offset "
            f"{start:#x}, the file has {len(data):#x}: truncated, or correct load_end_addr"
        )
    size = header.bss_end_addr - header.load_addr if header.bss_end_addr else length
    if size < length:
        raise ImageError(
            f"multiboot bss_end_addr {header.bss_end_addr:#x} is below the end of the loaded data "
            f"{header.load_addr + length:#x}; correct it or leave it 0"
        )
    if not header.load_addr <= header.entry_addr < header.load_addr + size:
        raise ImageError(f"multiboot entry_addr {header.entry_addr:#x} is outside what is loaded; correct it")
    return Segment("multiboot image", header.load_addr, data[start : start + length], size)


def place_modules(modules: list[tuple[bytes, str]], occupied: list[Extent], ram_size: int) -> list[Segment]:
    """Modules in their order, each on a page of its own above the image.  An empty module occupies nothing."""
    segments: list[Segment] = []
    start = max([LEGACY_HOLE.stop, *(extent.end for extent in occupied if extent.end <= HIGH_RAM)])
    for index, (data, string) in enumerate(modules):
        name = f"module {index} ({string!r})"
        address = find_space(name, len(data), start, occupied, ram_size)
        segments.append(Segment(name, address, data, len(data)))
        start = segments[-1].end
    return segments


def build_information(
    command_line: str, modules: list[tuple[Segment, str]], occupied: list[Extent], ram_size: int
) -> Segment:
    """The information structure with its strings, module list and memory map, all in one segment."""
    low = ram_ranges(ram_size)[0][1]
    memory = b"".join(pack("<IQQI", 20, *entry) for entry in memory_map(ram_size))
    strings = [c_string("the command line", command_line), LOADER_NAME]
    strings += [c_string(segment.name, string) for segment, string in modules]
    size = INFO_STRUCT.size + 16 * len(modules) + len(memory) + sum(map(len, strings))
    address = find_space("the multiboot information", size, INFO_ADDRESS, occupied, ram_size)
    modules_at = address + INFO_STRUCT.size
    memory_at = modules_at + 16 * len(modules)
    strings_at = []
    at = memory_at + len(memory)
    for string in strings:
        strings_at.append(at)
        at += len(string)
    table = b"".join(
        pack("<IIII", segment.address, segment.end, string_at, 0)
        for (segment, _), string_at in zip(modules, strings_at[2:], strict=True)
    )
    flags = INFO_MEMORY | INFO_CMDLINE | INFO_MODS | INFO_MMAP | INFO_LOADER_NAME
    information = INFO_STRUCT.pack(
        flags,
        EBDA >> 10,
        (low - LEGACY_HOLE.stop) >> 10,
        0,  # boot_device
        strings_at[0],
        len(modules),
        modules_at,
        bytes(16),  # syms
        len(memory),
        memory_at,
        0,  # drives_length
        0,  # drives_addr
        0,  # config_table
        strings_at[1],
        0,  # apm_table
    )
    return Segment("the multiboot information", address, information + table + memory + b"".join(strings), size)


def entry_state(entry: int, information: int) -> CpuState:
    """Specification 3.2.  The GDT is empty, not merely unspecified: an image that relies on ours fails here, not later
    on another loader.  ESP is 0 for the same reason.
    """
    state = flat_state("protected", entry)
    state.rax = LOADER_MAGIC
    state.rbx = information
    state.gdtr = DescriptorTable(0, 0)
    return state
