"""What an IOMMU keeps of its tables: entries of the device table and of interrupt tables, translations (IOTLB), page directories.

Coherent, which is the default, nothing shows that there are caches: what is kept is used while every word of memory that it
rests on is as it was.  Strict, it is used until software invalidates it (AMD 48882, 2.4): a forgotten invalidation is found.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from introspect.iommu.structures import DTE, GUEST_IRTE_UNCACHED, IRTE128, decode_dte
from introspect.iommu.verdicts import IoStep, StepKind
from introspect.sources import Unreadable
from vmdbg.platform.pci.dma import Memory

MOST_KEPT = 4096
"""Entries of each cache: the oldest makes room."""


class Recorder:
    """Memory that notes what is read, and answers for some addresses with what was there once.

    Implements `introspect.sources.Memory`; `who` writes accessed and dirty bits.
    """

    def __init__(self, memory: Memory, who: str, *kept: Mapping[int, bytes]) -> None:
        self._memory, self._who, self._kept = memory, who, kept
        self.seen: list[tuple[int, bytes]] = []
        self.old: list[int] = []
        """Where what was kept has answered."""
        self.wrote = False

    def read(self, spa: int, length: int, /) -> bytes:
        data = None
        for kept in self._kept:
            data = kept.get(spa)
            if data is not None and len(data) == length:
                self.old.append(spa)
                break
        else:
            data = self._memory.read(spa, length)
        self.seen.append((spa, data))
        return data

    def read_u32(self, spa: int, /) -> int:
        return int.from_bytes(self.read(spa, 4), "little")

    def read_u64(self, spa: int, /) -> int:
        return int.from_bytes(self.read(spa, 8), "little")

    def write(self, spa: int, data: bytes, /) -> None:
        self.wrote = True
        self._memory.dma(self._who, spa, data)

    def write_u32(self, spa: int, value: int, /) -> None:
        self.write(spa, value.to_bytes(4, "little"))

    def write_u64(self, spa: int, value: int, /) -> None:
        self.write(spa, value.to_bytes(8, "little"))


class Page(NamedTuple):
    """A translation without the rights that the device table entry gives: those are looked at each time."""

    first: int
    size: int
    spa: int
    read: bool
    write: bool
    settled: bool
    """A write needs no update of a dirty bit any more."""
    untranslated: bool = False
    """Devices must not keep it themselves (U)."""


class Kept(NamedTuple):
    """A page with the words of memory that it rests on."""

    page: Page
    rests_on: tuple[tuple[int, bytes], ...]
    directories: frozenset[int] = frozenset()
    """Strict: addresses of those of the words that lead to tables."""

    def holds(self, memory: Memory) -> bool:
        try:
            return all(memory.read(spa, len(data)) == data for spa, data in self.rests_on)
        except Unreadable:
            return False


class PageKey(NamedTuple):
    """Under what translations are kept: strict, devices of one domain share them, as the specification allows."""

    domain: int
    pasid: int | None
    device: int | None


@dataclass(frozen=True)
class Directories:
    """Of a domain, or of a PASID within one: entries that lead to tables, by their own address."""

    data: dict[int, bytes] = field(default_factory=dict)
    translates: dict[int, set[tuple[int, int]]] = field(default_factory=dict)
    """(first, end) of the addresses that lead through each: several, where tables are shared."""

    def forget(self, first: int, end: int) -> None:
        """One stays unless all of its pages are in the range (2.4.3, table 36)."""
        for spa in [spa for spa, ranges in self.translates.items() if any(first <= at and stop <= end for at, stop in ranges)]:
            del self.data[spa], self.translates[spa]


@dataclass
class Counters:
    hits: int = 0
    misses: int = 0


@dataclass
class Caches:
    """Of one IOMMU."""

    memory: Memory
    strict: bool
    devices: dict[int, bytes] = field(default_factory=dict)
    """Strict: 32 bytes of the device table, by DeviceID."""
    interrupts: dict[int, dict[int, bytes]] = field(default_factory=dict)
    """Strict: entries of interrupt tables, by DeviceID and address."""
    pages: dict[PageKey, dict[int, dict[int, Kept]]] = field(default_factory=dict)
    """By size and first address."""
    directories: dict[tuple[int, int | None], Directories] = field(default_factory=dict)
    """Strict: by domain, and PASID for guests' tables."""
    counters: Counters = field(default_factory=Counters)
    count: int = 0
    """Pages at most; forgotten ones are counted until all make room."""

    def key(self, domain: int, pasid: int | None, device: int) -> PageKey:
        return PageKey(domain, pasid, None if self.strict else device)

    def find_page(self, key: PageKey, iova: int) -> Kept | None:
        for size, held in self.pages.get(key, {}).items():
            kept = held.get(iova & -size)
            if kept is not None:
                if self.strict or kept.holds(self.memory):
                    self.counters.hits += 1
                    return kept
                del held[iova & -size]
        self.counters.misses += 1
        return None

    def keep_page(
        self, key: PageKey, page: Page, rests_on: Iterable[tuple[int, bytes]], directories: frozenset[int] = frozenset()
    ) -> None:
        self.count += 1
        if self.count > MOST_KEPT:
            self.pages.clear()
            self.count = 1
        self.pages.setdefault(key, {}).setdefault(page.size, {})[page.first] = Kept(page, tuple(rests_on), directories)

    def keep_directories(self, domain: int, pasid: int | None, trace: Sequence[IoStep]) -> None:
        """Those of a walk. What is not present is not kept: the capability header has no NpCache."""
        for step in trace:
            if step.leaf or step.kind not in (StepKind.HOST, StepKind.GUEST):
                continue
            host = step.kind == StepKind.HOST
            if step.next_level is None if host else not step.value & 1:
                continue
            if sum(len(one.data) for one in self.directories.values()) >= MOST_KEPT:
                self.directories.clear()
            shift = 3 + 9 * step.level
            first = step.address >> shift << shift
            kept = self.directories.setdefault((domain, None if host else pasid), Directories())
            kept.data.setdefault(step.spa, step.value.to_bytes(8, "little"))
            kept.translates.setdefault(step.spa, set()).add((first, first + (1 << shift)))

    def kept_directories(self, domain: int, pasid: int | None) -> Sequence[Mapping[int, bytes]]:
        """As `Recorder` takes them."""
        return [self.directories[key].data for key in {(domain, None), (domain, pasid)} if key in self.directories]

    def keep_device(self, device: int, entry: bytes) -> None:
        """Software has to invalidate an entry that had V or IV (2.2.2.2), so another one is not kept."""
        if self.strict and decode_dte(entry) & (DTE.V | DTE.IV):
            self.devices[device] = entry

    def keep_interrupt(self, device: int, address: int, entry: bytes) -> None:
        if self.strict:
            self.interrupts.setdefault(device, {})[address] = entry

    def kept_interrupts(self, device: int) -> Mapping[int, bytes]:
        """As `Recorder` takes them: of a guest's entries those fields that hardware does not cache are memory's."""
        kept = self.interrupts.get(device, {})
        for at, entry in kept.items():
            old = int.from_bytes(entry, "little")
            if len(entry) == 16 and old & IRTE128.GuestMode:
                try:
                    now = int.from_bytes(self.memory.read(at, 16), "little")
                except Unreadable:
                    continue
                kept[at] = (old & ~GUEST_IRTE_UNCACHED | now & GUEST_IRTE_UNCACHED).to_bytes(16, "little")
        return kept

    def forget_device(self, device: int) -> None:
        self.devices.pop(device, None)

    def forget_interrupts(self, device: int) -> None:
        self.interrupts.pop(device, None)

    def forget_pages(self, domain: int, first: int, end: int, pasid: int | None) -> None:
        """Of host translation (`pasid` None) all that a domain has there, guest translations through it included.

        A page that is larger than the range stays: software has to name all of it (2.4.3).
        """
        for key in [key for key in self.pages if key.domain == domain and (pasid is None or key.pasid == pasid)]:
            if pasid is None and key.pasid is not None:  # a nested translation rests on host pages that may be any
                del self.pages[key]
                continue
            for size, held in self.pages[key].items():
                for at in [at for at in held if first <= at and at + size <= end]:
                    del held[at]

    def forget_directories(self, domain: int, first: int, end: int, pasid: int | None) -> None:
        """Likewise: a guest's tables lie in host pages that may be any."""
        for key in [key for key in self.directories if key[0] == domain and (pasid is None or key[1] == pasid)]:
            if pasid is None and key[1] is not None:
                del self.directories[key]
            else:
                self.directories[key].forget(first, end)

    def forget_all(self) -> None:
        self.devices.clear()
        self.interrupts.clear()
        self.directories.clear()
        self.pages.clear()
        self.count = 0
