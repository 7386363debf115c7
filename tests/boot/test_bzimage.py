"""Kernels are made by the tests; the real one is booted by tests/real."""

from itertools import pairwise
from pathlib import Path
from struct import pack, pack_into, unpack_from

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmdbg.boot.images import BootOptions, ImageError, Module, load
from vmdbg.boot.state import Mode

MIB = 1 << 20
CODE = bytes(range(256)) * 8
OFFSETS = {
    "setup_sects": ("<B", 0x1F1), "syssize": ("<I", 0x1F4), "boot_flag": ("<H", 0x1FE), "jump": ("<B", 0x201),
    "header": ("<I", 0x202), "version": ("<H", 0x206), "loadflags": ("<B", 0x211), "initrd_addr_max": ("<I", 0x22C),
    "kernel_alignment": ("<I", 0x230), "relocatable_kernel": ("<B", 0x234), "xloadflags": ("<H", 0x236),
    "cmdline_size": ("<I", 0x238), "pref_address": ("<Q", 0x258), "init_size": ("<I", 0x260),
}  # fmt: skip
GOOD = {
    "setup_sects": 2, "syssize": len(CODE) // 16, "boot_flag": 0xAA55, "jump": 0x6A, "header": 0x53726448, "version": 0x20F,
    "loadflags": 1, "initrd_addr_max": 0x7FFFFFFF, "kernel_alignment": 2 * MIB, "relocatable_kernel": 1, "xloadflags": 1,
    "cmdline_size": 2047, "pref_address": 16 * MIB, "init_size": 4 * MIB,
}  # fmt: skip


def kernel(size: int | None = None, **changes: int) -> bytes:
    """A bzImage with two setup sectors and some code; fields of its header changed, the file cut to `size`."""
    data = bytearray(3 * 512) + CODE
    for name, value in (GOOD | changes).items():
        form, offset = OFFSETS[name]
        pack_into(form, data, offset, value)
    return bytes(data[:size])


class Ram(dict[int, bytes]):
    def write(self, address: int, data: bytes) -> None:
        self[address] = bytes(data)


def test_the_64_bit_entry() -> None:
    initrd = b"070701" * 1000
    image = load(kernel(), BootOptions(ram_size=64 * MIB, command_line="quiet init=/x", modules=(Module(initrd),)))
    assert (image.format, image.mode, image.entry) == ("bzImage", "long", 16 * MIB + 0x200)
    state, code = image.state, image.segments[0]
    assert (code.address, code.data, code.size) == (16 * MIB, CODE, len(CODE))
    assert (state.rip, state.cs.selector, state.ss.selector, state.cs.attrib) == (image.entry, 0x10, 0x18, 0xA9B)
    assert (state.efer & 0x500, state.cr0 & 0x80000001, state.rflags) == (0x500, 0x80000001, 2)
    area = image.segments[-1]
    assert state.rsi == area.address
    zero_page = area.data[:4096]
    assert zero_page[0x1F1:0x26C][:0x1F] == kernel()[0x1F1:0x210], "the header as it is in the file"
    assert zero_page[0x1EF] == 0, "the sentinel of a loader that clears the page"
    assert zero_page[0x210] == 0xFF
    code32, ramdisk, size = unpack_from("<III", zero_page, 0x214)
    assert (code32, ramdisk, size) == (16 * MIB, 64 * MIB - 8192, 6000)
    assert image.segments[1].data == initrd
    line = unpack_from("<I", zero_page, 0x228)[0] - area.address
    assert area.data[line:] == b"quiet init=/x\0"
    entries = [unpack_from("<QQI", zero_page, 0x2D0 + 20 * n) for n in range(zero_page[0x1E8])]
    assert entries == [(0, 0x9FC00, 1), (0x9FC00, 0x60400, 2), (MIB, 63 * MIB, 1)]
    gdt = state.gdtr.base - area.address
    assert unpack_from("<4Q", area.data, gdt)[2:] == (0x00AF9B000000FFFF, 0x00CF93000000FFFF)
    pml4 = state.cr3 - area.address
    assert unpack_from("<Q", area.data, pml4)[0] == state.cr3 + 4096 | 3
    assert unpack_from("<3Q", area.data, pml4 + 4096) == (0x83, 1 << 30 | 0x83, 2 << 30 | 0x83)


@pytest.mark.parametrize(
    ("data", "mode"),
    [(kernel(xloadflags=0), None), (kernel(version=0x20A), None), (kernel(), "protected")],
    ids=["no 64-bit entry", "older than xloadflags", "asked for"],
)
def test_the_32_bit_entry(data: bytes, mode: Mode | None) -> None:
    image = load(data, BootOptions(ram_size=64 * MIB, mode=mode))
    state = image.state
    assert (image.mode, state.rip, state.cs.selector, state.cs.attrib) == ("protected", 16 * MIB, 0x10, 0xC9B)
    assert (state.cr0 & 0x80000001, state.efer, state.rbp, state.rdi, state.rbx) == (1, 0, 0, 0, 0)
    assert state.rsi == image.segments[-1].address


def test_a_relocatable_kernel_moves_where_it_finds_room() -> None:
    image = load(kernel(), BootOptions(ram_size=12 * MIB))
    assert image.entry == 2 * MIB + 0x200
    assert unpack_from("<I", image.segments[-1].data, 0x214)[0] == 2 * MIB
    assert load(kernel(pref_address=5 << 30), BootOptions(ram_size=8 << 30)).entry == 2 * MIB + 0x200


def test_the_initrd_lies_as_high_as_the_kernel_allows() -> None:
    options = BootOptions(ram_size=5 << 30, modules=(Module(b"first"), Module(b"second!!!")))
    assert load(kernel(), options).segments[1].address == 0x7FFFF000
    image = load(kernel(initrd_addr_max=0xFFFFFFFF), options)
    assert image.segments[1].address == 0xBFFFF000, "below the devices"
    assert image.segments[1].data == b"first\0\0\0second!!!\0\0\0", "one after the other, each in whole words"


REFUSED = [
    (kernel(0x230), BootOptions(), "header ends beyond the file's 0x230 bytes: truncated"),
    (kernel(version=0x209), BootOptions(), r"boot protocol 2\.09 does not say.*2\.10 or later"),
    (kernel(loadflags=0), BootOptions(), r"loadflags 0x0.*zImage.*build a bzImage"),
    (kernel(jump=0x10), BootOptions(), "ends at 0x212, not between 0x264 and 0x290"),
    (kernel(jump=0xFF), BootOptions(), "ends at 0x301, not between"),
    (kernel(3 * 512), BootOptions(), "begins at file offset 0x600.*truncated; copy it again"),
    (kernel(3 * 512 + 256), BootOptions(), "0x800 bytes, the file ends at 0x700: truncated"),
    (kernel(setup_sects=255), BootOptions(), "begins at file offset 0x20000"),
    (kernel(init_size=100), BootOptions(), "init_size 0x64 is less than the kernel's own 0x800 bytes"),
    (kernel(kernel_alignment=0), BootOptions(), "kernel_alignment 0x0 is not a power of two"),
    (kernel(kernel_alignment=0x3000), BootOptions(), "kernel_alignment 0x3000 is not a power of two"),
    (kernel(syssize=0x20), BootOptions(), "of 0x200 bytes has no 64-bit entry point"),
    (kernel(), BootOptions(ram_size=2 * MIB), "memory it unpacks to, 0x600000 bytes, finds no room.*give the machine more"),
    (kernel(relocatable_kernel=0), BootOptions(ram_size=8 * MIB), "loads at 0x1000000 only.*CONFIG_RELOCATABLE"),
    (kernel(relocatable_kernel=0, pref_address=0), BootOptions(), "loads at 0x0 only"),
    (kernel(relocatable_kernel=0, pref_address=1 << 63), BootOptions(), "loads at 0x8000000000000000 only"),
    (kernel(cmdline_size=4), BootOptions(command_line="quiet"), "has 5 bytes, this kernel takes 4; shorten it"),
    (kernel(), BootOptions(command_line="a\0b"), "the command line contains a NUL"),
    (kernel(), BootOptions(command_line="\ud800"), "the command line cannot be encoded"),
    (kernel(initrd_addr_max=0), BootOptions(modules=(Module(b"x"),)), "the initrd, 0x4 bytes, finds no room"),
    (kernel(), BootOptions(ram_size=24 * MIB, modules=(Module(bytes(8 * MIB)),)), "the initrd.*give the machine more RAM"),
    (kernel(), BootOptions(mode="real"), "does not start in real mode"),
    (kernel(xloadflags=0), BootOptions(mode="long"), "does not start in long mode.*--mode protected"),
]


@pytest.mark.parametrize(("data", "options", "message"), REFUSED)
def test_refused(data: bytes, options: BootOptions, message: str) -> None:
    with pytest.raises(ImageError, match=message) as caught:
        load(data, options)
    assert "\n" not in str(caught.value)


def test_an_initrd_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="absent: No such file"):
        load(kernel(), BootOptions(modules=(Module(tmp_path / "absent"),)))


@settings(max_examples=400, deadline=None)
@given(
    st.dictionaries(st.sampled_from(sorted(OFFSETS)), st.integers(0, (1 << 64) - 1), max_size=4),
    st.integers(0, 4000),
    st.sampled_from([BootOptions(), BootOptions(mode="protected"), BootOptions(ram_size=5 << 30, modules=(Module(b"x"),))]),
)
def test_a_hostile_kernel_is_loaded_or_refused(changes: dict[str, int], length: int, options: BootOptions) -> None:
    widths = {name: len(pack(form, 0)) for name, (form, _) in OFFSETS.items()}
    fields = {name: value & (1 << 8 * widths[name]) - 1 for name, value in changes.items()}
    try:
        image = load(kernel(length or None, **fields), options)
    except ImageError:
        return
    extents = sorted((segment.address, segment.end) for segment in image.segments)
    assert all(0 <= start <= end <= options.ram_size for start, end in extents)
    assert all(one[1] <= other[0] for one, other in pairwise(extents))
    assert 0 <= image.entry < options.ram_size
