"""Caches: coherent ones do not show, strict ones keep what hardware may keep until software invalidates it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from introspect.iommu.records import CommandCode
from introspect.iommu.structures import PTE
from introspect.pci import RequesterId
from tests.iommu.rig import DATA, DEVICE, OTHER, RW, Bench
from vmdbg.platform.pci.dma import DmaError

EVERYTHING = 0x7FFFFFFFFFFFF
"""Address bits 63:12 that mean all pages."""


def reached(bench: Bench, iova: int = 0, device: int = DEVICE) -> int:
    bench.dma.read(RequesterId(device), iova, 1)
    return bench.dma.locate(RequesterId(device), iova, 1, False)[0].spa


def test_coherent_changes_show_at_once() -> None:
    bench = Bench()
    root = bench.give({0: DATA})
    assert reached(bench) == DATA
    bench.ram.write_u64(bench.leaf_of(root, 0), bench.ram.read_u64(bench.leaf_of(root, 0)) + 0x1000)
    assert reached(bench) == DATA + 0x1000
    bench.give({0: DATA + 0x3000})
    assert reached(bench) == DATA + 0x3000
    bench.put("device_table_base", 0x300000 | 0x1FF)
    assert reached(bench) == 0, "another table, without an entry"


@pytest.mark.parametrize(
    ("address", "size", "domain", "forgets"),
    [
        (0, 0, 7, True), (1, 0, 7, False), (0, 0, 8, False), (EVERYTHING, 1, 7, True), (0, 1, 7, True), (1, 1, 7, True),
        (4, 1, 7, False), (3, 1, 7, True),
    ],
)  # fmt: skip
def test_strict_pages_stay_until_their_range_is_invalidated(address: int, size: int, domain: int, forgets: bool) -> None:
    bench = Bench(strict=True)
    root = bench.give({0: DATA})
    assert reached(bench) == DATA
    bench.ram.write_u64(bench.leaf_of(root, 0), 0)
    assert reached(bench) == DATA, "the forgotten invalidation is found"
    bench.issue(CommandCode.INVALIDATE_IOMMU_PAGES, DomainID=domain, Address=address, S=size)
    bench.commands_done()
    if forgets:
        with pytest.raises(DmaError):
            reached(bench)
    else:
        assert reached(bench) == DATA


def test_strict_entries_of_the_device_table_stay() -> None:
    bench = Bench(strict=True)
    bench.give({0: DATA})
    assert reached(bench) == DATA
    bench.give({0: DATA + 0x1000}, DomainID=8)
    assert reached(bench) == DATA
    bench.issue(CommandCode.INVALIDATE_DEVTAB_ENTRY, DeviceID=OTHER)
    bench.commands_done()
    assert reached(bench) == DATA
    bench.issue(CommandCode.INVALIDATE_DEVTAB_ENTRY, DeviceID=DEVICE)
    bench.commands_done()
    assert reached(bench) == DATA + 0x1000


def test_strict_domains_are_shared() -> None:
    """Two devices of one domain with different tables: what is kept of one serves the other."""
    bench = Bench(strict=True)
    bench.give({0: DATA})
    bench.give({0: DATA + 0x1000}, device=OTHER)
    assert reached(bench) == DATA
    assert reached(bench, device=OTHER) == DATA
    bench.issue(CommandCode.INVALIDATE_IOMMU_ALL)
    bench.commands_done()
    assert reached(bench, device=OTHER) == DATA + 0x1000


def test_what_was_forgotten_is_told() -> None:
    """Strict, and only where the outcome is another."""
    bench = Bench(strict=True)
    told: list[str] = []
    bench.unit.stale_listeners.append(told.append)
    root = bench.give({0: DATA}, HAD=3)
    leaf = bench.leaf_of(root, 0)
    bench.dma.write(DEVICE, 0x10, b"x")
    bench.dma.write(DEVICE, 0x10, b"x")
    bench.ram.write_u64(leaf, bench.ram.read_u64(leaf) | 1 << 60)
    bench.dma.write(DEVICE, 0x10, b"x")
    assert told == []
    bench.ram.write_u64(leaf, bench.ram.read_u64(leaf) + 0x1000)
    bench.dma.locate(DEVICE, 0x10, 1, True)
    assert told == [], "to ask is not to use"
    bench.dma.write(DEVICE, 0x10, b"x")
    assert told == [
        f"iommu 00:00.2 uses a translation that its tables no longer have: 00:03.0 at 0x10 reaches {DATA + 0x10:#x}, "
        f"they lead to {DATA + 0x1010:#x}; INVALIDATE_IOMMU_PAGES was forgotten"
    ]
    bench.ram.write_u64(leaf, 0)
    bench.dma.write(DEVICE, 0x10, b"x")
    assert "they refuse it: IO_PAGE_FAULT: PR is 0" in told[1]


def replaced(bench: Bench, root: int, iova: int, spa: int) -> int:
    """Have the last directory entry for an address lead to another table, whose entry leads to `spa`; where it is."""
    table = bench.table()
    bench.ram.write_u64(table + (iova >> 12 & 0x1FF) * 8, spa | PTE.PR | RW)
    at = root
    for level in (4, 3):
        at = bench.ram.read_u64(at + (iova >> 12 + 9 * (level - 1) & 0x1FF) * 8) & PTE.Address
    slot = at + (iova >> 21 & 0x1FF) * 8
    bench.ram.write_u64(slot, table | PTE.make(PR=1, NextLevel=1) | RW)
    return slot


@pytest.mark.parametrize(
    ("address", "pde", "domain", "forgets"),
    [
        (EVERYTHING, 0, 7, False), (0xFF, 0, 7, False), (0xFF, 1, 8, False), (0x4FF, 1, 7, False), (0, 1, 7, False),
        (0xFF, 1, 7, True), (EVERYTHING, 1, 7, True),
    ],
)
def test_strict_directories_stay_until_pde(address: int, pde: int, domain: int, forgets: bool) -> None:
    """With all of the 2 MiB that one maps (2.4.3)."""
    bench = Bench(strict=True)
    told: list[str] = []
    bench.unit.stale_listeners.append(told.append)
    root = bench.give({0: DATA, 0x1000: DATA + 0x1000})
    assert reached(bench) == DATA
    slot = replaced(bench, root, 0x1000, DATA + 0x5000)
    bench.issue(CommandCode.INVALIDATE_IOMMU_PAGES, DomainID=domain, Address=address, S=address & 1, PDE=pde)
    bench.commands_done()
    bench.dma.read(DEVICE, 0x1000, 1)
    if forgets:
        assert bench.dma.locate(DEVICE, 0x1000, 1, False)[0].spa == DATA + 0x5000
        assert told == []
    else:
        assert bench.dma.locate(DEVICE, 0x1000, 1, False)[0].spa == DATA + 0x1000
        assert told == [
            f"iommu 00:00.2 uses the page directory entry at {slot:#x} that its tables no longer have: 00:03.0 at 0x1000 reaches "
            f"{DATA + 0x1000:#x}, they lead to {DATA + 0x5000:#x}; INVALIDATE_IOMMU_PAGES with PDE was forgotten"
        ]


def test_a_directory_that_was_not_there_is_not_kept() -> None:
    """Without NpCache nobody has to invalidate what becomes present."""
    bench = Bench(strict=True)
    told: list[str] = []
    bench.unit.stale_listeners.append(told.append)
    root = bench.give({0: DATA})
    with pytest.raises(DmaError):
        bench.dma.read(DEVICE, 0x200000, 1)
    replaced(bench, root, 0x200000, DATA + 0x2000)
    assert reached(bench, 0x200000) == DATA + 0x2000
    assert told == []


def test_stale_entries_of_the_device_table_are_told() -> None:
    bench = Bench(strict=True)
    told: list[str] = []
    bench.unit.stale_listeners.append(told.append)
    bench.give({0: DATA})
    bench.dma.read(DEVICE, 0, 1)
    bench.give({0: DATA + 0x1000})
    bench.dma.read(DEVICE, 0, 1)
    assert told == [
        f"iommu 00:00.2 uses a device table entry that its tables no longer have: 00:03.0 at 0x0 reaches {DATA:#x}, "
        f"they lead to {DATA + 0x1000:#x}; INVALIDATE_DEVTAB_ENTRY was forgotten"
    ]
    bench.issue(CommandCode.INVALIDATE_DEVTAB_ENTRY, DeviceID=DEVICE)
    bench.commands_done()
    bench.dma.read(DEVICE, 0, 1)
    assert told[1].endswith("a translation that its tables no longer have: 00:03.0 at 0x0 reaches 0x800000, they lead to 0x801000; "
                            "INVALIDATE_IOMMU_PAGES was forgotten"), "the entry is right by now, the pages are not"  # fmt: skip


def test_an_entry_without_v_and_iv_is_not_kept() -> None:
    """Who sets the first bit of an entry need not invalidate it."""
    bench = Bench(strict=True)
    told: list[str] = []
    bench.unit.stale_listeners.append(told.append)
    bench.dma.read(DEVICE, DATA, 1)
    bench.give({0: DATA})
    assert reached(bench) == DATA
    assert told == []


def test_what_a_stale_entry_refuses_is_told() -> None:
    bench = Bench(strict=True)
    told: list[str] = []
    bench.unit.stale_listeners.append(told.append)
    bench.give({0: DATA}, IW=0)
    for _ in range(2):
        with pytest.raises(DmaError):
            bench.dma.write(DEVICE, 0, b"x")
        bench.give({0: DATA})
    assert [one.partition(": 00:03.0")[2] for one in told] == [
        " at 0x0 is refused (IO_PAGE_FAULT: IR or IW is missing), they lead to 0x800000; INVALIDATE_DEVTAB_ENTRY was forgotten"
    ]


@pytest.mark.parametrize("level", [1, 2])
def test_a_right_that_the_hosts_tables_withheld_stays_withheld(level: int) -> None:
    """1.3.2: unlike a processor, the IOMMU does not walk nested tables again where what it has cached refuses."""
    bench = Bench(strict=True)
    told: list[str] = []
    bench.unit.stale_listeners.append(told.append)
    root = bench.give({0: DATA, 0x1000: DATA + 0x1000})
    entry = bench.leaf_of(root, 0)
    if level == 2:
        entry = bench.leaf_of(root, 0, 3)
    bench.ram.write_u64(entry, bench.ram.read_u64(entry) & ~PTE.IW)
    assert reached(bench) == DATA
    bench.ram.write_u64(entry, bench.ram.read_u64(entry) | PTE.IW)
    other = 0x1000 if level == 2 else 0  # through a directory that is kept
    for iova in (0, other):
        with pytest.raises(DmaError, match="IR or IW is missing"):
            bench.dma.write(DEVICE, iova, b"x")
        assert bench.event().flags == {"PR", "PE", "RW"}
    command = "INVALIDATE_IOMMU_PAGES with PDE" if level == 2 else "INVALIDATE_IOMMU_PAGES"
    assert [one.rpartition("; ")[2] for one in told] == [f"{command} was forgotten"] * 2
    bench.issue(CommandCode.INVALIDATE_IOMMU_PAGES, DomainID=7, S=1, PDE=1, Address=EVERYTHING)
    bench.commands_done()
    bench.dma.write(DEVICE, 0, b"x")
    assert bench.ram.read(DATA, 1) == b"x"


def test_a_right_that_a_device_lacks_is_not_one_that_the_tables_withhold() -> None:
    bench = Bench(strict=True)
    bench.give({0: DATA}, IW=0)
    assert reached(bench) == DATA
    bench.give({0: DATA}, device=OTHER)
    bench.dma.write(OTHER, 0, b"y")
    assert bench.ram.read(DATA, 1) == b"y"


def test_rights_of_the_device_are_not_shared_with_the_domain() -> None:
    bench = Bench(strict=True)
    bench.give({0: DATA})
    bench.dma.write(DEVICE, 0, b"x")
    bench.give({0: DATA}, device=OTHER, IW=0)
    with pytest.raises(DmaError):
        bench.dma.write(OTHER, 0, b"y")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.booleans(), st.booleans()), max_size=30))
def test_coherent_is_as_without_caches(steps: list[tuple[int, int, bool, bool]]) -> None:
    """Whatever is mapped, unmapped and used in between, a fresh walk says the same."""
    bench = Bench()
    root = bench.give({n << 12: DATA for n in range(4)})
    for page, target, present, write in steps:
        leaf = bench.leaf_of(root, page << 12)
        bench.ram.write_u64(leaf, DATA + (target << 12) | present | 3 << 61)
        try:
            used = bench.dma.locate(DEVICE, page << 12, 8, write, quiet=False)[0].spa
        except DmaError:
            used = None
        assert used == (DATA + (target << 12) if present else None)
