"""Mend faults of Unicorn 2.1.4 in memory: the files on disk stay as they are.

RDRAND and RDSEED give the host's random numbers, which no run could repeat, and no hook or intercept stops them.  The
CPU model that has SVM has them; `withdraw_features` clears its feature bit, so that they are #UD as CPUID says.

XSETBV takes AVX, which the engine has not, and cannot be intercepted.  The same function leaves it no component to enable:
it is #GP, whatever it asks for, and we execute it.  XSAVE and XRSTOR do not look at CR0.TS, by which a processor is told to
raise #NM; `mend_xsave` leads their test of CR4.OSXSAVE through a trampoline that tests both, and either makes them #UD.

The nested walker dies where a guest page table lies in a no-execute page.  `get_hphys` takes a pointer to the access
rights, NULL for an entry of a guest page table, and on a nested leaf with NX does `*prot &= ~PAGE_EXEC` without a test: a
guest that puts a page table into a page its hypervisor maps no-execute (which is legal and common) kills the process.  The
instructions around it occur once in the wheel; they are led through a trampoline that tests the pointer.  It also looks at
bits of a leaf that are software's, and free:

- `ONLY_USER` and `ONLY_SUPERVISOR` say whose code the page may hold (GMET, APM2 15.25.13), for which the walker, that takes
  every access for a user's, has no word.  Whose it is, its caller keeps in a register that it saves.
- `CHECKED`: the page holds code and is written.  The engine checks stores for translated code only while the page is
  executable for who stores.  An alias that is not gets an entry of the TLB that is good for one store.

The walk of a guest's tables lets pass what is reserved in the upper entries: `mend_reserved_bits` puts the missing bits into the
constants that it tests with.

Translation runs ahead of execution into the next page, and marks that as accessed; `end_blocks_at_pages` keeps it from that.

INS stores a zero to its destination to see whether it may, OUTS loads its source, and only then do they ask for the port.
By the manual the port comes first: an intercepted one has touched nothing (APM2 15.10.2).  `withdraw_string_io` points
their entries of the translator's table of opcodes at what undefined ones get.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import struct
from functools import cache
from itertools import count
from typing import Any

from unicorn import x86_const as x86

from . import layout
from .errors import EngineError
from .library import PAGE, displacement, distance, find, find_all, libc, linked, mappings, near, replace
from .physical import CHECKED, ONLY_SUPERVISOR, ONLY_USER

SITE = re.compile(
    rb"\x48\x85\xff"  # test rdi, rdi      the leaf has NX ...
    rb"\x79\x0d"  # jns past           ... else nothing to do
    rb"\x41\x83\xfe\x02"  # cmp r14d, 2        an instruction fetch ...
    rb"\x0f\x84(.{4})"  # je fault           ... is refused
    rb"\x83\x21\xfb"  # and dword [rcx], ~PAGE_EXEC
    rb"\x83\xe7\x02\x75",  # past: and edi, PG_RW; jne
    re.DOTALL,
)
_BEFORE, _BEHIND = 0x400, 0x1400
"""Bytes before the site, and from it on, in which both walks lie."""
_FAULT_FROM, _PAST = 15, 18
"""Offsets in the site: the end of `je fault`, and `past`."""

WALK = re.compile(
    rb"\x41\x57\x49\x89\xf7\x41\x56\x41\x55\x41\x54\x55\x53"  # push r15; mov r15, rsi; push r14, r13, r12, rbp, rbx
    rb"\x48\x83\xec\x38"  # sub rsp, 0x38
    rb"\xf6\x87.{4}\x40\x75",  # test byte [rdi+hflags2], NPT; jne
    re.DOTALL,
)
FINAL_WALK = re.compile(
    rb"\x48\x21\xf1\x48\x8d\x34\x11"  # and rcx, rsi; lea rsi, [rcx+rdx]
    rb"\x4c\x89\xc9\x44\x89\xea"  # mov rcx, r9; mov edx, r13d    the rights, and what the access is
    rb"\xe8(.{4})"  # call get_hphys
    rb"\x4c\x89\xe6\x31\xc9\x41\x89\xd9",  # mov rsi, r12; xor ecx, ecx; mov r9d, ebx    for tlb_set_page: whose it is
    re.DOTALL,
)
"""The beginning of `get_hphys`, and its only call with a pointer to the access rights."""
_CALL_FROM, _SAVED_RBX, _USER_INDEX = 18, 0x38, 1
"""The end of the call in `FINAL_WALK`; where rbx lies on the stack of `get_hphys`, and what it is for an access of a user."""

PML4E_RESERVED = re.compile(
    rb"\x49\xba(\x80\0\0\0\0\xff\x0f\0).{72}"  # movabs r10, 51:40 and PS
    rb"\x48\xba(\x80\0\0\0\0\xff\x0f\x80)\x4c\x0f\x44\xd2",  # movabs rdx, the same and NX; cmove r10, rdx    without EFER.NXE
    re.DOTALL,
)
PDPE_RESERVED = re.compile(
    rb"\x49\xb9(\0\0\0\0\0\xff\xff\xff)"  # movabs r9, 63:40
    rb"\x4c\x85\xc8\x0f\x85.{4}"  # test rax, r9; jne fault
    rb"\x49\xb9\x06\0\0\0\0\0\0\x80",  # movabs r9, NX | U | W    rights that a PDPE of PAE grants
    re.DOTALL,
)
"""What the walk of a guest's tables tests in PML4 (and PML5) entries, and in PDP entries of PAE mode."""

SWITCH = re.compile(
    rb"\x48\x8d\x1d(.{4})"  # lea rbx, table        32-bit distances from itself, by opcode, | 0x100 behind 0F
    rb"\x41\x81\xfa\xcf\x01\0\0"  # cmp r10d, 0x1cf
    rb"\x0f\x87(.{4})"  # ja undefined
    rb"\x44\x89\xd0\x48\x63\x04\x83\x48\x01\xd8\xff\xe0",  # mov eax, r10d; movsxd rax, [rbx+rax*4]; add rax, rbx; jmp rax
    re.DOTALL,
)
_TABLE_FROM, _UNDEFINED_FROM = 7, 20
"""Offsets in the switch: where its two distances count from."""
_TABLE = struct.Struct("<464i")
_INS, _OUTS, _INT1 = 0x6C, 0x6E, 0xF1

_CR0, _OSXSAVE = layout.CR - layout.REGS, (layout.CR - layout.REGS + 32 + 2).to_bytes(4, "little")
"""In the engine's state: CR0, and the byte of CR4 whose bit 2 is OSXSAVE."""
XSAVE_SITE = re.compile(
    rb"\xf6\x87" + re.escape(_OSXSAVE) + rb"\x04"  # test byte [rdi+cr4+2], OSXSAVE
    rb"\x0f\x84(.{4})"  # je undefined
    rb"(?=\x48\x89\xf3\x40\xf6\xc6\x3f)",  # mov rbx, rsi; test sil, 0x3f    the area is aligned
    re.DOTALL,
)

PAGE_END = re.compile(
    rb"\xf6\x42\x1a\x02"  # test byte [rdx+cflags+2], CF_USE_ICOUNT >> 16
    rb"(\x74\x17)"  # je past
    rb"\x48\x8d\x50\x0f\x48\x31\xc2\x48\xf7\xc2\0\xf0\xff\xff\x75\xd6"  # in rax and 15 bytes on: another page? jne end
    rb"\xa9\xff\x0f\0\0\x74\xcf",  # test eax, 4095; je end
    re.DOTALL,
)
"""Where a block ends whose next instruction may lie in two pages, or begins one: if QEMU counts instructions, which Unicorn never
does."""

_MARKS = (0x6A09E667F3BCC908, 0xBB67AE8584CAA73B)
_engines = count()
"""Part of an engine's marks: those of one that is gone may still lie in memory that was freed."""
_REACH = 0x12000
"""How far into the CPU object its register file may begin."""
_FEATURES = re.compile(
    rb"\xfd\xfb\x8b\x07\0\0\0\0(\x0b\x22\xd8\xc6)\0\0\0\0.{152}(\x07\0\0\0)\0\0\0\0", re.DOTALL,
)
"""The model's words of CPUID, 64 bits each, behind the registers: 0 is leaf 1 EDX, 1 ECX, 21 leaf D EAX: what XCR0 may hold."""
_RDRAND, _COMPONENTS = 1 << 30, 7


def withdraw_features(uc: Any) -> None:
    """Take RDRAND, RDSEED and all components of XCR0 from the model of an engine that has not run yet.

    The features lie behind the registers that a context holds.  `EngineError` if they are not found.
    """
    uc.reg_write(x86.UC_X86_REG_RAX, _MARKS[0] ^ next(_engines))
    uc.reg_write(x86.UC_X86_REG_RCX, _MARKS[1])
    context = uc.context_save()
    registers = bytes(layout.context_bytes(context)[layout.REGS :])
    copy = (ctypes.cast(context.context, ctypes.c_void_p).value or 0) + layout.REGS
    mark = registers[:16]
    with open("/proc/self/mem", "rb", buffering=0) as memory:

        def read(address: int, size: int) -> bytes:
            try:
                return os.pread(memory.fileno(), size, address)
            except OSError:
                return b""

        engine = ctypes.cast(uc._uch, ctypes.c_void_p).value or 0
        for (pointer,) in struct.iter_unpack("<Q", read(engine, 0x2000)):
            data = read(pointer, _REACH) if 0x10000 < pointer < 1 << 47 else b""
            for found in re.finditer(re.escape(mark), data):
                end = pointer + found.start() + len(registers)
                features = _FEATURES.search(read(end, 0x200)) if pointer + found.start() != copy else None
                if features is not None:
                    for word, bits in ((1, _RDRAND), (2, _COMPONENTS)):
                        ctypes.c_uint32.from_address(end + features.start(word)).value &= ~bits
                    uc.reg_write(x86.UC_X86_REG_RAX, 0)
                    uc.reg_write(x86.UC_X86_REG_RCX, 0)
                    return
    raise EngineError(
        "RDRAND cannot be taken from Unicorn's CPU model: its features are not where those of the unicorn 2.1.4 wheel for "
        "x86-64 are, and a run that draws the host's random numbers could not be repeated. "
        "Remedy: pip install --force-reinstall unicorn==2.1.4"
    )


@cache
def _nested_walker() -> tuple[int, re.Match[bytes]] | None:
    """`SITE` as the wheel has it."""
    return find(SITE)


def _find_in_walks(pattern: re.Pattern[bytes]) -> tuple[int, re.Match[bytes]] | None:
    """The one place near the nested walker that matches: in itself, or in the walk of the guest's tables behind it."""
    walker = _nested_walker()
    if walker is None:
        return None
    first = walker[0] - _BEFORE
    found = list(pattern.finditer(ctypes.string_at(first, _BEFORE + _BEHIND)))
    return (first + found[0].start(), found[0]) if len(found) == 1 else None


@cache
def nested_walk() -> int | None:
    """The address of `get_hphys`."""
    walk = _find_in_walks(WALK)
    return None if walk is None else walk[0]


@cache
def knows_privilege() -> bool:
    """Whether the nested walker can tell whose access it walks for: it is called as it should be."""
    call = _find_in_walks(FINAL_WALK)
    if call is None:
        return False
    site, match = call
    return site + _CALL_FROM + distance(match[1]) == nested_walk()


def _test_pte(bits: int) -> bytes:
    return b"\xa9" + bits.to_bytes(4, "little")  # test eax, bits


@cache
def mend_nested_walker() -> bool:
    """Install the trampoline; once a process.  False where the instructions are not found or may not be changed.

    Without it the engine maps no page no-execute: nothing crashes, but nested NX is not enforced and stores are slower.
    """
    found = _nested_walker()
    if found is None:
        return False
    site, match = found
    fault = site + _FAULT_FROM + distance(match[1])
    past = site + _PAST
    cave = near(site, PAGE)
    if cave is None:
        return False
    jump, jz, jnz, jns = b"\xeb", b"\x74", b"\x75", b"\x79"
    has_rights, allows_execution = b"\x48\x85\xc9", b"\xf7\x01\4\0\0\0"  # test rcx, rcx; test dword [rcx], PAGE_EXEC
    body = linked(
        cave,
        b"\x48\x85\xff", (jns, "executable"),  # test rdi, rdi
        "refuse", b"\x41\x83\xfe\x02", (jz, "fault"),  # cmp r14d, 2    a fetch
        has_rights, (jz, "past"), b"\x83\x21\xfb", (jump, "stores"),  # and dword [rcx], ~PAGE_EXEC
        "executable", _test_pte(ONLY_USER | ONLY_SUPERVISOR if knows_privilege() else 0), (jz, "stores"),
        has_rights, (jz, "past"), b"\x83\x7c\x24" + bytes((_SAVED_RBX, _USER_INDEX)), (jz, "user"),  # cmp dword [rsp+...], ...
        _test_pte(ONLY_USER), (jnz, "refuse"), (jump, "stores"),
        "user", _test_pte(ONLY_SUPERVISOR), (jnz, "refuse"),
        "stores", _test_pte(CHECKED), (jz, "past"),
        has_rights, (jz, "past"), allows_execution, (jnz, "past"), b"\x83\x09\x40",  # or dword [rcx], PAGE_WRITE_INV
        "past", (b"\xe9", past), "fault", (b"\xe9", fault),
    )  # fmt: skip
    ctypes.memmove(cave, body, len(body))
    if libc.mprotect(cave, PAGE, mmap.PROT_READ | mmap.PROT_EXEC):
        return False
    return replace(site, b"\xe9" + displacement(site + 1, cave))


@cache
def withdraw_string_io() -> bool:
    """Make INS and OUTS undefined to the engine, which then stops before them; once a process.

    False where the table of opcodes is not found, or is not what it should be, or may not be changed: there the engine
    executes them, and stops for their port with the memory touched.
    """
    found = find(SWITCH)
    if found is None:
        return False
    site, match = found
    table = site + _TABLE_FROM + distance(match[1])
    undefined = site + _UNDEFINED_FROM + distance(match[2]) - table
    if not any(first <= table and table + _TABLE.size <= end for first, end, _ in mappings()):
        return False
    targets = _TABLE.unpack(ctypes.string_at(table, _TABLE.size))
    pairs = [targets[opcode : opcode + 2] for opcode in (_INS, _OUTS)]
    if targets[_INT1] != undefined or any(a != b or targets.count(a) != 2 for a, b in pairs):
        return False
    return replace(table + 4 * _INS, struct.pack("<4i", *[undefined] * 4))


@cache
def end_blocks_at_pages() -> bool:
    """Have no block reach into a page before its first instruction; once a process.  False where the test is not found.

    To translate an instruction sets the accessed bit of its page.  So if a block began in the page before, it would depend on how
    a run is cut into blocks, which a debugger's steps change, whether a page counts as accessed that is never executed.
    """
    found = find(PAGE_END)
    return found is not None and replace(found[0] + found[1].start(1) - found[1].start(), b"\x90\x90")  # nop; nop


@cache
def mend_xsave() -> bool:
    """Have XSAVE and XRSTOR undefined to the engine while CR0.TS is set; once a process.

    False where their tests of CR4.OSXSAVE are not found, or may not be changed: XSAVE cannot be claimed there.
    """
    found = find_all(XSAVE_SITE)
    cave = near(found[0][0], PAGE) if len(found) == 2 else None
    if cave is None:
        return False
    body, starts = b"", []
    for site, match in found:
        starts.append(cave + len(body))
        end = site + len(match[0])
        undefined = end + distance(match[1])
        body += b"\xf6\x87" + _CR0.to_bytes(4, "little") + b"\x08\x0f\x85"  # test byte [rdi+cr0], TS; jne undefined
        body += displacement(cave + len(body), undefined)
        body += match[0][:9]  # test byte [rdi+cr4+2], OSXSAVE; je undefined
        body += displacement(cave + len(body), undefined)
        body += b"\xe9"  # jmp end
        body += displacement(cave + len(body), end)
    ctypes.memmove(cave, body, len(body))
    if libc.mprotect(cave, PAGE, mmap.PROT_READ | mmap.PROT_EXEC):
        return False
    return all(
        replace(site, b"\xe9" + displacement(site + 1, start)) for (site, _), start in zip(found, starts, strict=True)
    )


@cache
def mend_reserved_bits() -> bool:
    """Have the walk of a guest's tables refuse what is reserved in upper entries; once a process.

    That is bit 8 of a PML4E, and bits 8:5 and 2:1 of a PDPE in PAE mode (APM2 5.2.3, 5.3.3).  False where the constants are not
    found, or may not be changed: there such entries are walked as if the bits were clear.
    """
    found = [_find_in_walks(pattern) for pattern in (PML4E_RESERVED, PDPE_RESERVED)]
    if None in found:
        return False
    places = [
        (site + match.start(group) - match.start(), match[group], bits)
        for (site, match), groups, bits in zip(filter(None, found), ((1, 2), (1,)), (0x100, 0x1E6), strict=True)
        for group in groups
    ]
    return all(
        replace(at, (int.from_bytes(constant, "little") | bits).to_bytes(8, "little")) for at, constant, bits in places
    )
