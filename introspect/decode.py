"""Just enough decoding: length, opcode and operands of the instructions that a processor may stop before."""

from functools import lru_cache
from typing import NamedTuple

_SEGMENTS = {0x26: 0, 0x2E: 1, 0x36: 2, 0x3E: 3, 0x64: 4, 0x65: 5}
ES, CS, SS, DS, FS, GS = range(6)
TWO_BYTE = 0x0F00
STRING_IO = frozenset((0x6C, 0x6D, 0x6E, 0x6F))
"""Opcodes of INS and OUTS."""


class Instruction(NamedTuple):
    """`opcode` is 0x0F00 | the second byte for two-byte opcodes, 0x0F3800 or 0x0F3A00 | the third for longer ones; sizes in bits;
    `modrm` -1 if there is none."""

    length: int
    opcode: int
    modrm: int
    rex: int
    operand: int
    address: int
    segment: int | None
    rep: int
    immediate: int
    displacement: int
    sib: int

    @property
    def reg(self) -> int:
        """The register of ModRM.reg with REX.R."""
        return self.modrm >> 3 & 7 | (self.rex & 4) << 1

    @property
    def rm(self) -> int:
        """The register of ModRM.rm with REX.B."""
        return self.modrm & 7 | (self.rex & 1) << 3

    @property
    def memory(self) -> bool:
        return self.modrm >= 0 and self.modrm < 0xC0


class Undecodable(Exception):
    """More bytes are needed than there are."""


_NO_MODRM_TWO = frozenset((0x05, 0x06, 0x07, 0x08, 0x09, 0x0B, 0x30, 0x0E, 0x31, 0x32, 0x33, 0x34, 0x35, 0x37, 0x77, 0xA0, 0xA1,
                           0xA2, 0xA8, 0xA9, 0xAA))  # fmt: skip
_NO_MODRM_ONE = frozenset((
    0x27, 0x2F, 0x37, 0x3F, 0x06, 0x07, 0x0E, 0x16, 0x17, 0x1E, 0x1F, *range(0x40, 0x62), *range(0x6C, 0x80), *range(0x90, 0xA8),
    *range(0xAA, 0xB0), *range(0xB0, 0xC0), 0x68, 0x6A, 0xC2, 0xC3, 0xC8, 0xC9, 0xCA, 0xCB, 0xCC, 0xCD, 0xCE, 0xCF, 0xD4, 0xD5,
    0xD6, 0xD7, *range(0xE0, 0xF0), 0xF1, 0xF4, 0xF5, *range(0xF8, 0xFE), 0xA8, 0xA9, 0x9A,
    *(row + column for row in range(0, 0x40, 8) for column in (4, 5)),
))  # fmt: skip
_IMM8_ONE = frozenset((0x6A, 0x6B, *range(0x70, 0x84), 0xC0, 0xC1, 0xC6, 0xCD, 0xD4, 0xD5, *range(0xE0, 0xE8), 0xEB, 0xA8,
                       *range(0xB0, 0xB8), *range(4, 0x40, 8))) - {0x81}  # fmt: skip
_IMMZ_ONE = frozenset((0x68, 0x69, 0x81, 0xC7, 0xE8, 0xE9, 0xA9, *range(5, 0x40, 8)))
_IMM8_TWO = frozenset((0x70, 0x71, 0x72, 0x73, 0xA4, 0xAC, 0xBA, 0xC2, 0xC4, 0xC5, 0xC6))


@lru_cache(4096)  # the same few instructions stop the engine again and again
def decode(code: bytes, bits: int) -> Instruction:
    """Decode one instruction from `code` in a `bits`-bit (16, 32, 64) code segment.

    Raises `Undecodable` if `code` ends before the instruction does, or at 15 bytes.
    """
    at = rep = rex = 0
    segment: int | None = None
    other_operand = other_address = False
    try:
        while True:
            byte = code[at]
            at += 1
            if byte in _SEGMENTS:
                segment = _SEGMENTS[byte]
            elif byte == 0x66:
                other_operand = True
            elif byte == 0x67:
                other_address = True
            elif byte in (0xF2, 0xF3):
                rep = byte
            elif bits == 64 and 0x40 <= byte <= 0x4F:
                rex = byte
                continue
            elif byte != 0xF0:
                break
            rex = 0  # only a REX right before the opcode counts
        opcode = byte
        if byte == 0x0F:
            opcode = TWO_BYTE | code[at]
            at += 1
            if opcode in (0x0F38, 0x0F3A):
                opcode = opcode << 8 | code[at]
                at += 1
        if bits == 64:
            operand = 64 if rex & 8 else 16 if other_operand else 32
            address = 32 if other_address else 64
        else:
            operand = (16 if bits == 32 else 32) if other_operand else bits
            address = (16 if bits == 32 else 32) if other_address else bits
        modrm, sib, displacement = -1, -1, 0
        three = opcode > 0xFFFF
        two = opcode >= TWO_BYTE and not three
        low = opcode & 0xFF
        has_modrm = three or (low not in _NO_MODRM_TWO and not 0x80 <= low <= 0x8F and not 0xC8 <= low <= 0xCF) if two \
            else low not in _NO_MODRM_ONE  # fmt: skip
        if has_modrm:
            modrm = code[at]
            at += 1
            mod, rm = modrm >> 6, modrm & 7
            # MOV to and from CR and DR read the byte as registers whatever MOD says (APM3 MOV CRn).
            if two and 0x20 <= low <= 0x23:
                modrm |= 0xC0
            elif mod != 3:
                if address == 16:
                    size = 2 if mod == 2 or (mod == 0 and rm == 6) else mod
                else:
                    if rm == 4:
                        sib = code[at]
                        at += 1
                    size = (0, 1, 4)[mod]
                    if mod == 0 and (rm == 5 or (sib >= 0 and sib & 7 == 5)):
                        size = 4
                displacement = int.from_bytes(code[at : at + size], "little", signed=True)
                at += size
        size = 0
        if three:
            size = opcode >> 8 == 0x0F3A
        elif two:
            size = 1 if low in _IMM8_TWO else min(operand, 32) // 8 if 0x80 <= low <= 0x8F else 0
        elif low in _IMM8_ONE:
            size = 1
        elif low in _IMMZ_ONE:
            size = min(operand, 32) // 8
        elif 0xB8 <= low <= 0xBF:
            size = operand // 8
        elif 0xA0 <= low <= 0xA3:
            size = address // 8
        elif low in (0xC2, 0xCA):
            size = 2
        elif low == 0xC8:
            size = 3
        elif low in (0x9A, 0xEA):
            size = operand // 8 + 2
        elif low in (0xF6, 0xF7) and modrm >> 3 & 7 < 2:
            size = 1 if low == 0xF6 else min(operand, 32) // 8
        immediate = int.from_bytes(code[at : at + size], "little")
        at += size
    except IndexError:
        raise Undecodable(bytes(code).hex()) from None
    if at > len(code) or at > 15:
        raise Undecodable(bytes(code).hex())
    return Instruction(at, opcode, modrm, rex, operand, address, segment, rep, immediate, displacement, sib)


_JUMPS = frozenset((0x9A, 0xC2, 0xC3, 0xCA, 0xCB, 0xCF, 0xE8, 0xE9, 0xEA, 0xEB, 0x0F07, 0x0F35))
"""Near and far JMP, CALL, RET, IRET; SYSRET, SYSEXIT."""
_CONDITIONAL = frozenset((*range(0x70, 0x80), *range(0xE0, 0xE4), *range(0x0F80, 0x0F90)))


def has_branched(insn: Instruction, before: int, after: int, bits: int) -> bool:
    """Whether the instruction that was at RIP `before` and led to `after` is a branch that was taken."""
    if insn.opcode in _JUMPS or (insn.opcode == 0xFF and 2 <= insn.modrm >> 3 & 7 <= 5):
        return True
    return insn.opcode in _CONDITIONAL and bool((after - before - insn.length) & ((1 << bits) - 1))


def effective_address(insn: Instruction, regs: list[int], next_rip: int, bits: int) -> tuple[int, int]:
    """(segment, offset) of the memory operand; `regs` are the sixteen registers in encoding order."""
    mod, rm = insn.modrm >> 6, insn.modrm & 7
    segment = DS
    if insn.address == 16:
        base: tuple[int, ...] = ((3, 6), (3, 7), (5, 6), (5, 7), (6,), (7,), (5,), (3,))[rm]
        if mod == 0 and rm == 6:
            base = ()
        elif rm in (2, 3, 6):
            segment = SS
        offset = (sum(regs[r] for r in base) + insn.displacement) & 0xFFFF
    else:
        offset = insn.displacement
        if rm == 4:
            index = insn.sib >> 3 & 7 | (insn.rex & 2) << 2
            if index != 4:
                offset += regs[index] << (insn.sib >> 6)
            if not (mod == 0 and insn.sib & 7 == 5):
                offset += regs[insn.sib & 7 | (insn.rex & 1) << 3]
                if insn.sib & 7 in (4, 5) and not insn.rex & 1:
                    segment = SS
            elif mod:
                segment = SS
        elif mod == 0 and rm == 5:
            if bits == 64:
                offset += next_rip
        else:
            offset += regs[rm | (insn.rex & 1) << 3]
            if rm == 5 and not insn.rex & 1:
                segment = SS
        offset &= (1 << insn.address) - 1
    return insn.segment if insn.segment is not None else segment, offset
