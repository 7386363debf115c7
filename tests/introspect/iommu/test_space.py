"""What a device reaches as a whole is what single walks find."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest

from introspect.dimension import Limits
from introspect.iommu.registers import CONTROL
from introspect.iommu.space import UNREADABLE, IoSpace
from introspect.iommu.state import Iommu
from introspect.iommu.structures import DTE, PTE
from introspect.iommu.verdicts import DmaAccess, IoTranslation, Route
from introspect.iommu.walk import read_dte, translate
from introspect.paging import ENTRY

from .machines import RW, Machine, random_machine


def at(space: IoSpace, address: int) -> tuple[int, bool, bool] | None:
    """(spa, readable, writable) of one address."""
    runs = space.runs
    index = int(np.searchsorted(runs.start, np.uint64(address), "right")) - 1
    if index < 0 or address - int(runs.start[index]) >= int(runs.length[index]):
        return None
    flags = int(runs.attributes[index])
    return int(runs.target[index]) + address - int(runs.start[index]), not flags & UNREADABLE, bool(flags & ENTRY.W)


@pytest.mark.parametrize("first", range(0, 120, 40))
def test_a_listing_is_many_walks(first: int) -> None:
    found_some = 0
    for seed in range(first, first + 40):
        machine, requests = random_machine(seed)
        machine.registers["control"] |= CONTROL.GDUpdateDis | CONTROL.GAUpdateDis  # else tables that the host does not let be written matter, too
        memory, iommu = machine.memory, machine.iommu
        for device, address, _, pasid, _, _ in islice(requests, 6):
            dte = read_dte(memory, iommu, device)
            if not isinstance(dte, int) or (not iommu.enabled and pasid is not None):
                continue
            space = IoSpace(memory, iommu, dte, pasid=pasid, limits=Limits(1 << 17, 1 << 16))
            if not space.complete:
                continue
            starts = space.runs.start[:3].tolist() + (space.runs.end[:3] - np.uint64(1)).tolist()
            guest = pasid is not None or dte & DTE.GIoV
            for iova in (address, *starts):
                if iova >> (47 if guest else 52):
                    continue  # guest addresses are not sign-extended in a listing; identity ends at the last physical one
                verdicts = [translate(memory, iommu, device, iova, DmaAccess(write, pasid), set_ad=False) for write in (False, True)]
                read, write = (isinstance(one, IoTranslation) for one in verdicts)
                some = next((one for one in verdicts if isinstance(one, IoTranslation)), None)
                if some is not None and some.route == Route.FORWARDED:
                    continue  # that is no memory
                expected = None if some is None else (some.spa, read, write)
                assert at(space, iova) == expected, f"seed {seed}: device {device:#x} {iova:#x} pasid {pasid}"
                found_some += expected is not None
    assert found_some > 50


def test_neighbours_are_one_range() -> None:
    machine = Machine()
    root = machine.page()
    dte = machine.device(Mode=3, PageTableRoot=root >> 12, IR=1, IW=1)
    for page in range(4):
        machine.map(root, 3, 0x10000 + page * 0x1000, 0x80000 + page * 0x1000)
    machine.map(root, 3, 0x14000, 0x90000)
    machine.map(root, 3, 0x15000, 0x95000, PTE.IR)
    machine.map(root, 3, 0x20_0000, 0x4000_0000, level=2)
    machine.map(root, 3, 0x80_0000, 0x8000_0000, size=0x40_0000, level=2)
    space = IoSpace(machine.memory, machine.iommu, dte)
    rows = [(one.start, one.last, one.target, one.linear, one.rights) for one in space.ranges()]
    assert rows == [
        (0x10000, 0x14FFF, 0x80000, False, "rw"), (0x15000, 0x15FFF, 0x95000, True, "r-"),
        (0x20_0000, 0x3F_FFFF, 0x4000_0000, True, "rw"), (0x80_0000, 0xBF_FFFF, 0x8000_0000, True, "rw"),
    ]  # fmt: skip
    assert [one.page_sizes for one in space.ranges()][-1] == (0x40_0000,)
    assert len(list(space.ranges(linear=True))) == 5
    assert space.bytes_mapped == 6 * 0x1000 + 0x60_0000
    levels = space.tables().level.tolist()
    assert levels[0] == 3
    assert sorted(levels) == [1, 2, 3]


def test_untranslated_devices_reach_everything_but_the_interrupt_range() -> None:
    machine = Machine()
    dte = machine.device(Mode=0, IR=1, IW=1)
    space = IoSpace(machine.memory, machine.iommu, dte)
    assert at(space, 0x1234) == (0x1234, True, True)
    assert at(space, 0xFEE00000) is None
    assert not len(IoSpace(machine.memory, machine.iommu, machine.device(Mode=0)).runs.start)
    assert at(IoSpace(machine.memory, Iommu({}), 0), 0xFEE00000) == (0xFEE00000, True, True), "it is off"


def test_tables_that_describe_too_much_end() -> None:
    machine = Machine()
    tables = [machine.page() for _ in range(6)]
    for level, table in enumerate(tables, 1):
        for index in range(512):
            entry = (tables[level - 2] if level > 1 else 0x5000) | PTE.PR | RW | PTE.make(NextLevel=level - 1)
            machine.memory.write_u64(table + 8 * index, entry)
    dte = machine.device(Mode=6, PageTableRoot=tables[5] >> 12, IR=1, IW=1)
    space = IoSpace(machine.memory, machine.iommu, dte, limits=Limits(1 << 20, 1 << 16))
    assert not space.complete
    assert len(space.runs.start) > 0, "what was looked at counts"


def test_who_is_told_of_progress_may_end_it() -> None:
    machine = Machine()
    root = machine.page()
    dte = machine.device(Mode=3, PageTableRoot=root >> 12, IR=1, IW=1)
    machine.map(root, 3, 0x1000, 0x5000)
    told: list[float] = []

    def ends(part: float) -> bool:
        told.append(part)
        return False

    space = IoSpace(machine.memory, machine.iommu, dte, progress=ends)
    assert not space.complete
    assert told == [0]
