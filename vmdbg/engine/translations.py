"""Hold what the engine's walks of a guest's own tables have found until the guest flushes it.

The engine's TLB loses translations for reasons that are no guest's: for its size, which it chooses by the host's clock; for
conflicts, in which it counts whoever executes code anew, such as a debugger's step; for our own flushes, when something in a
nested table of ours has changed.  What is lost is walked anew, and a guest that has written a page-table entry since and not
flushed sees a new translation, or an accessed bit set again.  When it does would depend on the host, on a debugger, and on where
a run was restored.

So translations are held besides (translations.c), linear to guest-physical with the rights of the guest's tables, as many as
there are, and forgotten where the processor flushes: at its INVLPG, the loads of its control registers, a world switch.  A walk
is made once for each right that is used, whatever the engine's TLB does: it asks here before it walks.

That takes trampolines at four places: in the engine's fill of its TLB, where it begins to walk (`FILL`) and where it has the
guest-physical address and goes on to the nested table (`FINAL`); and in its two flushes.  They are found as in repair.py, and
tried on each engine.  Where that fails, or nothing is compiled, the engine's TLB is all there is, without its clock.
"""

from __future__ import annotations

import ctypes
import mmap
import re
import struct
from functools import cache
from typing import Any
from weakref import finalize

from unicorn import unicorn_const as const
from unicorn.unicorn_py3.unicorn import uclib

from . import layout
from .library import PAGE, displacement, distance, libc, linked, near, replace
from .memory import Ram
from .repair import knows_privilege, nested_walk
from .runtime import native

FILL = re.compile(
    rb"\x41\x57\x41\x56\x41\x55\x41\x89\xcd\x41\x54\x49\x89\xf4"  # push r15, r14, r13; mov r13d, ecx; push r12; mov r12, rsi
    rb"\x55\x48\x89\xfd\x53\x44\x89\xc3"  # push rbp; mov rbp, rdi; push rbx; mov ebx, r8d    CPU, access, address, mode
    rb"\x48\x83\xec\x68\x48\x8b\x84\x24\xa0\0\0\0\x44\x89\x4c\x24\x08"  # sub rsp, 0x68; mov rax, [rsp+0xa0]; mov [rsp+8], r9d
    rb"\x48\x89\x87.{4}"  # mov [rdi+...], rax    where it was called from, for a fault
    rb"(\x8b\x87.{4})"  # mov eax, [rdi+hflags]
    rb"\xa9\0\0\x08\0\x0f\x85",  # test eax, SMM; jne
    re.DOTALL,
)
FINAL = re.compile(
    rb"\x4c\x8d\x4c\x24\x5c\x48\x21\xf1\x48\x8d\x34\x11"  # lea r9, [rsp+0x5c]; and rcx, rsi; lea rsi, [rcx+rdx]    the rights
    rb"\x4c\x89\xc9\x44\x89\xea\xe8(.{4})"  # mov rcx, r9; mov edx, r13d; call get_hphys
    rb"\x4c\x89\xe6\x31\xc9\x41\x89\xd9\x48\x25\0\xf0\xff\xff"  # mov rsi, r12; xor ecx, ecx; mov r9d, ebx; and rax, -4096
    rb"\x48\x81\xe6\0\xf0\xff\xff\x48\x89\xef"  # and rsi, -4096; mov rdi, rbp
    rb"\xf6\x85.{4}\x08\x0f\x95\xc1\x48\x83\xec\x08"  # test [...], SMM; setne cl; sub rsp, 8
    rb"\x48\x89\xc2\x41\x56\x44\x8b\x44\x24\x6c\x01\xc9\xe8",  # push r14: the page's size; mov r8d, [rsp+0x6c]; call
    re.DOTALL,
)
_CALL = 18
"""Offset of the call in `FINAL`."""
_FLUSH_ALL = re.compile(rb"\xbe\x07\0\0\0\xe9", re.DOTALL)  # mov esi, 7; jmp
_FLUSH_PAGE = re.compile(rb"\xba\x07\0\0\0\xe9", re.DOTALL)  # mov edx, 7; jmp
CLOCK = re.compile(
    rb"\x4d\x39\xe8(\x7d\x0a)\x4d\x89\x6c\x24\x10.{9}\x5b\x5d\x41\x5c\x41\x5d\xc3.{6}"  # cmp r8, r13; jge: its time is not over
    rb"\x4d\x39\xe8(\x7d\xea)\x48\x83\xf8\x1d",  # the same, before it is made smaller
    re.DOTALL,
)
"""Where the engine's TLB is resized at a flush: it becomes smaller only if it was used little for 100 ms of the host's time."""

_BEFORE = 0x2000
"""Bytes before the flush in which that lies."""

LACKED = "a TLB that loses nothing by itself"
"""What there is not where translations are not held."""

PAIR = struct.Struct("<QQ")
_MOST, _MODES, _RIGHTS, _UNUSED = 1 << 20, 3, 7, 0xFC8
"""How many are held; of a pair: page | mode, and guest-physical page | index of its size << 4 | rights (translations.c)."""


def _function(name: str) -> int:
    function = getattr(uclib, f"{name}_x86_64", None)
    return 0 if function is None else ctypes.cast(function, ctypes.c_void_p).value or 0


@cache
def _trampolines() -> bool:
    """Install them; once a process.  False where something is not as it should be, or may not be changed."""
    walk, function = nested_walk(), _function("x86_cpu_tlb_fill")
    flush_all, flush_page = _function("tlb_flush"), _function("tlb_flush_page")
    if native is None or not knows_privilege() or walk is None or not function or not flush_all or not flush_page:
        return False
    code = ctypes.string_at(function, PAGE)
    fill, final = FILL.match(code), list(FINAL.finditer(code))
    if fill is None or len(final) != 1:
        return False
    begin, behind, call = function + fill.start(1), function + fill.end(1), function + final[0].start() + _CALL
    if (
        call + 5 + distance(final[0][1]) != walk
        or not _FLUSH_ALL.match(ctypes.string_at(flush_all, 6))
        or not _FLUSH_PAGE.match(ctypes.string_at(flush_page, 6))
    ):
        return False
    cave = near(begin, PAGE)
    if cave is None:
        return False
    to = {  # movabs rax, function; call rax
        name: b"\x48\xb8" + address.to_bytes(8, "little") + b"\xff\xd0"
        for name, address in native.translations_symbols().items()
    }
    jump = b"\xe9"
    parts: dict[int, tuple[bytes | str | tuple[bytes, str | int], ...]] = {
        begin: (
            bytes.fromhex("57 56 52 51 4150 4151"),  # push rdi, rsi, rdx, rcx, r8, r9
            bytes.fromhex("4c89e7 4489ee 89da 4889e9"),  # mov rdi, r12; mov esi, r13d; mov edx, ebx; mov rcx, rbp
            to["look"],
            bytes.fromhex("4159 4158 59 5a 5e 5f 4885c0"),  # pop r9, r8, rcx, rdx, rsi, rdi; test rax, rax
            (b"\x75", "held"), fill[1], (jump, behind),  # jnz held; mov eax, [rdi+hflags]
            "held",
            bytes.fromhex("488b30 4c8b7008"),  # mov rsi, [rax]; mov r14, [rax+8]    address and size
            bytes.fromhex("8b4010 8944245c"),  # mov eax, [rax+16]; mov [rsp+0x5c], eax    the rights
            bytes.fromhex("488d4c245c 4489ea 4889ef"),  # lea rcx, [rsp+0x5c]; mov edx, r13d; mov rdi, rbp
            (b"\xe8", walk), (jump, call + 5),  # call get_hphys
        ),
        call: (
            bytes.fromhex("57 56 52 51 50"),  # push rdi, rsi, rdx, rcx, rax
            bytes.fromhex("4889f2 448b01 4c89e6"),  # mov rdx, rsi; mov r8d, [rcx]; mov rsi, r12
            bytes.fromhex("4c89f1 4189d9"),  # mov rcx, r14; mov r9d, ebx
            to["record"],
            bytes.fromhex("58 59 5a 5e 5f"), (jump, walk),  # pop rax, rcx, rdx, rsi, rdi
        ),
        flush_all: (
            b"\x57", to["forget_all"], b"\x5f",  # push rdi, the CPU; pop rdi
            ctypes.string_at(flush_all, 5), (jump, flush_all + 5),
        ),
        flush_page: (
            bytes.fromhex("57 56 50"), to["forget_page"], bytes.fromhex("58 5e 5f"),  # push rdi, rsi, rax; pop rax, rsi, rdi
            ctypes.string_at(flush_page, 5), (jump, flush_page + 5),
        ),
    }  # fmt: skip
    body, starts = b"", {}
    for site, pieces in parts.items():
        starts[site] = cave + len(body)
        body += linked(starts[site], *pieces)
    ctypes.memmove(cave, body, len(body))
    if libc.mprotect(cave, PAGE, mmap.PROT_READ | mmap.PROT_EXEC):
        return False
    return all(
        replace(site, (b"\xe8" if site == call else jump) + displacement(site + 1, start) + (b"\x90" if site == begin else b""))
        for site, start in starts.items()
    )


@cache
def resize_without_clock() -> bool:
    """Have the engine's TLB become smaller at any flush if it was used little; once a process.  False where that fails."""
    first = _function("tlb_flush") - _BEFORE  # each of the library's processors has a TLB
    found = list(CLOCK.finditer(ctypes.string_at(first, _BEFORE))) if first > 0 else []
    return len(found) == 1 and all(replace(first + found[0].start(group), b"\x90\x90") for group in (1, 2))  # nop; nop


class Translations:
    """What is held of one machine's translations, on whose engine `works` says whether it is."""

    def __init__(self, uc: Any, ram: Ram) -> None:
        """`uc`: an engine that has not run yet, without paging, on whose RAM this is tried."""
        self.address = 0
        """Of the table in C; 0 for none."""
        if native is not None and _trampolines():
            self.address = native.translations_new(_function("tlb_flush"))
            self._free = finalize(self, native.translations_free, self.address)
            if not self._works(uc, ram):
                self.close()
        if not self.address:
            resize_without_clock()

    def _works(self, uc: Any, ram: Ram) -> bool:
        """Whether a translation is held when it is made, is taken from there, and goes when the engine flushes."""
        page = ram.ranges[0][0] + 5 * PAGE
        before, ram.view[page : page + 8] = bytes(ram.view[page : page + 8]), b"softTLB!"
        data = ctypes.create_string_buffer(8)

        def reads() -> bool:
            error = uclib.uc_vmem_read(
                uc._uch, ctypes.c_uint64(page), ctypes.c_uint32(const.UC_PROT_READ), data, ctypes.c_size_t(8)
            )
            return not error and data.raw == b"softTLB!"

        def flush() -> bool:
            return not uclib.uc_ctl(uc._uch, 1 << 30 | const.UC_CTL_TLB_FLUSH)

        def held() -> list[tuple[int, int]]:
            return [(at & -PAGE, to & -16 | to & _RIGHTS) for at, to in self.pairs()]

        assert native is not None
        outer = native.translations_enter(self.address)
        made = flush() and reads() and held() == [(page, page | _RIGHTS)]
        native.translations_enter(0)
        kept = flush() and held() != [] and native.translations_hits(self.address) == 0
        native.translations_enter(self.address)
        taken = reads() and native.translations_hits(self.address) == 1 and held() == [(page, page | _RIGHTS)]
        gone = flush() and held() == []
        native.translations_enter(outer)
        flush()
        ram.view[page : page + 8] = before
        return made and kept and taken and gone

    def pairs(self) -> list[tuple[int, int]]:
        """All that is held, a `PAIR` each, in the order of linear addresses."""
        return sorted(PAIR.iter_unpack(self.dump()[PAIR.size :]))

    def dump(self) -> bytes:
        """The same, behind base and mask of the region in which large pages are; nothing of nothing."""
        if not self.address:
            return b""
        assert native is not None
        found: bytes = native.translations_dump(self.address)
        pairs = sorted(PAIR.iter_unpack(found[PAIR.size :]))
        return found[: PAIR.size] + b"".join(PAIR.pack(*pair) for pair in pairs) if pairs else b""

    def load(self, dump: bytes) -> None:
        """Hold this and nothing else; `ValueError` if it is nothing that `dump` gives."""
        pairs = dump[PAIR.size :]
        if len(dump) % PAIR.size or len(pairs) > _MOST * PAIR.size or any(
            at & PAGE - 1 >= _MODES or to >= 1 << layout.PHYSICAL_BITS or to & _UNUSED for at, to in PAIR.iter_unpack(pairs)
        ):
            raise ValueError("none")
        if self.address:
            assert native is not None
            native.translations_load(self.address, dump)

    def close(self) -> None:
        if self.address:
            self.address = 0
            self._free()
