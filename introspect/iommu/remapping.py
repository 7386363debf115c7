"""Interrupt remapping: what an interrupt message of a device becomes (AMD 48882, 2.2.5)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import cache
from typing import NamedTuple

from introspect.address import Iova, Spa
from introspect.iommu.checks import interrupt_problem
from introspect.iommu.records import Event, EventCode
from introspect.iommu.registers import CONTROL, FEATURES2
from introspect.iommu.state import Iommu
from introspect.iommu.structures import DTE, GUEST_IRTE, IRTE, IRTE128, interrupt_root
from introspect.iommu.verdicts import Cause, IoFault, IoStep, StepKind
from introspect.iommu.walk import entry_fault, read_dte
from introspect.layout import Bits
from introspect.sources import Memory, Unreadable

__all__ = ["GuestInterrupt", "InterruptRoute", "IrqWalk", "Remapped", "entry_size", "interrupt_entries", "irte_type", "remap",
           "remap_walk"]  # fmt: skip

_INDEX = 0x7FF
_MODES = {0: "fixed", 1: "arbitrated", 2: "SMI", 3: "reserved", 4: "NMI", 5: "INIT", 6: "startup", 7: "ExtInt"}
_SMI = 2
_PASS = {3: DTE.NMIPass, 4: DTE.NMIPass, 5: DTE.InitPass, 6: DTE.NMIPass, 7: DTE.EIntPass}
"""What lets types through that are not remapped, to physical destinations (2.2.5, table 19)."""
_MASTER_ABORT = 1
_INTERRUPT_DENIED = 5
_WIDE = GUEST_IRTE.Destination_31_24 | IRTE128.Destination_23_0 & ~0xFFFF
"""Bits of a destination that only x2APIC has."""


class InterruptRoute(Enum):
    """Why a message becomes what it does."""

    OFF = "the IOMMU is off"
    UNMANAGED = "IV is 0: interrupts are not remapped"
    FORWARDED = "IntCtl forwards it"
    PASSED = "a pass bit lets this type through"
    TABLE = "the interrupt table remaps it"


class GuestInterrupt(NamedTuple):
    """An interrupt to a guest's virtual APIC: `vapic` is its backing page; the host is told by the log where `log` is set."""

    vapic: Spa
    tag: int
    running: bool
    log: bool
    destination: int
    """APIC ID of the processor to notify, while `running`."""


class Remapped(NamedTuple):
    """An interrupt that is delivered. `mode` as in MSI data 10:8; `wide`: the destination has 32 bits."""

    route: InterruptRoute
    vector: int
    mode: int
    destination: int
    logical: bool
    level: bool
    wide: bool = False
    request_eoi: bool = False
    guest: GuestInterrupt | None = None
    slot: int | None = None
    """Index of the IRTE."""
    entry: Spa | None = None
    """Where the IRTE is."""

    @property
    def mode_name(self) -> str:
        return _MODES[self.mode]


@dataclass(frozen=True, slots=True)
class IrqWalk:
    """The lookup of one message, with the entries that were read."""

    device: int
    address: int
    data: int
    steps: tuple[IoStep, ...]
    verdict: Remapped | IoFault
    entry_size: int
    """Bytes of an IRTE."""


def entry_size(iommu: Iommu) -> int:
    """Bytes of an IRTE."""
    return 16 if iommu.control & CONTROL.GAEn else 4


def irte_type(value: int, size: int) -> type[Bits]:
    """The table of an entry of 4 or 16 bytes."""
    if size == 4:
        return IRTE
    return GUEST_IRTE if value & IRTE128.GuestMode else IRTE128


def interrupt_entries(dte: int) -> int:
    """How many entries a device's interrupt table has; 0 for a reserved length."""
    length = DTE.get(dte, "IntTabLen")
    return 1 << length if length <= 11 else 0


def remap(
    memory: Memory, iommu: Iommu, device: int, address: int, data: int, *, dte: int | None = None
) -> Remapped | IoFault:
    """What a write of `data` to the interrupt range becomes. `dte`: the entry, where it is cached."""
    return _remap(memory, iommu, device, address, data, dte, None)


def remap_walk(memory: Memory, iommu: Iommu, device: int, address: int, data: int, *, dte: int | None = None) -> IrqWalk:
    """The same, with the entries that were read."""
    trace: list[IoStep] = []
    verdict = _remap(memory, iommu, device, address, data, dte, trace)
    return IrqWalk(device, address, data, tuple(trace), verdict, entry_size(iommu))


def _remap(
    memory: Memory, iommu: Iommu, device: int, address: int, data: int, dte: int | None, trace: list[IoStep] | None
) -> Remapped | IoFault:
    mode = data >> 8 & 7
    plain = Remapped(
        InterruptRoute.OFF, data & 0xFF, mode, address >> 12 & 0xFF, bool(address & 4), bool(data & 0x8000)
    )
    if not iommu.enabled:
        return plain
    if dte is None:
        found = read_dte(memory, iommu, device)
        if isinstance(found, Cause):
            return entry_fault(iommu, device, address, found)
        dte = found
    if trace is not None:
        spa = Spa(iommu.entry_address(device) or 0)
        trace.append(IoStep(StepKind.DTE, 0, spa, device, dte, False, 0))
    if not dte & DTE.IV:
        return plain._replace(route=InterruptRoute.UNMANAGED)
    problem = interrupt_problem(dte, iommu.features)
    if problem is not None:
        flags = frozenset(("I", "RZ") if problem.reserved else ("I",))
        event = Event(EventCode.ILLEGAL_DEV_TABLE_ENTRY, device, address, flags)
        return IoFault(Cause.ENTRY_ILLEGAL, event, Iova(address), detail=str(problem))
    control = DTE.get(dte, "IntCtl")
    if mode > 1:
        if not plain.logical and (mode == _SMI or dte & _PASS[mode]):
            return plain._replace(route=InterruptRoute.PASSED)
        to = " to a logical destination" if plain.logical else ""
        return _fault(dte, device, address, Cause.INTERRUPT_ABORTED, detail=f"{_MODES[mode]} interrupts{to}")
    if control == 0:
        event = Event(EventCode.INVALID_DEVICE_REQUEST, device, address, type=_INTERRUPT_DENIED)  # 2.5.9, table 64
        return IoFault(Cause.INTERRUPT_ABORTED, event, Iova(address), "IG" if dte & DTE.IG else "", "IntCtl is 0")
    if control == 1:
        return plain._replace(route=InterruptRoute.FORWARDED)
    return _through_table(memory, iommu, device, address, data, dte, trace, plain)


def _through_table(
    memory: Memory, iommu: Iommu, device: int, address: int, data: int, dte: int, trace: list[IoStep] | None, plain: Remapped
) -> Remapped | IoFault:
    index, size = data & _INDEX, entry_size(iommu)
    if index >= interrupt_entries(dte):
        return _fault(dte, device, address, Cause.INDEX, detail=f"index {index:#x} of {interrupt_entries(dte):#x}")
    spa = interrupt_root(dte) + index * size
    try:
        entry = int.from_bytes(memory.read(spa, size), "little")
    except Unreadable:
        domain = DTE.get(dte, "DomainID")
        event = Event(EventCode.PAGE_TAB_HARDWARE_ERROR, device, spa & ~7, frozenset(("I",)), domain, type=_MASTER_ABORT)
        return IoFault(Cause.INTERRUPT_UNREADABLE, event, Iova(address))
    if trace is not None:
        trace.append(IoStep(StepKind.IRTE, 0, Spa(spa), index, entry, True, 0))
    kind = irte_type(entry, size)
    if not entry & IRTE.RemapEn:
        return _fault(dte, device, address, Cause.NOT_REMAPPED, entry)
    guest, wide = bool(entry & IRTE.GuestMode), bool(iommu.control & CONTROL.XTEn)
    gappi = bool(iommu.features2 & FEATURES2.GAPPIDisSup)
    if entry & _reserved(size == 4, guest, wide, gappi) or (guest and not iommu.control & CONTROL.GAMEn):
        return _fault(dte, device, address, Cause.INTERRUPT_RESERVED, entry, ("PR", "RZ"))
    if not guest and kind.get(entry, "IntType") > 1:
        return _fault(dte, device, address, Cause.INTERRUPT_TYPE, entry, ("PR", "RZ"))
    vector = kind.get(entry, "Vector")
    if size == 4:
        return plain._replace(
            route=InterruptRoute.TABLE, vector=vector, mode=kind.get(entry, "IntType"), slot=index, entry=Spa(spa),
            destination=kind.get(entry, "Destination"), logical=bool(entry & IRTE.DM), request_eoi=bool(entry & IRTE.RqEoi),
        )  # fmt: skip
    destination = kind.get(entry, "Destination_23_0") | kind.get(entry, "Destination_31_24") << 24
    if guest:
        to = GuestInterrupt(
            Spa(GUEST_IRTE.get(entry, "VAPICRoot") << 12), GUEST_IRTE.get(entry, "GATag"), bool(entry & GUEST_IRTE.IsRun),
            bool(entry & GUEST_IRTE.GALogIntr), destination,
        )  # fmt: skip
        return Remapped(InterruptRoute.TABLE, vector, 0, destination, False, plain.level, wide, False, to, index, Spa(spa))
    return Remapped(
        InterruptRoute.TABLE, vector, kind.get(entry, "IntType"), destination, bool(entry & IRTE.DM), plain.level, wide,
        bool(entry & IRTE.RqEoi), None, index, Spa(spa),
    )  # fmt: skip


@cache
def _reserved(basic: bool, guest: bool, wide: bool, gappi: bool) -> int:
    """Bits of an entry that must be 0 while RemapEn is set: of the format without GAEn (`basic`), or with it, by GuestMode; with
    XTEn (`wide`) and GAPPIDisSup."""
    if basic:
        return IRTE.GuestMode | ~IRTE.defined
    mine = GUEST_IRTE.defined & ~(0 if gappi else GUEST_IRTE.GAPPIDis) if guest else IRTE128.defined
    return ~mine | (0 if wide else _WIDE)


def _fault(
    dte: int, device: int, address: int, cause: Cause, entry: int = 0, flags: tuple[str, ...] = (), detail: str = ""
) -> IoFault:
    """IG of the DTE and SupIOPF of the IRTE keep it from the log."""
    event = Event(EventCode.IO_PAGE_FAULT, device, address, frozenset(("I", *flags)), DTE.get(dte, "DomainID"))
    suppressed = "IG" if dte & DTE.IG else "SupIOPF" if entry & IRTE.SupIOPF else ""
    return IoFault(cause, event, Iova(address), suppressed, detail)
