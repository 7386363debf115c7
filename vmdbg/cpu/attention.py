"""Instructions that the engine leaves to us to look at first (see vmdbg/engine/attention.py): what may raise #AC or #XF.

While alignment is checked that is every one, while MXCSR has an exception unmasked those of SSE arithmetic; and loads of such
an MXCSR.  What passes is executed by the engine.
"""

from __future__ import annotations

from typing import NamedTuple

from vmdbg.engine import layout
from vmdbg.engine.state import HF_LET, HF_XM, MXCSR_RESERVED, RAX

from . import alignment, simd
from .bits import CR0_TS
from .core import Cpu
from .faults import GP, UD, XF, CpuFault
from .floats import unmasked
from .operands import disassemble, memory_operands

CR0_EM, CR4_OSFXSR, CR4_OSXMMEXCPT = 1 << 2, 1 << 9, 1 << 10
XCR0_SSE, XCR0_AVX = 1 << 1, 1 << 2
_FXRSTOR, _LDMXCSR, _XRSTOR = 1, 2, 5
"""ModRM.reg of opcode 0F AE."""
_MXCSR_AT = {_FXRSTOR: 24, _LDMXCSR: 0, _XRSTOR: 24}
"""Where MXCSR is in their operands."""
_MMX = layout.FPU + 24


class Encoding(NamedTuple):
    """Of an instruction behind 0F: `opcode` as `simd.FORMS` has it, the prefix that belongs to it, ModRM and REX."""

    opcode: int
    prefix: int
    modrm: int
    rex: int

    @property
    def memory(self) -> bool:
        return self.modrm < 0xC0

    @property
    def loads_mxcsr(self) -> bool:
        return self.opcode == 0x0FAE and not self.prefix and self.memory and self.modrm >> 3 & 7 in _MXCSR_AT


def encoding(code: bytes, bits: int) -> Encoding | None:
    """None for what is no instruction behind 0F, and for one with LOCK.  What is not all there has registers for operands."""
    prefix = rex = 0
    for at, byte in enumerate(code):
        if byte in (simd.REPZ, simd.REPNZ):
            prefix = byte
        elif byte == simd.DATA:
            prefix = prefix or byte
        elif bits == 64 and byte & 0xF0 == 0x40:
            rex = byte
            continue
        elif byte == 0x0F:
            first, second, third = code[at + 1 : at + 4].ljust(3, b"\xff")
            opcode, modrm = (0x3A00 | second, third) if first == 0x3A else (0x0F00 | first, second)
            return Encoding(opcode, prefix, modrm, rex)
        elif byte not in (0x26, 0x2E, 0x36, 0x3E, 0x64, 0x65, 0x67):
            break
        rex = 0
    return None


def wanted(cpu: Cpu) -> bool:
    """Whether the #UD at RIP is such a stop; it may be a real one all the same."""
    s = cpu.state
    if s.hflags & HF_LET:
        return False
    if s.hflags & HF_XM or alignment.checked(cpu):
        return True
    found = encoding(cpu.code(), cpu.bits)
    return found is not None and found.loads_mxcsr


def check(cpu: Cpu) -> int:
    """Raise what the instruction at RIP is to raise in place of its execution; else the flags of MXCSR that it sets."""
    if alignment.checked(cpu):
        alignment.check(cpu)
    found, s = encoding(cpu.code(), cpu.bits), cpu.state
    if found is None or s.cr(0) & (CR0_EM | CR0_TS) or not s.cr(4) & CR4_OSFXSR:
        return 0  # #UD or #NM, by the engine
    if found.loads_mxcsr:
        _check_mxcsr(cpu, found)
    return _check_simd(cpu, found) if s.hflags & HF_XM else 0


def _check_mxcsr(cpu: Cpu, found: Encoding) -> None:
    """An MXCSR with reserved bits is #GP (APM4 LDMXCSR)."""
    s, kind = cpu.state, found.modrm >> 3 & 7
    if kind == _XRSTOR and not s.reg(RAX) & s.xcr0 & (XCR0_SSE | XCR0_AVX):
        return
    data = _operand(cpu, 4, _MXCSR_AT[kind])
    if data is not None and data & MXCSR_RESERVED:
        raise CpuFault(GP, 0)


def _check_simd(cpu: Cpu, found: Encoding) -> int:
    """#XF, or #UD where the operating system has not asked for it, with the flags in MXCSR (APM2 8.2.20)."""
    s = cpu.state
    form = (simd.WIDE if found.rex & 8 else {}).get(found[:2]) or simd.FORMS.get(found[:2])
    if form is None:
        return 0
    insn = disassemble(cpu)
    if insn is None:
        return 0
    register = found.modrm & 7 | (found.rex & 1) << 3
    if found.memory:
        second = _operand(cpu, form.size)
        if second is None:
            return 0
    elif form.mmx:
        at = _MMX + 16 * (found.modrm & 7)
        second = int.from_bytes(s.bytes[at : at + 8], "little")
    elif found.opcode == 0x0F2A:
        second = s.reg(register)
    else:
        second = s.xmm(register)
    flags = simd.raised(form, s.xmm(found.modrm >> 3 & 7 | (found.rex & 4) << 1), second, s.mxcsr, insn.bytes[-1])
    if flags & unmasked(s.mxcsr):
        s.mxcsr |= flags
        raise CpuFault(XF if s.cr(4) & CR4_OSXMMEXCPT else UD)
    return flags


def _operand(cpu: Cpu, size: int, at: int = 0) -> int | None:
    """The memory operand of the instruction at RIP, or a part of it; None for one that is a device's.

    Raises what reading it raises: #GP, too, where 16 bytes are not aligned (APM1 4.3.2).
    """
    for _, segment, offset in memory_operands(cpu, disassemble(cpu)):
        address = cpu.segment_address(segment, offset + at, size)
        if size == 16 and address & 15:
            raise CpuFault(GP, 0)
        pieces = cpu.pieces(address, size, write=False, user=cpu.state.cpl == 3)
        if all(cpu.ram.contains(spa, length) for spa, length in pieces):
            return int.from_bytes(cpu.load(pieces), "little")
    return None
