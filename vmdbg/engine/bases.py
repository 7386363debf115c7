"""Have 64-bit code run and access memory as if the segments had no base, whatever their descriptors say (APM2 4.8.1).

The engine adds the base of CS to RIP after a far transfer to 64-bit code, and those of ES, SS and DS to an address behind a
prefix for them.  Both are mended in memory, as in repair.py.
"""

from __future__ import annotations

import ctypes
import mmap
import re
from functools import cache

from unicorn.unicorn_py3.unicorn import uclib

from . import layout
from .library import PAGE, displacement, distance, find, libc, mappings, near, replace
from .state import CODE_BASE_KEPT, CS, DS, ES, HF_CS64, SS

_CS = layout.SEGMENTS - layout.REGS + 24 * CS
_ENTRIES = {
    "tb_htable_lookup_x86_64": bytes.fromhex("4156 660f6ec1"),  # push r14; movd xmm0, ecx
    "tb_gen_code_x86_64": bytes.fromhex("4157 4156 4989fe"),  # push r15; push r14; mov r14, rdi
}
"""Functions that find the translation of a block and make it, with their first instructions.  Both take the CPU in RDI, the
linear address in RSI, CS.base in RDX, and the mode's flags in ECX.  No translation is made with a base in 64-bit code, so none
is found before these are asked, and code without one never pays."""
_STATE = re.compile(rb"\x48\x8b[\x87\xbf](\x28\x01\0\0)")
"""mov rax or rdi, [rdi+env]: where the CPU's state is, in the first instructions of both."""


@cache
def mend_code_bases() -> bool:
    """Put the base of CS aside (see state.py) when the engine looks for 64-bit code; once a process.  False where that cannot be
    done: such code runs at the wrong address there."""
    places = []
    for name, first in _ENTRIES.items():
        function = getattr(uclib, name, None)
        at = 0 if function is None else ctypes.cast(function, ctypes.c_void_p).value or 0
        code = ctypes.string_at(at, 64) if at else b""
        state = _STATE.search(code)
        if not code.startswith(first) or state is None:
            return False
        places.append((at, first, state[1]))
    cave = near(places[0][0], PAGE)
    if cave is None:
        return False
    body, starts = b"", []
    for at, first, offset in places:
        keep = b"\x48\x8b\x87" + offset  # mov rax, [rdi+env]
        keep += b"\x48\x89\x90" + (layout.CODE_BASE - layout.REGS).to_bytes(4, "little")  # mov [rax+code_base], rdx
        keep += b"\x48\x83\xa0" + (_CS + 8).to_bytes(4, "little") + b"\0"  # and qword [rax+cs.base], 0
        keep += b"\x83\x88" + (_CS + 20).to_bytes(4, "little") + bytes([CODE_BASE_KEPT])  # or dword [rax+cs.flags], KEPT
        keep += bytes.fromhex("4829d6 31d2")  # sub rsi, rdx; xor edx, edx
        test = b"\xf7\xc1" + HF_CS64.to_bytes(4, "little") + b"\x74" + bytes([len(keep)])  # test ecx, CS64; jz past
        starts.append(cave + len(body))
        body += bytes.fromhex("4885d2 74") + bytes([len(test + keep)]) + test + keep  # test rdx, rdx; jz past
        body += first + b"\xe9"  # past: what the entry began with; jmp behind it
        body += displacement(cave + len(body), at + len(first))
    ctypes.memmove(cave, body, len(body))
    if libc.mprotect(cave, PAGE, mmap.PROT_READ | mmap.PROT_EXEC):
        return False
    return all(
        replace(at, b"\xe9" + displacement(at + 1, start)) for (at, _, _), start in zip(places, starts, strict=True)
    )


_PREFIXES = re.compile(
    rb"\x4c\x8d\x25(.{4}).{10}"  # lea r12, table        32-bit distances from itself, by prefix, from 26 on
    rb"\xe8.{4}\x89\xc2\x44\x0f\xb6\xd0\x3c\x67\x0f\x87.{4}"  # cmp al, 0x67; ja opcode
    rb"\x3c\x25\x76.\x83\xe8\x26\x3c\x41\x77.\x0f\xb6\xc0"  # cmp al, 0x25; jbe opcode; sub eax, 0x26; cmp al, 0x41; ja opcode
    rb"\x49\x63\x04\x84\x4c\x01\xe0\xff\xe0",  # movsxd rax, [r12+rax*4]; add rax, r12; jmp rax
    re.DOTALL,
)
_FIRST_PREFIX, _REX = 0x26, 0x40
_OVERRIDES = {0x26: ES, 0x2E: CS, 0x36: SS, 0x3E: DS}
_OVERRIDE = re.compile(
    rb"\x48\x8b\x04\x24\x41\x83\xc6\x01"  # mov rax, [rsp]; add r14d, 1
    rb"\xc7\x40(.)(.)\0\0\0(?:\xe9(.{4})|\xeb(.))",  # mov dword [rax+override], segment; jmp next
    re.DOTALL,
)
_WIDE = re.compile(rb"\x48\x8b\x04\x24\x44\x8b\x48(.)\x45\x85\xc9", re.DOTALL)
"""What REX begins with: mov rax, [rsp]; mov r9d, [rax+code64]; test r9d, r9d."""


@cache
def mend_segment_overrides() -> bool:
    """Have 64-bit code ignore the prefixes of ES, CS, SS and DS; once a process.  False where that cannot be done."""
    found = find(_PREFIXES)
    if found is None:
        return False
    table = found[0] + 7 + distance(found[1][1])
    handlers = {}
    for prefix in (*_OVERRIDES, _REX):
        entry = table + 4 * (prefix - _FIRST_PREFIX)
        if not any(first <= entry < end for first, end, _ in mappings()):
            return False
        handlers[prefix] = table + distance(ctypes.string_at(entry, 4))
    wide = _WIDE.match(ctypes.string_at(handlers.pop(_REX), 16))
    cave = near(found[0], PAGE)
    if wide is None or cave is None:
        return False
    body, starts = b"", {}
    for prefix, handler in handlers.items():
        code = _OVERRIDE.match(ctypes.string_at(handler, 24))
        if code is None or code[2][0] != _OVERRIDES[prefix]:
            return False
        starts[prefix] = cave + len(body)
        body += code[0][:8] + b"\x83\x78" + wide[1] + b"\0\x75\x07"  # cmp dword [rax+code64], 0; jne past
        body += code[0][8:15] + b"\xe9"  # mov dword [rax+override], segment; past: jmp next
        body += displacement(cave + len(body), handler + code.end() + distance(code[3] or code[4]))
    ctypes.memmove(cave, body, len(body))
    if libc.mprotect(cave, PAGE, mmap.PROT_READ | mmap.PROT_EXEC):
        return False
    return all(
        replace(table + 4 * (prefix - _FIRST_PREFIX), (start - table).to_bytes(4, "little", signed=True))
        for prefix, start in starts.items()
    )
