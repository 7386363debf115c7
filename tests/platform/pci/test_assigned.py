"""A device in the hands of a guest: its BAR through the nested table, its DMA, and who must not notice."""

from __future__ import annotations

from typing import NoReturn

import pytest

from introspect.commands import CommandError
from tests.platform.pci.programs import BAR, MACROS
from tests.svm.hypervisor import GUEST, VMMCALL, Hypervisor
from vmdbg.debugger import Debugger
from vmdbg.platform.pci.edu import Edu
from vmdbg.platform.pci.function import Function

DRIVER = f"""{MACROS}
    .equ own, 0x180000
    movl $own, %ebx
    movl (%rbx), %eax; movl %eax, 0x100000
    movl $0x12345678, 4(%rbx); movl 4(%rbx), %eax; movl %eax, 0x100004
    movl $0x55667788, 0x100010
    movl ${GUEST + 0x100010:#x}, 0x80(%rbx); movl $0x40000, 0x88(%rbx); movl $8, 0x90(%rbx); movl $1, 0x98(%rbx)
    1: testl $1, 0x98(%rbx); jnz 1b
    movl $0x40000, 0x80(%rbx); movl ${GUEST + 0x100020:#x}, 0x88(%rbx); movl $3, 0x98(%rbx)
    1: testl $1, 0x98(%rbx); jnz 1b
    vmmcall"""


@pytest.mark.parametrize("strict", [False, True], ids=["coherent", "strict"])
@pytest.mark.parametrize("python", [False, True], ids=["native", "python"])
def test_a_guest_drives_a_device(python: bool, strict: bool) -> None:
    rig = Hypervisor(DRIVER, python=python, strict_tlb=strict, devices=("edu,slot=03.0",))
    rig.ram.write_u64(rig.nested_entry(0x180000), BAR | 7)
    rig.machine.chipset.root.functions[1].write_config(4, 2, 6)
    assert rig.enter(10_000_000) == VMMCALL
    assert [rig.guest_read(at, 4) for at in (0x100000, 0x100004, 0x100020)] == [0x010000ED, 0xEDCBA987, 0x55667788]


def test_debuggers_do_not_read_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a BAR nor MMCONFIG."""
    rig = Hypervisor("vmmcall", devices=("edu,slot=03.0",))
    commands = Debugger(rig.machine).monitor_commands

    def read(self: Function, bar: int, offset: int, size: int) -> NoReturn:
        raise AssertionError("a debugger has read a register")

    monkeypatch.setattr(Edu, "read_bar", read)
    for address in (BAR, 0xE0018000):
        assert rig.ram.extent(address, 4) == 0
        with pytest.raises(CommandError, match="devices are not read"):
            commands.registry.answer(commands, f"x/4xb spa:{address:#x}")
