"""The rings that an IOMMU writes: event log, peripheral page request log, guest virtual APIC log (AMD 48882, 2.5-2.7)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from introspect.iommu.registers import RING_BASE, STATUS
from introspect.iommu.state import RINGS, RingType
from introspect.sources import Unreadable, Unwritable
from vmdbg.iommu.registers import RegisterFile
from vmdbg.platform.pci.dma import Memory


class Pointers:
    """Head and tail of a ring in memory.  A reserved length is a ring without entries."""

    def __init__(self, ring: RingType, run: int, registers: RegisterFile) -> None:
        """`run`: the bit of the status register that says whether it works."""
        self.ring, self.run, self.registers = ring, run, registers

    @property
    def size(self) -> int:
        """Bytes: a power of two, or 0."""
        return self.ring.size(self.registers[self.ring.base])

    @property
    def base(self) -> int:
        return self.registers[self.ring.base] & RING_BASE.Base

    @property
    def head(self) -> int:
        return self.registers[self.ring.head] & max(self.size - 1, 0)

    @property
    def tail(self) -> int:
        return self.registers[self.ring.tail] & max(self.size - 1, 0)

    def after(self, offset: int) -> int:
        return offset + self.ring.entry_size & max(self.size - 1, 0)

    @property
    def running(self) -> bool:
        return bool(self.registers.status & self.run)

    @running.setter
    def running(self, value: bool) -> None:
        self.registers.status = self.registers.status & ~self.run | self.run * value


@dataclass(frozen=True, slots=True)
class LogBits:
    """Of the status register."""

    run: int
    overflow: int
    interrupt: int
    shadow: str = ""
    """Register with the address that a copy of the tail is written to; none, while it is 0."""


EVENT_LOG = LogBits(STATUS.EventLogRun, STATUS.EventOverflow, STATUS.EventLogInt)
PPR_LOG = LogBits(STATUS.PprLogRun, STATUS.PprOverflow, STATUS.PprInt)
GA_LOG = LogBits(STATUS.GALogRun, STATUS.GALogOverflow, STATUS.GALogInt, "ga_tail_address")


class Log(Pointers):
    """Hardware writes at the tail, software reads at the head; one entry stays free, and what does not fit is lost."""

    def __init__(
        self, name: str, bits: LogBits, registers: RegisterFile, memory: Memory, who: str,
        changed: Callable[[], None],
    ) -> None:  # fmt: skip
        """`who` writes; `changed`: bits of the status register may have become one."""
        super().__init__(RINGS[name], bits.run, registers)
        self.bits, self.memory, self.who, self.changed = bits, memory, who, changed

    def append(self, record: int) -> bool:
        """Whether it was written: the log runs, there is room, and there is memory."""
        if not self.running or self.registers.status & self.bits.overflow:
            return False
        if not self.size or self.after(self.tail) == self.head:
            self.running = False
            self.registers.status |= self.bits.overflow
            self.changed()
            return False
        try:
            self.memory.dma(self.who, self.base + self.tail, record.to_bytes(self.ring.entry_size, "little"))
        except (Unreadable, Unwritable):
            self.running = False  # what the log is to be written to is no memory
            return False
        self.registers[self.ring.tail] = tail = self.after(self.tail)
        shadow = self.registers[self.bits.shadow] if self.bits.shadow else 0
        if shadow:
            with suppress(Unwritable):  # where no memory is, nobody reads
                self.memory.dma(self.who, shadow, tail.to_bytes(8, "little"))
        self.registers.status |= self.bits.interrupt
        self.changed()
        return True
