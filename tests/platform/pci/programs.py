"""What test programs for PCI begin with: macros, and the addresses that firmware leaves."""

from __future__ import annotations

from tests.engine.rig import MEMORY, Mode, Rig
from vmdbg.platform.ioapic import IOAPIC_BASE
from vmdbg.platform.pci.root import ECAM

RESULTS = 0x200000
"""Where programs leave what they found."""
EDU = 3 << 3
"""In slot 3."""
BAR = 0xC0000000

MACROS = f"""
    .equ results, {RESULTS:#x}
    .equ ecam, {ECAM:#x}
    .equ ioapic, {IOAPIC_BASE:#x}
    .equ lapic, 0xfee00000
    .equ bar, {BAR:#x}
    .macro config_read devfn, offset
        movl $0x80000000 | (\\devfn << 8) | \\offset, %eax
        movw $0xcf8, %dx
        outl %eax, %dx
        movw $0xcfc, %dx
        inl %dx, %eax
    .endm
    .macro config_write devfn, offset, value
        movl $0x80000000 | (\\devfn << 8) | \\offset, %eax
        movw $0xcf8, %dx
        outl %eax, %dx
        movl $\\value, %eax
        movw $0xcfc, %dx
        outl %eax, %dx
    .endm
    .macro poke address, value
        movl $\\address, %ebx
        movl $\\value, (%rbx)
    .endm
    .macro keep index
        movl %eax, results + 4 * \\index
    .endm
    .macro edu_dma source, destination, count, command
        poke bar+0x80, \\source
        poke bar+0x88, \\destination
        poke bar+0x90, \\count
        poke bar+0x98, \\command
    .endm
    .macro edu_wait
    7:  movl $bar, %ebx
        testl $1, 0x98(%rbx)
        jnz 7b
    .endm
"""
MASTER = 0x7
"""I/O, memory and bus mastering in the command register."""


class PciRig(Rig):
    """A machine with devices, and a program that begins with `MACROS`."""

    def __init__(self, source: str, *devices: str, mode: Mode = "long", python: bool = False, memory: int = MEMORY) -> None:
        super().__init__(MACROS + source, mode, devices=devices, python=python, memory=memory)

    def result(self, index: int) -> int:
        return self.ram.read_u32(RESULTS + 4 * index)
