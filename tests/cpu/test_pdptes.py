"""PAE mode keeps the four PDPTEs that a load of CR3 read (APM2 5.3.2); under nested paging each walk reads them."""

from __future__ import annotations

import pytest

from tests.cpu.test_tasks import ENTRY, new_task
from tests.engine.rig import CODE, TABLES, TSS, Rig
from tests.svm.hypervisor import VMMCALL, Hypervisor
from vmdbg.engine.state import RBX, RDI

PDPT = TABLES + 0x1000
LOADS = {
    "cr3": "mov %cr3, %eax; mov %eax, %cr3",
    "cr0": "mov %cr0, %eax; btr $31, %eax; mov %eax, %cr0; bts $31, %eax; mov %eax, %cr0",
    "cr4": "mov %cr4, %eax; xor $0x80, %eax; mov %eax, %cr4",
}
READ = "mov 0x40005000, %ebx"
"""By the second PDPTE, to 1 GiB + 0x5000: no memory there, unless the entry leads to the first directory."""
CHANGE = "mov 0x41000, %ecx; mov %ecx, 0x41008"
FLUSH = "mov %cr4, %eax; mov %eax, %cr4; invlpg 0x40005000"
"""CR4 as it was loads none."""


def rig(source: str, python: bool) -> Rig:
    made = Rig(source, "pae", python=python)
    made.ram.write(0x5000, b"\x11\x22\x33\x44")
    return made


@pytest.mark.parametrize("how", LOADS)
def test_they_are_those_of_the_last_load(how: str, python: bool) -> None:
    r = rig(f"{LOADS[how]}; {CHANGE}; {FLUSH}; {READ}; mov %ebx, %edi; {LOADS[how]}; {READ}; hlt", python)
    r.run()
    assert (r.handled, r.reg(RDI), r.reg(RBX)) == (None, 0xFFFFFFFF, 0x44332211)


def test_software_reads_its_own_cr3(python: bool) -> None:
    r = rig("mov %cr3, %eax; mov %eax, %cr3; mov %cr3, %ebx; hlt", python)
    r.run()
    assert (r.reg(RBX), r.cpu.paging.cr3) == (PDPT, PDPT)
    assert r.cpu.paging.pdptes == tuple(r.ram.read_u64(PDPT + 8 * n) for n in range(4))


def test_the_processors_own_walks_use_them(python: bool) -> None:
    """The stack is mapped by an entry that is gone from memory since."""
    r = rig(f"{LOADS['cr3']}; movl $0, 0x41000; int $0x40", python)
    r.run()
    assert r.handled == 0x40


def test_other_modes_keep_none(python: bool) -> None:
    r = rig("mov %cr3, %eax; mov %eax, %cr3; mov %cr0, %eax; btr $31, %eax; mov %eax, %cr0; hlt", python)
    r.run()
    assert r.cpu.paging.pdptes is None
    assert (r.state.root, r.state.cr(3)) == (None, PDPT)
    for mode in ("long", "legacy"):
        other = Rig("mov %cr3, %rax; mov %rax, %cr3; hlt" if mode == "long" else "mov %cr3, %eax; mov %eax, %cr3; hlt", mode)
        other.run()
        assert other.state.root is None


def test_each_processor_has_its_own(python: bool) -> None:
    r = Rig("mov %cr3, %eax; mov %eax, %cr3; hlt", "pae", python=python, cpus=2)
    r.run()
    physical = r.machine.engine.physical
    assert physical.hold_pdptes(1, (0, 0, 0, 0)) != r.state.root
    r.state.rip = CODE
    r.cpu.halted = False
    r.run()
    assert r.handled is None


def test_over_a_task_switch_of_the_engine(python: bool) -> None:
    """It loads CR3: the engine reads the new ones from memory."""
    r = rig(f"{LOADS['cr3']}; ljmp $0x88, $0", python)
    new_task(r, cr3=PDPT)
    r.ram.write_u32(TSS + 0x1C, PDPT)
    r.run()
    assert (r.handled, r.rip, r.state.cr(3)) == (None, ENTRY + 2, PDPT)


@pytest.mark.parametrize("np", [False, True])
def test_in_a_guest(np: bool, python: bool) -> None:
    """VMRUN loads them where paging is not nested; nested, there are none to keep."""
    h = Hypervisor(f"{CHANGE}; invlpg 0x40005000; {READ}; vmmcall", "pae", python=python, np=np)
    h.guest_write(0x5000, b"\x11\x22\x33\x44")
    assert h.enter() == VMMCALL
    assert h.state.reg(RBX) == (0x44332211 if np else 0xFFFFFFFF)
    assert h["cr3"] == PDPT
    assert h.again(rip=CODE) == VMMCALL
    assert h.state.reg(RBX) == 0x44332211
    assert h.state.root is None
