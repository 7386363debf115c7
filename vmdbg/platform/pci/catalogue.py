"""The devices that can be asked for, and how: `--device KIND[,slot=DD.F][,bus=ID][,id=ID][,OPTION=VALUE...]`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from introspect.pci import RequesterId
from vmdbg.platform.clock import Clock
from vmdbg.platform.pci.bus import Bridge, PciBridge, PciBus
from vmdbg.platform.pci.edu import Edu, EduOptions
from vmdbg.platform.pci.function import Function
from vmdbg.platform.pci.root import RootComplex
from vmdbg.platform.serial import SerialError, open_serial
from vmdbg.platform.virtio.blk import Blk
from vmdbg.platform.virtio.console import Console
from vmdbg.platform.virtio.disk import DiskError, open_disk
from vmdbg.platform.virtio.net import Net
from vmdbg.platform.virtio.pcap import PcapError, PcapWriter, read_pcap
from vmdbg.platform.virtio.rng import Rng

TAKEN_SLOTS = (0x00, 0x14, 0x18)
"""Of the root bus: the host bridge, the requester ID of the I/O APIC, a processor's northbridge."""
MOST_DEVICES = 200


class DeviceError(ValueError):
    """A device that cannot be made, with what to do instead."""


@dataclass(frozen=True)
class DeviceSpec:
    """One device as it was asked for."""

    kind: str
    slot: int | None = None
    """devfn on its bus; the first free one if None."""
    bus: str = ""
    """The `id` of the bridge it is behind; the root bus if empty."""
    id: str = ""
    options: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> DeviceSpec:
        """Raises `DeviceError`."""
        kind, *words = text.split(",")
        if kind not in KINDS:
            raise DeviceError(f"there is no device {kind!r}; choose from {', '.join(KINDS)}")
        values: dict[str, str] = {}
        for word in words:
            key, equals, value = word.partition("=")
            if not equals or not key or key in values:
                raise DeviceError(f"{word!r} of device {kind} is not KEY=VALUE, each key once; write {kind},slot=03.0")
            values[key] = value
        slot = values.pop("slot", None)
        devfn = None if slot is None else RequesterId.parse(slot)
        if slot is not None and (devfn is None or ":" in slot):
            raise DeviceError(f"slot {slot!r} is not DEVICE.FUNCTION, in hexadecimal; write slot=03.0")
        spec = cls(kind, devfn, values.pop("bus", ""), values.pop("id", ""), values)
        known = KINDS[kind].options
        for key in values:
            if key not in known:
                keys = ", ".join(("slot", "bus", "id", *known))
                raise DeviceError(f"device {kind} has no option {key!r}; it has {keys}")
        return spec

    def number(self, key: str, default: int, low: int, high: int) -> int:
        text = self.options.get(key)
        if text is None:
            return default
        try:
            value = int(text, 0)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise DeviceError(f"{key}={text} of device {self.kind} is not a number from {low} to {high}; choose one")
        return value

    def flag(self, key: str, default: bool) -> bool:
        text = self.options.get(key, "on" if default else "off")
        if text not in ("on", "off"):
            raise DeviceError(f"{key}={text} of device {self.kind} is neither on nor off; write {key}=on")
        return text == "on"


class Kind(NamedTuple):
    """A device that can be asked for: how it is made, what it is, its options with what they mean."""

    make: Callable[[Clock, DeviceSpec], Function]
    what: str
    options: Mapping[str, str] = {}


def _edu(clock: Clock, spec: DeviceSpec) -> Function:
    return Edu(clock, EduOptions(spec.number("dma-mask", 28, 12, 64), spec.flag("express", True)))


def _blk(clock: Clock, spec: DeviceSpec) -> Function:
    path, write, read_only = spec.options.get("file"), spec.flag("write", False), spec.flag("readonly", False)
    if path is None:
        raise DeviceError("device virtio-blk has no image; write virtio-blk,file=disk.img")
    if write and read_only:
        raise DeviceError("write=on and readonly=on of device virtio-blk exclude each other; choose one")
    try:
        disk = open_disk(path, write=write)
    except DiskError as error:
        raise DeviceError(f"device virtio-blk: {error}") from None
    return Blk(clock, disk, read_only=read_only, serial=spec.options.get("serial", "vmdbg"))


def _console(clock: Clock, spec: DeviceSpec) -> Function:
    try:
        return Console(clock, open_serial(spec.options.get("chardev", "null")))
    except SerialError as error:
        raise DeviceError(f"device virtio-console: {error}") from None


def _net(clock: Clock, spec: DeviceSpec) -> Function:
    text = spec.options.get("mac", "52:54:00:12:34:56")
    try:
        mac = bytes.fromhex(text.replace(":", ""))
    except ValueError:
        mac = b""
    if len(mac) != 6 or mac[0] & 1:
        raise DeviceError(f"mac={text} of device virtio-net is no address of one card; write mac=52:54:00:12:34:56")
    capture, replay = spec.options.get("pcap"), spec.options.get("replay")
    try:
        frames = tuple(read_pcap(replay)) if replay is not None else ()
        writer = PcapWriter(capture) if capture is not None else None
    except PcapError as error:
        raise DeviceError(f"device virtio-net: {error}") from None
    return Net(clock, mac, peer=spec.flag("peer", True), capture=writer, replay=frames)


_ATS = {"ats": "on: it asks an IOMMU for translations, and keeps them (off)"}

KINDS: dict[str, Kind] = {
    "edu": Kind(
        _edu, "a device to try drivers and DMA on, as QEMU's edu",
        {"dma-mask": "address bits of its DMA (28)", "express": "on, or off for no PCI Express capability (on)",
         "ats": "on: it asks an IOMMU for translations and pages, and its requests have PASIDs (off)"},
    ),
    "virtio-blk": Kind(
        _blk, "a disk",
        {"file": "the image, raw or qcow2", "write": "on: the file itself is written; else writes stay in memory (off)",
         "readonly": "on: the guest cannot write at all (off)", "serial": "its serial number (vmdbg)", **_ATS},
    ),
    "virtio-console": Kind(
        _console, "a serial line", {"chardev": "where it leads: null, file:PATH, tcp:PORT, stdio (null)", **_ATS}
    ),
    "virtio-net": Kind(
        _net, "a network card, whose only peer 10.0.2.2 answers ARP, ping and UDP echo",
        {"mac": "its address (52:54:00:12:34:56)", "peer": "off: nobody answers (on)",
         "pcap": "a file to write all frames to", "replay": "a pcap file whose frames arrive", **_ATS},
    ),
    "virtio-rng": Kind(
        lambda clock, spec: Rng(clock, spec.number("seed", 0, 0, (1 << 64) - 1)), "random bytes",
        {"seed": "of the sequence (0)", **_ATS},
    ),
    "bridge": Kind(lambda clock, spec: Bridge(clock), "a root port of PCI Express: `bus=ID` puts a device behind it"),
    "pci-bridge": Kind(lambda clock, spec: PciBridge(clock), "a bridge to a conventional PCI bus of 32 slots"),
}  # fmt: skip


def add_devices(root: RootComplex, clock: Clock, specs: Sequence[DeviceSpec]) -> None:
    """Make the devices and put each in its place.  Raises `DeviceError`."""
    if len(specs) > MOST_DEVICES:
        raise DeviceError(f"{len(specs)} devices are too many; at most {MOST_DEVICES} are possible")
    buses: dict[str, PciBus] = {"": root.bus}
    for spec in specs:
        bus = buses.get(spec.bus)
        if bus is None:
            raise DeviceError(f"device {spec.kind} is to be on bus {spec.bus!r}, which no bridge before it has as its id; "
                              f"put --device bridge,id={spec.bus} before it")  # fmt: skip
        if spec.id and spec.id in buses:
            raise DeviceError(f"id={spec.id} is another bridge's already; choose another")
        function = KINDS[spec.kind].make(clock, spec)
        function.ats = spec.flag("ats", False)
        devfn = _free_slot(bus, spec) if spec.slot is None else spec.slot
        if isinstance(function, Bridge) and function.express and bus.bridge is not None:
            raise DeviceError(f"a root port is on the root bus, not on {spec.bus!r}; leave bus= out, or choose a pci-bridge")
        if bus.bridge is not None and bus.bridge.express and devfn >> 3:
            raise DeviceError(
                f"device {spec.kind} is to be at {devfn >> 3:02x}.{devfn & 7} below the root port {spec.bus!r}, which has "
                "one device, 00; use another function of that, or a pci-bridge"
            )
        try:
            bus.add(function, devfn)
        except ValueError as error:
            raise DeviceError(f"device {spec.kind}: {error}") from None
        if function.ats and not function.extended:
            raise DeviceError(f"ats=on of device {spec.kind} needs PCI Express, which express=off or a pci-bridge on the way "
                              "takes from it; leave ats= out, or have it elsewhere")  # fmt: skip
        if spec.id and isinstance(function, Bridge):
            buses[spec.id] = function.secondary


def _free_slot(bus: PciBus, spec: DeviceSpec) -> int:
    if bus.bridge is not None and bus.bridge.express:
        free = next((devfn for devfn in range(8) if devfn not in bus.functions), None)
    else:
        taken = {devfn >> 3 for devfn in bus.functions} | set(TAKEN_SLOTS if bus.bridge is None else ())
        free = next((device << 3 for device in range(32) if device not in taken), None)
    if free is None:
        raise DeviceError(f"device {spec.kind} finds no free slot on its bus; put it behind another bridge")
    return free
