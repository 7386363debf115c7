"""Translation of a device's address: device table, GCR3 and guest tables, host tables (AMD 48882, 2.1-2.2).

The rules are written once, in `_Walker`. `translate` runs them bare, for an emulator; `walk` with a trace, for a person; `walk`
and `translate` without `set_ad` change nothing. Neither can loop: each entry of the host's tables leads to a lower level.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple, TypeAlias

from introspect.address import Iova, Spa
from introspect.iommu.checks import dma_problem, too_many_guest_levels
from introspect.iommu.records import Event, EventCode
from introspect.iommu.registers import CONTROL, FEATURES, FEATURES2
from introspect.iommu.state import Iommu
from introspect.iommu.structures import (
    DTE,
    DTE_SIZE,
    GCR3,
    GCR3_RESERVED,
    PTE,
    PTE_TABLE_RESERVED,
    decode_dte,
    gcr3_root,
    host_root,
    page_size_of,
)
from introspect.iommu.verdicts import Cause, DmaAccess, IoFault, IoStep, IoTranslation, Route, StepKind
from introspect.paging import ENTRY, Format, PagingState
from introspect.registers import CR0, CR4, EFER
from introspect.sources import Memory, Unreadable

__all__ = [
    "HYPERTRANSPORT_INTERRUPTS", "INTERRUPT_RANGE", "PORT_RANGE", "SYSTEM_RANGE", "IoWalk", "entry_fault", "guest_format",
    "guest_root", "host_translate", "in_interrupt_range", "is_special", "judged_alike", "leaf_is_valid", "locate", "read_dte",
    "translate", "walk", "withheld",
]  # fmt: skip

INTERRUPT_RANGE = 0xFEE0_0000, 0xFEEF_FFFF
HYPERTRANSPORT_INTERRUPTS = 0xFD_0000_0000, 0xFD_F8FF_FFFF
SYSTEM_RANGE = 0xFD_F910_0000, 0xFD_F91F_FFFF
PORT_RANGE = 0xFD_FC00_0000, 0xFD_FDFF_FFFF
"""Special addresses: interrupts, their HyperTransport form, system management messages, port I/O (2.1.2, table 3)."""
_RESERVED_INTERRUPTS_END = 0xFD_F800_0000
_EDGES = [
    edge for first, last in (INTERRUPT_RANGE, HYPERTRANSPORT_INTERRUPTS, SYSTEM_RANGE, PORT_RANGE) for edge in (first, last + 1)
]
_MASTER_ABORT = 1
_IR, _IW = PTE.IR, PTE.IW
_RIGHTS = _IR | _IW
_WU = ENTRY.W | ENTRY.U


class _Refusal(NamedTuple):
    cause: Cause
    flags: tuple[str, ...] = ()
    code: EventCode = EventCode.IO_PAGE_FAULT
    address: int | None = None
    """Of a table entry that cannot be read; else the event has that of the request, whatever was being translated (2.5.1)."""
    type: int = 0
    detail: str = ""


def _invalid(cause: Cause, kind: int = 0) -> _Refusal:
    return _Refusal(cause, code=EventCode.INVALID_DEVICE_REQUEST, type=kind)


def _unreadable(spa: int) -> _Refusal:
    return _Refusal(Cause.TABLE_UNREADABLE, (), EventCode.PAGE_TAB_HARDWARE_ERROR, spa, _MASTER_ABORT)


class _Leaf(NamedTuple):
    """Where the host's tables lead."""

    spa: int
    size: int
    """0 without tables."""
    rights: int
    entry: int


_Pending: TypeAlias = list[tuple[int, int]]
"""(spa of an entry, accessed or dirty bits to set in its low half)."""


@dataclass(frozen=True, slots=True)
class IoWalk:
    """A translation with every entry that was read, in the order of the visit."""

    device: int
    iova: Iova
    access: DmaAccess
    steps: tuple[IoStep, ...]
    verdict: IoTranslation | IoFault
    blame: IoStep | None
    """The entry that made the verdict a fault, if it was one."""


def guest_format(iommu: Iommu, dte: int) -> Format:
    """Of the tables that a device's PASIDs have."""
    return _format(5 if DTE.get(dte, "GuestPagingMode") else 4)


def guest_root(memory: Memory, iommu: Iommu, dte: int, pasid: int) -> int | None:
    """Guest-physical address of the topmost table of a PASID; None if the GCR3 tables have none."""
    found = _Walker(memory, iommu, 0, DmaAccess(pasid=pasid), None).guest_root(dte, pasid)
    return None if isinstance(found, _Refusal) else found


def host_translate(memory: Memory, iommu: Iommu, dte: int, gpa: int) -> int | None:
    """Where the host's tables of an entry lead, for a read, whatever the address is used for; None if nowhere."""
    found = _Walker(memory, iommu, 0, DmaAccess(), None).host(dte, gpa, _IR)
    return None if isinstance(found, _Refusal) else found.spa


@cache
def _format(levels: int) -> Format:
    """Guest tables are those of the processor, where bit 8 of a PDPE is MBZ if it points to a table; NX is never reserved, and
    ignored without NXSup (2.2.6, tables 29 to 31)."""
    cr4 = CR4.PAE | (CR4.LA57 if levels == 5 else 0)
    form = PagingState(CR0.PG | CR0.PE, 0, cr4, EFER.LME | EFER.LMA | EFER.NXE, maxphyaddr=52).format
    assert form is not None
    strict = (one._replace(table_reserved=one.table_reserved | ENTRY.G) if one.number == 3 else one for one in form.levels)
    return form._replace(levels=tuple(strict))


def in_interrupt_range(address: int) -> bool:
    return INTERRUPT_RANGE[0] <= address <= INTERRUPT_RANGE[1]


def is_special(address: int) -> bool:
    """Whether an address may have rules of its own, whatever tables say of it."""
    return bisect_right(_EDGES, address) % 2 == 1


def judged_alike(iommu: Iommu, address: int) -> int:
    """Where behind an address other rules may begin: a page of the tables can span both (2.1.4.6)."""
    first, last, _ = iommu.exclusion or (0, -1, False)
    return min((edge for edge in (*_EDGES, first, last + 1) if edge > address), default=1 << 64)


def leaf_is_valid(entry: int, level: int) -> bool:
    """Whether a leaf's page size is one of its level: the default one, or with NextLevel 7 one above it and below the next
    level's. Level 6 has no default (2.2.3, tables 14 and 15)."""
    if level == 6:
        return False
    natural, size = 1 << 12 + 9 * (level - 1), page_size_of(entry, level)
    return size == natural if PTE.get(entry, "NextLevel") == 0 else natural < size < natural << 9 and size <= 1 << 52


def read_dte(memory: Memory, iommu: Iommu, device: int) -> int | Cause:
    """A device's entry as it is in the table."""
    spa = iommu.entry_address(device)
    if spa is None:
        return Cause.BEYOND_TABLE
    try:
        return decode_dte(memory.read(spa, DTE_SIZE))
    except Unreadable:
        return Cause.ENTRY_UNREADABLE


def entry_fault(iommu: Iommu, device: int, address: int, cause: Cause, access: DmaAccess | None = None) -> IoFault:
    """What follows from an entry that cannot be read (2.5.3, 2.5.4); `access` None: of an interrupt."""
    if cause == Cause.ENTRY_UNREADABLE:
        spa = iommu.entry_address(device)
        assert spa is not None
        event = Event(EventCode.DEV_TAB_HARDWARE_ERROR, device, spa, type=_MASTER_ABORT)
    elif access is not None and access.translation:
        event = Event(EventCode.INVALID_DEVICE_REQUEST, device, address)  # table 51
    else:
        event = Event(EventCode.IO_PAGE_FAULT, device, address)
    if access is None:
        return IoFault(cause, replace(event, flags=frozenset("I")), Iova(address))
    event = replace(event, flags=_flags(access, access.pasid), pasid=access.pasid)
    return IoFault(cause, _as_logged(event), Iova(address), _unlogged(event, access))


def _flags(access: DmaAccess, pasid: int | None) -> frozenset[str]:
    """What every event says of its request, as far as it has the bits."""
    words = {"RW": access.write, "TR": access.translation}
    if pasid is not None:
        words |= {"NX": access.execute, "US": not access.privileged}
    return frozenset(name for name, holds in words.items() if holds)


def _as_logged(event: Event) -> Event:
    """Without what this kind of event lacks."""
    return Event.decode(event.encode()) or event


def _unlogged(event: Event, access: DmaAccess) -> str:
    """Faults of translation requests are told to the device alone (2.5.3)."""
    return "ATS" if access.translation and event.code == EventCode.IO_PAGE_FAULT else ""


class _Walker:
    """One request."""

    def __init__(self, memory: Memory, iommu: Iommu, device: int, access: DmaAccess, trace: list[IoStep] | None) -> None:
        if access.pretranslated:  # a PASID is valid with an untranslated address alone (2.2.7.7)
            access = access._replace(pasid=None, execute=False, privileged=False)
        self.memory, self.iommu, self.device, self.access, self.trace = memory, iommu, device, access, trace
        self.pasid = access.pasid
        """Whose tables the address goes through first, and events name: with GIoV 0, where a request has none."""
        self.pending: _Pending = []
        self.blame: int | None = None
        """Index of the entry that refuses, in the trace."""

    def run(self, iova: int, dte: int | None) -> IoTranslation | IoFault:
        iommu, access = self.iommu, self.access
        if not iommu.enabled:
            return IoTranslation(Route.OFF, Spa(iova), 0, True, True, True, 0, False, False)
        if dte is None:
            found = read_dte(self.memory, iommu, self.device)
            if isinstance(found, Cause):
                return entry_fault(iommu, self.device, iova, found, access)
            dte = found
        if self.trace is not None:
            self.trace.append(IoStep(
                StepKind.DTE, DTE.get(dte, "Mode"), Spa(iommu.entry_address(self.device) or 0), self.device, dte,
                not dte & DTE.TV, dte & _RIGHTS,
            ))  # fmt: skip
        verdict = self._entry(iova, dte)
        return self._fault(iova, dte, verdict) if isinstance(verdict, _Refusal) else verdict

    def _entry(self, iova: int, dte: int) -> IoTranslation | _Refusal:
        """Validity, special addresses, exclusion, translation, in this order."""
        iommu, access = self.iommu, self.access
        if not dte & DTE.V:
            if access.translation:
                return _invalid(Cause.NO_TRANSLATION_SERVICE)
            if access.pretranslated:
                return _invalid(Cause.PRETRANSLATED, 1)
            return IoTranslation(Route.UNMANAGED, Spa(iova), 0, True, True, True, 0, False, False)
        problem = dma_problem(dte, iommu.features)
        if problem is not None:
            flags = ("RZ",) if problem.reserved else ()
            return _Refusal(Cause.ENTRY_ILLEGAL, flags, EventCode.ILLEGAL_DEV_TABLE_ENTRY, detail=str(problem))
        domain = DTE.get(dte, "DomainID")
        if access.pretranslated and not in_interrupt_range(iova):  # that range is, whatever is said of the address (2.1.4.2)
            if not dte & DTE.I:
                return _invalid(Cause.PRETRANSLATED, 1)
            return IoTranslation(Route.PRETRANSLATED, Spa(iova), 0, True, True, False, domain, False, False)
        special = self._special(iova, dte)
        if isinstance(special, _Refusal):
            return special
        if special:
            return IoTranslation(Route.FORWARDED, Spa(iova), 0, True, True, False, domain, False, False)
        if access.translation and not (dte & DTE.I and dte & DTE.TV):
            return _invalid(Cause.NO_TRANSLATION_SERVICE)
        if iommu.exclusion is not None and access.pasid is None:
            first, last, everybody = iommu.exclusion
            if first <= iova <= last and (everybody or dte & DTE.EX):
                return IoTranslation(Route.EXCLUSION, Spa(iova), 0, True, True, True, domain, False, False)
        guest = dte & DTE.TV and dte & DTE.GV and iommu.control & CONTROL.GTEn
        if access.pasid is not None and not guest:
            return _invalid(Cause.NO_GUEST_TABLES, 2 if access.translation else 4)
        if not dte & DTE.TV:
            return _Refusal(Cause.TRANSLATION_OFF)
        if guest and dte & DTE.GIoV and self.pasid is None:
            self.pasid = 0
        if self.pasid is not None:
            return self._two_dimensions(iova, dte, self.pasid)
        leaf = self.host(dte, iova, self._wanted)
        if isinstance(leaf, _Refusal):
            return leaf
        return self._reached(dte, leaf, bool(leaf.rights & _IW), bool(leaf.rights & _IR), None, 0)

    def _reached(self, dte: int, leaf: _Leaf, writable: bool, executable: bool, gpa: int | None, size: int) -> IoTranslation:
        forced = dte & DTE.GV and dte & DTE.AttrV and dte & DTE.Mode0FC
        coherent = bool(leaf.entry & PTE.FC) if leaf.size else bool(forced)
        both = min(leaf.size or size, size or leaf.size)
        return IoTranslation(
            Route.TABLES if both else Route.IDENTITY, Spa(leaf.spa), both, bool(leaf.rights & _IR), writable, executable,
            DTE.get(dte, "DomainID"), coherent, bool(leaf.entry & PTE.U), gpa, size,
        )  # fmt: skip

    def _special(self, iova: int, dte: int) -> bool | _Refusal:
        """Whether a special address is forwarded; those that are translated as any other are not (2.1.2, 2.5.9)."""
        access = self.access
        if in_interrupt_range(iova):
            if access.pasid is not None:
                return _Refusal(Cause.INTERRUPT_WITH_PASID, ("I",))
            return self._denied(Cause.INTERRUPT_RANGE, 0)
        if access.pasid is not None or self.iommu.features2 & FEATURES2.HTRangeIgnore:
            return False
        if HYPERTRANSPORT_INTERRUPTS[0] <= iova <= HYPERTRANSPORT_INTERRUPTS[1]:
            return self._denied(Cause.INTERRUPT_RANGE, 6 if access.write and iova < _RESERVED_INTERRUPTS_END else 0)
        if SYSTEM_RANGE[0] <= iova <= SYSTEM_RANGE[1]:
            control = DTE.get(dte, "SysMgt")
            if control == 1 and access.write and not access.translation:
                return True
            # SysMgt 2 forwards INTx messages alone; a DMA write is none.
            if control != 3:
                return self._denied(Cause.SYSTEM_MANAGEMENT, 3 if access.write else 4)
        elif PORT_RANGE[0] <= iova <= PORT_RANGE[1]:
            control = DTE.get(dte, "IoCtl")
            if control == 1 and not access.translation:
                return True
            if control != 2:
                return self._denied(Cause.PORT_IO, 2)
        else:
            return False
        return False if dte & DTE.TV else self._denied(Cause.TRANSLATION_OFF, 7)

    def _denied(self, cause: Cause, kind: int) -> _Refusal:
        """A special address; all of them are one type for translation requests (table 64)."""
        return _invalid(cause, 1 if self.access.translation else kind)

    # Host tables

    @property
    def _wanted(self) -> int:
        return 0 if self.access.empty else _IW if self.access.write else _IR

    def host(self, dte: int, address: int, wanted: int) -> _Leaf | _Refusal:
        """One address through the host's tables; `wanted` 0: either right. Of an entry, presence is looked at first, then rights,
        then its form."""
        mode = dte >> 9 & 7
        if mode > self.iommu.host_levels:
            self._blame_entry()
            return _Refusal(Cause.MODE, ("PR",))
        rights = dte & _RIGHTS
        if wanted & ~rights or not rights:
            self._blame_entry()
            return _Refusal(Cause.PERMISSION, ("PR", "PE"))
        if not mode:
            return _Leaf(address, 0, rights, 0)
        if address >> min(12 + 9 * mode, 64):
            self._blame_entry()
            return _Refusal(Cause.REACH, ("PR",))
        table, level, had = host_root(dte), mode, dte >> 7 & 3
        while True:
            shift = 3 + 9 * level
            spa = table + (address >> shift & 0x1FF) * 8
            try:
                entry = self.memory.read_u64(spa)
            except Unreadable:
                return _unreadable(spa)
            below = entry >> 9 & 7
            leaf = below in (0, 7)
            rights &= entry
            if self.trace is not None:
                self.trace.append(IoStep(
                    StepKind.HOST, level, Spa(spa), address, entry, leaf, rights,
                    next_level=None if leaf or below >= level else below,
                ))  # fmt: skip
            if not entry & PTE.PR:
                return _Refusal(Cause.NOT_PRESENT)
            if wanted & ~rights or not rights:
                return _Refusal(Cause.PERMISSION, ("PR", "PE"))
            if entry & (self.iommu.leaf_reserved if leaf else PTE_TABLE_RESERVED):
                return _Refusal(Cause.RESERVED, ("PR", "RZ"))
            if leaf:
                if not leaf_is_valid(entry, level):
                    return _Refusal(Cause.BAD_SIZE, ("PR",))
                size = page_size_of(entry, level)
                if not below and entry & PTE.Address & size - 1:
                    return _Refusal(Cause.MISALIGNED, ("PR",))
                marks = (PTE.A if had else 0) | (PTE.D if had == 3 and wanted & _IW else 0)
                if marks & ~entry:
                    self.pending.append((spa, marks))
                return _Leaf(entry & PTE.Address & -size | address & size - 1, size, rights, entry)
            if below >= level:
                return _Refusal(Cause.BAD_LEVEL, ("PR",))
            if address & (1 << shift) - (1 << 12 + 9 * below):
                return _Refusal(Cause.SKIPPED, ("PR",))
            if had and not entry & PTE.A:
                self.pending.append((spa, PTE.A))
            table, level = entry & PTE.Address, below

    def withheld(self, iova: int, dte: int) -> IoFault:
        return self._fault(iova, dte, _Refusal(Cause.PERMISSION, ("PR", "PE")))

    def _blame_entry(self) -> None:
        self.blame = 0

    # Guest tables

    def _table_entry(self, dte: int, gpa: int, wanted: int = _IR) -> tuple[int, int] | _Refusal:
        """An entry of GCR3 and guest tables, which the host's tables lead to: its spa and value."""
        leaf = self.host(dte, gpa, wanted)
        return leaf if isinstance(leaf, _Refusal) else self._read(leaf.spa)

    def _read(self, spa: int) -> tuple[int, int] | _Refusal:
        try:
            return spa, self.memory.read_u64(spa)
        except Unreadable:
            return _unreadable(spa)

    def guest_root(self, dte: int, pasid: int) -> int | _Refusal:
        """CR3 of a PASID, from the GCR3 tables. Bits of it that they have no level for are ignored, and the first table is where
        the entry says in system-physical memory, unless GCR3TRPMode has it guest-physical as all others are (2.2.6.3)."""
        features, features2 = self.iommu.features, self.iommu.features2
        if pasid >> FEATURES.get(features, "PASMax") + 1:
            self._blame_entry()
            return _Refusal(Cause.PASID_RANGE)
        if too_many_guest_levels(dte, features):
            self._blame_entry()
            return _Refusal(Cause.GUEST_LEVELS, ("PR",))
        levels = DTE.get(dte, "GLX") + 1
        nested = bool(features2 & FEATURES2.GCR3TRPModeSup and self.iommu.control & CONTROL.GCR3TRPMode)
        table = gcr3_root(dte)
        for level in range(levels, 0, -1):
            address = table + (pasid >> 9 * (level - 1) & 0x1FF) * 8
            found = self._table_entry(dte, address) if nested else self._read(address)
            if isinstance(found, _Refusal):
                return found
            spa, entry = found
            if self.trace is not None:
                gpa = address if nested else None
                self.trace.append(IoStep(StepKind.GCR3, level, Spa(spa), pasid, entry, level == 1, 0, gpa))
            if not entry & GCR3.V:
                return _Refusal(Cause.GUEST_NOT_PRESENT)
            if entry & GCR3_RESERVED:
                return _Refusal(Cause.GUEST_RESERVED, ("PR", "RZ"))
            table, nested = entry & GCR3.Address, True
        return table

    def _two_dimensions(self, gva: int, dte: int, pasid: int) -> IoTranslation | _Refusal:
        access, features, control = self.access, self.iommu.features, self.iommu.control
        table = self.guest_root(dte, pasid)
        if isinstance(table, _Refusal):
            return table
        form = guest_format(self.iommu, dte)
        if gva >> form.width - 1 not in (0, (1 << 65 - form.width) - 1):
            return _Refusal(Cause.NOT_CANONICAL)
        rights, known = _WU, _WU | (ENTRY.NX if features & FEATURES.NXSup else 0)
        # PrivAbrtEn 1 keeps everybody from supervisors' pages (2.2.6.2).
        user = bool(features & FEATURES.USSup) and (not access.privileged or CONTROL.get(control, "PrivAbrtEn") == 1)
        kept = (ENTRY.A if control & CONTROL.GAUpdateDis else 0) | (ENTRY.D if control & CONTROL.GDUpdateDis else 0)
        for level in form.levels:
            gpa = table + (gva >> level.shift & level.mask) * 8
            found = self._table_entry(dte, gpa)
            if isinstance(found, _Refusal):
                return found
            spa, entry = found
            leaf = bool(entry & level.leaf)
            rights = (rights & (entry | ENTRY.NX) | entry & ENTRY.NX) & known
            if self.trace is not None:
                self.trace.append(IoStep(StepKind.GUEST, level.number, Spa(spa), gva, entry, leaf, rights, gpa))
            if not entry & ENTRY.P:
                return _Refusal(Cause.GUEST_NOT_PRESENT)
            if entry & (level.leaf_reserved if leaf else level.table_reserved):
                return _Refusal(Cause.GUEST_RESERVED, ("PR", "RZ"))
            if leaf:
                wrong = (access.write and not rights & ENTRY.W) or (user and not rights & ENTRY.U)
                if wrong or (access.execute and rights & ENTRY.NX):
                    self._blame_withholding(user)
                    return _Refusal(Cause.GUEST_PERMISSION, ("PR", "PE"))
            marks = (ENTRY.A | (ENTRY.D if leaf and access.write else 0)) & ~kept
            if marks & ~entry:
                refused = self._table_entry(dte, gpa, _IR | _IW)
                if isinstance(refused, _Refusal):
                    return refused
                self.pending.append((spa, marks))
            if leaf:
                size = 1 << level.shift
                return self._final(dte, entry & PTE.Address & -size | gva & size - 1, size, rights)
            table = entry & PTE.Address
        raise AssertionError("the last level of every format is a leaf")

    def _final(self, dte: int, gpa: int, size: int, rights: int) -> IoTranslation | _Refusal:
        host = self.host(dte, gpa, self._wanted)
        if isinstance(host, _Refusal):
            return host
        writable = bool(rights & ENTRY.W and host.rights & _IW)
        return self._reached(dte, host, writable, bool(host.rights & _IR) and not rights & ENTRY.NX, gpa, size)

    def _blame_withholding(self, user: bool) -> None:
        """The first entry of the guest's that withholds what is asked for."""
        wanted = (ENTRY.W if self.access.write else 0) | (ENTRY.U if user else 0) | (ENTRY.NX if self.access.execute else 0)
        for index, step in enumerate(self.trace or ()):
            if step.kind == StepKind.GUEST and (step.rights ^ _WU) & wanted:
                self.blame = index
                return

    # Verdicts

    def _fault(self, iova: int, dte: int, refusal: _Refusal) -> IoFault:
        access, code = self.access, refusal.code
        interrupt = "I" in refusal.flags
        flags = _flags(access, self.pasid) - (frozenset(("RW",)) if interrupt else frozenset()) | frozenset(refusal.flags)
        address = iova if refusal.address is None else refusal.address
        event = Event(code, self.device, address, flags, DTE.get(dte, "DomainID"), self.pasid, refusal.type)
        suppressed = _unlogged(event, access)
        if not suppressed and (interrupt or code == EventCode.INVALID_DEVICE_REQUEST):
            suppressed = "IG" if dte & DTE.IV and dte & DTE.IG else ""
        elif not suppressed and code == EventCode.IO_PAGE_FAULT:
            suppressed = "SA" if dte & DTE.SA else "SE" if dte & DTE.SE else ""
        return IoFault(refusal.cause, _as_logged(event), Iova(iova), suppressed, refusal.detail)


def translate(
    memory: Memory, iommu: Iommu, device: int, iova: int, access: DmaAccess, *, set_ad: bool, dte: int | None = None,
    trace: list[IoStep] | None = None,
) -> IoTranslation | IoFault:  # fmt: skip
    """Translate one address of a device (its 16-bit DeviceID). `dte`: the entry, where it is cached; else the table is read.
    The entries that are read are added to `trace`.

    With `set_ad` accessed and dirty bits are left where HAD (host) and the guest's tables want them: entry by entry, so that a
    request which is refused leaves them before the entry that refuses (2.2.7.4). `Unwritable` then comes from a source that
    cannot be written.
    """
    walker = _Walker(memory, iommu, device, access, trace)
    verdict = walker.run(iova, dte)
    if set_ad:
        for spa, marks in walker.pending:
            memory.write_u32(spa, memory.read_u32(spa) | marks)
    return verdict


def withheld(memory: Memory, iommu: Iommu, device: int, iova: int, access: DmaAccess, dte: int) -> IoFault:
    """What follows where host tables have withheld a right, for whoever has kept that."""
    return _Walker(memory, iommu, device, access, None).withheld(iova, dte)


def locate(memory: Memory, iommu: Iommu | None, device: int, iova: int) -> int | None:
    """Where an address of a device leads, for a read or else for a write; None if it may do neither. No IOMMU: as it is."""
    if iommu is None:
        return iova
    for write in (False, True):
        found = translate(memory, iommu, device, iova, DmaAccess(write), set_ad=False)
        if isinstance(found, IoTranslation):
            return int(found.spa)
    return None


def walk(
    memory: Memory, iommu: Iommu, device: int, iova: int, access: DmaAccess, *, dte: int | None = None
) -> IoWalk:
    """The same without side effects, with every entry of every table."""
    trace: list[IoStep] = []
    walker = _Walker(memory, iommu, device, access, trace)
    verdict = walker.run(iova, dte)
    blame = None
    if isinstance(verdict, IoFault) and trace:
        blame = trace[-1] if walker.blame is None else trace[walker.blame]
        if verdict.cause in (Cause.NOT_CANONICAL, Cause.INTERRUPT_RANGE, Cause.INTERRUPT_WITH_PASID, Cause.TABLE_UNREADABLE):
            blame = None
    return IoWalk(device, Iova(iova), access, tuple(trace), verdict, blame)
