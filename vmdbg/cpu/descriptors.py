"""Segment descriptors: their fields, fetching them, and loading segment registers (APM2 chapter 4)."""

from __future__ import annotations

from typing import NamedTuple

from vmdbg.engine.state import GDTR, LDTR

from .core import Cpu
from .faults import GP, CpuFault

CODE, CONFORMING, WRITABLE_OR_READABLE, ACCESSED = 8, 4, 2, 1
PRESENT, SYSTEM_CLEAR, LONG, DEFAULT_BIG = 1 << 7, 1 << 4, 1 << 9, 1 << 10


class Descriptor(NamedTuple):
    """A descriptor with where it came from; `attrib` in the VMCB's packed form."""

    selector: int
    raw: int
    address: int

    @property
    def attrib(self) -> int:
        return (self.raw >> 40 & 0xFF) | (self.raw >> 44 & 0xF00)

    @property
    def type(self) -> int:
        return self.raw >> 40 & 0xF

    @property
    def is_segment(self) -> bool:
        """S: code or data, not a system descriptor."""
        return bool(self.raw >> 44 & 1)

    @property
    def is_code(self) -> bool:
        return self.is_segment and bool(self.type & CODE)

    @property
    def dpl(self) -> int:
        return self.raw >> 45 & 3

    @property
    def present(self) -> bool:
        return bool(self.raw >> 47 & 1)

    @property
    def base(self) -> int:
        return (self.raw >> 16 & 0xFFFFFF) | (self.raw >> 32 & 0xFF000000)

    @property
    def limit(self) -> int:
        limit = (self.raw & 0xFFFF) | (self.raw >> 32 & 0xF0000)
        return limit << 12 | 0xFFF if self.raw >> 55 & 1 else limit


def fetch(cpu: Cpu, selector: int, fault: int, external: int) -> Descriptor:
    """Read the descriptor a selector names; beyond its table's limit raises `fault` with the selector as error code."""
    s = cpu.state
    if selector & 4:
        base, limit = s.base(LDTR), s.limit(LDTR)
        if not s.selector(LDTR) & ~3 or not s.attrib(LDTR) & PRESENT:
            raise CpuFault(fault, selector & 0xFFFC | external)
    else:
        base, limit = s.base(GDTR), s.limit(GDTR)
    if (selector | 7) > limit:
        raise CpuFault(fault, selector & 0xFFFC | external)
    address = base + (selector & 0xFFF8)
    return Descriptor(selector, cpu.read(address, 8, implicit=True), address)


def load(cpu: Cpu, register: int, descriptor: Descriptor, rpl: int) -> None:
    """Load a segment register with a code or data descriptor that has been checked; sets its accessed bit."""
    if not descriptor.type & ACCESSED:
        cpu.write(descriptor.address + 5, 1, descriptor.raw >> 40 & 0xFF | ACCESSED, implicit=True)
    cpu.state.set_segment(
        register, descriptor.selector & 0xFFFC | rpl, descriptor.base, descriptor.limit, descriptor.attrib | ACCESSED
    )


def load_real(cpu: Cpu, register: int, selector: int) -> None:
    """Load a segment register in real or virtual-8086 mode: the base follows, limit and attributes stay in real mode."""
    s = cpu.state
    s.set_segment(register, selector, selector << 4, s.limit(register), s.attrib(register))


def null_selector(selector: int) -> bool:
    return not selector & 0xFFFC


def require(condition: bool, fault: int = GP, error: int | None = 0) -> None:
    """Raise `fault` unless `condition`."""
    if not condition:
        raise CpuFault(fault, error)
