"""Pages that are written and executed in turn, time and again: what is executed is always what was stored last."""

from __future__ import annotations

import pytest

from tests.engine.assembler import assemble
from tests.engine.rig import CODE, HANDLERS, NX, USER_CODE64, USER_DATA, USER_STACK, Rig, U
from vmdbg.engine.physical import MIXED
from vmdbg.engine.state import RCX

PAGE, ALIAS = 0x181000, 0x190000
ROUNDS = 30
SOURCE = f"movl ${ROUNDS}, %ebx; again: movl $0, %eax; addl %eax, %ecx; int $0x80; dec %ebx; jnz again; int $0x81"
"""Adds up what its handler has counted in it."""


@pytest.mark.parametrize("smep", [False, True])
@pytest.mark.parametrize("alias", [False, True])
def test_a_kernel_patches_its_user(alias: bool, smep: bool, python: bool) -> None:
    """Through an alias without execution, or under SMEP, the page is not executable for who stores."""
    program = assemble(SOURCE, PAGE, 64)
    immediate = program.labels["again"] + 1
    r = Rig(
        f"push ${USER_DATA}; push ${USER_STACK}; push $2; push ${USER_CODE64}; push ${PAGE}; iretq", "long", python=python
    )
    r.ram.write(PAGE, program.code)
    r.ram.write_u64(r.entry(ALIAS), PAGE | 3 | NX)
    for vector in (0x80, 0x81):
        r.gate(vector, dpl=3)
    r.handler(0x80, f"incl {immediate + ALIAS - PAGE if alias else immediate}; iretq")
    if smep:
        r.change(CODE, drop=U)
        r.change(HANDLERS, drop=U)
        r.state.set_cr(4, r.state.cr(4) | 1 << 20)
        r.state.refresh()
    r.run()
    assert r.handled == 0x81
    assert r.reg(RCX) & 0xFFFFFFFF == sum(range(ROUNDS))
    assert r.ram.pages[PAGE >> 12] & MIXED
