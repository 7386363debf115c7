"""The PCI function that an IOMMU is (AMD 48882, 3.1, 3.2): software finds its registers by the capability, or by the IVRS."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from introspect.iommu.registers import BASE, CAPABILITY_HEADER, CAPABILITY_ID, CAPABILITY_TYPE, MISC0
from introspect.layout import Field, Structure
from vmdbg.platform.clock import Clock
from vmdbg.platform.pci.capability import Capability, Msi
from vmdbg.platform.pci.config import Rule
from vmdbg.platform.pci.dma import MSI_FIRST, MSI_LAST, Message
from vmdbg.platform.pci.function import Function

PHYSICAL_SIZE = 52
GUEST_VIRTUAL_57, VIRTUAL_SIZE = 3, 64


IOMMU_CAPABILITY = Structure(
    "IOMMU capability", 24,
    (Field("kind", 2, 2), Field("base_low", 4, 4, BASE), Field("base_high", 8, 4), Field("range", 12, 4),
     Field("misc0", 16, 4, MISC0), Field("misc1", 20, 4)),
)  # fmt: skip


class Owner(Protocol):
    """The IOMMU that a function is the face of."""

    def reset(self) -> None: ...

    def mirror_msi(self) -> None: ...


class SecureDevice(Capability):
    """Where the registers are.  Enable stays once it is set, and then the base does, too."""

    id, size = CAPABILITY_ID, IOMMU_CAPABILITY.size

    def attach(self, function: Function, offset: int) -> None:
        super().attach(function, offset)
        kind = CAPABILITY_HEADER.make(CapType=CAPABILITY_TYPE, CapRev=1, IotlbSup=1, EFRSup=1, CapExt=1) >> 16
        misc = MISC0.make(GVASize=GUEST_VIRTUAL_57, PASize=PHYSICAL_SIZE, VASize=VIRTUAL_SIZE)
        function.config.define(
            IOMMU_CAPABILITY,
            {"kind": Rule(kind), "base_low": Rule(0, BASE.Enable | BASE.BaseAddress_31_14), "base_high": Rule(0, 0xFFFFFFFF),
             "range": Rule(), "misc0": Rule(misc), "misc1": Rule()},
            offset,
        )  # fmt: skip
        self.reset()

    def reset(self) -> None:
        self._locked: tuple[int, int] | None = None

    def written(self) -> None:
        if self._locked is not None:
            self.put(IOMMU_CAPABILITY, "base_low", self._locked[0])
            self.put(IOMMU_CAPABILITY, "base_high", self._locked[1])
        elif self.get(IOMMU_CAPABILITY, "base_low") & BASE.Enable:
            self._locked = self.get(IOMMU_CAPABILITY, "base_low"), self.get(IOMMU_CAPABILITY, "base_high")

    @property
    def base(self) -> int | None:
        """None while it is not enabled."""
        low = self.get(IOMMU_CAPABILITY, "base_low")
        return self.get(IOMMU_CAPABILITY, "base_high") << 32 | low & BASE.BaseAddress_31_14 if low & BASE.Enable else None


class IommuFunction(Function):
    """`owner` is told of resets, and of what is written to the MSI capability, which registers mirror."""

    kind, title = "iommu", "an AMD IOMMU"
    vendor_id, device_id, class_code = 0x1022, 0x1419, 0x080600

    def __init__(self, clock: Clock) -> None:
        super().__init__(clock)
        self.owner: Owner | None = None

    def device_reset(self) -> None:
        if self.owner is not None:
            self.owner.reset()

    def config_written(self, offset: int, size: int) -> None:
        if self.owner is not None:
            self.owner.mirror_msi()

    def make_capabilities(self) -> Iterable[Capability]:
        return SecureDevice(), Msi()

    def message(self, address: int, data: int) -> None:
        """Its own interrupts are not remapped, and need no right to master the bus."""
        if MSI_FIRST <= address <= MSI_LAST:
            self.attached.root.dma.deliver(Message.decode(address, data))

    def enable(self, base: int) -> None:
        """What firmware does: place the registers, and lock the place."""
        at = self.secure_device.offset
        self.write_config(at + IOMMU_CAPABILITY.offset_of("base_high"), 4, base >> 32)
        self.write_config(at + IOMMU_CAPABILITY.offset_of("base_low"), 4, base & 0xFFFFFFFF | BASE.Enable)

    @property
    def secure_device(self) -> SecureDevice:
        found = self.capability(SecureDevice)
        assert found is not None
        return found

    @property
    def msi(self) -> Msi:
        found = self.capability(Msi)
        assert found is not None
        return found
