"""Address spaces as a whole: everything that page tables map, of a guest, of the nested dimension, or of both combined.

Where `introspect.paging` answers for one address, this lists all of them, as stretches that map linearly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from introspect.dimension import NOWHERE, SCATTERED, SIZES, Dimension, Limits, Problem, Progress
from introspect.paging import ENTRY, Format, Nested, NestedTranslation, PagingState, nested_translate
from introspect.runs import EMPTY, U64, Runs, Spans, column, gaps, inside, joined, merged, merged_alike, overlaps
from introspect.sources import Memory

__all__ = ["AddressSpace", "Listing", "Mapped", "NestedSpace", "Range", "as_ranges", "canonical", "list_nested", "list_space"]

_WU = ENTRY.W | ENTRY.U
_NESTED_SHIFT = 32
_PLAIN = ENTRY.W | ENTRY.U | ENTRY.PWT | ENTRY.PCD | ENTRY.PS | ENTRY.G | ENTRY.NX
_REACH = 1 << 52
"""No guest-physical address is beyond."""
_UNPAGED = 1 << 32


class Mapped(NamedTuple):
    """What an address space has at one address."""

    target: int
    rights: int
    """W, U and NX of all dimensions combined, and G of the guest's page: bits of ENTRY."""
    page_size: int
    """The smaller of both dimensions; 0 if no table takes part."""
    guest_page_size: int
    """0 if paging is off."""


class Range(NamedTuple):
    """Addresses that are mapped with the same rights and memory type. `end` is the first address behind it."""

    start: int
    end: int
    target: int
    linear: bool
    """All of it leads to `target` and on; else only the first page does."""
    attributes: int

    @property
    def writable(self) -> bool:
        return bool(self.attributes & ENTRY.W)

    @property
    def user(self) -> bool:
        return bool(self.attributes & ENTRY.U)

    @property
    def executable(self) -> bool:
        return not self.attributes & ENTRY.NX

    @property
    def shared(self) -> bool:
        """G: kept over loads of CR3."""
        return bool(self.attributes & ENTRY.G)

    @property
    def page_sizes(self) -> tuple[int, ...]:
        """Those of the guest's tables, or of the only dimension."""
        return _sizes(self.attributes)

    @property
    def nested_page_sizes(self) -> tuple[int, ...]:
        """Those of the nested tables, where both dimensions are combined."""
        return _sizes(self.attributes >> _NESTED_SHIFT & 0x7FFF_FFFF)

    @property
    def pat_index(self) -> int:
        """Which entry of the PAT has the memory type (APM2 7.8.2)."""
        return _pat_index(self.attributes)

    @property
    def nested_pat_index(self) -> int:
        return _pat_index(self.attributes >> _NESTED_SHIFT)

    @property
    def nested_user(self) -> bool:
        """U of the nested tables, which with GMET says whose code it may be."""
        return bool(self.attributes >> _NESTED_SHIFT & ENTRY.U)


def _sizes(attributes: int) -> tuple[int, ...]:
    return tuple(1 << n for n in (12, 21, 22, 30) if attributes & SIZES & 1 << n)


def _pat_index(attributes: int) -> int:
    high, middle, low = (bool(attributes & flag) for flag in (ENTRY.PS, ENTRY.PCD, ENTRY.PWT))
    return high << 2 | middle << 1 | low


def canonical(address: int, width: int) -> int:
    """A linear address of so many bits, as software writes it in 64 bits."""
    return address | (1 << 64) - (1 << width) if width > 32 and address >> width - 1 else address


@dataclass(frozen=True, slots=True)
class Listing:
    """Everything that an address space maps. Addresses are those of the tables' width, not sign-extended: see `canonical`."""

    mode: str
    nested_mode: str | None
    width: int
    """Bits of an address."""
    signed: bool
    """Whether software writes the upper half sign-extended: linear addresses of 64-bit modes."""
    runs: Runs
    """What is mapped, in order."""
    refused: Runs
    """What the guest's tables map, but the nested ones do not: targets are guest-physical."""
    problems: tuple[Problem, ...]
    nested_problems: tuple[Problem, ...]
    problems_left_out: int
    unknown: Spans
    """Addresses that the limits on work, or who was told of progress, left unseen."""
    nested_unknown: Spans
    """The same of guest-physical ones."""
    tables: tuple[int, ...]
    """How many tables there are of each level, from the root on."""

    @property
    def bytes_mapped(self) -> int:
        return int(self.runs.length.sum())

    def shown(self, address: int) -> int:
        """An address as software writes it."""
        return canonical(address, self.width) if self.signed else address

    def find(self, address: int) -> Mapped | None:
        """What is mapped at an address, in either notation. ValueError in a listing without targets, where it matters."""
        address &= (1 << self.width) - 1
        index = int(np.searchsorted(self.runs.start, np.uint64(address), "right")) - 1
        if index < 0:
            return None
        start, length, target, attributes = (int(one[index]) for one in self.runs)
        if address - start >= length:
            return None
        if attributes & SCATTERED:
            raise ValueError(f"{address:#x}: the listing was made without targets; list the space with them")
        guest = attributes & SIZES
        nested = attributes >> _NESTED_SHIFT & SIZES if self.nested_mode else 0
        size = min(guest, nested) if guest and nested else guest or nested
        return Mapped(target + address - start, attributes & (_WU | ENTRY.NX | ENTRY.G), size, guest)

    def ranges(self, *, linear: bool = False) -> Iterator[Range]:
        """Neighbours with the same rights and memory type as one; with `linear` only where they map on linearly, too."""
        return as_ranges(self.table(linear=linear))

    def table(self, *, linear: bool = False) -> Runs:
        """The same as columns, for who wants to count them or some of them: see `as_ranges`."""
        if linear:
            return self.runs
        half = 1 << self.width - 1 if self.width > 32 else 0
        return merged_alike(self.runs, half, SCATTERED, SIZES | SIZES << _NESTED_SHIFT)


def as_ranges(runs: Runs) -> Iterator[Range]:
    """Rows of `Listing.table`."""
    columns = (runs.start, runs.end, runs.target, runs.attributes & SCATTERED == 0, runs.attributes)
    return map(Range, *(one.tolist() for one in columns))


class NestedSpace:
    """The guest-physical addresses of a guest, by its nested tables."""

    def __init__(
        self,
        memory: Memory,
        nested: Nested,
        *,
        limits: Limits | None = None,
        progress: Progress | None = None,
        keep: bool = False,
        targets: bool = True,
    ) -> None:
        self.memory, self.nested = memory, nested
        self.dimension = Dimension(
            memory, nested.format, nested.ncr3, limits=limits, progress=progress, keep=keep, targets=targets
        )
        self._use()

    def refresh(self) -> bool:
        """Look for changes; says whether there are any."""
        changed = self.dimension.refresh()
        if changed:
            self._use()
        return changed

    def _use(self) -> None:
        runs = self.dimension.runs
        if self.nested.apic is not None:
            runs = _with_apic(runs, *self.nested.apic)
        self.runs = runs
        user = runs.attributes & ENTRY.U != 0
        self.reachable = runs if self.nested.gmet or bool(user.all()) else runs.take(user)
        """Without U nobody has access (APM2 15.25.5), unless that bit is GMET's."""
        self.spans = Spans(self.reachable.start, self.reachable.end)

    def locate(self, tables: U64) -> U64:
        """Where guest page tables are: the processor reads them as if it wrote (APM2 15.25.5)."""
        known = self.reachable
        found = np.full(len(tables), NOWHERE, np.uint64)
        if len(known.start):
            index = np.searchsorted(known.start, tables, "right") - 1
            offset = tables - known.start[index]
            good = (index >= 0) & (offset < known.length[index]) & (known.attributes[index] & ENTRY.W != 0)
            found = np.where(good, known.target[index] + offset, found)
        for place in np.flatnonzero(inside(tables, self.dimension.unknown)).tolist():
            one = nested_translate(self.memory, self.nested, int(tables[place]), True, False, set_ad=False, table=True)
            if isinstance(one, NestedTranslation):
                found[place] = one.spa
        return found

    def listing(self) -> Listing:
        whole, none = self.dimension, Spans(column(), column())
        return Listing(
            whole.form.name, None, whole.form.width, False, self.runs, EMPTY, tuple(whole.problems), (),
            whole.problems_left_out, whole.unknown, none, tuple(whole.tables),
        )  # fmt: skip


def _with_apic(runs: Runs, bar: int, backing: int) -> Runs:
    """With AVIC accesses to the APIC page reach the backing page, if the tables map the page at all (APM2 15.29.3)."""
    index = int(np.searchsorted(runs.start, np.uint64(bar), "right")) - 1
    if index < 0 or bar - int(runs.start[index]) >= int(runs.length[index]):
        return runs
    start, length, target, attributes = (int(one[index]) for one in runs)
    size = attributes & SIZES
    page = bar & -size
    small = attributes & ~SIZES | 1 << 12
    pieces = [
        (start, page, target, attributes), (page, bar, target + page - start, small), (bar, bar + 0x1000, backing, small),
        (bar + 0x1000, page + size, target + bar + 0x1000 - start, small),
        (page + size, start + length, target + page + size - start, attributes),
    ]  # fmt: skip
    parts = [Runs(column(a), column(b - a), column(c), column(d)) for a, b, c, d in pieces if b > a]
    return joined([runs.take(slice(0, index)), *parts, runs.take(slice(index + 1, None))])


class AddressSpace:
    """The linear addresses of a guest or the host: by its page tables, and through the nested ones where there are some."""

    def __init__(
        self,
        memory: Memory,
        state: PagingState,
        nested: NestedSpace | None = None,
        *,
        limits: Limits | None = None,
        progress: Progress | None = None,
        keep: bool = False,
        targets: bool = True,
    ) -> None:
        self.state, self.nested, self.limits = state, nested, limits or Limits()
        self.dimension: Dimension | None = None
        form: Format | None = state.format
        if form is not None:
            held = state.pdptes if nested is None and form.name == "PAE" else None
            locate: Callable[[U64], U64] | None = None if nested is None else nested.locate
            self.dimension = Dimension(
                memory, form, state.cr3, pdptes=held, locate=locate, limits=self.limits, progress=progress, keep=keep,
                targets=targets or nested is not None,
            )  # fmt: skip
        self._use()

    def refresh(self, nested_changed: bool) -> bool:
        """Look for changes, once the nested space has been looked at; says whether there are any."""
        changed = nested_changed
        if self.dimension is not None:
            if nested_changed and self.dimension.relocated():
                self.dimension.walk()
            else:
                changed |= self.dimension.refresh()
        if changed:
            self._use()
        return changed

    def _use(self) -> None:
        whole = self.dimension
        self.guest_runs = Runs(column(0), column(_UNPAGED), column(0), column(_WU)) if whole is None else whole.runs
        """By the guest's tables alone: targets are guest-physical."""
        none = Spans(column(), column())
        self.unknown = none if whole is None else whole.unknown
        if self.nested is None:
            self.runs, self.refused = self.guest_runs, EMPTY
        else:
            self.runs, self.refused, undone = _through(self.guest_runs, self.nested, self.width, self.limits.runs)
            if undone is not None:
                start = np.append(self.unknown.start, undone)
                self.unknown = Spans(start, np.append(self.unknown.end, np.uint64(1 << self.width)))

    @property
    def width(self) -> int:
        return 32 if self.dimension is None else self.dimension.form.width

    def listing(self) -> Listing:
        whole, nested = self.dimension, None if self.nested is None else self.nested.dimension
        none = Spans(column(), column())
        return Listing(
            self.state.mode, None if nested is None else nested.form.name, self.width, self.width > 32, self.runs, self.refused,
            () if whole is None else tuple(whole.problems), () if nested is None else tuple(nested.problems),
            sum(0 if one is None else one.problems_left_out for one in (whole, nested)), self.unknown,
            none if nested is None else nested.unknown, () if whole is None else tuple(whole.tables),
        )  # fmt: skip


def _through(guest: Runs, nested: NestedSpace, width: int, limit: int) -> tuple[Runs, Runs, int | None]:
    """A guest's runs led on by the nested ones; what those refuse; and the address behind which it was too much, if it was."""
    inner = nested.reachable
    mine, theirs, start, end, done = overlaps(guest.target, guest.target + guest.length, nested.spans, limit)
    address = guest.start[mine] + (start - guest.target[mine])
    flags, more = guest.attributes[mine], inner.attributes[theirs]
    attributes = flags & (more | (ENTRY.W ^ NOWHERE)) | more & ENTRY.NX | (more & 0x7FFF_FFFF) << _NESTED_SHIFT
    target = inner.target[theirs] + (start - inner.start[theirs])
    half = 1 << width - 1 if width > 32 else 0
    runs = merged(joined([Runs(address, end - start, target, attributes)]), half)
    beyond = gaps(nested.spans, _REACH)
    mine, _, start, end, seen = overlaps(guest.target[:done], guest.target[:done] + guest.length[:done], beyond, limit)
    refused = Runs(guest.start[mine] + (start - guest.target[mine]), end - start, start, guest.attributes[mine])
    done = min(done, seen)
    undone = int(guest.start[done]) if done < len(guest.start) else None
    return runs, merged(joined([refused]), half), undone


def list_nested(
    memory: Memory, nested: Nested, *, targets: bool = True, limits: Limits | None = None, progress: Progress | None = None
) -> Listing:
    """Everything that nested tables map, by guest-physical address; `targets` as in `list_space`."""
    targets = targets or nested.apic is not None
    return NestedSpace(memory, nested, limits=limits, progress=progress, targets=targets).listing()


def list_space(
    memory: Memory, state: PagingState, nested: Nested | None = None, *, targets: bool = True, limits: Limits | None = None,
    progress: Progress | None = None,
) -> Listing:  # fmt: skip
    """Everything that is mapped, by linear address: by one dimension, or both combined.

    Without `targets` nothing but `Listing.ranges` without `linear` can be asked; of one dimension it is made much faster then.
    """
    inner = None if nested is None else NestedSpace(memory, nested, limits=limits, progress=progress)
    return AddressSpace(memory, state, inner, limits=limits, progress=progress, targets=targets).listing()
