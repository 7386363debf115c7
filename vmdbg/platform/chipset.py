"""Interrupt controllers, PCI and ACPI tables put together, and what firmware leaves behind of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

from introspect.pci import RequesterId
from vmdbg.iommu.config import IommuConfig
from vmdbg.iommu.translator import Iommus
from vmdbg.platform import acpi
from vmdbg.platform.apicbus import ApicBus
from vmdbg.platform.bus import Bus
from vmdbg.platform.clock import Clock
from vmdbg.platform.debugexit import ResetControl
from vmdbg.platform.hpet import HPET_BASE, HPET_SIZE, Hpet
from vmdbg.platform.ioapic import IOAPIC_BASE, IoApic, IrqLines, PciLines
from vmdbg.platform.pci.catalogue import DeviceError, DeviceSpec, add_devices
from vmdbg.platform.pci.dma import Dma, DmaError, Memory
from vmdbg.platform.pci.firmware import Firmware, NoRoom
from vmdbg.platform.pci.root import (
    CONFIG_PORT,
    ECAM,
    ECAM_SIZE,
    FIRST_GSI,
    LAST_CONFIG_PORT,
    PIC_IRQS,
    ConfigPorts,
    RootComplex,
)
from vmdbg.platform.pic import ELCR_PORT, MASTER_PORT, SLAVE_PORT, Pic

IOAPIC_REQUESTER = RequesterId.make(0, 0x14, 0)
"""Who messages of the I/O APIC and the HPET come from: there is no function, but an IOMMU tells senders apart by such numbers."""
HIGH = 4 << 30
HIGH_SIZE = 16 << 30


class Ram(Memory, Protocol):
    """As devices reach it, and where firmware leaves its tables."""

    @property
    def end(self) -> int: ...

    def write(self, spa: int, data: bytes, /) -> None: ...


class Chipset:
    """Everything between the processors and the devices on PCI."""

    def __init__(
        self, clock: Clock, bus: Bus, apics: ApicBus, ram: Ram, devices: Sequence[DeviceSpec], physical_bits: int,
        intr: Callable[[bool], None], reset: Callable[[], None], iommu: IommuConfig | None = None, *, hpet: bool = False,
    ) -> None:  # fmt: skip
        """`intr`: the 8259s' output has changed.  Raises `DeviceError`."""
        self.ram, self.apics, self.intr = ram, apics, intr
        self.dma = Dma(ram, apics)
        self.ioapic = IoApic(apics, self._send)
        self.pic = Pic(self._pic_output)
        self.irqs = IrqLines(self.pic, self.ioapic)
        self._pci_lines = PciLines(self.pic, self.ioapic, FIRST_GSI, PIC_IRQS)
        self.root = RootComplex(self.dma, clock, self._pci_lines.set)
        self.high_memory = _high_memory(ram.end, physical_bits)
        self.ports = ConfigPorts(self.root, ResetControl(reset))
        self.iommus = Iommus(iommu, self.root, self.dma, clock, bus) if iommu is not None else None
        add_devices(self.root, clock, devices)
        self._boot_pci()
        for first in (MASTER_PORT, SLAVE_PORT, ELCR_PORT):
            bus.add_ports(first, first + 1, self.pic)
        bus.add_ports(CONFIG_PORT, LAST_CONFIG_PORT, self.ports, width=4)
        bus.add_mmio(ECAM, ECAM + ECAM_SIZE - 1, self.root, width=4)
        bus.add_mmio(IOAPIC_BASE, IOAPIC_BASE + 0xFFF, self.ioapic, width=4)
        bus.decoder = self.root
        self.hpet: Hpet | None = None
        if hpet:
            self.hpet = Hpet(clock, self.irqs.drive, self.irqs.replace, self.ioapic.set_pin, self._send)
            bus.add_mmio(HPET_BASE, HPET_BASE + HPET_SIZE - 1, self.hpet)

    def irq(self, number: int) -> Callable[[bool], None]:
        """What drives an IRQ of the ISA bus."""
        return partial(self.irqs.set, number)

    def reset(self) -> None:
        self.pic.reset()
        self.ioapic.reset()
        self._pci_lines.reset()
        if self.hpet is not None:
            self.hpet.reset()
        self.ports.reset()
        self.root.reset()
        self._boot_pci()

    def _boot_pci(self) -> None:
        try:
            Firmware(self.root, self.high_memory).run()
        except NoRoom as error:
            raise DeviceError(str(error)) from None
        if any(function.interrupt_pin for function in self.root.functions):
            for irq in PIC_IRQS:
                self.pic.set_level_triggered(irq)
        if self.iommus is not None:
            self.iommus.enable()

    def leave_tables(self, apic_ids: Sequence[int], extra: Sequence[bytes] = (), *, tpm: bool = False) -> None:
        """Write the ACPI tables to memory."""
        board = acpi.Board(apic_ids, self.high_memory, self.hpet is not None, tpm)
        if self.iommus is not None:
            extra = [*extra, self.iommus.acpi_table(IOAPIC_REQUESTER)]
        self.ram.write(acpi.BASE, acpi.build(board, extra))

    def poll_input(self) -> bool:
        """Let devices take what came in from outside."""
        took = [function.poll() for function in self.root.functions]  # each of them
        return any(took)

    @property
    def hears(self) -> bool:
        """Whether input may come in, some time."""
        return any(function.hears for function in self.root.functions)

    def close(self) -> None:
        for function in self.root.functions:
            function.close()

    def _pic_output(self, level: bool) -> None:
        """To the local APIC's LINT0, and to pin 0 of the I/O APIC."""
        self.ioapic.set_pin(0, level)
        self.intr(level)

    def _send(self, address: int, data: int) -> None:
        """An interrupt message of the I/O APIC, or the HPET."""
        try:
            self.dma.interrupt(IOAPIC_REQUESTER, address, data)
        except DmaError:
            return  # an IOMMU has refused, and logged it


def _high_memory(ram_end: int, physical_bits: int) -> tuple[int, int] | None:
    """Addresses for BARs above RAM, aligned to their size; None where the processor's addresses end before."""
    first = -(-max(ram_end, HIGH) // HIGH_SIZE) * HIGH_SIZE
    return (first, first + HIGH_SIZE - 1) if first + HIGH_SIZE <= 1 << physical_bits - 1 else None
