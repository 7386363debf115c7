"""Lengths and operands of the instructions that the processor layer decodes, against a real disassembler."""

from __future__ import annotations

from random import Random

import pytest

from introspect.decode import Undecodable, decode
from introspect.operands import disassembler

# Opcode bytes; `m` stands for a ModRM byte with what follows it, `r` for one that names registers.
PLAIN = ("f4", "0fa2", "0f30", "0f32", "0f31", "0f33", "0f06", "0f08", "0f09", "cc", "f1", "0f05", "0f34", "ec", "ed",
"ee", "ef",
         "6c", "6d", "6e", "6f", "0f01d8", "0f01d9", "0f01da", "0f01db", "0f01dc", "0f01dd", "0f01df",
         "0f01f9")  # fmt: skip
IMMEDIATE = ("cd", "e4", "e5", "e6", "e7")
REGISTERS = ("0f20", "0f22", "0f21", "0f23")
MEMORY = {"0f01": (0, 1, 2, 3, 4, 6, 7), "0f00": (0, 1, 2, 3)}
PREFIXES = (0x66, 0x67, 0x2E, 0x36, 0x3E, 0x26, 0x64, 0x65)


def sample(random: Random, bits: int) -> bytes:
    """One instruction with prefixes, and bytes behind it."""
    code = bytes(random.choice(PREFIXES) for _ in range(random.choice((0, 0, 1, 2))))
    if bits == 64 and random.random() < 0.4:
        code += bytes([random.randrange(0x40, 0x50)])
    kind = random.randrange(4)
    if kind == 0:
        code += bytes.fromhex(random.choice(PLAIN))
    elif kind == 1:
        code += bytes.fromhex(random.choice(IMMEDIATE)) + random.randbytes(1)
    elif kind == 2:
        opcode = random.choice(REGISTERS)
        control = random.choice((0, 2, 3, 4)) if opcode in ("0f20", "0f22") else random.choice((0, 1, 2, 3, 6, 7))
        code = bytes.fromhex(opcode) + bytes([0xC0 | control << 3 | random.randrange(8)])
    else:
        opcode, extensions = random.choice(list(MEMORY.items()))
        modrm = random.randrange(3) << 6 | random.choice(extensions) << 3 | random.randrange(8)
        code += bytes.fromhex(opcode) + bytes([modrm])
    return (code + random.randbytes(15))[:15]


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_lengths(bits: int) -> None:
    random = Random(bits)
    seen = 0
    for _ in range(3000):
        code = sample(random, bits)
        insn = next(disassembler(bits).disasm(code, 0x1000, 1), None)
        if insn is None:
            continue  # the disassembler refuses a prefix
        seen += 1
        assert decode(code, bits).length == insn.size, f"{code.hex()}: {insn.mnemonic} {insn.op_str}"
    assert seen > 2000


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_any_bytes_decode_or_say_that_they_do_not(bits: int) -> None:
    random = Random(bits)
    for _ in range(5000):
        code = random.randbytes(random.randrange(16))
        try:
            insn = decode(code, bits)
        except Undecodable:
            continue
        assert 0 < insn.length <= 15
        assert insn.length <= len(code)
