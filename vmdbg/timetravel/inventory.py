# SPDX-License-Identifier: GPL-2.0-or-later
"""Every class of the machine: which objects are its parts, and what of each is no state.

A machine is made of *parts*: objects that its constructor makes and that stay.  All their attributes are state, and kept, but
for those that stand here with the reason.  So a device that is new is kept whole, or nothing is: what a tree cannot say
(`Unlisted`) stops the snapshot, and `tests/timetravel/test_inventory.py` finds it, as it finds classes that stand nowhere.
Attributes that hold a function are connections between parts, and no state, but for those of `WAITS`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from enum import Enum
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

from introspect.exits import ExitCode
from introspect.iommu.records import EventCode
from introspect.iommu.remapping import InterruptRoute
from introspect.iommu.state import RingType
from introspect.iommu.verdicts import Cause
from introspect.tpm import Algorithm
from vmdbg import late_launch
from vmdbg import machine as machine_module
from vmdbg.boot.image import BootImage
from vmdbg.cpu import core, debug, faults, processor
from vmdbg.engine import engine, physical, state
from vmdbg.engine.memory import Ram
from vmdbg.history import History
from vmdbg.iommu import caches, commands, function, interrupts, own_memory, pagerequests, registers, rings, staleness, unit
from vmdbg.iommu import config as iommu_config
from vmdbg.iommu import translation as iommu_translation
from vmdbg.iommu import translator as iommu_translator
from vmdbg.platform import (
    apicbus,
    bus,
    chipset,
    clock,
    cpuid,
    debugexit,
    dev,
    fwcfg,
    hpet,
    ioapic,
    lapic,
    msrs,
    pic,
    pit,
    rtc,
    serial,
    system_ports,
    uart,
)
from vmdbg.platform.pci import ats, capability, catalogue, dma, edu, root
from vmdbg.platform.pci import bus as pci_bus
from vmdbg.platform.pci import config as pci_config
from vmdbg.platform.tpm import commands as tpm_commands
from vmdbg.platform.tpm import pcr, tis
from vmdbg.platform.virtio import blk, console, disk, net, pcap, queue, rng, transport
from vmdbg.svm import switch, tlb, vmcbcache
from vmdbg.svm.held import Tables

from .allowed import CALLBACKS, FUNCTIONS, shapes
from .forms import FORMS, NUMBERS
from .tree import Names, Unlisted

WIRING = "a connection that the constructor makes"
ENGINE = "the engine's own, made anew"
CACHE = "found out again when it is asked for"
DEBUGGER = "a debugger's, not the machine's"
OUTSIDE = "outside the machine"
MADE = "made from what is kept: see restoring.py"

NOT_STATE: dict[type, dict[str, str]] = {
    machine_module.Machine: {"ram": WIRING, "files": "a snapshot file has them, see file.py", "_last_instruction": DEBUGGER}
    | dict.fromkeys(("identity", "fingerprint"), "kept by restoring.py"),
    Ram: dict.fromkeys(("size", "ranges", "end"), WIRING)
    | dict.fromkeys(("buffer", "view", "address"), "memory is kept by itself")
    | {"memo": CACHE, "device": DEBUGGER, "pages": MADE},
    engine.Engine: dict.fromkeys((
        "uc", "has_xsave", "has_gmet", "checks_reserved", "lacks", "asked", "_window", "devices", "_error", "binding", "_asked",
        "on_exit", "_switcher", "_judge", "_flat", "_active", "_sums",
    ), ENGINE) | dict.fromkeys(("translations", "holder"), "kept by restoring.py")
    | {"rt": "what lasts of it is kept by restoring.py", "last_code": "the same, seen through `rt`"}
    | dict.fromkeys(("judge", "armed", "_hooks", "_ranges", "_wanted"), DEBUGGER),
    physical.Physical: dict.fromkeys(("bits", "nx", "pinned", "reader"), WIRING)
    | dict.fromkeys(("arena", "shadows", "mirrors", "guards", "guarded", "mixed"), MADE),
    physical.Npt: dict.fromkeys(("arena", "pages", "root", "leaves"), MADE),
    state.CpuState: dict.fromkeys(("context", "bytes", "q", "i", "h", "address"), "what is state of it is kept by restoring.py")
    | {"cr_reads": DEBUGGER, "root": MADE, "strict": WIRING, "salt": WIRING},
    core.Cpu: {
        "npt": MADE, "_paging_key": CACHE, "_paging": CACHE, "accepted": CACHE, "crossing": "kept by restoring.py",
        "catches": DEBUGGER, "pause": DEBUGGER, "hold": DEBUGGER, "watched": DEBUGGER, "dr": "kept by restoring.py",
        "executor": WIRING, "cr4_valid": WIRING, "switcher": MADE, "recorder": WIRING,
    },
    debug.DebugRegisters: dict.fromkeys(("active", "instructions", "data", "ports"), "follows from DR0 to DR7")
    | {"follower": DEBUGGER},
    switch.Switcher: dict.fromkeys(("state", "address", "_judged", "_seen", "_known"), MADE),
    tlb.Tlb: {"_lent": CACHE},
    Tables: {"_readers": MADE},
    History: dict.fromkeys(("watching", "stop_on", "stopped_for", "witness", "trace", "_recorders", "on_switch"), DEBUGGER)
    | {"fingerprint": WIRING, "total": "kept by restoring.py", "version": DEBUGGER},
    apicbus.ApicBus: dict.fromkeys(("eoi_listeners", "doorbell_listeners"), WIRING),
    dma.Dma: {"listeners": DEBUGGER},
    commands.CommandProcessor: {"_handlers": WIRING},
    unit.IommuUnit: {"fault_listeners": DEBUGGER, "stale_listeners": WIRING, "_view": CACHE},
    root.RootComplex: dict.fromkeys(("_decoded", "_routes"), CACHE),
    msrs.MsrFile: {"table": WIRING},
    uart.Uart: {"backend": OUTSIDE},
    console.Console: {"serial": OUTSIDE},
    net.Net: {"capture": OUTSIDE, "replay": OUTSIDE},
    disk.Overlay: {"below": OUTSIDE},
    blk.Blk: {},
}  # fmt: skip
"""Attributes of parts that are not kept, with the reason; also for classes derived from these."""

PARTS = frozenset((
    *NOT_STATE, processor.Processor, vmcbcache.VmcbCache, late_launch.LateLaunch,
    caches.Caches, caches.Counters, function.IommuFunction, function.SecureDevice, interrupts.Interrupts, own_memory.OwnMemory,
    staleness.Staleness, pagerequests.PageRequests, ats.Ats, ats.PageRequests, ats.Pasid,
    registers.RegisterFile, rings.Log, iommu_translation.Translation, iommu_translator.Iommus,
    bus.Bus, bus.Route, chipset.Chipset, clock.Clock, debugexit.DebugExit, debugexit.PowerManagement, debugexit.ResetControl,
    dev.DevCapability, dev.Exclusion, dev.MiscControl, dev.Northbridge, dev.SlProtection, fwcfg.FwCfg, hpet.Comparator, hpet.Hpet,
    ioapic.IoApic, ioapic.IrqLines, ioapic.PciLines, lapic.Lapic, pci_bus.Bridge, pci_bus.PciBridge, pci_bus.PciBus,
    capability.Acs, capability.Express, capability.Msi, capability.MsiX, capability.Power, pci_config.ConfigSpace, edu.Edu,
    root.ConfigPorts, root.HostBridge, pic.Chip, pic.Pic, pit.Channel, pit.Pit, rtc.Rtc, system_ports.KeyboardController,
    system_ports.PortA, system_ports.PortB, system_ports.SmiPort, tpm_commands.Tpm, pcr.Pcrs, tis.Tis, queue.Queue,
    rng.Rng, transport.PartCapability, transport.WindowCapability,
))  # fmt: skip

FIXED = frozenset((
    machine_module.Config, BootImage, cpuid.CpuidConfig, iommu_config.IommuConfig, edu.EduOptions, catalogue.DeviceSpec,
    rings.LogBits, RingType, msrs.Msr,
))  # fmt: skip
"""What never changes: an attribute that holds one of these is no state."""

BEYOND = frozenset((
    serial.NullSerial, serial.BufferSerial, serial.FileSerial, serial.StdioSerial, serial.TcpSerial, disk.RawFile,
    disk.Qcow2File, pcap.PcapWriter,
))  # fmt: skip
"""What stands between the machine and the outside."""

WAITS = frozenset((("Timer", "callback"), ("Processor", "postponed")))
"""Attributes whose functions are state: what is to be done at some tick, or before the next instruction."""

_ENUMERATIONS: tuple[type[Enum], ...] = (
    Algorithm, Cause, EventCode, ExitCode, InterruptRoute, blk.Request, edu.Register, edu.Result, faults.Kind, lapic.Lvt,
    lapic.TimerMode, tis.Phase, transport.Part,
)  # fmt: skip

NAMES = Names(
    FORMS, {cls.__qualname__: cls for cls in (*_ENUMERATIONS, *NUMBERS)}, FUNCTIONS, CALLBACKS, shapes,
)  # fmt: skip

_FUNCTIONS = (FunctionType, MethodType, BuiltinFunctionType, partial)


def not_state(cls: type) -> dict[str, str]:
    """Attributes of a part of this class that are not kept, with the reason."""
    found: dict[str, str] = {}
    for base in cls.__mro__:
        found |= NOT_STATE.get(base, {})
    return found


def attributes(part: object) -> dict[str, Any]:
    """All attributes of a part."""
    found = dict(getattr(part, "__dict__", {}))
    for cls in type(part).__mro__:
        slots = cls.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if hasattr(part, name):
                found[name] = getattr(part, name)
    return found


def states(part: object) -> dict[str, Any]:
    """Those that are kept."""
    left_out, name = not_state(type(part)), type(part).__name__
    return {
        key: value
        for key, value in attributes(part).items()
        if key not in left_out and type(value) not in FIXED
        and type(value) not in BEYOND
        and not (isinstance(value, _FUNCTIONS) and (name, key) not in WAITS)
    }  # fmt: skip


def parts(machine: machine_module.Machine) -> dict[str, object]:
    """All parts, by where they are: "cpus.0.lapic".  Raises `Unlisted` for an object that is none."""
    found: dict[str, object] = {"": machine}
    seen = {id(machine)}
    queue = deque[tuple[str, object]]([("", machine)])
    while queue:
        path, part = queue.popleft()
        for name, value in states(part).items():
            for where, one in _within(f"{path}.{name}" if path else name, value):
                if id(one) not in seen and type(one) in PARTS:
                    seen.add(id(one))
                    found[where] = one
                    queue.append((where, one))
    return found


def _within(path: str, value: object) -> Iterator[tuple[str, object]]:
    """An attribute's value, and what is in it."""
    yield path, value
    if isinstance(value, dict):
        for key, one in value.items():
            yield from _within(f"{path}.{key}", one)
    elif isinstance(value, list | tuple | deque) and not isinstance(value, str | bytes):
        for index, one in enumerate(value):
            yield from _within(f"{path}.{index}", one)


def check(part: object) -> None:
    """`Unlisted` if its class is not in the inventory."""
    if type(part) not in PARTS:
        raise Unlisted(f"class {type(part).__module__}.{type(part).__qualname__}")
