"""Buses, the bridges between them, and how addresses and interrupt pins pass these."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

from introspect.pci import BRIDGE_CONTROL, COMMAND, HEADER1, windows
from vmdbg.platform.clock import Clock
from vmdbg.platform.pci.capability import ROOT_PORT, Acs, Capability, Express, ExtendedCapability, Msi, Power
from vmdbg.platform.pci.config import Rule
from vmdbg.platform.pci.dma import Dma
from vmdbg.platform.pci.function import STATUS_ERRORS, Function, Region


class Root(Protocol):
    """The root complex, as buses and functions see it."""

    @property
    def dma(self) -> Dma: ...

    def changed(self) -> None:
        """Who answers where may be another now."""

    def set_intx(self, line: int, source: Function, level: bool) -> None:
        """One of the four interrupt lines of the root bus, 0 to 3."""


class PciBus:
    """The functions on one bus, by device and function number."""

    def __init__(self, root: Root, bridge: Bridge | None = None) -> None:
        self.root, self.bridge = root, bridge
        self.functions: dict[int, Function] = {}

    @property
    def number(self) -> int:
        return 0 if self.bridge is None else self.bridge.header_field("secondary_bus")

    def add(self, function: Function, devfn: int) -> None:
        """ValueError if the place is taken, or there is none."""
        if devfn in self.functions:
            raise ValueError(f"{self.functions[devfn].kind} is at {devfn >> 3:02x}.{devfn & 7} already; choose another slot")
        function.attach(self, devfn)
        self.functions[devfn] = function
        self.functions = dict(sorted(self.functions.items()))
        first = self.functions.get(devfn & ~7)
        if first is not None and any(at >> 3 == devfn >> 3 and at & 7 for at in self.functions):
            first.mark_multifunction()
            first.config.reset()
        self.root.changed()

    def walk(self) -> Iterator[Function]:
        """Every function here and below, each bridge before what is behind it."""
        for function in self.functions.values():
            yield function
            if isinstance(function, Bridge):
                yield from function.secondary.walk()

    def find(self, bus: int, devfn: int) -> Function | None:
        """Whom a configuration access reaches: bridges pass it on by their bus numbers."""
        if bus == self.number and (bus or self.bridge is None):
            return self.functions.get(devfn)
        for function in self.functions.values():
            if isinstance(function, Bridge):
                low, high = function.header_field("secondary_bus"), function.header_field("subordinate_bus")
                if low and low <= bus <= high:
                    return function.secondary.find(bus, devfn)
        return None

    def regions(self) -> Iterator[Region]:
        """Where functions answer: own ranges, and behind bridges what the windows let through."""
        for function in self.functions.values():
            yield from function.regions()
            if isinstance(function, Bridge):
                yield from function.let_through(function.secondary.regions())

    def set_intx(self, function: Function, level: bool) -> None:
        """A pin of a function: behind a bridge, one of the bridge's own, by the usual swizzle."""
        pin, bus, devfn = function.interrupt_pin - 1, self, function.devfn
        while bus.bridge is not None:
            pin = pin + (devfn >> 3) & 3
            devfn, bus = bus.bridge.devfn, bus.bridge.attached
        self.root.set_intx(pin + (devfn >> 3) & 3, function, level)


class Bridge(Function):
    """A root port of PCI Express: one device below it, or functions of one.  `PciBridge` leads to conventional PCI."""

    kind, title = "bridge", "a root port of PCI Express"
    vendor_id, device_id, class_code = 0x1B36, 0x000C, 0x060400
    header, header_type = HEADER1, 1
    interrupt_pin = 1
    express = True

    def __init__(self, clock: Clock) -> None:
        super().__init__(clock)
        self._resetting = False

    def make_capabilities(self) -> Iterable[Capability]:
        return Express(ROOT_PORT), Power(), Msi()

    def make_extended(self) -> Iterable[ExtendedCapability]:
        return (Acs(),)

    def attach(self, bus: PciBus, devfn: int) -> None:
        self.secondary = PciBus(bus.root, self)
        super().attach(bus, devfn)

    def _define(self) -> None:
        super()._define()
        byte, wide = Rule(0, 0xFF), Rule(0, 0xFFFFFFFF)
        self.config.define(
            HEADER1,
            {
                "primary_bus": byte, "secondary_bus": byte, "subordinate_bus": byte,
                "io_base": Rule(1, 0xF0), "io_limit": Rule(1, 0xF0), "io_base_upper": Rule(0, 0xFFFF),
                "io_limit_upper": Rule(0, 0xFFFF), "secondary_status": Rule(0, 0, STATUS_ERRORS),
                "memory_base": Rule(0, 0xFFF0), "memory_limit": Rule(0, 0xFFF0),
                "prefetchable_base": Rule(1, 0xFFF0), "prefetchable_limit": Rule(1, 0xFFF0),
                "prefetchable_base_upper": wide, "prefetchable_limit_upper": wide,
                "bridge_control": Rule(0, BRIDGE_CONTROL.PARITY | BRIDGE_CONTROL.SERR | BRIDGE_CONTROL.BUS_RESET),
            },
        )  # fmt: skip

    def let_through(self, regions: Iterable[Region]) -> Iterator[Region]:
        """Those parts of ranges behind it that its windows pass on."""
        command, opened = self.header_field("command"), windows(self.config.bytes)
        if not self.awake:
            return
        for region in regions:
            if not command & (COMMAND.IO if region.io else COMMAND.MEMORY):
                continue
            for name in ("io",) if region.io else ("memory", "prefetchable"):
                low, high = opened.get(name, (1, 0))
                first, last = max(region.first, low), min(region.last, high)
                if first <= last:
                    yield region._replace(first=first, last=last)

    def config_written(self, offset: int, size: int) -> None:
        resetting = bool(self.header_field("bridge_control") & BRIDGE_CONTROL.BUS_RESET)
        if resetting and not self._resetting:
            for function in self.secondary.walk():
                function.reset()
        self._resetting = resetting

    def device_reset(self) -> None:
        self._resetting = False


class PciBridge(Bridge):
    """A bridge to a conventional PCI bus of 32 slots, whose devices' transactions come from the bridge itself."""

    kind, title = "pci-bridge", "a bridge to conventional PCI"
    device_id = 0x0001
    interrupt_pin = 0
    express = False

    def make_capabilities(self) -> Iterable[Capability]:
        return (Power(),)
