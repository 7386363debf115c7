"""What a PC's firmware does before it starts an operating system: bus numbers, BARs, windows of bridges, interrupt lines.

It goes through configuration accesses as software does, so that its result is what software could have made.
"""

from __future__ import annotations

from dataclasses import dataclass

from introspect.pci import COMMAND, HEADER1, RequesterId
from vmdbg.platform.pci.bus import Bridge, PciBus
from vmdbg.platform.pci.function import Bar, Function
from vmdbg.platform.pci.root import MEMORY, PIC_IRQS, PORTS, RootComplex

IO_WINDOW, MEMORY_WINDOW = 0x1000, 1 << 20
"""Granularity of a bridge's windows."""


class NoRoom(Exception):
    """The devices' BARs need more than there is."""


@dataclass
class Space:
    """Addresses that are given away in order."""

    next: int
    last: int

    def take(self, size: int, alignment: int) -> int:
        at = -(-self.next // alignment) * alignment
        if at + size - 1 > self.last:
            raise NoRoom(f"{size:#x} bytes of BARs do not fit below {self.last:#x}; leave devices out")
        self.next = at + size
        return at

    def align(self, alignment: int) -> int:
        self.next = -(-self.next // alignment) * alignment
        return self.next


class Firmware:
    """One pass over the buses.  `high`: the range for 64-bit BARs too large for the space below 4 GiB, if there is one."""

    def __init__(self, root: RootComplex, high: tuple[int, int] | None = None) -> None:
        self.root = root
        half = (MEMORY[0] + MEMORY[1] + 1) // 2
        self.spaces = {
            "io": Space(*PORTS), "memory": Space(MEMORY[0], half - 1), "prefetchable": Space(half, MEMORY[1]),
        }  # fmt: skip
        self.high = Space(*high) if high else None
        self._buses = 0

    def run(self) -> None:
        """NoRoom if the devices do not fit."""
        self._number(self.root.bus)
        self._place(self.root.bus)

    def _put(self, function: Function, name: str, value: int) -> None:
        field = function.header[name]
        self.root.write_config(function.address, field.offset, field.size, value)

    def _number(self, bus: PciBus) -> None:
        number = bus.number
        for function in bus.functions.values():
            if isinstance(function, Bridge):
                self._buses += 1
                self._put(function, "primary_bus", number)
                self._put(function, "secondary_bus", self._buses)
                self._put(function, "subordinate_bus", 0xFF)
                self._number(function.secondary)
                self._put(function, "subordinate_bus", self._buses)

    def _place(self, bus: PciBus) -> None:
        """The largest BARs first, so that little is lost to alignment; then what is behind each bridge."""
        wanted = [(bar, function) for function in bus.functions.values() for bar in function.bars]
        for bar, function in sorted(wanted, key=_largest_first):
            self._place_bar(bar, function, bus)
        for function in bus.functions.values():
            if isinstance(function, Bridge):
                self._open(function)
            self._put(function, "command", COMMAND.IO | COMMAND.MEMORY)
            if function.interrupt_pin:
                self._put(function, "interrupt_line", self._line(function))

    def _place_bar(self, bar: Bar, function: Function, bus: PciBus) -> None:
        space = self.spaces["io" if bar.io else "prefetchable" if bar.prefetchable else "memory"]
        if bar.wide and self.high is not None and bus.bridge is None and space.next + 2 * bar.size > space.last:
            space = self.high
        address = space.take(bar.size, bar.size)
        self._put(function, f"bar{bar.index}", address & 0xFFFFFFFF)
        if bar.wide:
            self._put(function, f"bar{bar.index + 1}", address >> 32)

    def _open(self, bridge: Bridge) -> None:
        """Windows around what is placed behind it; one that would be empty stays closed, its base above its limit."""
        grains = {"io": IO_WINDOW, "memory": MEMORY_WINDOW, "prefetchable": MEMORY_WINDOW}
        first = {name: self.spaces[name].align(grain) for name, grain in grains.items()}
        self._place(bridge.secondary)
        for name, grain in grains.items():
            low, high = first[name], self.spaces[name].align(grain) - 1
            if high < low:
                low, high = (0xF000, 0x0FFF) if name == "io" else (0xFFF00000, 0x000FFFFF)
            shift = 8 if name == "io" else 16
            self._put(bridge, f"{name}_base", low >> shift & 0xFFFF)
            self._put(bridge, f"{name}_limit", high >> shift & 0xFFFF)
            if name == "prefetchable":
                self._put(bridge, "prefetchable_base_upper", low >> 32)
                self._put(bridge, "prefetchable_limit_upper", high >> 32)

    def _line(self, function: Function) -> int:
        """The 8259's IRQ that its pin comes to."""
        pin, bus, devfn = function.interrupt_pin - 1, function.attached, function.devfn
        while bus.bridge is not None:
            pin, devfn, bus = pin + (devfn >> 3) & 3, bus.bridge.devfn, bus.bridge.attached
        return PIC_IRQS[pin + (devfn >> 3) & 3]


def _largest_first(item: tuple[Bar, Function]) -> tuple[int, RequesterId, int]:
    bar, function = item
    return -bar.size, function.address, bar.index


assert HEADER1.size_of("io_base") == 1
