"""Building page tables in test memory."""

from collections.abc import Iterable

from introspect.paging import Nested, PagingState
from introspect.registers import CR0, CR4, EFER
from introspect.sources import BytesMemory

P, W, U, A, D, PS, G, NX = 1, 2, 4, 0x20, 0x40, 0x80, 0x100, 1 << 63
PAGED = CR0.PE | CR0.PG | CR0.WP
LONG = EFER.LME | EFER.LMA | EFER.NXE

SHIFTS = {"legacy": (22, 12), "PAE": (30, 21, 12), "4-level": (39, 30, 21, 12), "5-level": (48, 39, 30, 21, 12)}
CR4S = {"legacy": CR4.PSE, "PAE": CR4.PAE, "4-level": CR4.PAE, "5-level": CR4.PAE | CR4.LA57}
EFERS = {"legacy": 0, "PAE": EFER.NXE, "4-level": LONG, "5-level": LONG}
MODES = tuple(SHIFTS)


def state(mode: str, root: int, *, cr0: int = PAGED, cr4: int = 0, rflags_ac: bool = False, maxphyaddr: int = 48,
          pdptes: tuple[int, ...] | None = None) -> PagingState:  # fmt: skip
    """A guest in this mode. `cr4` adds bits to those the mode needs."""
    return PagingState(cr0, root, CR4S[mode] | cr4, EFERS[mode], 0, rflags_ac, maxphyaddr, pdptes)


def nested(mode: str, root: int, maxphyaddr: int = 48) -> Nested:
    return Nested(root, CR4S[mode], EFERS[mode], maxphyaddr)


class Tables:
    """One tree of page tables; pages for it come from a shared allocator."""

    def __init__(self, memory: BytesMemory, mode: str, pages: Iterable[int]) -> None:
        self.memory, self.mode, self.pages = memory, mode, iter(pages)
        self.root = next(self.pages)
        self.size = 4 if mode == "legacy" else 8

    def entry(self, address: int, level: int) -> int:
        """Where the entry of `level` (1 is the last) for `address` is. The levels above must exist."""
        table = self.root
        for number, shift in reversed(list(enumerate(reversed(SHIFTS[self.mode]), 1))):
            at = table + (address >> shift & (0x3FF if self.size == 4 else 0x1FF)) * self.size
            if number == level:
                return at
            table = self.get(at) & 0x000F_FFFF_FFFF_F000
        raise ValueError(f"{self.mode} paging has no level {level}")

    def get(self, at: int) -> int:
        return self.memory.read_u32(at) if self.size == 4 else self.memory.read_u64(at)

    def put(self, at: int, value: int) -> None:
        if self.size == 4:
            self.memory.write_u32(at, value)
        else:
            self.memory.write_u64(at, value)

    def map(self, address: int, target: int, flags: int = P | W | U, level: int = 1) -> None:
        """Map one page; `level` 2 or 3 makes it large. Tables on the way grant everything."""
        for number in range(len(SHIFTS[self.mode]), level, -1):
            at = self.entry(address, number)
            if not self.get(at) & P:
                plain = self.mode == "PAE" and number == 3
                self.put(at, next(self.pages) | (P if plain else P | W | U))
        self.put(self.entry(address, level), target | flags | (PS if level > 1 else 0))

    def change(self, address: int, level: int, *, add: int = 0, drop: int = 0) -> None:
        at = self.entry(address, level)
        self.put(at, self.get(at) & ~drop | add)
