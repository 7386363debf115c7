"""`mtree`, `devices` and the commands of single devices: what the platform is and holds now, without side effects."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from introspect.commands import Arguments, Command, CommandError, Context
from introspect.commands.inferior_state import MapRange
from introspect.commands.parameters import Candidate, Number, Parameter, Text
from introspect.commands.render import columns, members, size_text
from vmdbg.platform.bus import Inspectable, State
from vmdbg.platform.lapic_state import lapic_state

if TYPE_CHECKING:
    from vmdbg.debugger import Debugger
    from vmdbg.machine import Machine


def _name(device: object) -> str:
    return device.name if isinstance(device, Inspectable) else type(device).__name__.lower()


def physical_map(machine: Machine) -> list[MapRange]:
    """System-physical addresses: RAM, devices, the APICs' pages (each seen by its own CPU only)."""
    found = [MapRange(first, end - 1, "RAM", "the machine") for first, end in machine.ram.ranges]
    found += [MapRange(claim.first, claim.last, "MMIO", _name(claim.device)) for claim in machine.bus.mmio_claims()]
    bases = dict.fromkeys(base for cpu in machine.cpus if (base := cpu.lapic.mmio_base) is not None)
    for base in bases:
        cpus = ", ".join(f"CPU {cpu.index}" for cpu in machine.cpus if cpu.lapic.mmio_base == base)
        found.append(MapRange(base, base + 0xFFF, "APIC", cpus))
    return sorted(found, key=lambda one: (one.first, one.kind == "RAM"))


def _span(ends: tuple[int, int]) -> str:
    first, last = ends
    return f"{first:#x}" if first == last else f"{first:#x}-{last:#x}"


@dataclass(frozen=True, slots=True)
class MapView:
    """What physical addresses and ports lead to. An APIC's page lies over RAM for its own CPU."""

    memory: tuple[MapRange, ...]
    ports: tuple[MapRange, ...]

    def text(self) -> str:
        rows = [(_span(one[:2]), size_text(one.last - one.first + 1), one.kind, one.owner) for one in self.memory]
        ports = [(_span(one[:2]), one.owner) for one in self.ports]
        return "\n".join(["memory (system-physical):", *columns(rows, "  "), "ports:", *columns(ports, "  "),
                          "All else reads as ones and swallows writes."])  # fmt: skip

    def json(self) -> object:
        return members(self)


@dataclass(frozen=True, slots=True)
class DeviceView:
    name: str
    title: str
    ports: tuple[tuple[int, int], ...]
    memory: tuple[tuple[int, int], ...]
    state: State

    def lines(self) -> Iterator[str]:
        """In full."""
        yield f"{self.name}: {self.title}"
        places = [*(f"ports {_span(one)}" for one in self.ports), *(f"memory {_span(one)}" for one in self.memory)]
        if places:
            yield f"  at {', '.join(places)}"
        yield from columns([(key, f"{value:#x}" if isinstance(value, int) else value) for key, value in self.state.items()], "  ")


@dataclass(frozen=True, slots=True)
class Devices:
    devices: tuple[DeviceView, ...]
    full: bool

    def text(self) -> str:
        if self.full:
            return "\n".join(line for device in self.devices for line in device.lines())
        return "\n".join(columns(
            (one.name, one.title, " ".join([*map(_span, one.ports), *(f"mem:{_span(place)}" for place in one.memory)]))
            for one in self.devices
        ))  # fmt: skip

    def json(self) -> object:
        return members(self)


def _devices(machine: Machine) -> list[DeviceView]:
    ports, memory = machine.bus.port_claims(), machine.bus.mmio_claims()
    every = {id(claim.device): claim.device for claim in [*ports, *memory]}
    views = [
        DeviceView(
            _name(device), device.title if isinstance(device, Inspectable) else type(device).__name__,
            tuple((claim.first, claim.last) for claim in ports if claim.device is device),
            tuple((claim.first, claim.last) for claim in memory if claim.device is device),
            device.state() if isinstance(device, Inspectable) else {},
        )
        for device in every.values()
    ]  # fmt: skip
    for cpu in machine.cpus:
        base = cpu.lapic.mmio_base
        place = () if base is None else ((base, base + 0xFFF),)
        views.append(DeviceView(f"lapic{cpu.index}", f"local APIC of CPU {cpu.index}", (), place, lapic_state(cpu.lapic)))
    return views


@dataclass(frozen=True)
class _DeviceName(Text):
    """A device of the machine."""

    noun: str = "the name of a device"
    listed: Callable[[], Iterable[DeviceView]] = list

    def complete(self, context: Context, prefix: str) -> Iterable[Candidate]:
        return [Candidate(one.name, one.title) for one in self.listed()]


_PAIR = {
    "ioapic": "the I/O APIC", "pic": "the 8259A interrupt controllers", "pit": "the 8254 interval timer",
    "rtc": "the real-time clock and CMOS memory",
}  # fmt: skip


class PlatformCommands:
    """Those of one debugger's machine."""

    def __init__(self, debugger: Debugger) -> None:
        self.debugger = debugger
        name = _DeviceName(listed=lambda: _devices(self.machine))
        self._named = Parameter("NAME", name, optional=True, help="this one, with what it holds now")
        self._cpu = Parameter("CPU", Number(0, 254), optional=True, help="of this CPU; else of each")
        quiet = "Nothing changes: no register is read as software would read it."
        self.commands = (
            Command("mtree", self._mtree, "Show the physical memory map, RAM, devices and their owners, and the ports.", (),
                    "Of the machine, that is of the hypervisor; what a guest has instead is in its nested page tables: `npt`.",
                    ("mtree", "mtree --json")),
            Command("devices", self._show, "List the devices, or show what one holds now.", (self._named,), quiet,
                    ("devices", "devices com1")),
            Command("lapic", self._lapic, "Show the local APICs: mode, priorities, vectors requested and in service, LVT, timer.",
                    (self._cpu,), f"{quiet} A guest's virtual APIC is shown by `avic`.", ("lapic", "lapic 0 --json")),
            *(self._single(name, what) for name, what in _PAIR.items()),
        )  # fmt: skip

    @property
    def machine(self) -> Machine:
        """The one that is there now: a restart makes another."""
        return self.debugger.machine

    def _single(self, name: str, what: str) -> Command:
        def run(context: Context, arguments: Arguments) -> Devices:
            return self._named_device(name)

        return Command(name, run, f"Show what {what} holds now." if not what.endswith("s") else f"Show what {what} hold now.", (),
                       f"The same as `devices {name}`.", (name, f"{name} --json"))  # fmt: skip

    def _mtree(self, context: Context, arguments: Arguments) -> MapView:
        machine = self.machine
        ports = (MapRange(claim.first, claim.last, "port", _name(claim.device)) for claim in machine.bus.port_claims())
        return MapView(tuple(physical_map(machine)), tuple(ports))

    def _named_device(self, name: str) -> Devices:
        known = _devices(self.machine)
        found = tuple(view for view in known if view.name == name)
        if not found:
            raise CommandError(name, "the machine has no such device", f"it has {', '.join(view.name for view in known)}")
        return Devices(found, True)

    def _show(self, context: Context, arguments: Arguments) -> Devices:
        name = arguments.get(self._named)
        return Devices(tuple(_devices(self.machine)), False) if name is None else self._named_device(name)

    def _lapic(self, context: Context, arguments: Arguments) -> Devices:
        cpu = arguments.get(self._cpu)
        if cpu is not None:
            return self._named_device(f"lapic{cpu}")
        return Devices(tuple(view for view in _devices(self.machine) if view.name.startswith("lapic")), True)
