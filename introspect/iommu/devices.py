"""The device table as a whole: who has an entry, and what reaches memory through it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from introspect.audit import Finding, Severity
from introspect.dev import Barrier
from introspect.dimension import Limits, TableRows
from introspect.expression import Space
from introspect.iommu.pasids import processes
from introspect.iommu.registers import CONTROL
from introspect.iommu.remapping import entry_size, interrupt_entries
from introspect.iommu.space import LIMITS, IoSpace
from introspect.iommu.state import RINGS, Iommu
from introspect.iommu.structures import DTE, DTE_SIZE, decode_dte, interrupt_root
from introspect.iommu.walk import read_dte
from introspect.pci import RequesterId
from introspect.reverse_map import Area, Mapper
from introspect.runs import Runs, Spans, covered, overlaps
from introspect.sources import Memory, Unreadable

__all__ = ["Entry", "IoMapper", "device_findings", "entries", "io_areas", "io_mappers", "owner_of"]

_PAGE = 0x1000
_TRANSLATION = (
    DTE.V | DTE.TV | DTE.Mode | DTE.PageTableRoot | DTE.GIoV | DTE.GV | DTE.GLX | DTE.GCR3Root_14_12 | DTE.IR | DTE.IW
    | DTE.GCR3Root_30_15 | DTE.GCR3Root_51_31 | DTE.EX | DTE.SysMgt | DTE.IoCtl | DTE.GuestPagingMode
)  # fmt: skip
"""What of an entry decides where addresses lead."""
_HOST = DTE.V | DTE.TV | DTE.Mode | DTE.PageTableRoot | DTE.IR | DTE.IW
_TOGETHER = Limits(1 << 25, 1 << 22)
_STEPS = 1 << 16
_MOST_MAPPERS = 1 << 10
_MOST_PROCESSES = 64
"""PASIDs of one device table entry."""


class Entry(NamedTuple):
    """Neighbours in the device table with the same entry."""

    first: RequesterId
    last: RequesterId
    dte: int

    def text(self) -> str:
        return str(self.first) if self.first == self.last else f"{self.first}-{self.last}"


def entries(memory: Memory, iommu: Iommu, apart: frozenset[int] = frozenset()) -> Iterator[Entry]:
    """Every DeviceID whose entry has V or IV, neighbours that are the same together, but those in `apart` each by itself."""
    waiting: Entry | None = None
    for device, dte in _valid(memory, iommu):
        alone = device in apart
        if waiting is not None and waiting.dte == dte and waiting.last + 1 == device and not alone and waiting.last not in apart:
            waiting = waiting._replace(last=RequesterId(device))
            continue
        if waiting is not None:
            yield waiting
        waiting = Entry(RequesterId(device), RequesterId(device), dte)
    if waiting is not None:
        yield waiting


def _valid(memory: Memory, iommu: Iommu) -> Iterator[tuple[int, int]]:
    low = 16 - iommu.segment_bits
    for segment, (base, count) in enumerate(iommu.tables):
        count = min(count, 1 << low)
        for first in range(0, count, _PAGE // DTE_SIZE):
            try:
                page = memory.read(base + first * DTE_SIZE, min(_PAGE, (count - first) * DTE_SIZE))
            except Unreadable as error:
                page = error.readable_prefix[: len(error.readable_prefix) // DTE_SIZE * DTE_SIZE]
            words = np.frombuffer(page, "<u8").reshape(-1, 4)
            for index in np.flatnonzero((words[:, 0] | words[:, 2]) & np.uint64(1)).tolist():
                at = index * DTE_SIZE
                device = segment << low | first + index
                if iommu.handles(device):
                    yield device, decode_dte(page[at : at + DTE_SIZE])


def owner_of(runs: Runs, guests: Sequence[Mapper]) -> Mapper | None:
    """The guest whose RAM a device's tables map most of; None if they map none of any."""
    reached = covered(runs.target, runs.target + runs.length)
    best, most = None, 0
    for guest in guests:
        if guest.space != Space.GPA:
            continue
        ram = covered(guest.runs.target, guest.runs.target + guest.runs.length)
        _, _, start, end, _ = overlaps(reached.start, reached.end, ram, _STEPS)
        shared = sum((end - start).tolist())
        if shared > most:
            best, most = guest, shared
    return best


@dataclass(eq=False)
class IoMapper:
    """Implements `introspect.reverse_map.Mapper`: the memory that devices with the same translation reach."""

    party: str
    number: int | None
    label: str
    reach: IoSpace
    host: bool = False
    confines: bool = True

    @property
    def space(self) -> Space:
        return Space.IOVA

    @property
    def runs(self) -> Runs:
        return self.reach.runs

    @property
    def complete(self) -> bool:
        return self.reach.complete

    def shown(self, address: int) -> int:
        return address

    def tables(self) -> TableRows:
        return self.reach.tables()


_NONE = Iommu({}, manages=((0x0008, 0xFFFF),))
"""Device 0 of the root bus is the root complex."""


def io_mappers(
    memory: Memory, iommus: Sequence[Iommu], names: Mapping[int, str], guests: Sequence[Mapper], barrier: Barrier | None = None
) -> tuple[list[IoMapper], list[str]]:
    """What devices reach: one mapper for those that are confined alike, and for those that are there and not translated.

    Entries of devices that are not there count too, but not those without V. Also: what could not be looked at.
    Without any IOMMU it is as with one that is off. What `barrier` denies is out of reach.
    """
    behind = iommus or (_NONE,)
    domain_of: Callable[[int], int] = (lambda device: 0) if barrier is None else barrier.domain_of
    left: dict[int, Spans | None] = {}
    found: list[IoMapper] = []
    limits = _TOGETHER
    left_out: list[str] = []
    for iommu in behind:
        groups: dict[tuple[int, int], list[str]] = {}
        example: dict[tuple[int, int], int] = {}
        own = iommu.device
        if iommu.enabled:
            for entry in entries(memory, iommu, frozenset() if barrier is None else barrier.apart):
                if entry.dte & DTE.V:
                    key = entry.dte & _TRANSLATION, domain_of(entry.first)
                    groups.setdefault(key, []).append(_named(entry, names))
                    example.setdefault(key, entry.dte)
        for device in names:
            if iommu.handles(device) and device != own and _untranslated(memory, iommu, device):
                key = 0, domain_of(device)
                groups.setdefault(key, []).append(f"{RequesterId(device)}")
                example[key] = 0
        for key, devices in groups.items():
            dte = example[key]
            room = Limits(min(LIMITS.entries, limits.entries), min(LIMITS.runs, limits.runs))
            if room.entries <= 0 or room.runs <= 0 or len(found) == _MOST_MAPPERS:
                left_out.append(f"device{'s' * (len(devices) > 1)} {_listed(devices)}")
                continue
            _, domain = key
            if barrier is not None and domain not in left:
                left[domain] = barrier.left(domain)
            plural = "devices" if len(devices) > 1 else "device"
            who = f"{plural} {_listed(devices)}"
            translated = f"domain {DTE.get(dte, 'DomainID'):#x}" if dte & DTE.V else "not translated"
            guard = barrier.words(domain) if barrier is not None else ""
            spaces, whole = _spaces(memory, iommu, dte)
            if not whole:
                left_out.append(f"further PASIDs of {who}")
            for pasid in spaces:
                # Whatever a guest has in tables for PASIDs, the host's confine it.
                looked_at = dte & ~(DTE.GV | DTE.GIoV) if dte & DTE.Mode else dte
                reach = IoSpace(memory, iommu, looked_at, pasid=pasid, limits=room, left=left.get(domain))
                limits = Limits(limits.entries - 0x200 * len(reach.tables().spa), limits.runs - len(reach.runs.start))
                if not len(reach.runs.start):
                    continue
                owner = owner_of(reach.translated, guests) if dte & DTE.V and dte & (DTE.Mode | DTE.GV) else None
                of = translated if pasid is None else f"{translated}, PASID {pasid:#x}"
                label = ", ".join(word for word in (of if iommus or not guard else "", guard) if word)
                found.append(IoMapper(who, owner.number if owner else None, label, reach))
                room = Limits(min(LIMITS.entries, max(limits.entries, 0)), min(LIMITS.runs, max(limits.runs, 0)))
    return found, left_out


def _spaces(memory: Memory, iommu: Iommu, dte: int) -> tuple[list[int | None], bool]:
    """The PASIDs that are to be looked at, None for requests without one, which GIoV makes PASID 0; and whether these are all.
    With tables of the host's, those confine all of them; and who reaches everything without a PASID reaches no more with one."""
    if dte & DTE.Mode or not dte & DTE.GIoV:
        return [None], True
    known, whole = processes(memory, iommu, dte, _MOST_PROCESSES)
    return [None, *(one.pasid for one in known if one.pasid)], whole


def _untranslated(memory: Memory, iommu: Iommu, device: int) -> bool:
    if not iommu.enabled:
        return True
    dte = read_dte(memory, iommu, device)
    return isinstance(dte, int) and not dte & DTE.V


def _named(entry: Entry, names: Mapping[int, str]) -> str:
    name = names.get(entry.first, "") if entry.first == entry.last else ""
    return f"{entry.text()}{f' ({name})' if name else ''}"


def _listed(devices: Sequence[str]) -> str:
    return ", ".join(devices[:4]) + (f" and {len(devices) - 4} more" if len(devices) > 4 else "")


def io_areas(memory: Memory, iommus: Sequence[Iommu]) -> Iterator[Area]:
    """The IOMMUs' own structures: who writes them decides what devices may do."""
    for iommu in iommus:
        who = f"IOMMU {iommu.index}"
        if not iommu.enabled:
            continue
        for base, count in iommu.tables:
            yield Area("device table", who, None, base, base + count * DTE_SIZE)
        for name in RINGS:
            ring = iommu.ring(name)
            if ring.base and ring.size and iommu.control & _RING_ON[name]:
                kind = "command buffer" if name == "command" else f"{name.upper() if name != 'event' else name} log"
                yield Area(kind, who, None, ring.base, ring.base + ring.size)
        seen: set[tuple[int, int]] = set()
        for entry in entries(memory, iommu):
            if entry.dte & DTE.IV and DTE.get(entry.dte, "IntCtl") == 2:
                base, size = interrupt_root(entry.dte), interrupt_entries(entry.dte) * entry_size(iommu)
                if size and (base, size) not in seen and len(seen) < _MOST_MAPPERS:
                    seen.add((base, size))
                    yield Area("interrupt table", f"device {entry.text()}", None, base, base + size)


def device_findings(memory: Memory, iommus: Sequence[Iommu], mappers: Sequence[Mapper]) -> list[Finding]:
    """Devices that a guest has, whose interrupts the hypervisor does not choose, or whose addresses nobody checks."""
    found = []
    for iommu in iommus:
        if not iommu.enabled:
            continue
        owners = {
            mapper.reach.dte & _HOST for mapper in mappers
            if isinstance(mapper, IoMapper) and mapper.number is not None and mapper.reach.iommu.index == iommu.index
        }  # fmt: skip
        for entry in entries(memory, iommu):
            if entry.dte & DTE.V and entry.dte & _HOST in owners:
                may = _interrupts(entry.dte)
                if may:
                    who = f"device {entry.text()}"
                    found.append(Finding(Severity.HIGH, "interrupts-not-remapped", who, f"may send {may}", (), 0))
                if entry.dte & DTE.I:
                    what = "may send addresses that it says it has translated (I is 1)"
                    found.append(Finding(Severity.MEDIUM, "addresses-not-checked", f"device {entry.text()}", what, (), 0))
    return found


def _interrupts(dte: int) -> str:
    """What a device may send that no table decides."""
    if not dte & DTE.IV:
        return "any interrupt (IV is 0)"
    words = ["any vector (IntCtl is 1)"] if DTE.get(dte, "IntCtl") == 1 else []
    passes = (("InitPass", "INIT"), ("EIntPass", "ExtInt"), ("NMIPass", "NMI"))
    return ", ".join([*words, *(word for name, word in passes if dte & DTE.fields[name])])


_RING_ON = {
    "command": CONTROL.CmdBufEn, "event": CONTROL.EventLogEn, "ppr": CONTROL.PprLogEn, "ga": CONTROL.GALogEn,
}  # fmt: skip
