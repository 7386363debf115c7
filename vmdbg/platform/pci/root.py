"""The root complex: configuration accesses, decoding of BARs, interrupt lines of the root bus."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import NamedTuple

from introspect.pci import RequesterId
from vmdbg.platform.bus import Claim, Route, State
from vmdbg.platform.clock import Clock
from vmdbg.platform.debugexit import ResetControl
from vmdbg.platform.pci.bus import Bridge, PciBus
from vmdbg.platform.pci.config import CONVENTIONAL, SIZE
from vmdbg.platform.pci.dma import Dma
from vmdbg.platform.pci.function import Bar, Function, Region

CONFIG_PORT, LAST_CONFIG_PORT = 0xCF8, 0xCFF
ECAM, ECAM_SIZE = 0xE0000000, 256 << 20
"""MMCONFIG: 1 MiB for each of 256 buses."""
ENABLE = 1 << 31
FIRST_GSI = 16
"""Of the root bus's four interrupt lines at the I/O APIC."""
PIC_IRQS = (10, 11, 10, 11)
"""And at the 8259."""
MEMORY = (0xC0000000, 0xDFFFFFFF)
MORE_MEMORY = (0xF0000000, 0xFEBFFFFF)
PORTS = (0xC000, 0xFFFF)
"""Addresses of the root bus that firmware gives to BARs, or leaves to software."""


class HostBridge(Function):
    """The root complex as software finds it on its own bus."""

    kind, title = "host-bridge", "the root complex on its own bus"
    vendor_id, device_id, class_code = 0x1B36, 0x0008, 0x060000


class Window(NamedTuple):
    """A BAR, or what a bridge lets through of it, at addresses or ports."""

    function: Function
    bar: Bar
    skip: int
    first: int

    def read_mmio(self, offset: int, size: int) -> int:
        return self.function.access(self.bar, offset + self.skip, size, None)

    def write_mmio(self, offset: int, size: int, value: int) -> None:
        self.function.access(self.bar, offset + self.skip, size, value)

    def read_port(self, port: int, size: int) -> int:
        return self.read_mmio(port - self.first, size)

    def write_port(self, port: int, size: int, value: int) -> None:
        self.write_mmio(port - self.first, size, value)


class RootComplex:
    """Bus 0 and what hangs off it."""

    def __init__(self, dma: Dma, clock: Clock, interrupt: Callable[[int, bool], None]) -> None:
        """`interrupt(line, level)`: one of the root bus's four interrupt lines has changed."""
        self.dma, self.clock, self.interrupt = dma, clock, interrupt
        self.bus = PciBus(self)
        self._asserting: list[set[Function]] = [set() for _ in range(4)]
        self._decoded: list[Region] | None = None
        self._routes: tuple[list[Route[Window]], list[Route[Window]]] = ([], [])
        """Of what is decoded: in memory, at ports."""
        self.bus.add(HostBridge(clock), 0)
        dma.names, dma.endpoint = self.name_of, self._endpoint

    @property
    def functions(self) -> list[Function]:
        return list(self.bus.walk())

    def find(self, address: RequesterId) -> Function | None:
        return self.bus.find(address.bus, address & 0xFF)

    def name_of(self, requester: RequesterId) -> str:
        function = self.find(requester)
        return f"{function.kind} {requester}" if function is not None else str(requester)

    def _endpoint(self, requester: RequesterId) -> Function | None:
        """A bridge to conventional PCI hides what is behind it."""
        function = self.find(requester)
        return function if function is not None and function.requester == requester else None

    def buses(self) -> list[PciBus]:
        return [self.bus, *(function.secondary for function in self.functions if isinstance(function, Bridge))]

    def reset(self) -> None:
        for function in self.functions:
            function.reset()

    # Configuration

    def read_config(self, address: RequesterId, offset: int, size: int) -> int:
        """All ones where no function is (master abort)."""
        function = self.find(address)
        return (1 << 8 * size) - 1 if function is None else function.read_config(offset, size)

    def write_config(self, address: RequesterId, offset: int, size: int, value: int) -> None:
        function = self.find(address)
        if function is not None:
            function.write_config(offset, size, value)

    # MMCONFIG; an access across the border of two functions reaches neither.

    def read_mmio(self, offset: int, size: int) -> int:
        if offset % SIZE + size > SIZE:
            return -1
        return self.read_config(RequesterId(offset >> 12), offset % SIZE, size)

    def write_mmio(self, offset: int, size: int, value: int) -> None:
        if offset % SIZE + size <= SIZE:
            self.write_config(RequesterId(offset >> 12), offset % SIZE, size, value)

    # BARs

    def changed(self) -> None:
        self._decoded = None

    def regions(self) -> list[Region]:
        if self._decoded is None:
            self._decoded = list(self.bus.regions())
            self._routes = ([], [])
            for region in self._decoded:
                window = Window(region.function, region.bar, region.first - region.base, region.first)
                self._routes[region.io].append(Route(region.first, region.last, window, region.bar.width))
        return self._decoded

    def route(self, address: int, io: bool) -> Route[Window] | None:
        """Who answers at an address that is no fixed device's; of several the first on the bus."""
        if self._decoded is None:
            self.regions()
        for route in self._routes[io]:
            if route.first <= address <= route.last:
                return route
        return None

    def claims(self, io: bool) -> list[Claim]:
        found = [Claim(region.first, region.last, region.function) for region in self.regions() if region.io == io]
        return sorted(found, key=attrgetter("first"))

    # For people

    name, title = "mmconfig", "configuration space of PCI, 4 KiB a function"

    def state(self) -> State:
        return {"functions": len(self.functions), "buses": len(self.buses())}

    # Interrupt lines

    def set_intx(self, line: int, source: Function, level: bool) -> None:
        asserting = self._asserting[line]
        before = bool(asserting)
        if level:
            asserting.add(source)
        else:
            asserting.discard(source)
        if bool(asserting) != before:
            self.interrupt(line, not before)


class ConfigPorts:
    """0xcf8 and 0xcfc, configuration mechanism 1, and between them the reset control register at 0xcf9."""

    def __init__(self, root: RootComplex, reset_control: ResetControl) -> None:
        self.root, self.reset_control = root, reset_control
        self.address = 0

    name, title = "pci-config", "configuration mechanism 1 of PCI, and the reset control register"

    def state(self) -> State:
        return {"address": self.address, **self.reset_control.state()}

    def reset(self) -> None:
        self.address = 0
        self.reset_control.reset()

    def _target(self, port: int) -> tuple[RequesterId, int] | None:
        """The function and offset that an access to the data port is for."""
        if not self.address & ENABLE:
            return None
        return RequesterId(self.address >> 8 & 0xFFFF), (self.address & 0xFC) + (port & 3)

    def read_port(self, port: int, size: int) -> int:
        if port == CONFIG_PORT and size == 4:
            return self.address
        if port == 0xCF9 and size == 1:
            return self.reset_control.read_port(port, size)
        target = self._target(port)
        if port < CONFIG_PORT + 4 or target is None:
            return -1
        assert target[1] + size <= CONVENTIONAL
        return self.root.read_config(target[0], target[1], size)

    def write_port(self, port: int, size: int, value: int) -> None:
        if port == CONFIG_PORT and size == 4:
            self.address = value & 0x80FFFFFC
        elif port == 0xCF9 and size == 1:
            self.reset_control.write_port(port, size, value)
        elif port >= CONFIG_PORT + 4:
            target = self._target(port)
            if target is not None:
                self.root.write_config(target[0], target[1], size, value)
