"""Address line 20: while it is off, bit 20 of every physical address reads as 0."""

from __future__ import annotations

import pytest

from tests.engine.rig import Rig
from tests.svm.hypervisor import HLT, Hypervisor
from vmdbg.engine.state import RBX, RDX

OFF = "mov $0xdd, %al; out %al, $0x64; xor %al, %al; out %al, $0x92"
ON = {"port": "mov $2, %al; out %al, $0x92", "keyboard": "mov $0xdf, %al; out %al, $0x64"}
HIGH = "mov $0xffff, %cx; mov %cx, %fs"


def test_off_in_real_mode(python: bool) -> None:
    """The last 64 KiB wrap to 0 as on an 8086: loads, stores, and stores into what was just read or executed."""
    rig = Rig(
        f"{HIGH}; mov %fs:0x5010, %bx; {OFF}; mov %fs:0x5010, %dx; movw $0x1234, %fs:0x5012; hlt", "real", python=python
    )
    rig.ram.write(0x5000, b"\x11\x11")
    rig.ram.write(0x105000, b"\x22\x22")
    rig.run()
    assert (rig.reg(RBX), rig.reg(RDX)) == (0x2222, 0x1111)
    assert (rig.ram.read(0x5002, 2), rig.ram.read(0x105002, 2)) == (b"\x34\x12", bytes(2))


@pytest.mark.parametrize("source", ON)
def test_either_source_opens_it(source: str, python: bool) -> None:
    rig = Rig(f"{HIGH}; {OFF}; {ON[source]}; mov %fs:0x5010, %bx; hlt", "real", python=python)
    rig.ram.write(0x105000, b"\x22\x22")
    rig.run()
    assert rig.reg(RBX) == 0x2222
    rig = Rig(f"{HIGH}; xor %al, %al; out %al, $0x92; mov %fs:0x5010, %bx; hlt", "real", python=python)
    rig.ram.write(0x105000, b"\x22\x22")
    rig.run()
    assert rig.reg(RBX) == 0x2222  # the keyboard controller's is still on


def test_code_and_the_processors_own_accesses(python: bool) -> None:
    rig = Rig(f"{OFF}; mov $0x109000, %ecx; jmp *%ecx", "protected32", python=python)
    rig.state.set_reg(2, 0x80)
    rig.state.set_reg(7, 0x105000)
    rig.ram.write(0x9000, bytes.fromhex("6c c6 05 09 90 10 00 43 bb 00 00 00 00 f4"))  # ins; it writes mov's operand; mov; hlt
    rig.ram.write(0x5000, b"\x55")
    rig.run()
    assert rig.reg(RBX) == 0x43
    assert (rig.ram.read(0x5000, 1) != b"\x55", rig.ram.read(0x105000, 1)) == (True, b"\0")


def test_below_paging_and_nested_paging(python: bool) -> None:
    rig = Rig(f"{OFF}; mov 0x105000, %ebx; hlt", "long", python=python)
    rig.ram.write(0x5000, b"\x11")
    rig.run()
    assert rig.reg(RBX) & 0xFF == 0x11
    h = Hypervisor("mov 0x105000, %ebx; hlt", "long", python=python, host=f"push %rax; {OFF}; pop %rax; vmrun; hlt")
    h.guest_write(0x5000, b"\x11")
    h.guest_write(0x105000, b"\x22")
    assert h.enter() == HLT
    assert h.state.reg(RBX) & 0xFF == 0x11
