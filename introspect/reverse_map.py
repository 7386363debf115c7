"""What leads to a page of memory, and whose it is: the reverse of all page tables there are.

The map is kept up to date rather than made anew: page tables that are as they were are not walked again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias
from weakref import WeakKeyDictionary

import numpy as np

from introspect.avic import APIC_ADDRESS
from introspect.dimension import NO_TABLES, Dimension, Limits, Progress, TableRows
from introspect.exits import ExitCode
from introspect.expression import Space
from introspect.intercepts import intercepted, words_of
from introspect.paging import Nested, PagingState
from introspect.permissions import IOPM_SIZE, MSRPM_SIZE
from introspect.runs import Runs, leading_to
from introspect.sources import Memory, Unreadable
from introspect.tables import AddressSpace, NestedSpace, canonical
from introspect.vmcb import AVIC_PHYSICAL, V_INTR, VMCB, VMCB_SIZE

if TYPE_CHECKING:
    from introspect.commands.context import GuestView, HostView

__all__ = ["Area", "Mapper", "Mapping", "Owner", "ReverseMap", "SpaceMapper", "reverse_map_of"]

_PAGE = 0x1000
_MAPS_OF_VMCB = (
    ("IOPM", "iopm_base_pa", IOPM_SIZE, ExitCode.IOIO), ("MSRPM", "msrpm_base_pa", MSRPM_SIZE, ExitCode.MSR),
)  # fmt: skip
_MOST = 4
"""As many addresses as are told of one owner."""
_KINDS = {Space.GPA: "nested ", Space.GVA: "shadow ", Space.IOVA: "I/O "}
"""Tables that confine somebody, by what they translate."""
_NAMES = {6: "level-6 table", 5: "PML5", 4: "PML4", 3: "page-directory-pointer table", 2: "page directory", 1: "page table"}


class Mapper(Protocol):
    """Whoever reaches memory through tables: page tables, nested ones, those of an IOMMU domain."""

    @property
    def party(self) -> str:
        """Whose tables they are: "the host", "guest 2 (linux)", "device 00:03.0"."""

    @property
    def number(self) -> int | None:
        """The inferior that reaches memory through them; None if it is none."""

    @property
    def space(self) -> Space:
        """What they translate."""

    @property
    def label(self) -> str:
        """Which of the party's tables of this space, if it has several; else empty."""

    @property
    def runs(self) -> Runs:
        """What they map; targets are system-physical."""

    @property
    def host(self) -> bool:
        """Whether they are the hypervisor's own."""

    @property
    def confines(self) -> bool:
        """Whether these tables are what keeps the party from the rest of memory: nested ones, those of a guest without nested
        paging, a device's; not the host's, nor those that a guest under nested paging has for itself."""

    @property
    def complete(self) -> bool:
        """Whether they were looked at wholly: loops may describe more than anybody would wait for."""

    def shown(self, address: int) -> int:
        """An address as software writes it."""

    def tables(self) -> TableRows:
        """The tables themselves."""


@dataclass(eq=False)
class SpaceMapper:
    """The tables of the host or a guest, of one dimension: nested ones if `linear` is None."""

    party: str
    number: int | None
    label: str
    nested: NestedSpace | None
    linear: AddressSpace | None
    host: bool = False
    nested_changed: Callable[[], bool] = lambda: False
    """For linear addresses under nested paging: whether the nested tables have changed at this look."""

    @property
    def space(self) -> Space:
        return Space.GPA if self.linear is None else Space.GVA

    @property
    def runs(self) -> Runs:
        if self.linear is not None:
            return self.linear.runs
        assert self.nested is not None
        return self.nested.reachable

    @property
    def confines(self) -> bool:
        return self.linear is None or (self.nested is None and not self.host)

    @property
    def complete(self) -> bool:
        spaces = [self.linear.unknown] if self.linear is not None else []
        if self.nested is not None:
            spaces.append(self.nested.dimension.unknown)
        return not any(len(unknown.start) for unknown in spaces)

    def shown(self, address: int) -> int:
        return address if self.linear is None else canonical(address, self.linear.width)

    def refresh(self) -> bool:
        if self.linear is not None:
            return self.linear.refresh(self.nested_changed())
        assert self.nested is not None
        return self.nested.refresh()

    @property
    def dimension(self) -> Dimension | None:
        if self.linear is not None:
            return self.linear.dimension
        assert self.nested is not None
        return self.nested.dimension

    def tell(self, progress: Progress | None) -> None:
        """Whom to tell of progress."""
        if self.dimension is not None:
            self.dimension.progress = progress

    def tables(self) -> TableRows:
        return NO_TABLES if self.dimension is None else self.dimension.table_rows()


_Known: TypeAlias = dict[tuple[object, ...], SpaceMapper]


@dataclass(frozen=True, slots=True)
class Area:
    """Memory with a purpose of its own. `end` is the first address behind it."""

    kind: str
    """VMCB, HSAVE, IOPM, MSRPM, "AVIC backing page" ..., image."""
    who: str
    number: int | None
    """The guest it is about; None for the hypervisor's own."""
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Mapping:
    """One way to an address: an address of one of the spaces that leads there."""

    party: str
    number: int | None
    space: Space
    label: str
    address: int
    length: int
    """Bytes from `address` on that go on linearly, and are mapped alike."""
    attributes: int
    """As `tables.Range` has them."""


@dataclass(frozen=True, slots=True)
class Owner:
    """What an address is part of."""

    kind: str
    who: str
    number: int | None
    detail: str = ""

    def text(self) -> str:
        return f"{self.kind} of {self.who}{', ' + self.detail if self.detail else ''}"


EACH = Limits(entries=1 << 24, runs=1 << 22)
"""For one address space: 64 GiB in 4 KiB pages, of which 16 may be scattered."""
ALL = Limits(entries=1 << 27, runs=1 << 25)
"""For all together. They are kept, so this is a bound on memory: 2 GiB."""
LEAST = Limits(entries=1 << 13, runs=1 << 8)
"""For each address space when there is no more room."""


class ReverseMap:
    """All page tables of a machine, by where they lead."""

    def __init__(self, memory: Memory, each: Limits = EACH, together: Limits = ALL) -> None:
        self.memory, self.each, self.together = memory, each, together
        self.mappers: list[Mapper] = []
        self.areas: list[Area] = []
        self._known: dict[tuple[object, ...], SpaceMapper] = {}
        self.walked = 0
        """Spaces that were made or had changed at the last `update`."""
        self.host_known = True
        """Whether the host's registers were: a dump may have none, and then its CR0 is 0."""

    def update(
        self,
        host: HostView,
        guests: Sequence[GuestView],
        progress: Progress | None = None,
    ) -> bool:
        """Bring the map up to date.

        False if `progress`, told of the part that is done, did not want to go on: then it is incomplete.
        """
        before, self._known = self._known, {}
        self.mappers, self.areas, self.walked = [], [], 0
        self._entries, self._runs = self.together.entries, self.together.runs
        self._ended = False
        parts = len(guests) + 1
        self.host_known = host.paging.cr0 != 0
        if self.host_known:
            going = self._going(progress, 0, parts)
            self._add(str(host), host.number, "", host.paging, None, before, going, host=True)
        for index, guest in enumerate(guests, 1):
            going = self._going(progress, index, parts)
            if not going(0):
                break
            nested = None
            if guest.nested is not None:
                nested = self._nested(str(guest), guest.number, guest.nested, before, going)
            for state, label in self._states(guest):
                self._add(str(guest), guest.number, label, state, nested, before, going)
        if self._ended:
            self._known = {**before, **self._known}  # what was not looked at now may be next time
            return False
        self.areas = list(_areas(self.memory, host, guests))
        return True

    def _going(self, progress: Progress | None, index: int, parts: int) -> Progress:
        """The same about one of so many parts; remembers that somebody did not want to go on."""

        def going(share: float) -> bool:
            if progress is not None and not self._ended:
                self._ended = not progress((index + share) / parts)
            return not self._ended

        return going

    def _states(self, guest: GuestView) -> Iterator[tuple[PagingState, str]]:
        """Those of the guest's virtual processors that have tables of their own, and what to call them."""
        seen = {(guest.paging.format, guest.paging.root)}
        yield guest.paging, ""
        for spa in guest.vmcbs[1:]:
            state = self._state(spa, guest.paging.maxphyaddr)
            if state is not None and (state.format, state.root) not in seen:
                seen.add((state.format, state.root))
                yield state, f"VMCB {spa:#x}"

    def _room(self) -> Limits:
        """What one more address space may have."""
        entries = max(min(self.each.entries, self._entries), LEAST.entries)
        return Limits(entries, max(min(self.each.runs, self._runs), LEAST.runs))

    def _state(self, vmcb: int, maxphyaddr: int) -> PagingState | None:
        try:
            return PagingState.from_vmcb(self.memory.read(vmcb, VMCB_SIZE), maxphyaddr)
        except Unreadable:
            return None

    def _nested(
        self, party: str, number: int, nested: Nested, before: _Known, going: Progress
    ) -> SpaceMapper:
        key = (number, Space.GPA, nested)
        known = before.get(key)
        changed = True
        if known is None:
            space = NestedSpace(self.memory, nested, limits=self._room(), progress=going, keep=True)
            known = SpaceMapper(party, number, "", space, None)
        else:
            known.party = party
            known.tell(going)
            changed = known.refresh()
        known.nested_changed = lambda: changed
        return self._take(key, known, changed)

    def _add(
        self, party: str, number: int, label: str, state: PagingState, nested: SpaceMapper | None,
        before: _Known, going: Progress, host: bool = False,
    ) -> None:  # fmt: skip
        inner = None if nested is None else nested.nested
        key = (number, Space.GVA, state.format, state.root, state.pdptes, None if inner is None else inner.nested)
        known = before.get(key)
        changed = True
        if known is not None and known.linear is not None and known.linear.nested is inner:
            known.party, known.label = party, label
            known.nested_changed = (lambda: False) if nested is None else nested.nested_changed
            known.tell(going)
            changed = known.refresh()
        else:
            space = AddressSpace(self.memory, state, inner, limits=self._room(), progress=going, keep=True)
            known = SpaceMapper(party, number, label, inner, space, host)
        self._take(key, known, changed)

    def _take(self, key: tuple[object, ...], mapper: SpaceMapper, changed: bool) -> SpaceMapper:
        self._known[key] = mapper
        self.mappers.append(mapper)
        self.walked += changed
        mapper.tell(None)
        self._entries -= 0x200 * len(mapper.tables().spa)
        self._runs -= len(mapper.runs.start)
        return mapper

    # Asking

    def mappings(self, spa: int, limit: int) -> list[Mapping]:
        """The ways to an address, at most `limit` through each mapper."""
        found = []
        for mapper in self.mappers:
            for address, length, target, attributes in leading_to(mapper.runs, spa, limit):
                skipped = spa - target
                found.append(Mapping(
                    mapper.party, mapper.number, mapper.space, mapper.label, mapper.shown(address + skipped),
                    length - skipped, attributes,
                ))  # fmt: skip
        return found

    def owners(self, spa: int) -> list[Owner]:
        """What an address is part of, if that is known: page tables, structures, the image, RAM of guests."""
        found = [
            Owner(area.kind, area.who, area.number, f"offset {spa - area.start:#x}")
            for area in self.areas if area.start <= spa < area.end
        ]  # fmt: skip
        page = spa & -_PAGE
        for mapper in self.mappers:
            kind = _KINDS[mapper.space] if mapper.confines else ""
            tables = mapper.tables()
            for index in np.flatnonzero(tables.spa - np.uint64(page) < _PAGE)[:_MOST].tolist():
                begins = f"for {mapper.space} {mapper.shown(int(tables.address[index])):#x} and on"
                found.append(Owner(kind + _NAMES[int(tables.level[index])], mapper.party, mapper.number, begins))
        for mapper in self.mappers:
            if mapper.space == Space.GPA:
                for address, _, target, _ in leading_to(mapper.runs, spa, _MOST):
                    found.append(Owner("RAM", mapper.party, mapper.number, f"gpa {address + spa - target:#x}"))
        return found


def _areas(memory: Memory, host: HostView, guests: Sequence[GuestView]) -> Iterator[Area]:
    for start, end in host.image:
        yield Area("image", str(host), None, start, end)
    for cpu, spa in enumerate(host.saves):
        if spa:
            yield Area("HSAVE", f"CPU {cpu}", None, spa, spa + _PAGE)
    for guest in guests:
        who, number = str(guest), guest.number
        for spa in guest.vmcbs:
            yield Area("VMCB", who, number, spa, spa + VMCB_SIZE)
            try:
                vmcb = memory.read(spa, VMCB_SIZE)
            except Unreadable:
                continue
            for kind, name, size, code in _MAPS_OF_VMCB:
                if intercepted(words_of(vmcb), code):  # else nobody looks at it, and the field may say anything
                    base = VMCB.read(vmcb, name) & APIC_ADDRESS
                    yield Area(kind, who, number, base, base + size)
            if VMCB.read(vmcb, "v_intr") & V_INTR.avic_enable:
                yield from _avic_areas(vmcb, who, number)


def _avic_areas(vmcb: bytes, who: str, number: int) -> Iterator[Area]:
    last = AVIC_PHYSICAL.get(VMCB.read(vmcb, "avic_physical_table"), "max_index")
    for kind, name, size in (
        ("AVIC backing page", "avic_backing_page", _PAGE), ("AVIC logical table", "avic_logical_table", _PAGE),
        ("AVIC physical table", "avic_physical_table", 8 * (last + 1)),
    ):  # fmt: skip
        base = VMCB.read(vmcb, name) & APIC_ADDRESS
        yield Area(kind, who, number, base, base + size)


_MAPS: WeakKeyDictionary[Memory, ReverseMap] = WeakKeyDictionary()


def reverse_map_of(memory: Memory) -> ReverseMap:
    """The map of a memory: the same one each time, so that it need not be made anew."""
    found = _MAPS.get(memory)
    if found is None:
        found = _MAPS[memory] = ReverseMap(memory)
    return found
