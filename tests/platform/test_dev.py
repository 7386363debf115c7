"""The device exclusion vector: registers by its capability, domains and bitmaps, what is cached, what is logged."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from introspect.address import Spa
from introspect.dev import (
    DEV_BASE_LO,
    DEV_CAP,
    DEV_CR,
    DEV_MAP,
    Barrier,
    DevFunction,
    DevRegisters,
    Domain,
    denied_pages,
)
from introspect.pci import RequesterId, capabilities
from introspect.sources import BytesMemory
from tests.platform.pci.board import Board
from vmdbg.late_launch import LateLaunch
from vmdbg.platform.dev import DOMAINS, MAPS, MOST_LINES, Exclusion, SlProtection
from vmdbg.platform.pci.dma import DmaError, Span

MISC = "00:18.3"
A, B = RequesterId.make(0, 3, 0), RequesterId.make(2, 5, 1)
BITMAP, OTHER = 0x100000, 0x120000


class WithDev(Board):
    """A board with a northbridge that has a DEV."""

    def __init__(self, dev: str = "coherent") -> None:
        super().__init__()
        self.late = LateLaunch(self.clock, self.bus, self.chipset, self.ram, dev=dev)
        self.at = self.capability(MISC, 0x0F)

    def get(self, function: DevFunction, index: int = 0) -> int:
        self.write(MISC, self.at + 4, function << 8 | index)
        return self.read(MISC, self.at + 8)

    def put(self, function: DevFunction, value: int, index: int = 0) -> None:
        self.write(MISC, self.at + 4, function << 8 | index)
        self.write(MISC, self.at + 8, value)

    def deny(self, page: int, bitmap: int = BITMAP) -> None:
        at = bitmap + page // 8
        self.ram.write(at, bytes([self.ram.read(at, 1)[0] | 1 << page % 8]))

    def domain(self, number: int, bitmap: int = BITMAP, **fields: int) -> None:
        self.put(DevFunction.BASE_LO, bitmap | DEV_BASE_LO.make(**{"VALID": 1, **fields}), number)

    def reaches(self, who: RequesterId, page: int, write: bool = True) -> bool:
        dma = self.chipset.dma
        if not dma.refusal(who, Span(Spa(page << 12), 4), write):
            (dma.write(who, page << 12, b"data") if write else dma.read(who, page << 12, 4))
            return True
        with pytest.raises(DmaError, match="DEV denies"):
            (dma.write(who, page << 12, b"data") if write else dma.read(who, page << 12, 4))
        return False


def test_the_capability_is_found() -> None:
    board = WithDev()
    function = board.root.find(RequesterId.make(0, 0x18, 3))
    assert function is not None
    assert list(capabilities(function.config.bytes)) == [(0xF0, 0x0F)]
    assert board.read(MISC, 0xF0) == 0x0F, "type 0: a DEV, no IOMMU"
    assert board.get(DevFunction.CAP) == DEV_CAP.make(REVISION=1, DOMAINS=DOMAINS, MAPS=MAPS)


def test_registers_keep_what_they_have() -> None:
    board = WithDev()
    ones = 0xFFFFFFFF
    for index in range(DOMAINS):
        board.put(DevFunction.BASE_LO, ones, index)
        board.put(DevFunction.BASE_HI, ones, index)
        assert board.get(DevFunction.BASE_LO, index) == 0xFFFFF07F
        assert board.get(DevFunction.BASE_HI, index) == 0xFF
    for index in range(MAPS):
        board.put(DevFunction.MAP, ones, index)
        assert board.get(DevFunction.MAP, index) == ones
    board.put(DevFunction.CR, ones)
    assert board.get(DevFunction.CR) == DEV_CR.DEVEN | DEV_CR.MEM_CLR | DEV_CR.IODIS | DEV_CR.MCEEN | DEV_CR.WALKPROBE
    board.put(DevFunction.CAP, 0)
    assert board.get(DevFunction.CAP)
    for function, index in ((DevFunction.BASE_LO, DOMAINS), (DevFunction.MAP, MAPS), (DevFunction.MAP, 255)):
        board.put(function, ones, index)
        assert board.get(function, index) == 0
    board.write(MISC, board.at + 4, 0xFF00)
    board.write(MISC, board.at + 8, ones)
    assert board.read(MISC, board.at + 8) == 0
    board.root.reset()
    assert board.get(DevFunction.CR) == board.get(DevFunction.MAP) == 0


def test_pages_are_denied_to_reads_and_writes() -> None:
    board = WithDev()
    board.domain(0)
    board.deny(0x300)
    assert board.reaches(A, 0x300), "DEVEN is clear"
    board.put(DevFunction.CR, DEV_CR.DEVEN)
    for write in (False, True):
        assert not board.reaches(A, 0x300, write)
        assert board.reaches(A, 0x301, write)
    with pytest.raises(DmaError):
        board.chipset.dma.write(A, 0x2FFFFE, b"over the border")
    assert board.ram.read(0x2FFFFE, 2) == b"\0\0", "nothing of it was written"


def test_domains_by_map() -> None:
    """A device is in the domain that a map gives to its bus and number, whatever its function; else in 0."""
    board = WithDev()
    board.domain(0)
    board.domain(2, OTHER)
    board.deny(0x300)
    board.deny(0x400, OTHER)
    board.put(DevFunction.MAP, DEV_MAP.make(UNIT1=5, VALID1=1, DOMAIN1=2, BUS=2), 7)
    board.put(DevFunction.CR, DEV_CR.DEVEN)
    assert [board.reaches(A, page) for page in (0x300, 0x400)] == [False, True]
    assert [board.reaches(B, page) for page in (0x300, 0x400)] == [True, False]
    board.put(DevFunction.MAP, DEV_MAP.make(UNIT1=5, VALID1=1, DOMAIN1=3, BUS=2), 7)
    assert [board.reaches(B, page) for page in (0x300, 0x400)] == [True, True], "domain 3 is not valid: nothing is denied"


def test_what_the_bitmap_does_not_cover() -> None:
    domain = Domain.decode(0, BITMAP | DEV_BASE_LO.make(VALID=1, SIZE=1), 0)
    assert domain.size == 8 << 30
    registers = DevRegisters((BITMAP | 1,), (1,), (), DEV_CR.DEVEN)
    assert registers.domain(0).base == 1 << 32 | BITMAP
    memory = BytesMemory(0x200000)
    exclusion = Exclusion(memory, SlProtection())
    for protect in (0, 1):
        domain = Domain.decode(0, BITMAP | DEV_BASE_LO.make(VALID=1, PROTECT=protect), 0)
        assert bool(exclusion._denied(domain, 4 << 30, True)) == bool(protect)
        assert not exclusion._denied(domain, (4 << 30) - 0x1000, True)


def test_a_bitmap_that_is_no_memory_denies() -> None:
    board = WithDev()
    board.domain(0, 0xF0000000)
    board.put(DevFunction.CR, DEV_CR.DEVEN)
    assert not board.reaches(A, 0x300)
    assert board.late.dev is not None
    assert "its bitmap is no memory" in board.late.dev.last


def test_errors_are_kept_until_cleared() -> None:
    board = WithDev()
    board.domain(0)
    board.deny(0x300)
    board.deny(0x301)
    board.put(DevFunction.CR, DEV_CR.DEVEN)
    with pytest.raises(DmaError):
        board.chipset.dma.locate(A, 0x300123, 4, True)
    assert board.get(DevFunction.ERR_STATUS) == 0, "to ask is not to try"
    for page in (0x300, 0x301):
        with pytest.raises(DmaError):
            board.chipset.dma.write(A, page << 12 | 0x123, b"data")
    assert board.get(DevFunction.ERR_STATUS) == 1 << 31
    assert (board.get(DevFunction.ERR_ADDR_LO), board.get(DevFunction.ERR_ADDR_HI)) == (0x300123, 0)
    board.put(DevFunction.ERR_STATUS, 0)
    assert not board.reaches(A, 0x301)
    assert board.get(DevFunction.ERR_ADDR_LO) == 0x301000
    assert board.late.dev is not None
    assert (board.late.dev.refusals, "page 0x301000" in board.late.dev.last) == (3, True)


@pytest.mark.parametrize("dev", ["coherent", "strict"])
def test_a_forgotten_invalidation(dev: str) -> None:
    board = WithDev(dev)
    board.domain(0)
    board.put(DevFunction.CR, DEV_CR.DEVEN)
    assert board.reaches(A, 0x300)
    board.deny(0x300)
    assert board.reaches(A, 0x300) == (dev == "strict")
    board.put(DevFunction.CR, DEV_CR.DEVEN | DEV_CR.INVD)
    assert board.get(DevFunction.CR) == DEV_CR.DEVEN, "INVD clears itself"
    assert not board.reaches(A, 0x300)


def test_the_cache_is_bounded() -> None:
    exclusion = Exclusion(BytesMemory(1 << 20), SlProtection(), strict=True)
    for number in range(3 * MOST_LINES):
        exclusion._denied(Domain(number, True, False, 4 << 30, 0), 0, False)
    assert len(exclusion._cache) == MOST_LINES


@given(st.sets(st.integers(0, 0x7F), max_size=30), st.integers(0x60, 0x90))
def test_denied_ranges_are_those_of_the_bits(pages: set[int], end: int) -> None:
    data = bytearray(0x2000)
    for page in pages:
        data[0x1000 + page // 8] |= 1 << page % 8
    found = denied_pages(BytesMemory({0: bytes(data)}), Domain(0, True, False, 4 << 30, 0x1000), end << 12)
    assert {page for first, last in found for page in range(first >> 12, last >> 12)} == {page for page in pages if page < end}
    assert all(before[1] < after[0] for before, after in pairwise(found))


def test_a_barrier_leaves_what_neither_dev_nor_skinit_denies() -> None:
    data = bytearray(0x2000)
    data[0x1000] = 0b1100
    memory, maps = BytesMemory({0: bytes(data)}), (DEV_MAP.make(BUS=1, UNIT0=3, VALID0=1, DOMAIN0=1),)
    low = (DEV_BASE_LO.VALID | 0x1000, 0)
    on, off = (DevRegisters(low, (0, 0), maps, control) for control in (DEV_CR.DEVEN, 0))

    def left(dev: DevRegisters | None, domain: int, block: int | None = None) -> list[tuple[int, int]] | None:
        spans = Barrier(memory, 0x30000, dev, block).left(domain)
        return None if spans is None else list(spans.rows())

    assert left(on, 0, 0x20000) == [(0, 0x2000), (0x4000, 0x20000), (0x30000, 1 << 52)]
    assert left(on, 0, 0x3000) == [(0, 0x2000), (0x13000, 1 << 52)]
    assert left(on, 1) is None
    assert left(off, 0) is None
    assert left(None, 0, 0) == [(0x10000, 1 << 52)]
    barrier = Barrier(memory, 0x30000, on)
    assert barrier.apart == frozenset(range(0x118, 0x120))
    assert [barrier.domain_of(device) for device in (0x117, 0x118, 0x11F, 0x120)] == [0, 1, 1, 0]


def test_the_block_of_skinit_is_kept_without_deven() -> None:
    board = WithDev()
    board.late.protect(0x200000)
    assert board.get(DevFunction.CR) == DEV_CR.SL_DEV_EN
    with pytest.raises(DmaError, match="SL_DEV"):
        board.chipset.dma.read(B, 0x20FFFF, 1)
    board.put(DevFunction.CR, DEV_CR.SL_DEV_EN | DEV_CR.DEVEN)
    assert board.late.protection.on
    board.put(DevFunction.CR, DEV_CR.DEVEN)
    assert not board.late.protection.on
    assert board.reaches(B, 0x200)
