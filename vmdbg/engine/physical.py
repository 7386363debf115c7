"""The engine's own nested page tables: every CPU, host and guest, runs on one of these, never on a user's.

The host's table maps RAM to itself; a guest's table is a shadow of the nested table its VMCB names, filled on faults.
What a table withholds is an instrument, at no cost to what it does not concern:

- execution, until the first fetch: stores to pages without code stay on the engine's fast path, and the set of pages
  that hold translations is known;
- writing, to pages whose code is translated, to page tables that a shadow or a mirror was made from, and to watched
  pages;
- everything, for devices and for addresses where nothing is.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from introspect.address import Gpa
from introspect.paging import Nested, NestedFault, nested_translate

from .memory import PAGE, Ram, sparse

P, W, U, A, D = 1, 2, 4, 0x20, 0x40
NX = 1 << 63
LEAF = P | U | A | D
"""Accessed and dirty are always set: the architectural bits live in the user's tables."""
ONLY_USER, ONLY_SUPERVISOR = 1 << 9, 1 << 10
"""Of an executable leaf under GMET: whose code the page may hold."""
CHECKED = 1 << 11
"""The page holds code and is written: each store to it is checked, also where it is not executable for who stores.

Bits 11:9 are software's; repair.py has the engine heed them."""

PRIVATE = 0xF000000000
"""Engine-physical home of what only the engine uses; no table maps it, so no guest can name it."""
VMCB_PAGE, MSRPM_PAGES, VOID_PAGE, PDPTE_PAGE = PRIVATE, PRIVATE + PAGE, PRIVATE + 3 * PAGE, PRIVATE + 4 * PAGE
PDPTES = 1 << 46
"""Where the host's table maps `PDPTE_PAGE`: beyond the physical addresses that page tables can name."""
TABLES = PRIVATE + 16 * PAGE
PRIVATE_SIZE = 512 << 20
WINDOW = 0xF800000000
"""Where device accesses are let through, a page at a time."""
WINDOW_PAGES = 16

APIC_PAGE = 1 << 52
"""In place of an spa: the virtual APIC of the guest that runs.  No table can name an address up there."""
HOLE, APIC_HOLE = PRIVATE - PAGE, PRIVATE - 2 * PAGE
"""Where a mirror's leaves lead that lead to no memory: those for addresses from there on, which are the engine's own, and those
for the guest's virtual APIC."""

CODE, MIXED, TABLE, WATCH_WRITE, WATCH_READ = 1, 2, 4, 8, 16
NOTED = CODE | MIXED | TABLE | WATCH_WRITE | WATCH_READ
"""States of a page with which a store to it, behind the engine's back, means something."""
FLIP = 32
"""The upper three bits of a page's state count how often it changed between data and code."""
MOST_FLIPS = 4 * FLIP

MOST_SHADOWS = 64
PATIENCE = 64
"""VMRUNs after which a nested table that was rewritten all the time is looked at again."""

ALL_LINES, A20 = -1, 1 << 20


class OutOfTables(Exception):
    """The private memory holds no more tables."""


class Arena:
    """The private memory, and page-sized tables in it."""

    def __init__(self) -> None:
        self.buffer = sparse(PRIVATE_SIZE)
        self.bytes = memoryview(self.buffer)
        self.q = self.bytes.cast("Q")
        self.bytes[MSRPM_PAGES - PRIVATE : MSRPM_PAGES - PRIVATE + 2 * PAGE] = b"\xff" * (2 * PAGE)
        self.bytes[VOID_PAGE - PRIVATE : VOID_PAGE - PRIVATE + PAGE] = b"\xff" * PAGE
        self._free: list[int] = []
        self._next = TABLES

    def allocate(self) -> int:
        """Engine-physical address of a zeroed table page."""
        if self._free:
            page = self._free.pop()
            at = page - PRIVATE
            self.bytes[at : at + PAGE] = bytes(PAGE)
            return page
        page = self._next
        if page + PAGE > PRIVATE + PRIVATE_SIZE:
            raise OutOfTables
        self._next += PAGE
        return page

    def release(self, pages: list[int]) -> None:
        self._free.extend(pages)


class Npt:
    """One four-level table of 4 KiB leaves, from (guest-)physical pages to engine-physical ones."""

    def __init__(self, arena: Arena) -> None:
        self.arena = arena
        self.pages: list[int] = []
        self.root = self._page()
        self.leaves: dict[int, int] = {}
        """gpa >> 21 to the index in `arena.q` of the last-level table."""

    def _page(self) -> int:
        page = self.arena.allocate()
        self.pages.append(page)
        return page

    def leaf(self, gpa: int) -> int:
        """Index in `arena.q` of the leaf entry for gpa; the tables above it are made."""
        region = gpa >> 21
        base = self.leaves.get(region)
        if base is None:
            q = self.arena.q
            table = self.root
            for shift in (39, 30, 21):
                at = (table - PRIVATE >> 3) + (gpa >> shift & 0x1FF)
                entry = q[at]
                if not entry:
                    entry = self._page() | P | W | U | A
                    q[at] = entry
                table = entry & 0xFFFFFFFFFF000
            base = self.leaves[region] = table - PRIVATE >> 3
        return base + (gpa >> 12 & 0x1FF)

    def get(self, gpa: int) -> int:
        base = self.leaves.get(gpa >> 21)
        return 0 if base is None else self.arena.q[base + (gpa >> 12 & 0x1FF)]

    def set(self, gpa: int, entry: int) -> None:
        self.arena.q[self.leaf(gpa)] = entry

    def unmap(self, gpa: int) -> None:
        base = self.leaves.get(gpa >> 21)
        if base is not None:
            self.arena.q[base + (gpa >> 12 & 0x1FF)] = 0

    def clear(self) -> None:
        """Forget every mapping; the root stays where it is."""
        self._clear(1)

    def _clear(self, keep: int) -> None:
        """Empty the table but for its first pages, which are zeroed."""
        self.arena.release(self.pages[keep:])
        del self.pages[keep:]
        for page in self.pages:
            self.arena.bytes[page - PRIVATE : page - PRIVATE + PAGE] = bytes(PAGE)
        self.leaves.clear()

    def close(self) -> None:
        self.arena.release(self.pages)
        self.pages = []


class Mirror(Npt):
    """A page table for linear addresses, from which the engine runs in place of the guest's own: see vmdbg/svm/tlb.py.

    It serves two formats: `root` is a CR3 of 4-level paging, `low` one of PAE paging, whose four entries lead to the same page
    directories.
    """

    def __init__(self, arena: Arena) -> None:
        super().__init__(arena)
        self.low = self._page()

    def leaf(self, gpa: int) -> int:
        known = gpa >> 21 in self.leaves
        leaf = super().leaf(gpa)
        if not known and gpa >> 32 == 0:
            q, index = self.arena.q, gpa >> 30
            pointers = q[self.root - PRIVATE >> 3] & -PAGE
            q[(self.low - PRIVATE >> 3) + index] = q[(pointers - PRIVATE >> 3) + index] & -PAGE | P
        return leaf

    def clear(self) -> None:
        self._clear(2)


class TableReader:
    """RAM for a nested walk: remembers the pages it read, and sets accessed and dirty bits without being noticed."""

    def __init__(self, ram: Ram) -> None:
        self.ram = ram
        self.seen: set[int] = set()
        self.read, self.write = ram.read, ram.write
        self.watched: Callable[[int, int, bool], None] = lambda spa, length, write: None
        """As `Physical.seen`."""

    def read_u64(self, spa: int, /) -> int:
        self.seen.add(spa >> 12)
        return self.ram.read_u64(spa)

    def read_u32(self, spa: int, /) -> int:
        self.seen.add(spa >> 12)
        return self.ram.read_u32(spa)

    def write_u32(self, spa: int, value: int, /) -> None:
        if self.ram.pages[spa >> 12] & (CODE | MIXED):
            self.ram.write_u32(spa, value)
        else:
            self.ram.view[spa : spa + 4] = value.to_bytes(4, "little")
            self.watched(spa, 4, True)

    def write_u64(self, spa: int, value: int, /) -> None:
        self.write_u32(spa, value & 0xFFFFFFFF)
        self.write_u32(spa + 4, value >> 32)


class Shadow(Npt):
    """A guest's table: the user's nested table, composed with what the engine withholds."""

    def __init__(self, arena: Arena, nested: Nested) -> None:
        super().__init__(arena)
        self.nested = nested
        self.by_spa: dict[int, list[int]] = {}
        """Page number to the gpas mapped to it."""
        self.tables: set[int] = set()
        """Pages of the user's nested table that were read to make this one."""
        self.volatile = 0
        """For how many VMRUNs to come the nested table is not guarded, since it was rewritten all the time: at each of them
        everything is forgotten."""
        self.before: dict[int, bytes] = {}
        """Pages of the user's nested table that may have been written since the last VMRUN, as they were before."""

    def clear(self) -> None:
        super().clear()
        self.by_spa.clear()
        self.tables.clear()
        self.before.clear()

    def outgrown(self, ram: Ram) -> int | None:
        """A page of the user's nested table that says something else now than before; None if all that was there still
        is, and all that came are entries and rights: a shadow holds nothing of what was not there."""
        entries = struct.Struct("<512Q" if self.nested.format.entry_size == 8 else "<1024I").unpack
        for page, before in self.before.items():
            now = ram.read(page << 12, PAGE)
            if before != now and any(
                old & P and (old & ~new or new & ~old & ~(W | A | D))
                for old, new in zip(entries(before), entries(now), strict=True)
            ):
                return page
        return None


class Physical:
    """Physical memory as the CPUs see it: the host's table, the guests' shadows and the state of each page."""

    def __init__(self, ram: Ram, *, nx: bool, bits: int) -> None:
        self.ram = ram
        self.bits = bits
        self.arena = Arena()
        self.nx = nx
        """The engine survives no-execute leaves (see repair.py); else every page is executable."""
        self.host = Npt(self.arena)
        self.shadows: dict[tuple[object, ...], Shadow] = {}
        self.mirrors: list[Mirror] = []
        self.reader = TableReader(ram)
        self.tables_written: set[int] = set()
        """Pages of `guard_tables` that were stored to since somebody looked."""
        self.guards: dict[object, Mapping[int, int]] = {}
        """Pages that stop the engine as watched ones do, to WATCH_WRITE and WATCH_READ, by the processor's part that asks."""
        self.guarded: dict[int, int] = {}
        self.lifted: set[int] = set()
        """Pages whose watch is lifted: soon to be taken away again, so not mapped with all around them."""
        """All of them together."""
        self.a20 = ALL_LINES
        """What the address lines let through."""
        self.pinned: Callable[[], set[int]] = set
        """Roots of the tables that CPUs run on now: they stay."""
        self.mixed = not nx
        """Some pages are both written and executed: their code may change under the engine's feet."""
        self.flush: Callable[[], None] = lambda: None
        """A mapping was taken away: the engine's TLB must forget."""
        self.invalidate: Callable[[int, int], None] = lambda spa, length: None
        """Translated code at (spa, length) is out of date."""
        self.on_watched: Callable[[int, int, bool], None] = lambda spa, length, write: None
        """A range of a watched page was read or, if the last is true, written behind the engine's back."""
        self.reader.watched = self.seen
        self.on_unfit: Callable[[int], None] = lambda root: None
        """The table with this root can no longer be used as it is from one VMRUN to the next."""

    def shadow(
        self, ncr3: int, host_cr4: int, host_efer: int, apic: tuple[int, int] | None = None, gmet: bool = False
    ) -> Shadow:
        """The shadow of a nested table in the host's paging mode; `apic` and `gmet` as in `Nested`."""
        key = (ncr3, host_cr4, host_efer, apic, gmet)
        shadow = self.shadows.get(key)
        if shadow is None:
            if len(self.shadows) >= MOST_SHADOWS:
                self._evict()
            shadow = self.shadows[key] = Shadow(self.arena, Nested(ncr3, host_cr4, host_efer, self.bits, apic, gmet))
        elif shadow.volatile:
            shadow.volatile -= 1
            shadow.clear()
        elif shadow.before:
            self._review(shadow)
        return shadow

    def _review(self, shadow: Shadow) -> None:
        """A shadow of a table that was written is about to be used."""
        changed = shadow.outgrown(self.ram)
        if changed is not None:
            self._changed(shadow, changed)
            return
        again = set(shadow.before)
        shadow.before.clear()
        self._guard(shadow, again)

    def _changed(self, shadow: Shadow, page: int) -> None:
        """A page of a nested table says something else now, or is about to: the more often, the less is guarding worth."""
        pages = self.ram.pages
        flips = pages[page] & -FLIP & 0xFF
        pages[page] = pages[page] & 0x1F | min(flips + FLIP, 0xE0)
        if flips >= MOST_FLIPS:
            self._give_up(shadow, page)
        shadow.clear()

    def table(self, root: int) -> Npt:
        """The table with this root."""
        return next((shadow for shadow in self.shadows.values() if shadow.root == root), self.host)

    def _evict(self) -> None:
        """Give up the oldest shadow that no CPU runs on."""
        pinned = self.pinned()
        for key, shadow in self.shadows.items():
            if shadow.root not in pinned:
                del self.shadows[key]
                self.on_unfit(shadow.root)
                shadow.close()
                return

    def _give_up(self, shadow: Shadow, page: int) -> None:
        """Guard a nested table no longer for a while, for the sake of a page of it."""
        self.ram.pages[page] &= 0x1F
        shadow.volatile = PATIENCE
        self.on_unfit(shadow.root)

    def drop(self, page: int) -> None:
        """Take away every mapping of a page, to be made anew with its present state."""
        self.host.unmap(page << 12)
        if self.a20 != ALL_LINES:
            self.host.unmap(page << 12 | A20)
        for shadow in self.shadows.values():
            for gpa in shadow.by_spa.pop(page, ()):
                shadow.unmap(gpa)
        self.flush()

    def _entry(self, spa: int, writable: bool, executable: bool) -> int:
        state = self.ram.pages[spa >> 12] | self.guarded.get(spa >> 12, 0)
        if state & WATCH_READ:
            return 0
        entry = (spa & -PAGE) | LEAF
        if writable and not state & (CODE | TABLE | WATCH_WRITE):
            entry |= W
        if self.nx and not (executable and state & (CODE | MIXED)):
            entry |= NX
        return entry | CHECKED if state & MIXED else entry

    def _on_code(self, page: int, write: bool) -> None:
        """A fetch from a data page, or a store to a page of translated code."""
        pages = self.ram.pages
        state = pages[page]
        flips = state & -FLIP & 0xFF
        if flips >= MOST_FLIPS:
            # It holds both: executable and writable, and the engine itself watches every store.
            pages[page] = (state & ~(CODE | MIXED)) | MIXED
            self.mixed = True
        elif write:
            pages[page] = (state & 0x1F & ~CODE) | (flips + FLIP)
            self.invalidate(page << 12, PAGE)
        else:
            pages[page] = state | CODE
        self.drop(page)

    def guard_tables(self, pages: set[int]) -> None:
        """Have the next store to each of these pages, as far as they are memory, noted in `tables_written`."""
        for page in pages - self.tables_written:
            if self.ram.contains(page << 12) and not self.ram.pages[page] & TABLE:
                self.ram.pages[page] |= TABLE
                self.drop(page)

    def on_table(self, page: int, *, written: bool = False) -> None:
        """A nested table that shadows were made from, or a page of `guard_tables`, is about to change, or was `written`.

        A shadow that no CPU runs on now is looked at when one is about to: a table that grows needs no new shadow.
        """
        self.ram.pages[page] &= ~TABLE & 0xFF
        if self.mirrors:
            self.tables_written.add(page)
        pinned = self.pinned()
        for shadow in self.shadows.values():
            if page not in shadow.tables:
                continue
            if written or shadow.root in pinned:
                self._changed(shadow, page)
            elif not shadow.volatile:
                shadow.before.setdefault(page, self.ram.read(page << 12, PAGE))
                self.on_unfit(shadow.root)
        self.drop(page)

    def fill(self, npt: Npt, gpa: int, write: bool, fetch: bool, user: bool) -> int | NestedFault:
        """Answer a fault of the engine's walk; see `_fill`.

        Without room for more tables everything mapped is forgotten, to be mapped again as it is needed.
        """
        try:
            return self._fill(npt, gpa, write, fetch, user)
        except OutOfTables:
            self.make_room()
            return self._fill(npt, gpa, write, fetch, user)

    def make_room(self) -> None:
        """Empty every table: what is needed is mapped again."""
        for table in (self.host, *self.shadows.values(), *self.mirrors):
            table.clear()
        self.flush()

    def _fill(self, npt: Npt, gpa: int, write: bool, fetch: bool, user: bool) -> int | NestedFault:
        """Answer a fault of the engine's walk; `user`: the processor was at CPL 3.

        Returns -1 if a mapping was made (try again), the spa if the engine may not map it (a device, nothing, a watched
        page, or `APIC_PAGE`), or the fault that the user's nested table says.  An address beyond MAXPHYADDR is a fault, too: an
        entry of the walked tables has reserved bits.
        """
        if self.mirrors and gpa & -PAGE == APIC_HOLE:
            return APIC_PAGE | gpa & PAGE - 1
        if gpa >> self.bits and gpa & -PAGE != PDPTES & -PAGE:
            return NestedFault(0, Gpa(gpa))
        only = 0
        if isinstance(npt, Shadow):
            reader = self.reader
            reader.seen.clear()
            found = nested_translate(reader, npt.nested, gpa, write, fetch, user, set_ad=True)
            if not reader.seen <= npt.tables:
                self._guard(npt, reader.seen - npt.tables)
            if isinstance(found, NestedFault):
                return found
            if npt.nested.apic is not None and gpa & -PAGE == npt.nested.apic[0]:
                return APIC_PAGE | gpa & PAGE - 1
            spa, writable, executable = int(found.spa), found.writable and found.dirty, found.executable
            if npt.nested.gmet and executable:
                only = ONLY_USER if found.user else ONLY_SUPERVISOR
        else:
            spa, writable, executable = gpa, True, True
        if spa == PDPTES & -PAGE:
            npt.set(gpa, PDPTE_PAGE | LEAF | W)
            return -1
        if self.mirrors and PRIVATE <= spa < WINDOW:  # the engine walks a mirror, which names no such page itself
            npt.set(gpa, spa & -PAGE | LEAF | W)
            return -1
        spa &= self.a20
        if not self.ram.contains(spa):
            if not fetch:
                return spa
            npt.set(gpa, VOID_PAGE | LEAF | only)
            return -1
        page = spa >> 12
        state = self.ram.pages[page]
        if (fetch and not state & (CODE | MIXED)) or (write and state & CODE):
            if self.nx:
                self._on_code(page, write)
            else:
                self.ram.pages[page] = (state & ~CODE) | MIXED
        if write and state & TABLE:
            self.on_table(page)
        state = self.ram.pages[page]
        if self.watches(page, write) or self.guards_against(page, write):
            return spa
        if isinstance(npt, Shadow):
            entry = self._entry(spa, writable, executable)
            npt.set(gpa, entry and entry | only)
            npt.by_spa.setdefault(page, []).append(gpa & -PAGE)
        elif state or page in self.lifted or self.a20 != ALL_LINES or not self._fill_region(gpa):
            npt.set(gpa, self._entry(spa, True, True))
        return -1

    def _fill_region(self, gpa: int) -> bool:
        """Map the whole 2 MiB around an untouched page of plain RAM at once."""
        first = gpa & -0x200000
        if not self.nx or not self.ram.contains(first, 0x200000):
            return False
        if any(page << 12 & -0x200000 == first for page in self.guarded):
            return False
        base = self.host.leaf(first)
        if any(self.ram.pages[first >> 12 : (first >> 12) + 512]) or any(self.arena.q[base : base + 512]):
            return False
        flags = LEAF | W | NX
        self.arena.q[base : base + 512] = array("Q", range(first | flags, (first + 0x200000) | flags, PAGE))
        return True

    def _guard(self, shadow: Shadow, tables: set[int]) -> None:
        """From now on, notice writes to these pages of a nested table."""
        shadow.tables |= tables
        if shadow.volatile:
            return
        for page in tables:
            spa = page << 12
            if self.ram.contains(spa) and not self.ram.pages[page] & TABLE:
                if self.ram.pages[page] & -FLIP & 0xFF >= MOST_FLIPS:
                    self._give_up(shadow, page)
                    continue
                self.ram.pages[page] |= TABLE
                self.drop(page)

    def hold_pdptes(self, cpu: int, entries: tuple[int, ...]) -> int:
        """Keep a CPU's four PDPTEs for the engine to walk from; returns the CR3 that leads it there."""
        at = 32 * cpu
        self.arena.bytes[PDPTE_PAGE - PRIVATE + at : PDPTE_PAGE - PRIVATE + at + 32] = struct.pack("<4Q", *entries)
        return PDPTES + at

    def set_a20(self, on: bool) -> None:
        """Address line 20; off, it reads as 0 in every physical address of a CPU.  What is mapped is mapped anew."""
        lines = ALL_LINES if on else ~A20
        if lines != self.a20:
            self.a20 = lines
            for table in (self.host, *self.shadows.values()):
                table.clear()
            self.flush()

    def open(self, npt: Npt, gpa: int, window: int) -> None:
        """Let accesses to a page through to window page `window`."""
        npt.set(gpa, (WINDOW + window * PAGE) | LEAF | W | (NX if self.nx else 0))

    def written(self, spa: int, length: int) -> None:
        """Memory changed behind the engine's back (a device, a debugger, our own stores): forget what came from it."""
        if (spa & PAGE - 1) + length <= PAGE and not self.ram.pages[spa >> 12] & NOTED and self.nx:
            return  # one page of plain data: the common case
        for page in range(spa >> 12, (spa + max(length, 1) - 1 >> 12) + 1):
            state = self.ram.pages[page]
            if state & (WATCH_READ | WATCH_WRITE):
                start = max(spa, page << 12)
                self.on_watched(start, min(spa + length, (page + 1) << 12) - start, True)
            if state & TABLE:
                self.on_table(page, written=True)
            if state & (CODE | MIXED) or not self.nx:
                start = max(spa, page << 12)
                self.invalidate(start, min(spa + length, (page + 1) << 12) - start)

    def guard(self, owner: object, pages: Mapping[int, int]) -> None:
        """Stop at accesses to page numbers, each with WATCH_WRITE or WATCH_READ, in place of what `owner` asked for before."""
        self.guards[owner] = pages
        self._set_guarded(self._wanted())

    def _wanted(self) -> dict[int, int]:
        wanted: dict[int, int] = {}
        for pages in self.guards.values():
            for page, flags in pages.items():
                wanted[page] = wanted.get(page, 0) | flags
        return wanted

    def _set_guarded(self, pages: dict[int, int]) -> None:
        changed = [page for page in self.guarded.keys() | pages.keys() if self.guarded.get(page) != pages.get(page)]
        self.guarded = pages
        for page in changed:
            self.drop(page)

    @contextmanager
    def unguarded(self) -> Iterator[None]:
        """Let accesses to guarded pages through for a moment."""
        self._set_guarded({})
        try:
            yield
        finally:
            self._set_guarded(self._wanted())

    def guards_against(self, page: int, write: bool) -> bool:
        """Whether such accesses to a page number are for the processor to look at."""
        return bool(self.guarded and self.guarded.get(page, 0) & (WATCH_READ | WATCH_WRITE if write else WATCH_READ))

    def seen(self, spa: int, length: int, write: bool) -> None:
        """The processor has accessed a range within a page behind the engine's back, and nobody has been told."""
        if self.watches(spa >> 12, write):
            self.on_watched(spa, length, write)

    def watches(self, page: int, write: bool) -> bool:
        """Whether such accesses to a page number of RAM are watched."""
        return bool(self.ram.pages[page] & (WATCH_READ | WATCH_WRITE if write else WATCH_READ))

    def lift(self, page: int) -> int:
        """Let accesses to a watched page through, until `watch` is called with the flags that this returns.

        What the engine may not do now it finds out again at its next fault; it need forget nothing.
        """
        flags = self.ram.pages[page] & (WATCH_READ | WATCH_WRITE)
        self.ram.pages[page] &= ~flags & 0xFF
        self.lifted.add(page)
        return flags

    def watch(self, page: int, flag: int, on: bool) -> None:
        """Set or clear WATCH_WRITE or WATCH_READ for a page number."""
        pages = self.ram.pages
        pages[page] = pages[page] | flag if on else pages[page] & ~flag
        self.lifted.discard(page)
        self.drop(page)
