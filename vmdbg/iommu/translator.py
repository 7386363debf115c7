"""All IOMMUs of a machine, as one translator before the devices: which one it is depends on who sends."""

from __future__ import annotations

from collections.abc import Sequence

from introspect.address import Iova, Spa
from introspect.iommu.registers import WINDOW_SIZE
from introspect.pci import RequesterId
from vmdbg.iommu import ivrs
from vmdbg.iommu.config import IommuConfig
from vmdbg.iommu.function import PHYSICAL_SIZE, VIRTUAL_SIZE, IommuFunction
from vmdbg.iommu.topology import FIRST_FUNCTION, Share, shares, unit_of
from vmdbg.iommu.unit import IommuUnit
from vmdbg.platform.bus import Bus
from vmdbg.platform.clock import Clock
from vmdbg.platform.pci.bus import Bridge
from vmdbg.platform.pci.dma import PLAIN, Answer, Attributes, Dma, DmaError, Message, PageRequest, Span
from vmdbg.platform.pci.root import RootComplex

BASE = 0xFED80000
"""Where the first one's registers are; the others' follow."""


class Iommus:
    """Implements `vmdbg.platform.pci.dma.Translator`."""

    def __init__(self, config: IommuConfig, root: RootComplex, dma: Dma, clock: Clock, bus: Bus) -> None:
        self.config, self.root = config, root
        self.units: list[IommuUnit] = []
        self.shares: list[Share] = []
        for number in range(config.units):
            function = IommuFunction(clock)
            root.bus.add(function, FIRST_FUNCTION + number)
            unit = IommuUnit(number, function, dma, clock, config.strict)
            base = BASE + number * WINDOW_SIZE
            bus.add_mmio(base, base + WINDOW_SIZE - 1, unit)
            self.units.append(unit)
        dma.translator = self

    def enable(self) -> None:
        """What firmware does, once the buses have their numbers."""
        self.shares = shares(self.root, len(self.units))
        for unit in self.units:
            unit.function.enable(BASE + unit.number * WINDOW_SIZE)
            unit.manages = tuple((int(one.first), int(one.last)) for one in self.shares if one.unit == unit.number)

    def unit_for(self, requester: RequesterId) -> IommuUnit | None:
        """None for the root complex itself, which is before all of them."""
        number = unit_of(self.shares, requester)
        return None if number is None else self.units[number]

    def translate(
        self, requester: RequesterId, address: Iova, length: int, write: bool, *, quiet: bool = False,
        attributes: Attributes = PLAIN,
    ) -> Sequence[Span]:  # fmt: skip
        unit = self.unit_for(requester)
        if unit is None:
            return [Span(Spa(address), length)]
        access = attributes.access(write)._replace(empty=not length and not write)
        return unit.translation.translate(requester, address, length, access, quiet)

    def answer(
        self, requester: RequesterId, address: Iova, write: bool, *, quiet: bool = False, attributes: Attributes = PLAIN
    ) -> Answer:
        unit = self.unit_for(requester)
        if unit is None:
            raise DmaError(requester, address, write, "no IOMMU is there to translate for it")
        return unit.translation.answer(requester, address, attributes.access(write, request=True), quiet)

    def ask(self, requester: RequesterId, request: PageRequest) -> None:
        unit = self.unit_for(requester)
        if unit is not None and unit.view.enabled:
            unit.page_requests.ask(requester, request)

    def invalidated(self, requester: RequesterId, tag: int) -> None:
        unit = self.unit_for(requester)
        if unit is not None:
            unit.commands.answered(tag)

    def used(self, requester: RequesterId, address: int, spa: int, write: bool, attributes: Attributes = PLAIN) -> None:
        unit = self.unit_for(requester)
        if unit is not None:
            unit.translation.staleness.device(requester, address, spa, attributes.access(write, request=True))

    def remap(self, requester: RequesterId, address: Iova, data: int, *, quiet: bool = False) -> Sequence[Message]:
        unit = self.unit_for(requester)
        return [Message.decode(address, data)] if unit is None else unit.remap(requester, address, data, quiet)

    def acpi_table(self, ioapic: RequesterId, kinds: Sequence[int] = ivrs.KINDS) -> bytes:
        """The IVRS, which describes them: sizes of addresses as their capabilities have them."""
        tables = [
            ivrs.UnitTable(
                unit.function.address, unit.function.secure_device.offset, BASE + unit.number * WINDOW_SIZE,
                unit.registers["extended_features"], unit.registers["extended_features2"],
            )
            for unit in self.units
        ]  # fmt: skip
        facts = ivrs.Facts(PHYSICAL_SIZE, VIRTUAL_SIZE, ioapic)
        return ivrs.build(facts, tables, self.shares, self._aliases(), self.config.reserved, kinds)

    def _aliases(self) -> list[ivrs.Alias]:
        """Devices on conventional PCI: their transactions come from the bridge."""
        return [
            ivrs.Alias(
                RequesterId(bridge.header_field("secondary_bus") << 8),
                RequesterId(bridge.header_field("subordinate_bus") << 8 | 0xFF), bridge.requester,
            )
            for bridge in self.root.functions if isinstance(bridge, Bridge) and not bridge.express
        ]  # fmt: skip
