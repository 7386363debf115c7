"""Address translation: legacy, PAE, 4-level and 5-level paging, alone or nested (APM2 chapter 5, 15.25).

The rules are written once, in `_descend` (one dimension) and `_translate` (both). `translate` runs them bare, for an
emulator; `walk` runs them with a trace and keeps every entry, for a person. Neither can loop: the depth is the mode's.
Page tables where there is no memory read as all ones, as an unclaimed bus does, so they mostly fault on reserved bits.
"""

from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from itertools import takewhile
from typing import Literal, NamedTuple, Self, TypeAlias

from introspect.address import Gpa, Gva, Spa
from introspect.avic import APIC_ADDRESS
from introspect.exits import NPF_INFO, PF_ERROR
from introspect.layout import Bits, Buffer, bit, bits
from introspect.registers import CR0, CR4, EFER, RFLAGS
from introspect.sources import Memory, Unreadable
from introspect.vmcb import MISC_CTL, V_INTR, VMCB

__all__ = [
    "ENTRY", "Access", "Fault", "Format", "Level", "Nested", "NestedFault", "NestedTranslation", "PagingState", "Step",
    "Translation", "Walk", "nested_translate", "pdpte_reserved", "permits", "translate", "walk",
]  # fmt: skip


class ENTRY(Bits):
    """The bits that page-table entries of every format share (APM2 5.4)."""

    P = bit(0)
    W = bit(1)
    U = bit(2)
    PWT = bit(3)
    PCD = bit(4)
    A = bit(5)
    D = bit(6)
    PS = bit(7)
    G = bit(8)
    NX = bit(63)


_P, _W, _U, _A, _D, _PS, _G, _NX = ENTRY.P, ENTRY.W, ENTRY.U, ENTRY.A, ENTRY.D, ENTRY.PS, ENTRY.G, ENTRY.NX
_ADDRESS = bits(51, 12)
_NAMES = {5: "PML5E", 4: "PML4E", 3: "PDPE", 2: "PDE", 1: "PTE"}


class Level(NamedTuple):
    """How to read the entries of one level."""

    number: int
    shift: int
    mask: int
    """Of the table index."""
    leaf: int
    """An entry with any of these bits set maps a page; any other points to the next table."""
    leaf_reserved: int
    table_reserved: int
    grants: int
    """Rights that the level cannot take away: a PAE PDPE has no W and U bits."""
    accessed: int


class Format(NamedTuple):
    """One paging mode of one processor."""

    name: str
    entry_size: int
    levels: tuple[Level, ...]
    width: int
    """Bits of an address that the tables translate."""
    base: int
    """The bits of CR3 that hold the table's address."""


def pdpte_reserved(maxphyaddr: int) -> int:
    """The bits that a present PAE page-directory-pointer entry must have clear (APM2 5.2.3)."""
    return bits(63, 52) | bits(8, 5) | bits(2, 1) | _beyond(maxphyaddr)


def _beyond(maxphyaddr: int) -> int:
    """The address bits of an entry that the processor does not implement."""
    return bits(51, maxphyaddr) if maxphyaddr < 52 else 0


@cache
def _format(mode: str, pse: bool, nxe: bool, maxphyaddr: int) -> Format:
    """The format of "legacy", "PAE", "4-level" or "5-level" paging (APM2 figures 5-9 to 5-28)."""
    if mode == "legacy":
        # A 4 MiB page holds address bits 39:32 in bits 20:13 (PSE-36); bit 21 and unimplemented ones are reserved.
        high = bit(21) | (bits(20, max(13, maxphyaddr - 19)) if maxphyaddr < 40 else 0)
        directory = Level(2, 22, 0x3FF, _PS if pse else 0, high, 0, 0, _A)
        return Format(mode, 4, (directory, Level(1, 12, 0x3FF, _P, 0, 0, 0, _A)), 32, bits(31, 12))
    high = _beyond(maxphyaddr) | (0 if nxe else _NX)
    if mode == "PAE":
        high |= bits(62, 52)
        pointers = Level(3, 30, 3, 0, 0, pdpte_reserved(maxphyaddr), _W | _U, 0)
        upper, width, base = [pointers], 32, bits(31, 5)
    else:
        # Bits 8:7 are reserved above the PDPEs; bit 8 of a PDPE that points to a table is ignored, as in a PDE.
        upper = [Level(3, 30, 0x1FF, _PS, high | bits(29, 13), high, 0, _A)]
        for number, shift in ((4, 39), (5, 48))[: 2 if mode == "5-level" else 1]:
            upper.insert(0, Level(number, shift, 0x1FF, 0, 0, high | ENTRY.G | _PS, 0, _A))
        width, base = (57 if mode == "5-level" else 48), _ADDRESS
    lower = [Level(2, 21, 0x1FF, _PS, high | bits(20, 13), high, 0, _A), Level(1, 12, 0x1FF, _P, high, 0, 0, _A)]
    return Format(mode, 8, (*upper, *lower), width, base)


def _choose(cr4: int, efer: int, maxphyaddr: int) -> Format:
    mode = ("5-level" if cr4 & CR4.LA57 else "4-level") if efer & (EFER.LMA | EFER.LME) else "PAE" if cr4 & CR4.PAE else "legacy"
    return _format(mode, bool(cr4 & CR4.PSE), bool(efer & EFER.NXE), min(max(maxphyaddr, 32), 52))


@dataclass(frozen=True, slots=True)
class PagingState:
    """The registers that decide a translation. `maxphyaddr` is the one the guest's processor reports, in bits.

    `pdptes` are the four entries the processor loaded with CR3 in PAE mode; None reads them from memory, as a
    processor under nested paging does in any case (APM2 15.25.10).
    """

    cr0: int
    cr3: int
    cr4: int
    efer: int
    cpl: int = 0
    rflags_ac: bool = False
    maxphyaddr: int = 48
    pdptes: tuple[int, ...] | None = None
    format: Format | None = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        chosen = _choose(self.cr4, self.efer, self.maxphyaddr) if self.cr0 & CR0.PG else None
        object.__setattr__(self, "format", chosen)

    def privileged(self) -> Self:
        """The same tables seen with every right that reading needs, those that SMAP withholds among them."""
        if not self.cpl and (self.rflags_ac or not self.cr4 & CR4.SMAP):
            return self
        return replace(self, cpl=0, rflags_ac=True)

    @classmethod
    def from_vmcb(cls, buffer: Buffer, maxphyaddr: int = 48) -> "PagingState":
        """The state of the guest that a VMCB describes."""
        cr0, cr3, cr4, efer, cpl, rflags = (
            VMCB.read(buffer, name) for name in ("cr0", "cr3", "cr4", "efer", "cpl", "rflags")
        )
        return cls(cr0, cr3, cr4, efer, cpl, bool(rflags & RFLAGS.AC), maxphyaddr)

    @property
    def mode(self) -> str:
        """"off", "legacy", "PAE", "4-level" or "5-level"."""
        return self.format.name if self.format else "off"

    @property
    def root(self) -> int | None:
        """Guest-physical address of the topmost table; None while paging is off."""
        return self.cr3 & self.format.base if self.format else None


@dataclass(frozen=True, slots=True)
class Nested:
    """The nested dimension: nCR3, and the host's registers that decide the format of its tables."""

    ncr3: int
    host_cr4: int
    host_efer: int
    maxphyaddr: int = 48
    apic: tuple[int, int] | None = None
    """With AVIC: the gpa of the APIC page, and the spa of the backing page that accesses to it reach whatever the tables
    map there. They must map it all the same (APM2 15.29.3)."""
    gmet: bool = False
    """Guest mode execute trap: the U bit says whose code a page may hold, that of users or of supervisors (APM2 15.25.13)."""
    format: Format = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "format", _choose(self.host_cr4, self.host_efer, self.maxphyaddr))

    @classmethod
    def from_vmcb(cls, buffer: Buffer, host_cr4: int, host_efer: int, maxphyaddr: int = 48) -> "Nested | None":
        """The nested dimension that a VMCB asks for; None without nested paging."""
        control = VMCB.read(buffer, "misc_ctl")
        if not control & MISC_CTL.np_enable:
            return None
        apic = None
        if VMCB.read(buffer, "v_intr") & (V_INTR.avic_enable | V_INTR.x2avic_enable) == V_INTR.avic_enable:
            bar, backing = (VMCB.read(buffer, name) & APIC_ADDRESS for name in ("avic_apic_bar", "avic_backing_page"))
            apic = bar, backing
        gmet = bool(control & MISC_CTL.gmet_enable)
        return cls(VMCB.read(buffer, "n_cr3"), host_cr4, host_efer, maxphyaddr, apic, gmet)


@dataclass(frozen=True, slots=True)
class Access:
    """What is attempted. `implicit_supervisor`: a system access (GDT, IDT, TSS...), whatever the CPL."""

    write: bool = False
    execute: bool = False
    user: bool = False
    implicit_supervisor: bool = False


class Step(NamedTuple):
    """One page-table entry that a walk read."""

    nested: bool
    level: int
    spa: Spa | None
    """Where the entry is; None for a PDPE the processor holds in a register."""
    gpa: Gpa | None
    """Of a guest's entry, its guest-physical address (None unless nested); of a nested one, the gpa translated."""
    value: int
    leaf: bool
    rights: int
    """W, U and NX of the dimension so far, combined: bits of ENTRY."""

    @property
    def name(self) -> str:
        """PML5E, PML4E, PDPE, PDE or PTE, as the manual calls them."""
        return _NAMES[self.level]

    @property
    def flags(self) -> str:
        """The set flags by name."""
        return _described(self.value & ENTRY.defined)


@lru_cache(1024)
def _described(flags: int) -> str:
    return ENTRY.describe(flags)


class Translation(NamedTuple):
    """A permitted access. Sizes in bytes; `writable` and `executable` are for the privilege of the access made."""

    spa: Spa
    gpa: Gpa
    page_size: int
    """The smaller of both dimensions: the stretch around gva that maps linearly. 0 if no table took part."""
    guest_page_size: int
    """0 if paging is off."""
    writable: bool
    executable: bool
    user: bool
    dirty: bool
    """Whether every entry a write would mark dirty now is."""
    rights: int
    """W, U and NX of both dimensions combined, whatever the privilege (so without GMET), and G of the guest's page: bits of
    ENTRY."""


class Fault(NamedTuple):
    """A refused access: PF with error code and CR2, NPF with EXITINFO1 and EXITINFO2, or GP (not canonical)."""

    kind: Literal["PF", "NPF", "GP"]
    code: int
    address: int


class NestedTranslation(NamedTuple):
    """A gpa that the nested tables map. `page_size` in bytes.

    `user` is the U bit: with GMET an executable page is so for users, or else for supervisors; without, it is set.
    """

    spa: Spa
    writable: bool
    executable: bool
    page_size: int
    dirty: bool
    user: bool = True


class NestedFault(NamedTuple):
    """A gpa that they do not; the gpa is EXITINFO2."""

    exitinfo1: int
    gpa: Gpa


@dataclass(frozen=True, slots=True)
class Walk:
    """A translation with everything that led to it."""

    gva: Gva
    access: Access
    mode: str
    nested_mode: str | None
    gmet: bool
    steps: tuple[Step, ...]
    verdict: Translation | Fault
    blame: Step | None
    """The entry that made the verdict a fault, if it was one entry."""


class _Leaf(NamedTuple):
    """Where `_descend` arrived."""

    address: int
    shift: int
    rights: int
    """W, U and NX as combined over the levels, and G of the page."""
    dirty: bool
    spa: int


_Pending: TypeAlias = list[tuple[int, int]]
"""(spa of an entry, accessed or dirty bits to set in its low half)."""

_NOT_PRESENT, _RESERVED = 0, PF_ERROR.P | PF_ERROR.RSV


def _descend(
    memory: Memory,
    form: Format,
    root: int,
    address: int,
    pending: _Pending,
    trace: list[Step] | None,
    nested: "Nested | None",
    pdptes: tuple[int, ...] | None,
    translated: Gpa | None,
) -> _Leaf | NestedFault | int:
    """Walk one dimension down to its leaf.

    With `nested`, entry addresses are guest-physical and go through it. `translated` is the gpa if this is itself the
    nested dimension. Returns the leaf, the nested fault of an entry, or the P and RSV bits of a fault of its own.
    """
    size = form.entry_size
    read = memory.read_u64 if size == 8 else memory.read_u32
    table = root & form.base
    rights, denied = _W | _U, 0
    for number, shift, mask, leaf, leaf_reserved, table_reserved, grants, accessed in form.levels:
        index = address >> shift & mask
        spa = entry_gpa = table + index * size
        held = pdptes is not None and number == 3
        if pdptes is not None and number == 3:
            entry = pdptes[index]
        else:
            if nested is not None:
                found = _nested(memory, nested, Gpa(entry_gpa), True, False, True, NPF_INFO.TABLE, pending, trace)
                if isinstance(found, NestedFault):
                    return found
                spa = found.spa
            try:
                entry = read(spa)
            except Unreadable:
                entry = (1 << 8 * size) - 1
        is_leaf = bool(entry & leaf)
        rights &= entry | grants
        denied |= entry & _NX
        if trace is not None:
            gpa = translated if nested is None else Gpa(entry_gpa)
            nesting = translated is not None
            trace.append(Step(nesting, number, None if held else Spa(spa), gpa, entry, is_leaf, rights | denied))
        if not entry & _P:
            return _NOT_PRESENT
        if entry & (leaf_reserved if is_leaf else table_reserved):
            return _RESERVED
        if accessed & ~entry:
            pending.append((spa, accessed))
        if is_leaf:
            offset = (1 << shift) - 1
            target = entry & _ADDRESS & ~offset | address & offset
            if shift == 22:
                target |= (entry >> 13 & 0xFF) << 32
            return _Leaf(target, shift, rights | denied | entry & _G, bool(entry & _D), spa)
        table = entry & _ADDRESS
    raise AssertionError("the last level of every format is a leaf")


def _nested(
    memory: Memory,
    nested: Nested,
    gpa: Gpa,
    write: bool,
    execute: bool,
    user: bool,
    where: int,
    pending: _Pending,
    trace: list[Step] | None,
) -> NestedTranslation | NestedFault:
    """One gpa through the nested tables; `where` is the FINAL or TABLE bit.

    It is always a user access (APM2 15.25.5), but for a fetch under GMET, which is that of the guest's CPL. Then users execute
    pages with U only, as ever, and supervisors those without, as with SMEP; U does not concern data (APM2 15.25.13).
    """
    form = nested.format
    # An address that the tables cannot express is in none of them.
    leaf: _Leaf | NestedFault | int = _NOT_PRESENT
    if not gpa >> form.width:
        leaf = _descend(memory, form, nested.ncr3, gpa, pending, trace, None, None, gpa)
    if isinstance(leaf, _Leaf):
        rights, dirty = leaf.rights, leaf.dirty
        reachable = not execute or bool(rights & _U) == user if nested.gmet else rights & _U
        if reachable and (not write or rights & _W) and not (execute and rights & _NX):
            if write and not dirty:
                pending.append((leaf.spa, _D))
                dirty = True
            spa, size = leaf.address, 1 << leaf.shift
            if nested.apic is not None and not (gpa ^ nested.apic[0]) & -size:
                size = 0x1000  # what lies around the APIC page is in parts
                if gpa & -size == nested.apic[0]:
                    spa = nested.apic[1] | gpa & 0xFFF
            return NestedTranslation(Spa(spa), bool(rights & _W), not rights & _NX, size, dirty, bool(rights & _U))
        cause = int(PF_ERROR.P)
    else:
        assert isinstance(leaf, int)
        cause = leaf
    by_user = user or not (execute and nested.gmet)
    # ID is set for each code read, whatever the host's EFER.NXE is (APM2 15.25.6); for #PF it is not (8.4.2).
    info = where | cause | (NPF_INFO.U if by_user else 0) | (NPF_INFO.W if write else 0) | (NPF_INFO.ID if execute else 0)
    return NestedFault(info, gpa)


def _commit(memory: Memory, pending: _Pending) -> None:
    """Set accessed and dirty bits: all are in the low half of an entry of any size."""
    for spa, marks in pending:
        memory.write_u32(spa, memory.read_u32(spa) | marks)


def nested_translate(
    memory: Memory,
    nested: Nested,
    gpa: int,
    write: bool,
    execute: bool,
    user: bool = True,
    *,
    set_ad: bool,
    table: bool = False,
) -> NestedTranslation | NestedFault:
    """Translate one guest-physical address. `table`: the access is a guest page walk, not the final one.

    `user`: the guest is at CPL 3, which a fetch under GMET depends on.
    """
    pending: _Pending = []
    where = NPF_INFO.TABLE if table else NPF_INFO.FINAL
    found = _nested(memory, nested, Gpa(gpa), write, execute, user, where, pending, None)
    if set_ad and pending and isinstance(found, NestedTranslation):
        _commit(memory, pending)
    return found


def _granted(state: PagingState, rights: int, user: bool, implicit: bool) -> tuple[bool, bool, bool]:
    """What such rights let a user, or a supervisor, do: read, write if it may read, execute (APM2 5.6)."""
    writable = bool(rights & _W or not (user or state.cr0 & CR0.WP))
    if user:
        reachable = bool(rights & _U)
        return reachable, writable, reachable and not rights & _NX
    # SMAP spares explicit accesses with RFLAGS.AC set (APM2 5.6.7).
    spared = not state.cr4 & CR4.SMAP or (state.rflags_ac and not implicit)
    return spared or not rights & _U, writable, not rights & _NX and not (rights & _U and state.cr4 & CR4.SMEP)


def permits(state: PagingState, rights: int, access: Access) -> bool:
    """Whether a translation with such rights (`Translation.rights`) permits an access."""
    implicit = access.implicit_supervisor
    reachable, writable, executable = _granted(state, rights, access.user and not implicit, implicit)
    return (executable if access.execute else reachable) and (not access.write or (reachable and writable))


def _translate(
    memory: Memory,
    state: PagingState,
    gva: int,
    access: Access,
    nested: Nested | None,
    pending: _Pending,
    trace: list[Step] | None,
) -> Translation | Fault:
    form = state.format
    write, execute = access.write, access.execute
    user = access.user and not access.implicit_supervisor
    if form is None:
        gpa, guest_size = Gpa(gva & 0xFFFF_FFFF), 0
        writable = executable = dirty = True
        rights = _W | _U
    else:
        if form.width == 32:
            gva &= 0xFFFF_FFFF
        elif (gva >> form.width - 1) not in (0, (1 << 65 - form.width) - 1):
            return Fault("GP", 0, gva)
        held = state.pdptes if nested is None and form.name == "PAE" else None
        leaf = _descend(memory, form, state.cr3, gva, pending, trace, nested, held, None)
        if isinstance(leaf, NestedFault):
            return Fault("NPF", leaf.exitinfo1, leaf.gpa)
        cause: int | None = leaf if isinstance(leaf, int) else None
        if isinstance(leaf, _Leaf):
            rights = leaf.rights
            reachable, writable, executable = _granted(state, rights, user, access.implicit_supervisor)
            if not (executable if execute else reachable) or (write and not (reachable and writable)):
                cause = PF_ERROR.P
        if cause is not None:
            fetch = execute and (state.cr4 & CR4.SMEP or (state.efer & EFER.NXE and state.cr4 & CR4.PAE))
            code = cause | (PF_ERROR.W if write else 0) | (PF_ERROR.U if user else 0) | (PF_ERROR.ID if fetch else 0)
            return Fault("PF", code, gva)
        assert isinstance(leaf, _Leaf)
        gpa, guest_size, dirty = Gpa(leaf.address), 1 << leaf.shift, leaf.dirty
        if write and not dirty:
            pending.append((leaf.spa, _D))
            dirty = True
    if nested is None:
        return Translation(Spa(gpa), gpa, guest_size, guest_size, writable, executable, bool(rights & _U), dirty, rights)
    final = _nested(memory, nested, gpa, write, execute, user, NPF_INFO.FINAL, pending, trace)
    if isinstance(final, NestedFault):
        return Fault("NPF", final.exitinfo1, final.gpa)
    size = min(guest_size, final.page_size) if guest_size else final.page_size
    rights = rights & (~0 if final.writable else ~_W) | (0 if final.executable else _NX)
    executable = executable and final.executable and not (nested.gmet and final.user != user)
    return Translation(
        final.spa, gpa, size, guest_size,
        writable and final.writable, executable, bool(rights & _U), dirty and final.dirty, rights,
    )  # fmt: skip


def translate(
    memory: Memory, state: PagingState, gva: int, access: Access, nested: Nested | None = None, *, set_ad: bool
) -> Translation | Fault:
    """Translate one linear address.

    With `set_ad`, a permitted access leaves accessed bits in every entry it used, and dirty bits if it writes (in the
    nested tables also for the guest's page tables); a refused one leaves no mark in either dimension. `Unwritable`
    then comes from a source that cannot be written.
    """
    pending: _Pending = []
    verdict = _translate(memory, state, gva, access, nested, pending, None)
    if set_ad and pending and isinstance(verdict, Translation):
        _commit(memory, pending)
    return verdict


def walk(memory: Memory, state: PagingState, gva: int, access: Access, nested: Nested | None = None) -> Walk:
    """The same translation without side effects, with every entry of both dimensions in the order of the visit."""
    trace: list[Step] = []
    verdict = _translate(memory, state, gva, access, nested, [], trace)
    blame = _blame(trace, verdict, state) if isinstance(verdict, Fault) else None
    nested_mode, gmet = (nested.format.name, nested.gmet) if nested else (None, False)
    return Walk(Gva(gva), access, state.mode, nested_mode, gmet, tuple(trace), verdict, blame)


def _blame(trace: list[Step], fault: Fault, state: PagingState) -> Step | None:
    """The entry to change: the last one read, or for a refused right the first that withholds it."""
    if not trace:
        return None
    last = trace[-1]
    if fault.kind == "NPF" and (not last.nested or last.gpa != fault.address):
        return None  # the gpa was beyond the reach of the nested tables: no entry was read for it
    code = fault.code
    if not code & PF_ERROR.P or code & PF_ERROR.RSV:
        return last
    if last.nested:
        run = list(takewhile(lambda step: step.nested and step.gpa == last.gpa, reversed(trace)))[::-1]
    else:
        run = [step for step in trace if not step.nested]
    wanted = _U if code & PF_ERROR.U else 0
    if code & PF_ERROR.W and (wanted or state.cr0 & CR0.WP):
        wanted |= _W
    if code & PF_ERROR.ID:
        wanted |= _NX
    # A page that supervisors may not touch at all (SMEP, SMAP) is no one entry's doing: name the leaf.
    return next((step for step in run if (step.rights ^ _W ^ _U) & wanted), last)
