"""The translations that a strict TLB holds (see tlb.py), and which page of tables each came from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from introspect.paging import Nested
from vmdbg.engine.physical import Mirror, Physical

PAGE = 4096
SIZES = (PAGE, 2 << 20, 4 << 20, 1 << 30)
MOST_ENTRIES = 4096
"""Of one ASID, level and page size; then the oldest goes, as hardware's capacity ends some time."""


class Origin(NamedTuple):
    """Where the processor was when it made a translation."""

    vmcb: int
    cr3: int
    ncr3: int
    moves: int
    """How often the vCPU had changed CPUs."""


@dataclass(slots=True, eq=False)
class Entry:
    """A translation that is held.  Addresses and sizes in bytes."""

    space: Space
    nested: bool
    """Of guest-physical addresses; else of linear ones."""
    base: int
    size: int
    gpa: int
    spa: int
    rights: int
    """W, U, NX and G as in `Translation.rights`, but W without the nested tables; under GMET also whose code the page may
    hold, as in the engine's own nested tables."""
    dirty: bool
    """A write needs no look at the tables: its dirty bits are set, and the nested tables let it."""
    span: int
    """Size of the guest's page, of which it may be a part: INVLPG of any address in that is meant."""
    origin: Origin
    tables: set[int] = field(default_factory=set)
    """Numbers of the pages of tables that it came from."""
    doubtful: bool = False
    """What it came from may have changed."""
    told: bool = False
    leaves: set[int] = field(default_factory=set)
    """Pages of the mirror that are mapped by it."""

    def spa_of(self, address: int) -> int:
        return self.spa + address - self.base

    def gpa_of(self, address: int) -> int:
        return self.gpa + address - self.base


class Fresh(NamedTuple):
    """What the tables say now."""

    spa: int
    gpa: int
    rights: int
    writable: bool
    dirty: bool


class Held:
    """Translations of one level, by size and base.  Where several cover an address, the smallest counts."""

    def __init__(self) -> None:
        self._by_size: dict[int, dict[int, Entry]] = {size: {} for size in SIZES}

    def __iter__(self) -> Iterator[Entry]:
        return iter([entry for entries in self._by_size.values() for entry in entries.values()])

    def find(self, address: int) -> Entry | None:
        for size, entries in self._by_size.items():
            entry = entries.get(address & -size)
            if entry is not None:
                return entry
        return None

    def add(self, entry: Entry) -> Entry | None:
        """Returns what must go for it."""
        entries = self._by_size[entry.size]
        out = entries.get(entry.base)
        if out is None and len(entries) >= MOST_ENTRIES:
            out = next(iter(entries.values()))
        if out is not None:
            del entries[out.base]
        entries[entry.base] = entry
        return out

    def remove(self, entry: Entry) -> None:
        del self._by_size[entry.size][entry.base]


class Space:
    """What a CPU holds for one ASID."""

    def __init__(self, mirror: Mirror) -> None:
        self.linear = Held()
        self.nested = Held()
        self.mirror = mirror
        self.paging: tuple[int, ...] = ()
        """CR0, CR3, CR4 and EFER that it was used with last, as far as they decide a translation."""
        self.by: Nested | None = None


class Tables:
    """Which translations came from which page of tables, and where vCPUs have been: one for all CPUs."""

    def __init__(self, physical: Physical) -> None:
        self.physical = physical
        self._readers: dict[int, set[Entry]] = {}
        self._visits: dict[int, tuple[int, int]] = {}

    def note(self, entry: Entry, pages: set[int]) -> None:
        """The entry came from these pages: stores to them are to be noticed."""
        self.physical.guard_tables(pages)
        for page in pages - entry.tables:
            self._readers.setdefault(page, set()).add(entry)
        entry.tables |= pages

    def forget(self, entry: Entry) -> None:
        for page in entry.tables:
            readers = self._readers[page]
            readers.discard(entry)
            if not readers:
                del self._readers[page]

    def relearn(self, held: Iterable[Entry]) -> None:
        """All that is held by any CPU came from elsewhere: what each came from is looked after again."""
        self._readers.clear()
        for entry in held:
            pages, entry.tables = entry.tables, set()
            self.note(entry, pages)

    def settle(self) -> None:
        """What came from tables that were stored to is doubtful from now on."""
        written = self.physical.tables_written
        if not written:
            return
        for page in written:
            for entry in self._readers.get(page, ()):
                doubt(entry)
        written.clear()
        self.physical.flush()

    def visit(self, vmcb: int, cpu: int) -> int:
        """A vCPU runs on a CPU; returns how often it has changed CPUs."""
        last, moves = self._visits.get(vmcb, (cpu, 0))
        moves += last != cpu
        self._visits[vmcb] = cpu, moves
        return moves


def doubt(entry: Entry) -> None:
    """Compare it with the tables at its next use."""
    entry.doubtful = True
    for leaf in entry.leaves:
        entry.space.mirror.unmap(leaf)
    entry.leaves.clear()
