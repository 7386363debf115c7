"""ELF cores, LiME images, raw and sparse files: memory where they say, remarks on what is odd, words for what is none."""

from __future__ import annotations

import os
import struct
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from introspect.sources import (
    FileMemory,
    SourceError,
    Unreadable,
    Unwritable,
    data_ranges,
    memory_ranges,
    open_core,
    open_dump,
    open_lime,
    open_raw,
)
from introspect.sources.notes import OWN_TYPE, Annotations, GuestNote, make_note, make_own, make_prstatus, make_qemu

from .files import elf32_core, elf_core, lime

LOADS = [(0x1000, b"low."), (1 << 32, b"high")]
REGISTERS = {"rip": 0xFFFF_8000_0000_1234, "rsp": 0x8000, "rax": 1, "r15": 15, "cs.selector": 0x10, "rflags": 0x202, "fs.base": 0x7000}
STATE = {
    **REGISTERS, "cr0": 0x8005_0033, "cr2": 0x10, "cr3": 0x1000, "cr4": 0x20, "cs.attrib": 0xA9B, "cs.limit": 0xFFFF_FFFF,
    "gdtr.base": 0xFFFF_0000, "gdtr.limit": 0x7F, "tr.selector": 0x40, "kernel_gs_base": 0x9000,
}  # fmt: skip


def written(tmp_path: Path, contents: bytes) -> Path:
    path = tmp_path / "dump"
    path.write_bytes(contents)
    return path


@pytest.mark.parametrize("make", [elf_core, lime])
def test_memory_lies_at_its_physical_address(tmp_path: Path, make: object) -> None:
    assert callable(make)
    dump = open_dump(written(tmp_path, make(LOADS)))
    assert dump.format == ("ELF core" if make is elf_core else "LiME")
    memory = dump.memory
    assert isinstance(memory, FileMemory)
    assert (memory.read(0x1000, 4), memory.read(1 << 32, 4), memory.read_u32(0x1000)) == (b"low.", b"high", 0x2E776F6C)
    assert memory.ranges == [(0x1000, 0x1004), (1 << 32, (1 << 32) + 4)]
    assert dump.remarks == ()
    with pytest.raises(Unwritable):
        memory.write(0x1000, b"x")
    for address in (0, 0x1004, (1 << 32) - 1, 1 << 63):
        with pytest.raises(Unreadable):
            memory.read(address, 1)


def test_32_bit_core(tmp_path: Path) -> None:
    status = struct.pack("<24xI44x17I4x", 7, *range(1, 18))
    dump = open_dump(written(tmp_path, elf32_core([(0x1000, b"low.")], make_note(b"CORE", 1, status))))
    assert dump.memory.read(0x1000, 4) == b"low."
    (cpu,) = dump.annotations.cpus
    assert (cpu["rbx"], cpu["rax"], cpu["rip"], cpu["ss.selector"]) == (1, 7, 13, 17)


def test_raw_dump(tmp_path: Path) -> None:
    path = written(tmp_path, b"abcdefgh")
    assert open_dump(path).memory.read(2, 3) == b"cde"
    assert open_raw(path, base=0x100).memory.read(0x102, 3) == b"cde"
    assert open_dump(written(tmp_path, elf_core(LOADS)), base=0).memory.read(0, 4) == b"\x7fELF"
    with pytest.raises(SourceError, match="do not fit"):
        open_raw(path, (1 << 64) - 4)


def test_words_cross_pages_and_the_end(tmp_path: Path) -> None:
    data = bytes(range(256)) * 32 + b"tail"
    memory = open_raw(written(tmp_path, data)).memory
    for address in (0, 8, 0xFFC, 0x1FFC, 0x1FFF):
        with suppress(Unreadable):
            assert memory.read_u64(address) == int.from_bytes(data[address : address + 8], "little")
    assert memory.read_u32(0x2000) == int.from_bytes(b"tail", "little")
    with pytest.raises(Unreadable) as caught:
        memory.read_u64(0x2000)
    assert caught.value.address == 0x2004


BAD = [
    b"", b"\x7fELF", b"\x7fELF\x02\x01" + b"\xff" * 80, elf_core([]), elf_core(LOADS, machine=62).replace(b"\4\0\x3e", b"\2\0\x3e"),
    lime([])[:0] + (0x4C694D45).to_bytes(4, "little") + b"\xff" * 40, b"KDUMP   " + bytes(100), b"\x1f\x8b\x08",
]  # fmt: skip


@pytest.mark.parametrize("contents", BAD)
def test_what_is_no_dump_is_refused_in_words(tmp_path: Path, contents: bytes) -> None:
    with pytest.raises(SourceError, match="dump"):
        open_dump(written(tmp_path, contents))


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="not a regular file"):
        open_dump(Path("/dev/zero"))
    with pytest.raises(OSError, match="No such file"):
        open_dump(tmp_path / "none")


def test_overlapping_segments_show_the_same_memory(tmp_path: Path) -> None:
    core = elf_core([(0, b"abcd"), (2, b"cdef"), (1, b"bc")])
    assert open_core(written(tmp_path, core)).memory.read(0, 6) == b"abcdef"


@pytest.mark.parametrize("make", [elf_core, lime])
def test_overlap_with_other_contents_is_remarked(tmp_path: Path, make: object) -> None:
    assert callable(make)
    dump = open_dump(written(tmp_path, make([(0x100, b"abcd"), (0x102, b"XXXX")])))
    assert dump.memory.read(0x100, 6) == b"abcdXX"
    assert dump.remarks[0].startswith("two segments have different contents for 0x102..0x103")


def test_many_segments_are_counted_in_the_first_section_header(tmp_path: Path) -> None:
    core = bytearray(elf_core([(0x1000, b"low."), (0x2000, b"high")]))
    core[56:58] = b"\xff\xff"
    core[40:48] = len(core).to_bytes(8, "little")
    assert open_core(written(tmp_path, bytes(core) + struct.pack("<44xI16x", 2))).memory.read(0x2000, 4) == b"high"


@pytest.mark.parametrize("make", [elf_core, lime])
def test_a_dump_cut_off_in_the_middle_says_where_knowledge_ends(tmp_path: Path, make: object) -> None:
    assert callable(make)
    whole = make([(0x1000, b"a" * 100), (0x2000, b"b" * 100)])
    dump = open_dump(written(tmp_path, whole[:-40]))
    assert dump.memory.read(0x2000, 60) == b"b" * 60
    assert dump.remarks == (
        "the file was cut off: 0x28 bytes of memory are missing, from 0x203c on; copy or dump it again",
    )
    with pytest.raises(Unreadable, match="cut off") as caught:
        dump.memory.read(0x2000, 100)
    assert (caught.value.address, len(caught.value.readable_prefix)) == (0x203C, 60)


def test_a_file_that_shrinks_while_it_is_open(tmp_path: Path) -> None:
    path = written(tmp_path, bytes(0x4000))
    memory = open_raw(path).memory
    os.truncate(path, 0x2000)
    with pytest.raises(Unreadable, match="became shorter") as caught:
        memory.read(0x1000, 0x2000)
    assert caught.value.address == 0x2000


def test_a_sparse_image_of_a_tebibyte(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        os.truncate(path, 1 << 40)
        file.seek(123 << 30)
        file.write(b"here")
    memory = open_dump(path).memory
    assert memory.read(123 << 30, 8) == b"here\0\0\0\0"
    assert memory.read_u64(1 << 39) == 0
    found = list(data_ranges(memory))
    assert sum(end - first for first, end in found) < 1 << 20
    assert any(first <= 123 << 30 < end for first, end in found)


def test_lime_with_rubbish_behind_a_range(tmp_path: Path) -> None:
    image = lime([(0x1000, b"first")]) + b"rubbish" * 8
    dump = open_lime(written(tmp_path, image))
    assert dump.memory.read(0x1000, 5) == b"first"
    assert "no header of LiME's" in dump.remarks[0]


def test_registers_of_linux_and_qemu(tmp_path: Path) -> None:
    def cpus(notes: bytes) -> tuple[dict[str, int], ...]:
        return open_core(written(tmp_path, elf_core(LOADS, notes))).annotations.cpus

    (linux,) = cpus(make_prstatus(REGISTERS, 1))
    assert {name: linux[name] for name in REGISTERS} == REGISTERS
    assert "cr3" not in linux
    first, second = cpus(b"".join(make(STATE | {"rax": n}) for make in (lambda s: make_prstatus(s, 1), make_qemu) for n in (1, 2)))
    assert {name: first[name] for name in STATE} == STATE
    assert second["rax"] == 2
    assert first["efer"] & 0x500 == 0x500


def test_our_own_note(tmp_path: Path) -> None:
    ours = Annotations(
        ({"cr3": 5, "star": 7},), (GuestNote(2, "linux", (0x1000, 0x2000), None, ({"rcx": 1}, {})),), 2, 40, 3, ((1, 5),)
    )
    found = open_core(written(tmp_path, elf_core(LOADS, make_own(ours)))).annotations
    assert found == ours


@pytest.mark.parametrize("contents", [b"{", b"[]", b'{"cpus":5}', b'{"cpus":[{"rip":"x"}]}', b'{"cpus":[],"guests":[{}]}', b"[" * 5000])
def test_damaged_notes_are_left_out(tmp_path: Path, contents: bytes) -> None:
    notes = make_note(b"VMDBG", OWN_TYPE, contents) + make_note(b"CORE", 1, b"short") + make_note(b"QEMU", 0, b"")
    dump = open_core(written(tmp_path, elf_core(LOADS, notes)))
    assert len(dump.remarks) == 3
    assert dump.annotations.cpus == ()


CORE = elf_core(LOADS, make_prstatus(STATE, 1) + make_qemu(STATE) + make_own(Annotations((STATE,), (GuestNote(1, "g", (1,)),))))
LIME = lime([(0x1000, b"a" * 30), (0x1010, b"b" * 30), (0x9000, b"c" * 9)])


@pytest.mark.parametrize("whole", [CORE, elf32_core([(4096, b"low.")], make_prstatus(STATE, 1)), LIME], ids=["core", "core32", "lime"])
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_dumps_never_escape(tmp_path: Path, whole: bytes, data: st.DataObject) -> None:
    places = st.integers(0, 199) | st.integers(0, len(whole) - 1)
    changes = data.draw(st.dictionaries(places, st.sampled_from((0, 1, 0x7F, 0x80, 0xFF)) | st.integers(0, 255), max_size=12))
    damaged = bytearray(whole)
    for position, value in changes.items():
        damaged[min(position, len(whole) - 1)] = value
    path = written(tmp_path, bytes(damaged[: data.draw(st.integers(0, len(whole)) | st.just(len(whole)))]))
    with suppress(SourceError):
        dump = open_dump(path)
        for first, end in [*memory_ranges(dump.memory)[:3], *list(data_ranges(dump.memory))[:3]]:
            with suppress(Unreadable):
                dump.memory.read(first, min(end - first, 100))
                dump.memory.read_u64(end - 4)
