"""PCI without a processor: configuration, BARs and interrupts as software sees them, devices that tests make up."""

from __future__ import annotations

from introspect.pci import COMMAND, CapabilityId, RequesterId, capabilities
from vmdbg.engine.memory import Ram
from vmdbg.iommu.config import IommuConfig
from vmdbg.platform.apicbus import ApicBus, DeliveryMode
from vmdbg.platform.bus import Bus
from vmdbg.platform.chipset import Chipset
from vmdbg.platform.clock import Clock
from vmdbg.platform.pci.catalogue import DeviceSpec
from vmdbg.platform.pci.dma import Record
from vmdbg.platform.pci.function import Function

MSI_ADDRESS = 0xFEE00000


class Apic:
    """Takes every message, and keeps it."""

    enabled = accepts_fixed = True
    arbitration_priority = 0

    def __init__(self) -> None:
        self.taken: list[tuple[int, DeliveryMode, bool]] = []
        self.asked: list[tuple[int, bool, bool]] = []
        """Destinations: number, logical, 32 bits wide."""

    def matches(self, dest: int, logical: bool, wide: bool) -> bool:
        self.asked.append((dest, logical, wide))
        return True

    def accept(self, mode: DeliveryMode, vector: int, level: bool) -> None:
        self.taken.append((vector, mode, level))

    def read_remote(self, offset: int) -> int | None:
        return None


class Board:
    """A chipset with devices, after its firmware."""

    def __init__(
        self, *devices: str, memory: int = 16 << 20, physical_bits: int = 40, hpet: bool = False,
        iommu: IommuConfig | None = None,
    ) -> None:  # fmt: skip
        self.clock, self.bus, self.apics, self.apic = Clock(), Bus(), ApicBus(), Apic()
        self.apics.receivers.append(self.apic)
        self.ram = Ram(memory)
        self.intr: list[bool] = []
        self.resets: list[int] = []
        self.chipset = Chipset(
            self.clock, self.bus, self.apics, self.ram, [DeviceSpec.parse(text) for text in devices], physical_bits,
            self.intr.append, lambda: self.resets.append(self.clock.now), iommu, hpet=hpet,
        )  # fmt: skip
        self.root = self.chipset.root
        self.told: list[Record] = []
        self.chipset.dma.listeners.append(self.told.append)

    def place(self, function: Function, devfn: int = 3 << 3) -> None:
        """Another device, on the root bus, behind the firmware's back but for decoding."""
        self.root.bus.add(function, devfn)

    def function(self, name: str, index: int = 0) -> Function:
        return [function for function in self.root.functions if function.kind == name][index]

    # Software

    def read(self, where: str | RequesterId, offset: int, size: int = 4) -> int:
        """By ports 0xcf8 and 0xcfc."""
        self.bus.write_port(0xCF8, 4, 1 << 31 | self._address(where) << 8 | offset & 0xFC)
        return self.bus.read_port(0xCFC + (offset & 3), size)

    def write(self, where: str | RequesterId, offset: int, value: int, size: int = 4) -> None:
        self.bus.write_port(0xCF8, 4, 1 << 31 | self._address(where) << 8 | offset & 0xFC)
        self.bus.write_port(0xCFC + (offset & 3), size, value)

    @staticmethod
    def _address(where: str | RequesterId) -> RequesterId:
        if isinstance(where, RequesterId):
            return where
        parsed = RequesterId.parse(where)
        assert parsed is not None
        return parsed

    def command(self, where: str, add: int = COMMAND.BUS_MASTER, drop: int = 0) -> None:
        self.write(where, 4, self.read(where, 4, 2) & ~drop | add, 2)

    def capability(self, where: str, number: int) -> int:
        """Its offset."""
        function = self.root.find(self._address(where))
        assert function is not None
        return next(at for at, found in capabilities(function.config.bytes) if found == number)

    def messages(self, where: str, vector: int, *, multiple: int = 0) -> int:
        """Turn on MSI; the offset of the capability."""
        at = self.capability(where, CapabilityId.MSI)
        self.write(where, at + 4, MSI_ADDRESS)
        self.write(where, at + 12, vector)
        self.write(where, at + 2, 1 | multiple << 4, 2)
        return at

    def pass_time(self, ticks: int) -> None:
        self.clock.now += ticks
        self.clock.fire()
