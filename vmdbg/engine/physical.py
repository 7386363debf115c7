"""The engine's own nested page tables: every CPU, host and guest, runs on one of these, never on a user's.

The host's table maps RAM to itself; a guest's table is a shadow of the nested table its VMCB names, filled on faults.
What a table withholds is an instrument, at no cost to what it does not concern:

- execution, until the first fetch: stores to pages without code stay on the engine's fast path, and the set of pages
  that hold translations is known;
- writing, to pages whose code is translated, to nested page tables that a shadow was made from, and to watched pages;
- everything, for devices and for addresses where nothing is.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from introspect.address import Gpa
from introspect.paging import Nested, NestedFault, nested_translate

from .memory import PAGE, Ram, sparse

P, W, U, A, D = 1, 2, 4, 0x20, 0x40
NX = 1 << 63
LEAF = P | U | A | D
"""Accessed and dirty are always set: the architectural bits live in the user's tables."""

PRIVATE = 0xF000000000
"""Engine-physical home of what only the engine uses; no table maps it, so no guest can name it."""
VMCB_PAGE, MSRPM_PAGES, VOID_PAGE = PRIVATE, PRIVATE + PAGE, PRIVATE + 3 * PAGE
TABLES = PRIVATE + 16 * PAGE
PRIVATE_SIZE = 512 << 20
WINDOW = 0xF800000000
"""Where device accesses are let through, a page at a time."""
WINDOW_PAGES = 16

CODE, MIXED, TABLE, WATCH_WRITE, WATCH_READ = 1, 2, 4, 8, 16
NOTED = CODE | MIXED | TABLE | WATCH_WRITE | WATCH_READ
"""States of a page with which a store to it, behind the engine's back, means something."""
FLIP = 32
"""The upper three bits of a page's state count how often it changed between data and code."""
MOST_FLIPS = 4 * FLIP

MOST_SHADOWS = 64


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
        root = self.pages[0]
        self.arena.release(self.pages[1:])
        self.pages = [root]
        at = root - PRIVATE
        self.arena.bytes[at : at + PAGE] = bytes(PAGE)
        self.leaves.clear()

    def close(self) -> None:
        self.arena.release(self.pages)
        self.pages = []


class TableReader:
    """RAM for a nested walk: remembers the pages it read, and sets accessed and dirty bits without being noticed."""

    def __init__(self, ram: Ram) -> None:
        self.ram = ram
        self.seen: set[int] = set()
        self.read, self.write = ram.read, ram.write

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
        self.volatile = False
        """A nested table that cannot be guarded, since it is written all the time: forget everything at each VMRUN."""

    def clear(self) -> None:
        super().clear()
        self.by_spa.clear()
        self.tables.clear()


class Physical:
    """Physical memory as the CPUs see it: the host's table, the guests' shadows and the state of each page."""

    def __init__(self, ram: Ram, *, nx: bool, bits: int) -> None:
        self.ram = ram
        self.bits = bits
        self.arena = Arena()
        self.nx = nx
        """The engine survives no-execute leaves (see repair.py); else every page is executable."""
        self.host = Npt(self.arena)
        self.shadows: dict[tuple[int, int, int], Shadow] = {}
        self.reader = TableReader(ram)
        self.guards: dict[int, int] = {}
        """Pages whose stores stop the engine, as watched ones do, by the CPU that asks for it."""
        self.guarded: frozenset[int] = frozenset()
        self.pinned: Callable[[], set[int]] = set
        """Roots of the tables that CPUs run on now: they stay."""
        self.mixed = not nx
        """Some pages are both written and executed: their code may change under the engine's feet."""
        self.flush: Callable[[], None] = lambda: None
        """A mapping was taken away: the engine's TLB must forget."""
        self.invalidate: Callable[[int, int], None] = lambda spa, length: None
        """Translated code at (spa, length) is out of date."""
        self.on_watched: Callable[[], None] = lambda: None
        """A watched page was written behind the engine's back."""
        self.on_unfit: Callable[[int], None] = lambda root: None
        """The table with this root can no longer be used as it is from one VMRUN to the next."""

    def shadow(self, ncr3: int, host_cr4: int, host_efer: int) -> Shadow:
        """The shadow of a nested table in the host's paging mode."""
        key = (ncr3, host_cr4, host_efer)
        shadow = self.shadows.get(key)
        if shadow is None:
            if len(self.shadows) >= MOST_SHADOWS:
                self._evict()
            shadow = self.shadows[key] = Shadow(self.arena, Nested(ncr3, host_cr4, host_efer, self.bits))
        elif shadow.volatile:
            shadow.clear()
        return shadow

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

    def _give_up(self, shadow: Shadow) -> None:
        """Guard a nested table no longer."""
        shadow.volatile = True
        self.on_unfit(shadow.root)

    def drop(self, page: int) -> None:
        """Take away every mapping of a page, to be made anew with its present state."""
        self.host.unmap(page << 12)
        for shadow in self.shadows.values():
            for gpa in shadow.by_spa.pop(page, ()):
                shadow.unmap(gpa)
        self.flush()

    def _entry(self, spa: int, writable: bool, executable: bool) -> int:
        state = self.ram.pages[spa >> 12]
        if state & WATCH_READ:
            return 0
        entry = (spa & -PAGE) | LEAF
        if writable and not state & (CODE | TABLE | WATCH_WRITE) and spa >> 12 not in self.guarded:
            entry |= W
        if self.nx and not (executable and state & (CODE | MIXED)):
            entry |= NX
        return entry

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

    def on_table(self, page: int) -> None:
        """A nested table that shadows were made from is about to change."""
        pages = self.ram.pages
        flips = pages[page] & -FLIP & 0xFF
        hopeless = flips >= MOST_FLIPS
        pages[page] = (pages[page] & ~TABLE & 0x1F) | min(flips + FLIP, 0xE0)
        for shadow in self.shadows.values():
            if page in shadow.tables:
                if hopeless:
                    self._give_up(shadow)
                shadow.clear()
        self.drop(page)

    def fill(self, npt: Npt, gpa: int, write: bool, fetch: bool) -> int | NestedFault:
        """Answer a fault of the engine's walk; see `_fill`.

        Without room for more tables everything mapped is forgotten, to be mapped again as it is needed.
        """
        try:
            return self._fill(npt, gpa, write, fetch)
        except OutOfTables:
            for table in (self.host, *self.shadows.values()):
                table.clear()
            self.flush()
            return self._fill(npt, gpa, write, fetch)

    def _fill(self, npt: Npt, gpa: int, write: bool, fetch: bool) -> int | NestedFault:
        """Answer a fault of the engine's walk.

        Returns -1 if a mapping was made (try again), the spa if the engine may not map it (a device, nothing, or a
        watched page), or the fault that the user's nested table says.  An address beyond MAXPHYADDR is a fault, too: an entry
        of the walked tables has reserved bits.
        """
        if gpa >> self.bits:
            return NestedFault(0, Gpa(gpa))
        if isinstance(npt, Shadow):
            reader = self.reader
            reader.seen.clear()
            found = nested_translate(reader, npt.nested, gpa, write, fetch, set_ad=True)
            if not reader.seen <= npt.tables:
                self._guard(npt, reader.seen - npt.tables)
            if isinstance(found, NestedFault):
                return found
            spa, writable, executable = int(found.spa), found.writable and found.dirty, found.executable
        else:
            spa, writable, executable = gpa, True, True
        if not self.ram.contains(spa):
            if not fetch:
                return spa
            npt.set(gpa, VOID_PAGE | LEAF)
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
        if state & WATCH_READ or (write and (state & WATCH_WRITE or page in self.guarded)):
            return spa
        if isinstance(npt, Shadow):
            npt.set(gpa, self._entry(spa, writable, executable))
            npt.by_spa.setdefault(page, []).append(gpa & -PAGE)
        elif state or not self._fill_region(gpa):
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
                    self._give_up(shadow)
                    continue
                self.ram.pages[page] |= TABLE
                self.drop(page)

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
                self.on_watched()
            if state & TABLE:
                self.on_table(page)
            if state & (CODE | MIXED) or not self.nx:
                start = max(spa, page << 12)
                self.invalidate(start, min(spa + length, (page + 1) << 12) - start)

    def guard(self, owner: int, page: int | None) -> None:
        """Stop at stores to a page number for CPU `owner`, in place of the page it asked for before."""
        if page is None:
            self.guards.pop(owner, None)
        else:
            self.guards[owner] = page
        self._set_guarded(frozenset(self.guards.values()))

    def _set_guarded(self, pages: frozenset[int]) -> None:
        changed = self.guarded ^ pages
        self.guarded = pages
        for page in changed:
            self.drop(page)

    @contextmanager
    def unguarded(self) -> Iterator[None]:
        """Let stores to guarded pages through for a moment."""
        self._set_guarded(frozenset())
        try:
            yield
        finally:
            self._set_guarded(frozenset(self.guards.values()))

    def watch(self, page: int, flag: int, on: bool) -> None:
        """Set or clear WATCH_WRITE or WATCH_READ for a page number."""
        pages = self.ram.pages
        pages[page] = pages[page] | flag if on else pages[page] & ~flag
        self.drop(page)
