"""System-management mode: SMIs, the save area, RSM (APM2 chapter 10)."""

from __future__ import annotations

from random import Random

import pytest

from introspect.smm import SMM_IO, SMM_SAVE, SMM_SAVE_OFFSET
from tests.engine.assembler import assemble
from tests.engine.interrupts import IF, interrupt
from tests.engine.rig import CODE, DATA, GDT, MODES, TSS, TSS_SELECTOR, Mode, Rig
from vmdbg.engine.state import CS, DS, GDTR, SS, TR
from vmdbg.machine import Event
from vmdbg.platform.apicbus import DeliveryMode
from vmdbg.platform.msrs import SMM_BASE

SMBASE = 0x30000
ENTRY = 0x8000
SAVE = SMBASE + SMM_SAVE_OFFSET
SHOW = f"movl ${SAVE}, %ebx"
"""A handler's first instruction where it looks at the save area."""


def handler(rig: Rig, source: str, base: int = SMBASE) -> None:
    """What an SMI runs: 16-bit code with flat segments."""
    rig.ram.write(base + ENTRY, assemble(source, ENTRY, 16).code)


def saved(rig: Rig, base: int = SMBASE) -> dict[str, int]:
    return SMM_SAVE.decode(rig.ram.read(base + SMM_SAVE_OFFSET, SMM_SAVE.size))


def everything(rig: Rig) -> dict[str, object]:
    s = rig.state
    return {
        "registers": [s.reg(n) for n in range(16)], "rip": s.rip, "rflags": s.rflags, "cr": [s.cr(n) for n in (0, 2, 3, 4)],
        "efer": s.efer, "dr": list(rig.cpu.dr), "hflags": s.hflags, "nmi": s.nmi_blocked, "halted": rig.cpu.halted,
        "segments": [(s.selector(n), s.base(n), s.limit(n), s.attrib(n)) for n in range(10)],
    }  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_there_and_back(mode: Mode, python: bool) -> None:
    """RSM brings back every register, in every mode."""
    rig = Rig("nop; nop", mode, python=python)
    handler(rig, "movl $0x12345678, %eax; movl %eax, %esp; movw %ax, %es; lgdt (0); movl $0x10, %ecx; movl %ecx, %cr4; rsm")
    for number in range(1, 16):
        if number != 4:
            rig.state.set_reg(number, 0x1111111111111111 * number if mode == "long" else 0x1111 * number)
    rig.cpu.dr[7] = 0x700
    rig.step()
    before = everything(rig)
    rig.cpu.smi()
    rig.step()
    assert rig.cpu.smm is not None
    rig.step(7)
    assert rig.cpu.smm is None
    assert everything(rig) == before
    rig.step()
    assert rig.rip == CODE + 2


def test_the_handlers_world(python: bool) -> None:
    """Real mode at SMBASE + 8000h, all of memory in reach, nothing enabled (APM2 10.3.1)."""
    rig = Rig("nop", python=python)
    handler(rig, f"movl ${DATA}, %ebx; movl $0x77, (%ebx); hlt")
    rig.cpu.smi()
    rig.step()
    s = rig.state
    assert (s.rip, s.selector(CS), s.base(CS), s.limit(CS)) == (ENTRY, SMBASE >> 4, SMBASE, 0xFFFFFFFF)
    assert (s.selector(DS), s.base(DS), s.limit(DS), s.base(SS)) == (0, 0, 0xFFFFFFFF, 0)
    assert (s.cr(0) & 0x8000000D, s.cr(4), s.efer, s.rflags, rig.cpu.dr[7]) == (0, 0, 0, 2, 0x400)
    assert "SMM" in rig.cpu.where
    rig.run()
    assert rig.ram.read_u32(DATA) == 0x77


def test_the_save_area(python: bool) -> None:
    rig = Rig("nop", python=python)
    rig.state.set_reg(13, 0x1234567890)
    rig.cpu.smi()
    rig.step()
    area = saved(rig)
    assert (area["rip"], area["r13"], area["cr0"], area["efer"]) == (CODE, 0x1234567890, 0x80000011, 0xD00)
    assert (area["smbase"], area["revision"], area["svm_state"], area["auto_halt_restart"]) == (SMBASE, 0x30064, 0, 0)
    assert (area["cs.attrib"], area["gdtr.base"], area["tr.selector"], area["tr.base"]) == (0xA09B, GDT, TSS_SELECTOR, TSS)


def test_what_the_handler_changes_there_counts(python: bool) -> None:
    rig = Rig("nop; nop; nop; hlt", python=python)
    handler(rig, f"{SHOW}; movl ${CODE + 2}, 0x178(%ebx); movl $0x99, 0x1f8(%ebx); rsm")
    rig.cpu.smi()
    rig.run()
    assert (rig.rip, rig.reg(0)) == (CODE + 4, 0x99)


def test_smbase_moves_at_rsm(python: bool) -> None:
    """Each processor is given a place of its own before it uses SMM (APM2 10.2.4)."""
    rig = Rig("nop; nop; nop; hlt", python=python)
    handler(rig, f"{SHOW}; movl $0x200000, 0x100(%ebx); rsm")
    handler(rig, "incl %esi; hlt", 0x200000)
    rig.cpu.smi()
    rig.step(4)
    assert rig.cpu.msrs.values[SMM_BASE] == 0x200000
    rig.cpu.smi()
    rig.run()
    assert rig.rip == ENTRY + 3
    assert rig.state.base(CS) == 0x200000
    assert saved(rig, 0x200000)["rip"] == CODE


@pytest.mark.parametrize("restart", [True, False])
def test_auto_halt_restart(restart: bool, python: bool) -> None:
    """A processor that slept sleeps on, if the handler does not clear the flag (APM2 10.2.5)."""
    rig = Rig("hlt; movl $1, %edx; hlt", python=python)
    handler(rig, f"{SHOW}; movb $0, 0xc9(%ebx); rsm" if not restart else "rsm")
    rig.run()
    rig.cpu.smi()
    rig.run()
    assert saved(rig)["auto_halt_restart"] == restart
    assert rig.cpu.halted
    assert rig.reg(2) == (0 if restart else 1)


def test_interrupts_wait_for_rsm(python: bool) -> None:
    """IF is clear, NMIs and SMIs are blocked, INIT waits."""
    rig = Rig("nop\nnext: nop; hlt", python=python)
    handler(rig, "incl %ecx; nop; nop; nop; nop; rsm")
    rig.state.rflags |= IF
    rig.step()
    rig.cpu.smi()
    rig.step()
    interrupt(rig, 0x40)
    rig.cpu.nmi()
    rig.cpu.smi()
    rig.step(5)
    assert (rig.handled, rig.rip) == (None, ENTRY + 6)
    rig.step()  # RSM
    assert rig.rip == rig.labels["next"]
    rig.step()
    assert rig.rip == ENTRY  # the most urgent one
    rig.run()
    assert (rig.handled, rig.stack(1, 8)) == (2, [rig.labels["next"]])  # then the NMI, whose handler has IF clear


def test_the_nmi_mask_comes_back(python: bool) -> None:
    for blocked in (False, True):
        rig = Rig("nop; nop; nop", python=python)
        rig.state.nmi_blocked = blocked
        rig.cpu.smi()
        rig.step()
        assert rig.state.nmi_blocked
        rig.step()
        assert rig.state.nmi_blocked == blocked


def test_without_a_handler_of_its_own_nothing_happens(python: bool) -> None:
    """The firmware's handler is an RSM."""
    rig = Rig("nop; incl %eax; hlt", python=python)
    rig.cpu.smi()
    rig.run()
    assert (rig.rip, rig.reg(0)) == (CODE + 4, 1)


def test_rsm_outside_is_undefined(python: bool) -> None:
    rig = Rig("rsm", python=python)
    rig.run()
    assert rig.handled == 6


@pytest.mark.parametrize(
    ("at", "value"),
    [(0x158, 0x80000010), (0x158, 0x20000011), (0x15C, 1), (0x148, 1 << 31), (0x16C, 1), (0x164, 1), (0xD0, 1 << 30),
     (0x148, 0), (0xD0, 0x900)],
)  # fmt: skip
def test_rsm_to_an_impossible_state_shuts_down(at: int, value: int, python: bool) -> None:
    rig = Rig("nop", python=python)
    handler(rig, f"{SHOW}; movl ${value}, {at}(%ebx); rsm")
    rig.cpu.smi()
    assert rig.run() == Event.EXIT
    assert rig.cpu.shutdown


def test_from_the_apic(python: bool) -> None:
    """An SMI by the interrupt command register."""
    rig = Rig(
        f"movl $0xfee00000, %ebx; movl ${DeliveryMode.SMI << 8 | 1 << 18 | 1 << 14}, 0x300(%rbx)\nnext: nop; hlt", python=python
    )
    handler(rig, "incl %esi; hlt")
    rig.cpu.lapic.write_mmio(0xF0, 4, 0x1FF)
    rig.run()
    assert saved(rig)["rip"] == rig.labels["next"]


def test_by_port(python: bool) -> None:
    """A command at B2 is an SMI for every processor, behind the OUT: the area says which port it was."""
    rig = Rig("movb $0x5a, %al\nit: outb %al, $0xb2\nnext: inb $0xb2, %al; hlt", python=python, cpus=2)
    rig.run()
    assert rig.reg(0) == 0x5A
    area = saved(rig)
    assert (area["rip"], area["io_rip"]) == (rig.labels["next"], rig.labels["it"])
    assert area["io"] == SMM_IO.make(VALID=1, SZ8=1, PORT=0xB2)
    assert rig.machine.cpus[1].smi_pending  # it waits for its SIPI


def test_io_restart(python: bool) -> None:
    """The handler has the I/O instruction executed once more."""
    rig = Rig("movb $7, %al\nit: outb %al, $0xb2\nnext: hlt", python=python)
    handler(rig, f"{SHOW}; movb $0xff, 0xc8(%ebx); incl %ss:0x500; cmpb $2, %ss:0x500; jb 1f; movb $0, 0xc8(%ebx); 1: rsm")
    rig.run()
    assert rig.rip == rig.labels["next"] + 1
    assert rig.ram.read_u32(0x500) == 2


def test_a_shadow_holds_an_smi_back(python: bool) -> None:
    rig = Rig("movw %ds, %ax; movw %ax, %ss\nnext: nop; nop", python=python)
    rig.step(2)
    rig.cpu.smi()
    rig.run()
    assert saved(rig)["rip"] == rig.labels["next"] + 1


def test_smmlock(python: bool) -> None:
    """HWCR.SMMLOCK fixes SMBASE, the SMRAM registers and SMM_CTL (APM2 15.30.3, 15.32.1)."""
    for number in (0xC0010111, 0xC0010112, 0xC0010113, 0xC0010116):
        rig = Rig(
            f"""movl $0xc0010015, %ecx; rdmsr; orl $1, %eax; wrmsr
            movl ${number:#x}, %ecx; xorl %eax, %eax; xorl %edx, %edx\nit: wrmsr""",
            python=python,
        )
        rig.run()
        assert (rig.handled, rig.stack(2, 8)) == (13, [0, rig.labels["it"]])


def test_memory_that_is_not_there(python: bool) -> None:
    """SMBASE may point anywhere: nothing is saved, and RSM finds nothing."""
    rig = Rig("nop", python=python)
    rig.cpu.msrs.values[SMM_BASE] = 0xF0000000
    rig.cpu.smi()
    rig.machine.run(10_000)
    rig = Rig("nop", python=python)
    handler(rig, f"{SHOW}; movl $0xf0000000, 0x100(%ebx); rsm")
    rig.cpu.smi()
    rig.step(4)
    rig.cpu.smi()
    rig.step()
    assert rig.state.base(CS) == 0xF0000000
    assert rig.state.base(TR) == TSS
    assert rig.state.base(GDTR) == GDT


def test_random_save_areas(python: bool) -> None:
    """Whatever stands there, RSM ends in a state or a shutdown, and the processor goes on or stops."""
    shutdowns = 0
    for seed in range(60):
        random = Random(seed)
        rig = Rig("nop; 1: jmp 1b", random.choice(MODES), python=python)
        rig.cpu.smi()
        rig.step()
        area = bytearray(rig.ram.read(SAVE, SMM_SAVE.size))
        for field in random.sample(list(SMM_SAVE), random.choice((1, 2, 5, 40))):
            value = random.choice((0, CODE, 0x33, 1 << 31, random.getrandbits(8 * field.size)))
            SMM_SAVE.write(area, field.name, value & (1 << 8 * field.size) - 1)
        rig.ram.write(SAVE, bytes(area))
        for _ in range(3):
            rig.machine.run(300)
            rig.cpu.smi()
        shutdowns += rig.cpu.shutdown
    assert 0 < shutdowns < 60
