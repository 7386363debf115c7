"""SKINIT: when it is refused or intercepted, the state behind it, what is measured, who is kept out (APM2 15.27)."""

from __future__ import annotations

import hashlib
import struct

import pytest

from introspect.exits import ExitCode
from introspect.msrs import VM_CR as VM_CR_BITS
from introspect.pci import RequesterId
from introspect.skinit import SLB_SIZE, STATE_AFTER, Block, judge_block, state_after
from introspect.tpm import BANKS, DRTM_PCRS, PCRS, Algorithm
from tests.engine.assembler import assemble
from tests.engine.interrupts import IF, enable_apic, interrupt
from tests.engine.rig import LONG_MODES, MODES, Mode, Rig
from tests.svm.covers import covers
from tests.svm.hypervisor import SVME, VMCB_PAGE, Hypervisor
from vmdbg.engine.state import CS, DS, ES, FS, GDTR, GS, IDTR, RAX, RBX, SS
from vmdbg.platform.msrs import VM_CR
from vmdbg.platform.pci.dma import DmaError

SLB = 0x110000
GP, UD = 13, 6
EDU = RequesterId.make(0, 3, 0)
ENTRY = 0x20
_NAMES = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", *(f"r{n}" for n in range(8, 16)))
_SEGMENTS = {"cs": CS, "ss": SS, "ds": DS, "es": ES, "fs": FS, "gs": GS}


def place(rig: Rig, source: str = "hlt", *, length: int | None = None, entry: int = ENTRY, at: int = SLB) -> bytes:
    """A secure loader: 32-bit code at `entry`; the image that is measured."""
    code = assemble(source, at + entry, 32).code
    image = (struct.pack("<HH", entry, entry + len(code) if length is None else length)).ljust(entry, b"\xcc") + code
    rig.ram.write(at, image)
    return image if length is None else rig.ram.read(at, length or SLB_SIZE)


def rig_with(
    source: str = "skinit", mode: Mode = "long", *, loader: str = "hlt", python: bool = False, user: bool = False, cpus: int = 1,
    tpm: bool = True, dev: str = "", at: int = SLB, length: int | None = None,
) -> tuple[Rig, bytes]:  # fmt: skip
    rig = Rig(source, mode, python=python, user=user, cpus=cpus, memory=16 << 20, tpm=tpm, dev=dev)
    image = place(rig, loader, length=length)
    rig.state.set_reg(RAX, at)
    return rig, image


def registers(rig: Rig) -> dict[str, int]:
    """By the names of the table."""
    s = rig.state
    found = {name: s.reg(number) for number, name in enumerate(_NAMES)}
    found |= {f"cr{n}": s.cr(n) for n in (0, 2, 3, 4)}
    for name, segment in _SEGMENTS.items():
        found |= {
            f"{name}.selector": s.selector(segment), f"{name}.attrib": s.attrib(segment), f"{name}.limit": s.limit(segment),
            f"{name}.base": s.base(segment),
        }  # fmt: skip
    for name, table in (("gdtr", GDTR), ("idtr", IDTR)):
        found |= {f"{name}.base": s.base(table), f"{name}.limit": s.limit(table)}
    return found | {
        "efer": s.efer, "rflags": s.rflags, "rip": s.rip, "gif": int(rig.cpu.gif), "vm_cr": rig.cpu.msrs.values[VM_CR],
    }  # fmt: skip


def pcr17(rig: Rig, bank: Algorithm = Algorithm.SHA256) -> bytes:
    tis = rig.machine.late_launch.tis
    assert tis is not None
    return tis.tpm.pcrs.banks[bank][17]


def expected(image: bytes, bank: str = "sha256") -> bytes:
    digest = hashlib.new(bank, image).digest()
    return hashlib.new(bank, bytes(len(digest)) + digest).digest()


# Preconditions


@pytest.mark.parametrize("mode", MODES)
def test_protected_mode_only(mode: Mode, python: bool) -> None:
    """#UD in real and virtual-8086 mode; elsewhere it works, EFER.SVME or not (APM2 15.4)."""
    for svme in (0, SVME):
        rig, _ = rig_with(mode=mode, python=python)
        rig.state.efer |= svme
        rig.state.refresh(rig.state.cpl)
        rig.step()
        if mode in ("real", "virtual"):
            assert rig.handled == UD
            assert rig.machine.late_launch.last is None
        else:
            assert rig.rip == SLB + ENTRY


def test_privilege(python: bool) -> None:
    for svme in (0, SVME):
        rig, _ = rig_with(user=True, python=python)
        rig.state.efer |= svme
        rig.state.refresh(3)
        rig.step()
        assert rig.handled == GP
        assert rig.stack(1, 8) == [0]


# The state


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode not in ("real", "virtual")])
def test_every_register_is_as_the_table_says(mode: Mode, python: bool) -> None:
    rig, image = rig_with(mode=mode, python=python, at=SLB | 0x1234)
    for number in range(1, 16 if mode in LONG_MODES else 8):
        rig.state.set_reg(number, 0x1111 * number)
    rig.cpu.msrs.values[VM_CR] = VM_CR_BITS.LOCK
    cr0 = rig.state.cr(0)
    rig.step()
    found, said = registers(rig), state_after(Block.decode(SLB, image), cr0)
    said = {**said, "vm_cr": said["vm_cr"] | VM_CR_BITS.LOCK}
    assert {name: found[name] for name in said} == said
    assert set(said) == {row.name for row in STATE_AFTER}
    assert all(row.section for row in STATE_AFTER)


def test_what_stays(python: bool) -> None:
    """x87 and SSE registers, the cache's control and most MSRs (APM2 15.27.6)."""
    rig, _ = rig_with("movq %rbx, %xmm3; skinit", loader="hlt", python=python)
    rig.state.set_reg(RBX, 0x1122334455667788)
    rig.state.set_field("lstar", 0x1234)
    rig.state.set_cr(0, rig.state.cr(0) | 0x60000000)
    rig.step(2)
    assert rig.state.field("lstar") == 0x1234
    assert rig.state.cr(0) == 0x60000011
    assert rig.cpu.msrs.values[VM_CR] == 7


def test_no_trap_is_left(python: bool) -> None:
    """Neither RFLAGS.TF nor a breakpoint is honoured (APM2 15.27.6)."""
    rig, _ = rig_with(python=python)
    rig.state.rflags |= 1 << 8
    rig.run()
    assert rig.rip == SLB + ENTRY + 1
    assert rig.cpu.halted


def test_the_loader_runs_in_flat_protected_mode(python: bool) -> None:
    """With the stack it is given, its data through SS, and STGI although EFER.SVME is 0."""
    rig, _ = rig_with(python=python, loader="""
        pushl $0x12345678; movl %ss:(%esp), %ebx; movw $0x77, %ss:0x8000(%eax); stgi; movl $0xc0010114, %ecx
        xorl %edx, %edx; xorl %eax, %eax; wrmsr; hlt""")  # fmt: skip
    rig.run()
    assert rig.cpu.gif
    assert rig.ram.read(SLB + SLB_SIZE - 4, 4) == b"\x78\x56\x34\x12"
    assert rig.reg(RBX) == 0x12345678
    assert rig.ram.read(SLB + 0x8000, 2) == b"\x77\x00"
    assert rig.cpu.msrs.values[VM_CR] == 0


@pytest.mark.parametrize("what", ["interrupt", "nmi", "init", "smi"])
def test_everything_is_held_until_stgi(what: str, python: bool) -> None:
    rig, _ = rig_with("sti; skinit" if what == "interrupt" else "skinit", loader="nop; nop; nop; hlt", python=python)
    enable_apic(rig)
    rig.state.rflags &= ~IF
    rig.step(2 if what == "interrupt" else 1)
    if what == "interrupt":
        interrupt(rig, 0x40)
    else:
        getattr(rig.cpu, what)()
    rig.step(4)
    assert rig.rip == SLB + ENTRY + 4
    assert rig.cpu.smm is None


def test_init_becomes_sx_behind_stgi(python: bool) -> None:
    """R_INIT is set: the INIT that came meanwhile raises #SX (APM2 15.27.6, 15.28)."""
    gate = SLB + 0x800
    rig, _ = rig_with(python=python, loader="""
        lidt %ss:0x700(%eax); lgdt %ss:0x710(%eax); stgi; nop; hlt""")  # fmt: skip
    rig.ram.write(SLB + 0x700, struct.pack("<HI", 0xFF, gate))
    rig.ram.write(SLB + 0x710, struct.pack("<HI", 0x17, SLB + 0x720))
    rig.ram.write(SLB + 0x720, struct.pack("<3Q", 0, 0xCF9B000000FFFF, 0xCF93000000FFFF))
    handler = SLB + 0x900
    rig.ram.write(gate + 8 * 30, struct.pack("<HHHH", handler & 0xFFFF, 8, 0x8E00, handler >> 16))
    rig.ram.write(handler, b"\xf4")
    rig.step()
    rig.cpu.init()
    rig.run()
    assert rig.rip == handler + 1
    assert rig.state.reg(RAX) == SLB


def test_a20_is_not_looked_at(python: bool) -> None:
    """DIS_A20M: the block is where EAX says, with the line held low (APM2 15.30.1)."""
    rig, _ = rig_with("inb $0x92, %al; andb $0xfd, %al; outb %al, $0x92; movl %ebx, %eax; skinit", python=python)
    rig.state.set_reg(RBX, SLB)
    rig.run()
    assert rig.rip == SLB + ENTRY + 1
    assert rig.state.reg(RAX) == SLB
    assert rig.machine.engine.physical.a20 == (1 << 64) - 1 or rig.machine.engine.physical.a20 & 1 << 20


# Measurement


@pytest.mark.parametrize("length", [None, ENTRY + 1, 0, 0xFFFF])
def test_pcr_17_is_the_hash_of_what_is_measured(length: int | None, python: bool) -> None:
    rig, image = rig_with(length=length, python=python)
    image = rig.ram.read(SLB, length if length else SLB_SIZE) if length is not None else image
    tis = rig.machine.late_launch.tis
    assert tis is not None
    assert pcr17(rig) == b"\xff" * 32, "there was no dynamic launch"
    assert tis.read_mmio(0, 1) & 1, "nor has the TPM seen one"
    rig.step()
    assert pcr17(rig) == expected(image)
    assert pcr17(rig, Algorithm.SHA1) == expected(image, "sha1")
    assert judge_block(SLB, rig.ram.read(SLB, SLB_SIZE)).pcr17 == {bank: pcr17(rig, bank) for bank in BANKS}
    for bank in BANKS:
        values = tis.tpm.pcrs.banks[bank]
        size = len(values[0])
        assert [values[n] for n in range(PCRS) if n != 17] == [bytes(size)] * 23, "all others of a launch are zeros"
    assert not tis.read_mmio(0, 1) & 1
    assert tis.active is None
    assert len(DRTM_PCRS) == 6


def test_without_a_tpm_it_starts_all_the_same(python: bool) -> None:
    rig, _ = rig_with(tpm=False, python=python)
    rig.step()
    launch = rig.machine.late_launch.last
    assert launch is not None
    assert (rig.rip, launch.failed) == (SLB + ENTRY, "none")


def test_software_holds_the_tpm(python: bool) -> None:
    """What a locality of software has is not the processor's: the launch is not measured."""
    rig, _ = rig_with(python=python)
    rig.machine.bus.write_mmio(0xFED40000, 1, 2)
    rig.step()
    launch = rig.machine.late_launch.last
    assert launch is not None
    assert launch.failed == "locality"
    assert pcr17(rig) == b"\xff" * 32


def test_a_block_that_is_no_memory(python: bool) -> None:
    rig, _ = rig_with(at=0xF0000000, python=python)
    rig.step()
    launch = rig.machine.late_launch.last
    assert launch is not None
    assert (launch.block.entry, launch.block.length) == (0xFFFF, 0xFFFF)
    rig.machine.run(10000)


# Other processors


@pytest.mark.parametrize("waiting", [True, False])
def test_every_other_processor_must_wait(waiting: bool, python: bool) -> None:
    rig, image = rig_with(cpus=3, python=python)
    rig.machine.cpus[2].wait_for_sipi = waiting
    rig.machine.cpus[2].halted = True
    rig.step()
    launch = rig.machine.late_launch.last
    assert launch is not None
    assert rig.rip == SLB + ENTRY, "the loader starts unconditionally"
    if waiting:
        assert (launch.running, launch.failed, pcr17(rig)) == ((), "", expected(image))
        assert [cpu.gif for cpu in rig.machine.cpus] == [False] * 3
        assert [cpu.msrs.values[VM_CR] & 7 for cpu in rig.machine.cpus] == [7] * 3, "DPD, R_INIT, DIS_A20M (15.27.8)"
    else:
        assert (launch.running, launch.failed, pcr17(rig)) == ((2,), "aps", b"\xff" * 32)
        assert [cpu.msrs.values[VM_CR] & 7 for cpu in rig.machine.cpus] == [7, 0, 0]


def test_an_ap_starts_with_gif_clear(python: bool) -> None:
    """What is pending waits for its own STGI (APM2 15.27.8)."""
    rig, _ = rig_with(cpus=2, loader="hlt", python=python)
    ap = rig.machine.cpus[1]
    rig.ram.write(0x9000, assemble("nop; nop; movl %cr0, %eax; orb $1, %al; movl %eax, %cr0; stgi", 0, 16).code)
    rig.step()
    ap.sipi(9)
    ap.nmi()
    while ap.state.rip != 2:
        rig.step()
    assert (ap.state.base(CS), ap.gif, ap.nmi_pending) == (0x9000, False, True)
    rig.step(4)
    assert ap.gif


# Devices


def test_devices_are_kept_out_until_software_says_so(python: bool) -> None:
    rig, image = rig_with(python=python)
    dma, root = rig.machine.chipset.dma, rig.machine.chipset.root
    northbridge = RequesterId.make(0, 0x18, 0)
    dma.write(EDU, SLB, image[:4])
    rig.step()
    for at, length in ((SLB, 4), (SLB - 2, 4), (SLB + SLB_SIZE - 1, 2), (SLB - 0x1000, 3 * SLB_SIZE)):
        with pytest.raises(DmaError, match="SL_DEV"):
            dma.write(EDU, at, b"\xcc" * length)
        with pytest.raises(DmaError, match="SL_DEV"):
            dma.read(EDU, at, length)
    assert rig.ram.read(SLB, len(image)) == image
    dma.write(EDU, SLB - 4, b"near")
    dma.write(EDU, SLB + SLB_SIZE, b"near")
    assert root.read_config(northbridge, 0x384, 4) == 1
    root.write_config(northbridge, 0x384, 4, 0)
    assert root.read_config(northbridge, 0x384, 4) == 0
    dma.write(EDU, SLB, b"\xcc")
    root.write_config(northbridge, 0x384, 4, 1)
    assert root.read_config(northbridge, 0x384, 4) == 0, "software cannot begin it"


def test_with_a_dev_the_bit_is_there(python: bool) -> None:
    rig, _ = rig_with(dev="coherent", python=python)
    dma, root = rig.machine.chipset.dma, rig.machine.chipset.root
    misc = RequesterId.make(0, 0x18, 3)
    rig.step()
    root.write_config(misc, 0xF4, 4, 4 << 8)
    assert root.read_config(misc, 0xF8, 4) == 1 << 5
    with pytest.raises(DmaError, match="SL_DEV"):
        dma.write(EDU, SLB, b"\xcc")
    root.write_config(misc, 0xF8, 4, 0)
    dma.write(EDU, SLB, b"\xcc")


# Guests


@covers(0x86)
def test_intercepted_in_a_guest(python: bool) -> None:
    h = Hypervisor("nop\nit: skinit", python=python)
    h.intercept(ExitCode.SKINIT)
    assert h.enter() == ExitCode.SKINIT
    assert h["rip"] == h.labels["it"]
    assert h.machine.late_launch.last is None


def test_a_guest_that_nobody_stops(python: bool) -> None:
    """As INIT does, it ends guest mode: the hypervisor is gone."""
    h = Hypervisor("skinit", python=python)
    place(h)
    h.set(rax=SLB)
    h.step(2)
    assert h.cpu.guest is None
    assert h.rip == SLB + ENTRY
    launch = h.machine.late_launch.last
    assert launch is not None
    assert launch.guest
    assert h.machine.history.by_vmcb[VMCB_PAGE][1].running_on is None


# Reset


def test_a_reset_forgets(python: bool) -> None:
    rig, _ = rig_with(python=python)
    rig.step()
    rig.machine._reset()
    assert rig.machine.late_launch.last is None
    assert not rig.machine.late_launch.protection.on
    assert pcr17(rig) == b"\xff" * 32
    assert rig.cpu.gif
    assert rig.cpu.msrs.values[VM_CR] == 0
