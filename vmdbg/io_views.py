"""What debuggers see of the machine's IOMMUs, if it has any."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from gdbstub.target import ThreadId
from introspect.commands.devices import CachedEntry, CachedPage
from introspect.expression import Space
from introspect.iommu.state import Iommu
from introspect.iommu.walk import locate
from introspect.pci import RequesterId
from vmdbg.history import HOST
from vmdbg.iommu.unit import IommuUnit
from vmdbg.machine import Machine
from vmdbg.platform.pci.ats import Ats
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
    """Every translation that is kept, by the IOMMUs and by devices themselves."""
    kept = (
        (unit.number, key, one.page) for unit in _units(machine) for key, sizes in unit.caches.pages.items()
        for held in sizes.values() for one in held.values()
    )  # fmt: skip
    found = [
        CachedPage(number, key.domain, key.device, key.pasid, page.first, page.size, int(page.spa), page.read, page.write)
        for number, key, page in kept
    ]
    for function in machine.chipset.root.functions:
        ats, device = function.capability(Ats), function.requester
        unit = machine.chipset.iommus.unit_for(device) if ats is not None and machine.chipset.iommus is not None else None
        if ats is None or unit is None:
            continue
        found += [
            CachedPage(unit.number, 0, device, pasid, page.first, page.size, page.spa, page.read, page.write, True)
            for (pasid, _), sizes in ats.kept.items() for held in sizes.values() for page in held.values()
        ]
    return found


def cached_entries(machine: Machine) -> Sequence[CachedEntry]:
    """Of device tables, interrupt tables and page directories that are kept."""
    return [one for unit in _units(machine) for one in _entries(unit)]


def _entries(unit: IommuUnit) -> Iterator[CachedEntry]:
    caches, number = unit.caches, unit.number
    for device, data in caches.devices.items():
        yield CachedEntry(number, "device table", str(RequesterId(device)), unit.view.entry_address(device) or 0, data)
    for device, entries in caches.interrupts.items():
        for spa, data in entries.items():
            yield CachedEntry(number, "interrupt table", str(RequesterId(device)), spa, data)
    for (domain, pasid), kept in caches.directories.items():
        who = f"domain {domain:#x}" + ("" if pasid is None else f", PASID {pasid:#x}")
        for spa, data in kept.data.items():
            yield CachedEntry(number, "page directory", who, spa, data)


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
