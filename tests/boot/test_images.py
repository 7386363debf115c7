"""Images are made by the tests themselves; hostile ones are mutations of a good one."""

import os
from pathlib import Path
from struct import pack, unpack, unpack_from

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmdbg.boot.images import BootOptions, ImageError, Module, Symbol, load

MAGIC = 0x1BADB002
CODE = b"\xfa\xf4\xeb\xfc"


def multiboot_header(flags: int = 3, addresses: tuple[int, ...] = ()) -> bytes:
    return pack("<III", MAGIC, flags, -(MAGIC + flags) & 0xFFFFFFFF) + pack(f"<{len(addresses)}I", *addresses)


def elf(
    bits: int,
    parts: list[tuple[int, int, bytes, int]],
    entry: int,
    symbols: list[tuple[str, int, int]] | None = None,
    machine: int | None = None,
    e_type: int = 2,
) -> bytes:
    """Segments are (virtual, physical, data, memory size); the data of each starts at an offset of its own."""
    machine = machine or {32: 3, 64: 62}[bits]
    header_size, program_size = (52, 32) if bits == 32 else (64, 56)
    offset = header_size + program_size * len(parts)
    programs, body = b"", b""
    for virtual, physical, data, size in parts:
        at = offset + len(body)
        if bits == 32:
            programs += pack("<IIIIIIII", 1, at, virtual, physical, len(data), size, 7, 1)
        else:
            programs += pack("<IIQQQQQQ", 1, 7, at, virtual, physical, len(data), size, 1)
        body += data
    names, table = b"\0", bytes(16 if bits == 32 else 24)
    for name, value, size in symbols or []:
        form = ("<IIIBBH", len(names), value, size, 0x12, 0, 1)
        if bits == 64:
            form = ("<IBBHQQ", len(names), 0x12, 0, 1, value, size)
        table += pack(*form)
        names += name.encode() + b"\0"
    table_at = offset + len(body)
    names_at = table_at + len(table)
    sections_at = names_at + len(names)
    sections = b""
    for kind, at, size, link in ((0, 0, 0, 0), (2, table_at, len(table), 2), (3, names_at, len(names), 0)):
        sections += pack("<IIIIIIIIII" if bits == 32 else "<IIQQQQIIQQ", 0, kind, 0, 0, at, size, link, 0, 0, 0)
    section_size = 40 if bits == 32 else 64
    identification = b"\x7fELF" + bytes((1 if bits == 32 else 2, 1, 1)) + bytes(9)
    rest = (header_size, sections_at, 0, header_size, program_size, len(parts), section_size, 3, 2)
    form_string = "<HHIIIIIHHHHHH" if bits == 32 else "<HHIQQQIHHHHHH"
    header = pack(form_string, e_type, machine, 1, entry, rest[0], rest[1], *rest[2:])
    return identification + header + programs + body + table + names + sections


def multiboot_elf(bits: int = 32) -> bytes:
    """A kernel linked high: physical 1 MiB, virtual 0xc0100000, with bss and a symbol."""
    text = multiboot_header() + CODE
    parts = [(0xC0100000, 0x100000, text, len(text)), (0xC0101000, 0x101000, b"data", 0x2000)]
    return elf(bits, parts, 0xC010000C, [("start", 0xC010000C, 4), ("stack", 0xC0101000, 0x2000)])


class Ram:
    def __init__(self, size: int) -> None:
        self.bytes = bytearray(b"\xcc") * size

    def write(self, address: int, data: bytes) -> None:
        assert address + len(data) <= len(self.bytes)
        self.bytes[address : address + len(data)] = data

    def read(self, address: int, size: int) -> bytes:
        return bytes(self.bytes[address : address + size])

    def string(self, address: int) -> str:
        return bytes(self.bytes[address : self.bytes.index(0, address)]).decode()


MIB = 1 << 20


@pytest.mark.parametrize("bits", [32, 64])
def test_multiboot_elf(bits: int, tmp_path: Path) -> None:
    path = tmp_path / "kernel.elf"
    path.write_bytes(multiboot_elf(bits))
    image = load(path, BootOptions(ram_size=4 * MIB, command_line="debug=1"))
    assert (image.format, image.mode, image.entry, image.debug_file) == ("multiboot", "protected", 0x10000C, path)
    assert image.symbols == (Symbol("start", 0xC010000C, 4), Symbol("stack", 0xC0101000, 0x2000))
    ram = Ram(4 * MIB)
    image.place(ram)
    assert ram.read(image.entry, 4) == CODE
    assert ram.read(0x101000, 0x2000) == b"data" + bytes(0x1FFC)
    assert ram.bytes[0x103000] == 0xCC
    state = image.state
    assert (state.rip, state.rax, state.rflags, state.cr0 & 0x80000001) == (0x10000C, 0x2BADB002, 2, 1)
    assert (state.cs.attrib, state.ds.attrib, state.cs.limit, state.cs.base) == (0xC9B, 0xC93, 0xFFFFFFFF, 0)
    flags, lower, upper, _, command_line = unpack_from("<5I", ram.bytes, state.rbx)
    assert (flags, lower, upper) == (0x24D, 639, 3072)
    assert ram.string(command_line) == "kernel.elf debug=1"
    assert ram.string(unpack_from("<I", ram.bytes, state.rbx + 64)[0]) == "vmdbg"


def test_multiboot_memory_map_covers_high_ram() -> None:
    image = load(multiboot_elf(), BootOptions(ram_size=5 << 30))
    ram = Ram(2 * MIB)
    information = image.segments[-1]
    ram.write(information.address, information.data)
    length, address = unpack_from("<II", ram.bytes, image.state.rbx + 44)
    entries = [unpack("<IQQI", ram.read(address + at, 24)) for at in range(0, length, 24)]
    assert entries == [
        (20, 0, 0x9FC00, 1),
        (20, 0x9FC00, 0x60400, 2),
        (20, 0x100000, 0xBFF00000, 1),
        (20, 1 << 32, (5 << 30) - 0xC0000000, 1),
    ]


def test_multiboot_modules(tmp_path: Path) -> None:
    (tmp_path / "guest.bin").write_bytes(b"G" * 5000)
    modules = (Module(tmp_path / "guest.bin"), Module(b"", "empty"), Module(b"second", "two words"))
    image = load(multiboot_elf(), BootOptions(ram_size=2 * MIB, modules=modules))
    ram = Ram(2 * MIB)
    image.place(ram)
    count, table = unpack_from("<II", ram.bytes, image.state.rbx + 20)
    found = [unpack("<IIII", ram.read(table + 16 * n, 16)) for n in range(count)]
    assert [(start, end) for start, end, _, _ in found] == [
        (0x103000, 0x103000 + 5000),
        (0x105000, 0x105000),
        (0x105000, 0x105006),
    ]
    assert [ram.string(string) for _, _, string, _ in found] == [str(tmp_path / "guest.bin"), "empty", "two words"]
    assert ram.read(0x105000, 6) == b"second"


def test_information_gives_way_to_the_image() -> None:
    text = multiboot_header() + CODE
    image = load(elf(32, [(0x8000, 0x8000, text, 0x20000)], 0x800C))
    assert image.state.rbx == 0x28000


def test_address_fields() -> None:
    front = b"\x90" * 8
    header = multiboot_header(0x10003, (0x200008, 0x200000, 0, 0x201000, 0x200028))
    data = front + header + CODE
    image = load(data)
    assert image.segments[0].address == 0x200000
    assert image.segments[0].data == data
    assert image.segments[0].size == 0x1000
    assert image.entry == 0x200028


@pytest.mark.parametrize(
    ("addresses", "message"),
    [
        ((0x200000, 0x200004, 0, 0, 0x200004), "correct load_addr"),
        ((0x200004, 0x200000, 0, 0, 0x200004), "4 bytes before the file"),
        ((0x200000, 0x200000, 0x300000, 0, 0x200004), "0x24: truncated"),
        ((0x200000, 0x200000, 0x1FFFFF, 0, 0x200004), "load_end_addr"),
        ((0x200000, 0x200000, 0, 0x200001, 0x200004), "bss_end_addr 0x200001 is below"),
        ((0x200000, 0x200000, 0, 0, 0x200024), "entry_addr 0x200024 is outside"),
        ((0xF0000000, 0xF0000000, 0, 0, 0xF0000000), "outside RAM"),
    ],
)
def test_wrong_address_fields(addresses: tuple[int, ...], message: str) -> None:
    with pytest.raises(ImageError, match=message):
        load(multiboot_header(0x10003, addresses) + CODE)


@pytest.mark.parametrize(("address", "cs", "ip"), [(0x7C00, 0, 0x7C00), (0x12340, 0x1234, 0), (0x12345, 0x1234, 5)])
def test_flat_real(address: int, cs: int, ip: int) -> None:
    state = load(CODE, BootOptions(flat_address=address, mode="real")).state
    assert (state.cs.selector, state.cs.base, state.rip, state.cr0 & 1) == (cs, cs << 4, ip, 0)
    assert (state.cs.base + state.rip, state.idtr.limit) == (address, 0x3FF)


def test_flat_long_has_identity_tables_a_gdt_and_a_stack() -> None:
    image = load(CODE, BootOptions(ram_size=4 * MIB, flat_address=0x100000, mode="long"))
    ram = Ram(4 * MIB)
    image.place(ram)
    state = image.state
    assert (state.cr3, state.efer, state.cr4, state.cr0 & 0x80000001) == (0x10000, 0x500, 0x20, 0x80000001)
    pml4e = unpack("<Q", ram.read(state.cr3, 8))[0]
    for gigabyte in (0, 1, 511):
        assert unpack("<Q", ram.read((pml4e & ~0xFFF) + 8 * gigabyte, 8))[0] == gigabyte << 30 | 0x83
    code = unpack("<Q", ram.read(state.gdtr.base + state.cs.selector, 8))[0]
    assert (code >> 40 & 0xFF | code >> 44 & 0xF00) == state.cs.attrib == 0xA9B
    assert state.gdtr.limit == 23
    assert state.rsp == 0x14000


def test_flat_protected() -> None:
    image = load(CODE, BootOptions(flat_address=0x10000, mode="protected"))
    assert (image.state.rip, image.state.cr0 & 0x80000001, image.state.cs.attrib) == (0x10000, 1, 0xC9B)
    assert image.segments[1].address == 0x11000, "the boot area gives way"


def test_boot_sector() -> None:
    data = CODE.ljust(510, b"\0") + b"\x55\xaa"
    image = load(data)
    assert (image.format, image.state.rip, image.state.cs.selector, image.state.rdx) == ("boot sector", 0x7C00, 0, 0x80)


def test_plain_elf_in_long_mode() -> None:
    image = load(elf(64, [(0x200000, 0x200000, CODE, 4)], 0x200000), BootOptions(mode="long"))
    assert (image.format, image.mode, image.state.rip) == ("elf", "long", 0x200000)


BSS = 1 << 62
REFUSED: list[tuple[bytes, BootOptions, str]] = [
    (b"", BootOptions(), "empty; build it again"),
    (b"\x90" * 100, BootOptions(), "--flat ADDRESS --mode"),
    (b"\x7fELF", BootOptions(), "truncated: 4 bytes"),
    (multiboot_elf()[:60], BootOptions(), "program header 0 ends at .*truncated"),
    (multiboot_elf()[:120], BootOptions(), "segment 0 ends at file offset .*truncated"),
    (multiboot_elf()[:-1], BootOptions(), "section header 2 ends at .*truncated"),
    (elf(32, [(0, 0, CODE, 4)], 0, machine=40), BootOptions(), "machine 40 in a 32-bit file"),
    (elf(64, [(0, 0, CODE, 4)], 0, machine=3), BootOptions(), "machine 3 in a 64-bit file"),
    (elf(32, [(0, 0, CODE, 4)], 0, e_type=3), BootOptions(), "-no-pie"),
    (elf(32, [(0, 0, CODE, 3)], 0), BootOptions(), "0x4 bytes in the file but 0x3 in memory"),
    (elf(32, [(0, 0, CODE, 4)], 9), BootOptions(), r"entry point 0x9 is in no PT_LOAD.*ENTRY\(\)"),
    (elf(32, [], 0), BootOptions(), "no PT_LOAD segment"),
    (elf(32, [(0, 0x8000, CODE, 4)], 0), BootOptions(), "without a multiboot header.*--mode long"),
    (elf(32, [(0, 0x8000, CODE, 4)], 0), BootOptions(mode="long"), "32-bit ELF file does not start in long mode"),
    (elf(32, [(0, 0x8000, CODE, 4)], 0), BootOptions(mode="real"), "does not start in real mode"),
    (
        elf(64, [(0, 0x8000, CODE, 4), (0, 0x8003, CODE, 4)], 0),
        BootOptions(mode="long"),
        r"segment 0 at 0x8000\.\.0x8003 and ELF segment 1 at 0x8003\.\.0x8006 overlap",
    ),
    (elf(64, [(0, 0x8000, CODE, BSS)], 0), BootOptions(mode="long"), "outside RAM .*more RAM"),
    (elf(64, [(0, 0xFFFFFFFFFFFFF000, CODE, 8192)], 0), BootOptions(mode="long"), "outside RAM"),
    (elf(64, [(0, 1 << 32, CODE, 4)], 0), BootOptions(ram_size=5 << 30, mode="protected"), "choose --mode long"),
    (elf(64, [(0, 1 << 32, multiboot_header(), 12)], 0), BootOptions(ram_size=5 << 30), "above 4 GiB"),
    (pack("<III", 0x1BADB002, 3, 5), BootOptions(), "checksum 0x5; with flags 0x3 it must be 0xe4524ffb"),
    (multiboot_header(7), BootOptions(), "video mode.*clear bits 0x4"),
    (multiboot_header(0x103), BootOptions(), "clear bits 0x100"),
    (multiboot_header(3), BootOptions(), "no address fields"),
    (multiboot_header(0x10003), BootOptions(), "lacks its address fields"),
    (CODE, BootOptions(flat_address=0x7C00), "add --mode real"),
    (CODE, BootOptions(flat_address=0x100000, mode="real"), "below 0x100000"),
    (CODE, BootOptions(flat_address=-1, mode="long"), "outside RAM"),
    (CODE, BootOptions(flat_address=1 << 32, mode="protected", ram_size=5 << 30), "below 4 GiB"),
    (bytes(3 * MIB), BootOptions(flat_address=0, mode="real", ram_size=2 * MIB), "outside RAM"),
    (CODE, BootOptions(flat_address=0, mode="long", modules=(Module(b"x"),)), "need a multiboot image"),
    (multiboot_elf(), BootOptions(command_line="a\0b"), "the command line contains a NUL"),
    (multiboot_elf(), BootOptions(command_line="\ud800"), "the command line cannot be encoded"),
    (
        multiboot_elf(),
        BootOptions(ram_size=2 * MIB, modules=(Module(bytes(2 * MIB), "big"),)),
        r"module 0 \('big'\), 0x200000 bytes, finds no room",
    ),
]


@pytest.mark.parametrize(("data", "options", "message"), REFUSED)
def test_refused(data: bytes, options: BootOptions, message: str) -> None:
    with pytest.raises(ImageError, match=message) as caught:
        load(data, options)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="is a directory; name a file"):
        load(tmp_path)
    with pytest.raises(ImageError, match="No such file"):
        load(tmp_path / "absent")
    with pytest.raises(ImageError, match="null"):
        load("a\0b")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ImageError, match="not a regular file"):
        load(tmp_path / "pipe")
    with pytest.raises(ImageError, match="absent"):
        load(multiboot_elf(), BootOptions(modules=(Module(tmp_path / "absent"),)))


def test_overlapping_symbol_names_do_not_expand_without_bound() -> None:
    names = "x" * 100_000
    good = elf(64, [(0, 0x8000, CODE, 4)], 0, [(names, 0, 0)])
    entry = good[-len(names) - 2 - 192 - 24 : -len(names) - 2 - 192]
    table_at = len(good) - 192 - len(names) - 2 - 48
    evil = bytearray(good + entry * 2000)
    header_at = len(good) - 128
    evil[header_at + 24 : header_at + 40] = pack("<QQ", len(good), 24 * 2000)
    assert unpack_from("<Q", good, header_at + 24)[0] == table_at
    with pytest.raises(ImageError, match="symbol names exceed"):
        load(bytes(evil), BootOptions(mode="long"))


@settings(max_examples=400, deadline=None)
@given(
    st.sampled_from([32, 64]),
    st.lists(st.tuples(st.integers(0, 700), st.binary(min_size=1, max_size=8)), max_size=6),
    st.integers(0, 1000),
    st.sampled_from([BootOptions(), BootOptions(mode="long"), BootOptions(mode="protected")]),
)
def test_hostile_elf_is_loaded_or_refused(
    bits: int, changes: list[tuple[int, bytes]], length: int, options: BootOptions
) -> None:
    data = bytearray(multiboot_elf(bits))
    for at, value in changes:
        at %= len(data)
        data[at : at + len(value)] = value
    try:
        image = load(bytes(data[:length] if length else data), options)
    except ImageError:
        return
    for segment in image.segments:
        assert 0 <= segment.address <= segment.end <= options.ram_size
    assert 0 <= image.entry < options.ram_size
