# SPDX-License-Identifier: GPL-2.0-or-later
"""Machines of the Python API: on the demo hypervisor, and on small programs of ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.engine.assembler import assemble
from vmdbg import Machine

BUILD = Path(__file__).resolve().parents[2] / "examples/hypervisor/build"
IMAGE = BUILD / "hypervisor.elf"

ENDLESS = "loop: inc %rax; jmp loop"
WAITS = "cli; hlt"
ECHO = """
    xor %ax, %ax; mov %ax, %ds; mov %ax, %ss; mov $0x7000, %sp
    movw $handler, 0x30; movw $0, 0x32
    mov $0x11, %al; out %al, $0x20; mov $8, %al; out %al, $0x21; mov $4, %al; out %al, $0x21; mov $1, %al; out %al, $0x21
    mov $0xef, %al; out %al, $0x21
    mov $0x3f9, %dx; mov $1, %al; out %al, %dx
    mov $0x3fc, %dx; mov $8, %al; out %al, %dx
    sti
again: hlt; jmp again
handler:
    mov $0x3f8, %dx; in %dx, %al; inc %al; out %al, %dx
    mov $0x3fd, %dx; in %dx, %al; test $1, %al; jnz handler
    mov $0x20, %al; out %al, $0x20
    iret
"""
"""Sends back what it gets, each byte one higher."""


@pytest.fixture
def machine() -> Iterator[Machine]:
    """The demo, with symbols of its first guest."""
    if not IMAGE.exists():
        pytest.skip("the demo hypervisor is not built: no gcc and ld for x86-64")
    with Machine(IMAGE, memory="256M", symbols={2: BUILD / "guest64.elf"}) as made:
        yield made


@pytest.fixture(scope="session")
def whole() -> Iterator[Machine]:
    """The same at its end."""
    if not IMAGE.exists():
        pytest.skip("the demo hypervisor is not built: no gcc and ld for x86-64")
    with Machine(IMAGE, memory="256M", symbols={2: BUILD / "guest64.elf"}) as made:
        made.run()
        yield made


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Callable[..., Machine]]:
    """A machine that executes assembly, in long mode or another, at 0x8000."""
    made: list[Machine] = []

    def start(source: str, bits: int = 64, **options: object) -> Machine:
        path = tmp_path / f"program{len(made)}.bin"
        path.write_bytes(assemble(source, 0x8000, bits).code)
        modes = {16: "real", 32: "protected", 64: "long"}
        made.append(Machine.with_options(path, {"memory": "16M", "flat": 0x8000, "mode": modes[bits], **options}))
        return made[-1]

    yield start
    for one in made:
        one.close()
