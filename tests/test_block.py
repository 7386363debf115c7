"""The register block that is read at once is the one that is read register by register."""

from __future__ import annotations

from random import Random

import pytest

from gdbstub.description import x86
from tests.engine.rig import MODES, Mode, Rig
from vmdbg.block import Block
from vmdbg.contexts import LiveContext
from vmdbg.engine import layout


@pytest.mark.parametrize("architecture", ["i386:x86-64", "i386", "i8086"])
@pytest.mark.parametrize("mode", MODES)
def test_the_block_is_its_registers(mode: Mode, architecture: str) -> None:
    rig = Rig("nop", mode)
    context, random = LiveContext(rig.cpu), Random(mode)
    description = x86(architecture)
    block = Block(description)
    for _ in range(3):
        for name in ("rax", "rsp", "r9", "cr2", "k_gs_base"):
            assert context.write(name, random.getrandbits(64))
        rig.state.bytes[layout.FPU : layout.XMM + 1024] = random.randbytes(layout.XMM + 1024 - layout.FPU)
        read = block.read(context)
        assert len(read) == description.block_size
        for register, at in zip(description.registers, description.offsets, strict=False):
            value = (context.read(register.name) or 0) & ((1 << register.bits) - 1)
            assert int.from_bytes(read[at : at + register.bits // 8], "little") == value, register.name
