"""Have the engine stop, as #UD, before what it would not do by the letter: in code that asks for it, and nowhere else.

The engine checks no alignment and raises no SIMD exceptions.  Few programs ask for either, so these are executed one
instruction at a time, with our eyes on each (vmdbg/cpu/attention.py).  Flags of ours among the engine's mode flags say so.
The engine tells translated blocks apart by all of its mode flags, so code without them is translated as ever:

- HF_AM while CR0.AM is set.  With RFLAGS.AC, at CPL 3, the translator then takes every instruction for an undefined one.
- HF_XM while MXCSR has an exception unmasked: then those that may raise it, and those that load or store MXCSR.
- HF_LET while an instruction that stopped is executed after all.

LDMXCSR, FXRSTOR and XRSTOR stop where they are about to load an MXCSR with an exception unmasked or a reserved bit set; that
is a test of the value, in a trampoline each.  One byte mends the engine's FTZ, which it takes for the x87's.
"""

from __future__ import annotations

import ctypes
import mmap
import re
import struct
from functools import cache

from unicorn.unicorn_py3.unicorn import uclib

from . import layout
from .library import PAGE, displacement, find, find_all, libc, near, replace
from .repair import SWITCH
from .state import HF_AM, HF_LET, HF_XM, MXCSR_ATTENTION, MXCSR_DEFAULT

_HFLAGS, _MXCSR = (offset - layout.REGS for offset in (layout.HFLAGS, layout.MXCSR))
_AC, _CPL3, _UD = 1 << 18, 3, 6
_CHOICE = 7
"""Offset in the switch: where the opcode, in R10D, is looked at; on the way behind 0F, too."""
_SLOT = 0x100
"""Bytes for a trampoline, of which there are four."""
_UNDEFINED = 0xF1
"""INT1: the engine has none."""
_SIMD = (0x12A, *range(0x12C, 0x130), 0x151, *range(0x158, 0x160), 0x17C, 0x17D, 0x1C2, 0x1D0, 0x1E6, 0x13A, 0x1AE)
"""Opcodes that may raise SIMD exceptions, with all of 0F 3A and 0F AE; | 0x100 behind 0F."""

_LOAD = re.compile(
    rb"(\x4c\x89[\xe2\xf2])"  # mov rdx, r12 or r14      where the instruction was translated to
    rb"\x48\x89\xef\xe8.{4}"  # mov rdi, rbp; call cpu_ldl_data_ra
    rb"\x48\x89\xef(\x89\x85" + re.escape(struct.pack("<I", _MXCSR)) + rb")\xe8",  # mov [rbp+mxcsr], eax; call
    re.DOTALL,
)
_FTZ = re.compile(rb"\x88\x87\x0c\x03\0\0\x88\x97\x2d\x03\0\0\xc3", re.DOTALL)
"""mov [rdi+fp_status.flush_to_zero], al; mov [rdi+sse_status.flush_inputs_to_zero], dl; ret"""
_SSE_FTZ = 0x2C


def _symbol(name: str) -> int:
    """The address of a function that the library exports; 0 if it does not."""
    try:
        return ctypes.cast(getattr(uclib, f"{name}_x86_64"), ctypes.c_void_p).value or 0
    except AttributeError:
        return 0


def _tests(value: bytes, plain: int) -> bytes:
    """To `plain` bytes ahead, unless an MXCSR, which `value` copies to ECX, asks for attention and HF_LET is clear."""
    let = b"\xf7\x87" + struct.pack("<II", _HFLAGS, HF_LET)  # test dword [rdi+hflags], HF_LET
    code = value + b"\x81\xf1" + struct.pack("<I", MXCSR_DEFAULT)  # xor ecx, MXCSR_DEFAULT
    code += b"\xf7\xc1" + struct.pack("<I", MXCSR_ATTENTION) + b"\x74"  # test ecx, MXCSR_ATTENTION; jz
    code += bytes((len(let) + 2 + plain,))
    return code + let + b"\x75" + bytes((plain,))  # jnz


def _choice(cave: int, site: int) -> bytes:
    """The translator's look at an opcode: where it is to stop, it sees an undefined one."""
    wanted, undefined = _AC | HF_AM | _CPL3, b"\x41\xba" + struct.pack("<I", _UNDEFINED)  # mov r10d, _UNDEFINED
    done = b"\x41\x81\xfa\xcf\x01\0\0\xe9"  # cmp r10d, 0x1cf; jmp: what is replaced, and back
    every = b"\x25" + struct.pack("<I", wanted) + b"\x3d" + struct.pack("<I", wanted)  # and eax; cmp eax
    every += b"\x75\x0c\x41\x83\xfa\x0f\x74\x06" + undefined  # jne done; cmp r10d, 0x0f; je done
    simd = b"\x4c\x0f\xa3\x15" + struct.pack("<i", 8 + len(every) + len(done) + 4)  # bt [bits], r10
    simd += b"\x73\x06" + undefined  # jnc
    code = bytes.fromhex("488b0424 488b00 8b4010")  # mov rax, [rsp]; mov rax, [rax]; mov eax, [rax+16]   the block's flags
    code += b"\xa9" + struct.pack("<I", HF_LET) + b"\x75" + bytes((7 + len(simd) + len(every),))  # test eax, HF_LET; jnz done
    code += b"\xa9" + struct.pack("<I", HF_XM) + b"\x74" + bytes((len(simd),)) + simd + every + done  # test eax, HF_XM; jz every
    code += displacement(cave + len(code), site + 7)
    bits: int = sum(1 << opcode for opcode in _SIMD)
    return code + bits.to_bytes(64, "little")


def _ldmxcsr(cave: int, site: int, raises: int) -> bytes:
    """In place of the first instruction of LDMXCSR's helper, which has its state in RDI and the value in ESI."""
    stop = b"\x48\x8b\x14\x24\xbe" + struct.pack("<I", _UD) + b"\xe9"  # mov rdx, [rsp]; mov esi, UD; jmp raise_exception_ra
    code = _tests(b"\x89\xf1", len(stop) + 4) + stop
    code += displacement(cave + len(code), raises)
    code += b"\x89\xb7" + struct.pack("<I", _MXCSR) + b"\xe9"  # mov [rdi+mxcsr], esi; jmp
    return code + displacement(cave + len(code), site + 6)


def _restore(cave: int, site: int, match: re.Match[bytes], raises: int) -> bytes:
    """The place where FXRSTOR or XRSTOR has read its MXCSR into EAX."""
    stop = match[1] + b"\xbe" + struct.pack("<I", _UD) + b"\xe8"  # mov rdx, ...; mov esi, UD; call raise_exception_ra
    code = _tests(b"\x89\xc1", len(stop) + 4) + stop
    code += displacement(cave + len(code), raises)
    code += match[2] + b"\xe9"  # mov [rbp+mxcsr], eax; jmp
    return code + displacement(cave + len(code), site + len(match[2]))


@cache
def call_attention() -> bool:
    """Install all of it, once a process; False where something is not as expected, or may not be changed: then #AC and #XF do
    not come."""
    found, loads, ftz = find(SWITCH), find_all(_LOAD), find(_FTZ)
    helper, raises = _symbol("helper_ldmxcsr"), _symbol("raise_exception_ra")
    store = b"\x89\xb7" + struct.pack("<I", _MXCSR)  # mov [rdi+mxcsr], esi
    if found is None or ftz is None or len(loads) != 2 or not raises or not helper or ctypes.string_at(helper, 6) != store:
        return False
    choice = found[0] + _CHOICE
    cave = near(choice, PAGE)
    if cave is None:
        return False
    trampolines = [(choice, 7, _choice(cave, choice))]
    for at, match in loads:
        site = at + match.start(2) - match.start()
        trampolines.append((site, len(match[2]), _restore(cave + _SLOT * len(trampolines), site, match, raises)))
    trampolines.append((helper, len(store), _ldmxcsr(cave + _SLOT * len(trampolines), helper, raises)))
    body = b"".join(code.ljust(_SLOT, b"\xcc") for _, _, code in trampolines)
    ctypes.memmove(cave, body, len(body))
    if libc.mprotect(cave, PAGE, mmap.PROT_READ | mmap.PROT_EXEC) or not replace(ftz[0] + 2, bytes((_SSE_FTZ,))):
        return False
    return all(
        replace(site, (b"\xe9" + displacement(site + 1, cave + _SLOT * slot)).ljust(size, b"\x90"))
        for slot, (site, size, _) in enumerate(trampolines)
    )
