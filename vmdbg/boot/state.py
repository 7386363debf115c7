"""The state of the boot CPU when an image gets control."""

from dataclasses import dataclass, field
from typing import Literal

Mode = Literal["real", "protected", "long"]

CR0_PE, CR0_ET, CR0_NE, CR0_PG = 1 << 0, 1 << 4, 1 << 5, 1 << 31
CR4_PAE = 1 << 5
EFER_LME, EFER_LMA = 1 << 8, 1 << 10

GENERAL_REGISTERS = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp", *(f"r{n}" for n in range(8, 16)))


@dataclass(frozen=True, slots=True)
class SegmentRegister:
    """`attrib` in the VMCB's packed format (APM2 15.5.1): descriptor bits 47:40, then 55:52.  `limit` in bytes."""

    selector: int
    attrib: int
    limit: int
    base: int


@dataclass(frozen=True, slots=True)
class DescriptorTable:
    base: int
    limit: int


REAL_CODE, REAL_DATA = 0x09B, 0x093
FLAT_CODE32, FLAT_CODE64, FLAT_DATA = 0xC9B, 0xA9B, 0xC93
LDT, BUSY_TSS = 0x082, 0x08B

CODE_SELECTOR, DATA_SELECTOR = 0x08, 0x10


@dataclass(slots=True)
class CpuState:
    """Registers by their manual names; those not listed keep their reset values (APM2 14.1.3)."""

    rip: int
    cs: SegmentRegister
    ds: SegmentRegister
    es: SegmentRegister
    ss: SegmentRegister
    fs: SegmentRegister
    gs: SegmentRegister
    rax: int = 0
    rbx: int = 0
    rcx: int = 0
    rdx: int = 0
    rsi: int = 0
    rdi: int = 0
    rbp: int = 0
    rsp: int = 0
    r8: int = 0
    r9: int = 0
    r10: int = 0
    r11: int = 0
    r12: int = 0
    r13: int = 0
    r14: int = 0
    r15: int = 0
    rflags: int = 2
    cr0: int = CR0_ET
    cr3: int = 0
    cr4: int = 0
    efer: int = 0
    ldtr: SegmentRegister = field(default_factory=lambda: SegmentRegister(0, LDT, 0xFFFF, 0))
    tr: SegmentRegister = field(default_factory=lambda: SegmentRegister(0, BUSY_TSS, 0xFFFF, 0))
    gdtr: DescriptorTable = field(default_factory=lambda: DescriptorTable(0, 0))
    idtr: DescriptorTable = field(default_factory=lambda: DescriptorTable(0, 0))


def real_state(cs: int, ip: int) -> CpuState:
    """Real mode at CS:IP, other segments 0, interrupts off, the vector table at 0."""
    data = SegmentRegister(0, REAL_DATA, 0xFFFF, 0)
    code = SegmentRegister(cs, REAL_CODE, 0xFFFF, cs << 4)
    state = CpuState(rip=ip, cs=code, ds=data, es=data, ss=data, fs=data, gs=data)
    state.idtr = DescriptorTable(0, 0x3FF)
    return state


def flat_state(mode: Mode, entry: int) -> CpuState:
    """Protected mode without paging, or long mode without CR3: flat segments, interrupts off, empty GDT and IDT."""
    long = mode == "long"
    data = SegmentRegister(DATA_SELECTOR, FLAT_DATA, 0xFFFFFFFF, 0)
    code = SegmentRegister(CODE_SELECTOR, FLAT_CODE64 if long else FLAT_CODE32, 0xFFFFFFFF, 0)
    state = CpuState(rip=entry, cs=code, ds=data, es=data, ss=data, fs=data, gs=data)
    state.cr0 = CR0_PE | CR0_ET
    if long:
        state.cr0 |= CR0_NE | CR0_PG
        state.cr4 = CR4_PAE
        state.efer = EFER_LME | EFER_LMA
    return state
