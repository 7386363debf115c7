"""AVIC: the virtual APIC of a running guest, on the backing page that its VMCB names (APM2 15.29).

The rules of each register and the formats of the tables are `introspect.avic`'s.  What the manual leaves open is decided
here as software that runs on such processors needs it; docs/design.md has the list.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from introspect.address import Gpa
from introspect.avic import (
    APIC_ADDRESS,
    BROADCAST,
    DFR,
    EOI,
    EXIT_WRITE,
    ICR,
    ICRH,
    ICRL,
    ID,
    IRR,
    ISR,
    LOGICAL_ENTRIES,
    LOGICAL_ENTRY,
    PHYSICAL_ENTRY,
    PPR,
    TMR,
    TPR,
    IncompleteIpi,
    Rule,
    dword,
    logical_indices,
    register,
    vectors,
)
from introspect.exits import ExitCode
from introspect.paging import Access, Fault, NestedFault
from introspect.vmcb import AVIC_PHYSICAL, V_INTR, VMCB
from vmdbg.cpu.faults import NestedPageFault
from vmdbg.cpu.operands import accesses
from vmdbg.engine.memory import PAGE, Ram

if TYPE_CHECKING:
    from vmdbg.cpu.core import Cpu

    from .guest import Guest

Exit = tuple[int, int, int]
"""EXITCODE, EXITINFO1, EXITINFO2."""

_POINTERS = VMCB.codec("avic_apic_bar", "avic_backing_page", "avic_logical_table", "avic_physical_table").unpack
_ENABLE = V_INTR.avic_enable | V_INTR.x2avic_enable
_SELF, _ALL_BUT_SELF = 1, 3
"""Destination shorthands."""


class Undeliverable(Exception):
    """An IPI that reaches nobody: the cause, and the index of the table entry that is to blame."""

    def __init__(self, cause: IncompleteIpi, index: int = 0) -> None:
        super().__init__(cause.name)
        self.cause, self.index = cause, index


class BackingPage:
    """The registers of a virtual APIC in memory.  Where no memory is they read as zero."""

    def __init__(self, ram: Ram, spa: int) -> None:
        self.ram = ram
        self.spa = spa
        self.view = ram.view[spa : spa + PAGE] if ram.contains(spa, PAGE) else memoryview(bytes(PAGE))

    def store(self, offset: int, value: int, size: int = 4) -> None:
        if not self.view.readonly:
            self.ram.write(self.spa + offset, value.to_bytes(size, "little"))

    def change(self, bank: int, vector: int, on: bool) -> None:
        """Set or clear the bit of a vector in ISR or IRR."""
        at, bit = bank + (vector >> 5) * 16, 1 << (vector & 31)
        old = dword(self.view, at)
        self.store(at, old | bit if on else old & ~bit)

    def highest(self, bank: int) -> int:
        """The highest vector whose bit is set; 0, which is no vector of an APIC, if none is."""
        return max(vectors(self.view, bank).bit_length() - 1, 0)


class Avic:
    """The virtual APIC of a guest between VMRUN and #VMEXIT.

    `request` is the vector that was found deliverable when the page was last looked at, 0 if none was.  The processor
    looks at VMRUN, at a doorbell, and where the guest changes what decides (APM2 15.29.8): what others put into IRR besides
    goes unnoticed until then.
    """

    def __init__(self, cpu: Cpu, guest: Guest, view: memoryview) -> None:
        """`view` is the VMCB as the processor sees it."""
        bar, backing, logical, physical = _POINTERS(view, 0)
        self.cpu = cpu
        self.guest = guest
        self.base = bar & APIC_ADDRESS
        """Guest-physical address of the APIC page."""
        self.page = BackingPage(cpu.ram, backing & APIC_ADDRESS)
        self.logical_table = logical & APIC_ADDRESS
        self.physical_table = physical & APIC_ADDRESS
        self.last_id = physical & AVIC_PHYSICAL.max_index
        self.request = 0
        self.exit: Exit | None = None
        """The exit that is due behind the instruction that accesses the page."""

    # Interrupts (APM2 15.29.3.1, 15.29.8)

    def evaluate(self) -> None:
        """Look at the page for an interrupt whose priority is above V_TPR and what is in service."""
        self.request = self._deliverable()

    def _deliverable(self) -> int:
        vector = self.page.highest(IRR)
        return vector if vector >> 4 > max(self.guest.v_tpr & 0xF, self.page.highest(ISR) >> 4) else 0

    def take(self) -> int:
        """The guest takes an interrupt: its vector, which is in service now."""
        vector = self._deliverable() or self.request
        self.page.change(IRR, vector, False)
        self.page.change(ISR, vector, True)
        self._priority_changed()
        return vector

    def _priority_changed(self) -> None:
        """TPR or the highest interrupt in service is another one."""
        tpr, serviced = dword(self.page.view, TPR) & 0xFF, self.page.highest(ISR)
        self.page.store(PPR, tpr if tpr >> 4 >= serviced >> 4 else serviced & 0xF0)
        self.evaluate()

    def write_cr8(self, value: int) -> None:
        self.guest.v_tpr = value
        self.page.store(TPR, value << 4)
        self._priority_changed()

    # The guest's accesses to the APIC page, by offset

    def refuses(self, offset: int, reads: bool, writes: bool) -> Exit | None:
        """The exit that comes before such an access."""
        rules = register(offset)
        if reads and rules.read is Rule.FAULT:
            return ExitCode.AVIC_NOACCEL, offset & 0xFF0, 0
        if writes and rules.write is Rule.FAULT:
            return ExitCode.AVIC_NOACCEL, offset & 0xFF0 | EXIT_WRITE, 0
        return None

    def read(self, offset: int, size: int) -> int:
        return int.from_bytes(self.page.view[offset : offset + size], "little")

    def write(self, offset: int, size: int, value: int) -> None:
        """A write that `refuses` let through; `exit` tells whether an exit follows."""
        rule = register(offset).write
        if rule is Rule.FAULT:
            return
        self.page.store(offset, value & (1 << 8 * size) - 1, size)
        if offset & 0xF >= 4:
            return  # behind the register
        offset &= 0xFF0
        if rule is Rule.TRAP:
            self.exit = ExitCode.AVIC_NOACCEL, offset | EXIT_WRITE, 0
        elif offset == TPR:
            self.guest.v_tpr = dword(self.page.view, TPR) >> 4 & 0xF
            self._priority_changed()
        elif offset == EOI:
            self._end_of_interrupt()
        elif offset == ICRL:
            self._command(dword(self.page.view, ICRL), dword(self.page.view, ICRH))

    def _end_of_interrupt(self) -> None:
        vector = self.page.highest(ISR)
        if vectors(self.page.view, TMR) >> vector & 1:
            # A trap, and the bit in ISR is still set: it is the hypervisor's to end.
            self.exit = ExitCode.AVIC_NOACCEL, EOI | EXIT_WRITE, vector
        elif vector:
            self.page.change(ISR, vector, False)
            self._priority_changed()

    # Interprocessor interrupts (APM2 15.29.6.1)

    def _command(self, low: int, high: int) -> None:
        """ICRL was written."""
        try:
            self._send(low, high >> 24)
        except Undeliverable as found:
            self.exit = ExitCode.AVIC_INCOMPLETE_IPI, high << 32 | low, found.cause << 32 | found.index

    def _send(self, low: int, destination: int) -> None:
        vector, shorthand = low & ICR.vector, ICR.get(low, "shorthand")
        if low & (ICR.message_type | ICR.level):
            raise Undeliverable(IncompleteIpi.INVALID_TYPE)
        if vector < 16:
            raise Undeliverable(IncompleteIpi.INVALID_VECTOR)
        if shorthand == _SELF:
            self.page.change(IRR, vector, True)
            self.evaluate()
            return
        if shorthand or destination == BROADCAST:
            entries = self._everybody(shorthand != _ALL_BUT_SELF)
        elif low & ICR.logical:
            entries = {index: self._logical_entry(index)
                       for index in logical_indices(destination, dword(self.page.view, DFR))}  # fmt: skip
        else:
            entries = {destination: self._physical_entry(destination, destination)}
        pages = {index: BackingPage(self.cpu.ram, entry & APIC_ADDRESS) for index, entry in entries.items()}
        for index, page in pages.items():
            if page.view.readonly:
                raise Undeliverable(IncompleteIpi.INVALID_BACKING_PAGE, index)
        asleep = [index for index, entry in entries.items() if not entry & PHYSICAL_ENTRY.is_running]
        for index, entry in entries.items():
            pages[index].change(IRR, vector, True)
            if entry & PHYSICAL_ENTRY.is_running:
                self.cpu.lapic.bus.doorbell(entry & PHYSICAL_ENTRY.host_apic_id)
        if asleep:
            raise Undeliverable(IncompleteIpi.TARGET_NOT_RUNNING, asleep[0])

    def _everybody(self, with_self: bool) -> dict[int, int]:
        """The valid physical entries by index; the last index is reserved."""
        own = None if with_self else dword(self.page.view, ID) >> 24
        found = {index: self._table(self.physical_table, index, 8) for index in range(min(self.last_id + 1, BROADCAST))}
        return {index: entry for index, entry in found.items() if entry & PHYSICAL_ENTRY.valid and index != own}

    def _logical_entry(self, index: int) -> int:
        """The physical entry of the APIC that a logical one names."""
        entry = self._table(self.logical_table, index, 4) if index < LOGICAL_ENTRIES else 0
        if not entry & LOGICAL_ENTRY.valid:
            raise Undeliverable(IncompleteIpi.INVALID_TARGET, index)
        return self._physical_entry(entry & LOGICAL_ENTRY.guest_apic_id, index)

    def _physical_entry(self, apic_id: int, index: int) -> int:
        """Raises `Undeliverable` with `index` if there is none."""
        entry = self._table(self.physical_table, apic_id, 8) if apic_id <= self.last_id else 0
        if not entry & PHYSICAL_ENTRY.valid:
            raise Undeliverable(IncompleteIpi.INVALID_TARGET, index)
        return entry

    def _table(self, table: int, index: int, size: int) -> int:
        """An entry of a table; all ones where no memory is."""
        at = table + index * size
        data = self.cpu.ram.view[at : at + size] if self.cpu.ram.contains(at, size) else b"\xff" * size
        return int.from_bytes(data, "little")


def enabled(guest: Guest) -> bool:
    """Whether a VMCB that VMRUN accepted asks for AVIC; without nested paging there is none."""
    return guest.v_intr & _ENABLE == V_INTR.avic_enable and guest.np


def refused(cpu: Cpu, avic: Avic) -> Exit | None:
    """The exit that comes instead of the instruction at RIP, which is about to access the APIC page.

    Raises `NestedPageFault` where the nested tables do not let it write what it reads first.
    """
    for address, _, reads, writes in accesses(cpu):
        found = cpu.guest_physical(address, Access(writes, user=cpu.state.cpl == 3))
        if not isinstance(found, Fault):
            exit_ = avic.refuses(found & PAGE - 1, reads, writes) if found & -PAGE == avic.base else None
            if exit_ is not None:
                return exit_
        elif found.kind == "NPF" and found.address & -PAGE == avic.base:
            raise NestedPageFault(NestedFault(found.code, Gpa(found.address)))
    return None
