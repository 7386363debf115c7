"""What leads to a page of memory, and whose it is: the reverse of all page tables there are.

The map is kept up to date rather than made anew: page tables that are as they were are not walked again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol
from weakref import WeakKeyDictionary

import numpy as np

from introspect.avic import APIC_ADDRESS
from introspect.dimension import NO_TABLES, Dimension, Limits, TableRows
from introspect.expression import Space
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
_MOST = 4
"""As many addresses as are told of one owner."""
_KINDS = {Space.GPA: "nested ", Space.GVA: "shadow ", Space.IOVA: "I/O "}
"""Tables that confine somebody, by what they translate."""
_NAMES = {5: "PML5", 4: "PML4", 3: "page-directory-pointer table", 2: "page directory", 1: "page table"}


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

    def refresh(self) -> bool:
        """Look for changes; says whether there are any."""

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

    def tables(self) -> TableRows:
        return NO_TABLES if self.dimension is None else self.dimension.table_rows()


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


class ReverseMap:
    """All page tables of a machine, by where they lead."""

    def __init__(self, memory: Memory, limits: Limits | None = None) -> None:
        self.memory, self.limits = memory, limits or Limits()
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
        others: Iterable[Mapper] = (),
        progress: Callable[[float], bool] | None = None,
    ) -> bool:
        """Bring the map up to date. `others` are mappers of other kinds, which are refreshed, too.

        False if `progress`, told of the part that is done, did not want to go on: then it is incomplete.
        """
        before, self._known = self._known, {}
        self.mappers, self.walked = [], 0
        self.host_known = host.paging.cr0 != 0
        if self.host_known:
            self._add(str(host), host.number, "", host.paging, None, before, host=True)
        for index, guest in enumerate(guests):
            if progress is not None and not progress(index / len(guests)):
                return False
            nested = None if guest.nested is None else self._nested(str(guest), guest.number, guest.nested, before)
            states = {(guest.paging.format, guest.paging.root): (guest.paging, "")}
            for spa in guest.vmcbs[1:]:
                state = self._state(spa, guest.paging.maxphyaddr)
                if state is not None:
                    states.setdefault((state.format, state.root), (state, f"VMCB {spa:#x}"))
            for state, label in states.values():
                self._add(str(guest), guest.number, label, state, nested, before)
        for other in others:
            self.walked += other.refresh()
            self.mappers.append(other)
        self.areas = list(_areas(self.memory, host, guests))
        return True

    def _state(self, vmcb: int, maxphyaddr: int) -> PagingState | None:
        try:
            return PagingState.from_vmcb(self.memory.read(vmcb, VMCB_SIZE), maxphyaddr)
        except Unreadable:
            return None

    def _nested(self, party: str, number: int, nested: Nested, before: dict[tuple[object, ...], SpaceMapper]) -> SpaceMapper:
        key = (number, Space.GPA, nested)
        known = before.get(key)
        changed = True
        if known is None:
            space = NestedSpace(self.memory, nested, limits=self.limits, keep=True)
            known = SpaceMapper(party, number, "", space, None)
        else:
            known.party = party
            changed = known.refresh()
        known.nested_changed = lambda: changed
        return self._take(key, known, changed)

    def _add(
        self, party: str, number: int, label: str, state: PagingState, nested: SpaceMapper | None,
        before: dict[tuple[object, ...], SpaceMapper], host: bool = False,
    ) -> None:  # fmt: skip
        inner = None if nested is None else nested.nested
        key = (number, Space.GVA, state.format, state.root, state.pdptes, None if inner is None else inner.nested)
        known = before.get(key)
        changed = True
        if known is not None and known.linear is not None and known.linear.nested is inner:
            known.party, known.label = party, label
            known.nested_changed = (lambda: False) if nested is None else nested.nested_changed
            changed = known.refresh()
        else:
            space = AddressSpace(self.memory, state, inner, limits=self.limits, keep=True)
            known = SpaceMapper(party, number, label, inner, space, host)
        self._take(key, known, changed)

    def _take(self, key: tuple[object, ...], mapper: SpaceMapper, changed: bool) -> SpaceMapper:
        self._known[key] = mapper
        self.mappers.append(mapper)
        self.walked += changed
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
            for kind, name, size in (("IOPM", "iopm_base_pa", IOPM_SIZE), ("MSRPM", "msrpm_base_pa", MSRPM_SIZE)):
                base = VMCB.read(vmcb, name) & -_PAGE & APIC_ADDRESS
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
