"""Every command on a dump whose structures are damaged: an answer, or a refusal in words, in bounded time."""

from __future__ import annotations

import json
import random
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from introspect.commands import CommandError, default_registry
from introspect.dump_context import DumpContext
from introspect.sources import BytesMemory, Dump
from introspect.sources.notes import Annotations

from .machines import CODE, HSAVE, STATE, VMCB_A, VMCB_B, VMCB_MADE, build

PLACES = (
    *range(0x10000, 0x38000, 0x1000), *(0x100000 + at for at in range(0x10000, 0x28000, 0x1000)), HSAVE, VMCB_A, VMCB_B, VMCB_MADE,
)  # fmt: skip
VALUES = (0, 7, 1, 0x87, 2**64 - 1, 0x10007, 0x20007, 0x23007, 0x110007, 1 << 63 | 0x10007, 0x3FFFFF007, 1 << 51 | 7)
LINES = (
    "guests --scan", "guests", "vmcb", "vmcb 2", "vmcb 3 inner", "vmrun why 2", "intercepts 3", "iopm 2", "msrpm 2", "avic 2", "exits",
    "walk 2:0x1000", "walk 3:0x1000 --access w", "walk host:0x1000", "walk 0x1000 --vmcb 0x3000", "npt 2", "npt 3", "pt host", "pt 2",
    "pt 3", "who-maps 0x101000", "audit isolation", "leak check 2", "save core PATH", "save core PATH --guest 2",
    "save core PATH --guest 3", "dump PATH 2:0x1000 0x3000 --holes", "regs 2", "idt 2", "gdt 2", "tss 2", "disasm 2:rip", "stack 2", "bt 2",
)  # fmt: skip


def damaged(seed: int, changes: int) -> BytesMemory:
    chance, memory = random.Random(seed), build()
    for _ in range(changes):
        at = chance.choice(PLACES) + 8 * (chance.randrange(512) if chance.random() < 0.5 else chance.randrange(4))
        value = chance.choice((*VALUES, chance.getrandbits(64), memory.read_u64(chance.choice(PLACES))))
        memory.write_u64(at, value)
    return memory


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2**32), st.integers(1, 40))
def test_every_command_answers(tmp_path: Path, seed: int, changes: int) -> None:
    registers = {**STATE, "cr3": 0x10000, "rip": CODE, "rsp": 0x3000}
    context = DumpContext(Dump("bytes", "raw", damaged(seed, changes), Annotations((registers,))))
    registry = default_registry()
    for line in LINES:
        with suppress(CommandError):
            result = registry.run_line(context, line.replace("PATH", str(tmp_path / "file")))
            assert isinstance(result.text(), str)
            json.dumps(result.json())


@pytest.mark.parametrize("line", LINES[:23])
def test_the_lines_work_on_what_is_whole(tmp_path: Path, line: str) -> None:
    """So that the test above tests something."""
    context = DumpContext(Dump("bytes", "raw", build(), Annotations(({**STATE, "cr3": 0x10000},))))
    registry = default_registry()
    registry.run_line(context, "guests --scan")
    context.select(2)
    assert registry.run_line(context, line).text()
