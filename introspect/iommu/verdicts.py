"""What becomes of a device's request: where it leads, or the event that the IOMMU logs."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

from introspect.address import Iova, Spa
from introspect.iommu.records import Event
from introspect.iommu.structures import DTE, GCR3, PTE, page_size_of
from introspect.paging import ENTRY

__all__ = ["Cause", "DmaAccess", "IoFault", "IoStep", "IoTranslation", "Route", "StepKind"]


class DmaAccess(NamedTuple):
    """What a device asks for. `privileged` and `execute` go with a PASID; `translation`: an ATS request, whose page faults are
    told to the device and not logged; `pretranslated`: the address is what such a request was answered with, says the device;
    `empty`: a read of no bytes, for which either right is enough (2.1.4.1)."""

    write: bool = False
    pasid: int | None = None
    execute: bool = False
    privileged: bool = False
    translation: bool = False
    pretranslated: bool = False
    empty: bool = False


class Route(Enum):
    """Why a request leads where it does."""

    OFF = "the IOMMU is off"
    UNMANAGED = "V is 0: addresses are not translated"
    EXCLUSION = "the address is in the exclusion range"
    IDENTITY = "Mode is 0: addresses are not translated, IR and IW count"
    FORWARDED = "a special address range that the entry forwards"
    PRETRANSLATED = "the device says that it is translated, and I is 1: no table is asked"
    TABLES = "the page tables map it"


class Cause(Enum):
    """Why a request is refused; the same event stands for many of them."""

    BEYOND_TABLE = "the device table ends before the device's entry"
    ENTRY_UNREADABLE = "the device table entry is where no memory is"
    ENTRY_ILLEGAL = "the device table entry has a reserved bit or value"
    TRANSLATION_OFF = "V is 1 and TV is 0: nothing is mapped"
    MODE = "Mode asks for more levels than the IOMMU walks"
    REACH = "the address is beyond what so many levels translate"
    TABLE_UNREADABLE = "a page table is where no memory is"
    NOT_PRESENT = "PR is 0"
    RESERVED = "a reserved bit is set"
    PERMISSION = "IR or IW is missing"
    BAD_SIZE = "the page size is none of this level's"
    MISALIGNED = "the page's address is no multiple of its size"
    BAD_LEVEL = "NextLevel is not below the entry's own level"
    SKIPPED = "the address has bits in the levels that NextLevel skips"
    NO_TRANSLATION_SERVICE = "I, V or TV is 0: the device gets no translations"
    PRETRANSLATED = "the address is said to be translated, and I or V is 0"
    NO_GUEST_TABLES = "the request has a PASID, and TV, GV or GTEn is 0"
    PASID_RANGE = "the PASID is beyond PASMax"
    GUEST_LEVELS = "GuestPagingMode asks for more levels than the IOMMU walks"
    NOT_CANONICAL = "the address is not canonical"
    GUEST_NOT_PRESENT = "P or V is 0 in the guest's tables"
    GUEST_RESERVED = "a reserved bit is set in the guest's tables"
    GUEST_PERMISSION = "the guest's tables withhold the right"
    INTERRUPT_RANGE = "only writes of four bytes reach the interrupt address range"
    INTERRUPT_WITH_PASID = "an interrupt has no PASID"
    SYSTEM_MANAGEMENT = "SysMgt keeps the device from system management addresses"
    PORT_IO = "IoCtl keeps the device from port I/O addresses"
    INTERRUPT_ABORTED = "IntCtl or a pass bit denies interrupts of this type"
    INDEX = "the interrupt table is shorter"
    NOT_REMAPPED = "RemapEn is 0"
    INTERRUPT_RESERVED = "a reserved bit is set in the interrupt table entry"
    INTERRUPT_TYPE = "IntType is reserved"
    INTERRUPT_UNREADABLE = "the interrupt table is where no memory is"


class StepKind(Enum):
    DTE = "DTE"
    GCR3 = "GCR3"
    GUEST = "guest"
    HOST = "host"
    IRTE = "IRTE"


_GUEST_NAMES = {5: "PML5E", 4: "PML4E", 3: "PDPE", 2: "PDE", 1: "PTE"}


class IoStep(NamedTuple):
    """One entry that was read."""

    kind: StepKind
    level: int
    spa: Spa
    address: int
    """What it translates: IOVA, for the host's tables below a guest's a guest-physical address, for GCR3 tables the PASID."""
    value: int
    leaf: bool
    rights: int
    """Those of the dimension so far: IR and IW of PTE for a DTE and the host's tables; W, U, NX of ENTRY for a guest's."""
    gpa: int | None = None
    """Of an entry of GCR3 and guest tables, its address as the tables have it."""
    next_level: int | None = None
    """Of a host entry that points to a table, that one's level."""

    @property
    def name(self) -> str:
        match self.kind:
            case StepKind.DTE | StepKind.IRTE:
                return str(self.kind.value)
            case StepKind.GCR3:
                return f"GCR3 L{self.level}"
            case StepKind.GUEST:
                return _GUEST_NAMES[self.level]
            case StepKind.HOST:
                return f"L{self.level}"

    @property
    def skipped(self) -> int:
        """Levels between this entry's and the next one's."""
        return 0 if self.next_level is None else self.level - 1 - self.next_level

    @property
    def flags(self) -> str:
        match self.kind:
            case StepKind.DTE:
                shown = DTE.V | DTE.TV | DTE.Mode | DTE.IR | DTE.IW | DTE.GV | DTE.GIoV | DTE.GLX | DTE.DomainID | DTE.HAD
                return DTE.describe(self.value & shown)
            case StepKind.GCR3:
                return GCR3.describe(self.value & ~GCR3.Address)
            case StepKind.GUEST:
                return ENTRY.describe(self.value & ENTRY.defined)
            case StepKind.HOST:
                return PTE.describe(self.value)
            case StepKind.IRTE:
                return ""

    @property
    def page_size(self) -> int:
        """Of a leaf, bytes."""
        if self.kind == StepKind.HOST:
            return page_size_of(self.value, self.level)
        return 1 << 12 + 9 * (self.level - 1)


class IoTranslation(NamedTuple):
    """A permitted request. `page_size`: bytes around the address that lead on linearly, 0 if no table took part."""

    route: Route
    spa: Spa
    page_size: int
    readable: bool
    writable: bool
    executable: bool
    domain: int
    coherent: bool
    """FC, or Mode0FC without tables: force coherent."""
    untranslated_only: bool
    """U of the leaf: what a device must not cache of it."""
    gpa: int | None = None
    """Through a guest's tables, what those have the address lead to."""
    guest_page_size: int = 0


class IoFault(NamedTuple):
    """A refused request, and the event for it: `suppressed` names the bit that keeps it from the log, SA, SE (but for the first
    one), IG, SupIOPF or ATS."""

    cause: Cause
    event: Event
    iova: Iova
    suppressed: str = ""
    detail: str = ""
