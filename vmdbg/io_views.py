"""What debuggers see of the machine's IOMMUs, if it has any."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from gdbstub.target import ThreadId
from introspect.commands.devices import CachedPage
from introspect.expression import Space
from introspect.iommu.state import Iommu
from introspect.iommu.walk import locate
from introspect.pci import RequesterId
from vmdbg.history import HOST
from vmdbg.iommu.unit import IommuUnit
from vmdbg.machine import Machine
from vmdbg.registers import Registers
from vmdbg.scopes import PAGE, ThreadScope

HOST_BRIDGE = 0x060000


def _units(machine: Machine) -> Sequence[IommuUnit]:
    found = machine.chipset.iommus
    return () if found is None else found.units


def iommus(machine: Machine) -> Sequence[Iommu]:
    """With rings and status as they are now."""
    return [replace(unit.view, registers=unit.registers.snapshot()) for unit in _units(machine)]


def device_names(machine: Machine) -> Mapping[int, str]:
    """What kind each function on PCI is, by the requester ID of its transactions; those of the processor's side make none."""
    return {
        int(function.requester): function.kind for function in machine.chipset.root.functions
        if function.class_code != HOST_BRIDGE
    }  # fmt: skip


def iotlb(machine: Machine) -> Sequence[CachedPage]:
    """Every translation that is kept."""
    kept = (
        (unit.number, key, one.page) for unit in _units(machine) for key, sizes in unit.caches.pages.items()
        for held in sizes.values() for one in held.values()
    )  # fmt: skip
    return [
        CachedPage(number, key.domain, key.device, key.pasid, page.first, page.size, int(page.spa), page.read, page.write)
        for number, key, page in kept
    ]


def cached_entries(machine: Machine) -> Sequence[tuple[int, int]]:
    """(number of the IOMMU, DeviceID) of device table entries that are kept."""
    return [(unit.number, device) for unit in _units(machine) for device in unit.caches.devices]


class DeviceScope(ThreadScope):
    """A device as the owner of addresses in an expression; registers are the hypervisor's."""

    def __init__(self, registers: Registers, device: RequesterId) -> None:
        super().__init__(registers, ThreadId(HOST, 1), {})
        self.device = device

    def read(self, space: Space, address: int, size: int) -> bytes:
        """By the tables as they are in memory."""
        if space != Space.IOVA:
            return super().read(space, address, size)
        machine = self.registers.who.machine
        iommu = next((one for one in iommus(machine) if one.handles(self.device)), None)
        data = bytearray()
        while len(data) < size:
            at = address + len(data) & (1 << 64) - 1
            length = min(size - len(data), PAGE - at % PAGE)
            spa = locate(machine.ram, iommu, self.device, at)
            if spa is None or not machine.ram.contains(spa, length):
                break
            data += machine.ram.view[spa : spa + length]
        return bytes(data)
