"""SKINIT (APM2 15.27, APM3): the processor starts over in a block of code that is measured and kept from devices.

introspect/skinit.py has the state that it leaves, as a table.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

from introspect.skinit import SLB_SIZE, Block, Launch, state_after
from introspect.sources import Unreadable
from vmdbg.cpu.reset import init
from vmdbg.engine.state import CS, DS, ES, FS, GDTR, GS, IDTR, RAX, SS
from vmdbg.platform.msrs import VM_CR

if TYPE_CHECKING:
    from introspect.tpm import Algorithm
    from vmdbg.cpu.core import Cpu

_ENCODING = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", *(f"r{n}" for n in range(8, 16)))
_SEGMENTS = {"cs": CS, "ss": SS, "ds": DS, "es": ES, "fs": FS, "gs": GS}
_BASE = 0xFFFF0000


class Platform(Protocol):
    """What SKINIT does outside its processor."""

    def protect(self, base: int) -> None:
        """Keep devices from the block."""

    def handshake(self, cpu: Cpu) -> tuple[int, ...]:
        """The other processors that do not wait for a start-up IPI.  Where there is none, they all have GIF clear now, and the
        same bits of VM_CR set."""

    def measure(self, image: bytes) -> str:
        """Send the image to the TPM; why it was not measured, a key of `TPM_FAILED`."""

    def pcr17(self) -> Mapping[Algorithm, bytes]: ...

    def launched(self, launch: Launch) -> None:
        """It is done."""


def launch(cpu: Cpu, length: int) -> None:
    """The instruction, `length` bytes long, where nobody intercepts it."""
    s, platform = cpu.state, cpu.platform
    rip, guest, cr0 = s.rip, cpu.guest, cpu.cr0
    base = s.reg(RAX) & _BASE
    vm_cr = cpu.msrs.values[VM_CR]
    cpu.engine.retire(length)
    init(cpu)  # step 1; it ends guest mode as INIT does
    if guest is not None:
        cpu.observer.switched(cpu, guest, None)
    platform.protect(base)  # step 2: before the image is read, or a device could change what was measured
    running = platform.handshake(cpu)  # step 3
    data = _read(cpu, base)
    block = Block.decode(base, data)
    image = data[: block.measured]
    failed = "aps" if running else platform.measure(image)  # steps 4 and 5
    state = dict(state_after(block, cr0))
    state["vm_cr"] |= vm_cr
    _apply(cpu, state)  # steps 6 to 8
    platform.launched(Launch(
        cpu.engine.clock.now, cpu.index, rip, guest is not None, block, image, running, failed, platform.pcr17(), state
    ))  # fmt: skip


def _read(cpu: Cpu, base: int) -> bytes:
    """The block; ones where no memory is."""
    try:
        return cpu.ram.read(base, SLB_SIZE)
    except Unreadable as error:
        return error.readable_prefix.ljust(SLB_SIZE, b"\xff")


def _apply(cpu: Cpu, state: Mapping[str, int]) -> None:
    """Put the table's values into the processor."""
    s = cpu.state
    for number in (0, 2, 3, 4):
        s.set_cr(number, state[f"cr{number}"])
    s.efer = state["efer"]
    s.rflags = state["rflags"]
    for name, segment in _SEGMENTS.items():
        s.set_segment(segment, *(state[f"{name}.{part}"] for part in ("selector", "base", "limit", "attrib")))
    for name, table in (("gdtr", GDTR), ("idtr", IDTR)):
        s.set_table(table, state[f"{name}.base"], state[f"{name}.limit"])
    for number, name in enumerate(_ENCODING):
        s.set_reg(number, state[name])
    s.rip = state["rip"]
    cpu.msrs.values[VM_CR] = state["vm_cr"]
    cpu.set("vm_cr", state["vm_cr"])
    s.refresh(0)
    cpu.flush()
    cpu.gif = bool(state["gif"])

