"""What leads to a page, and whose it is; and that unchanged tables are not walked again."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from introspect.commands import CommandError, GuestView, HostView, run_line
from introspect.dimension import Dimension, Limits, TableRows
from introspect.expression import Space
from introspect.paging import Nested, PagingState
from introspect.reverse_map import ReverseMap, reverse_map_of
from introspect.runs import ByTarget, Runs, column, leading_to
from introspect.sources import BytesMemory
from introspect.symbols import Symbol, Symbols

from .fleet import HSAVE, IMAGE, IOPM, MSRPM, NPT, RAM, Fleet
from .plain import plain_space
from .tables import P, U, W
from .test_tables import spaces


def updated(fleet: Fleet) -> ReverseMap:
    found = ReverseMap(fleet.memory)
    assert found.update(fleet.host, fleet.guests)
    return found


def ways(found: ReverseMap, spa: int) -> list[tuple[int | None, str, int, int]]:
    return [(one.number, one.space, one.address, one.length > 0) for one in found.mappings(spa, 9)]


def owners(found: ReverseMap, spa: int) -> list[str]:
    return [owner.text() for owner in found.owners(spa)]


def text(fleet: Fleet, line: str) -> str:
    result = run_line(fleet, line)
    json.dumps(result.json())
    return result.text()


def test_a_page_of_a_guest_is_reached_by_host_and_guest() -> None:
    fleet = Fleet(2)
    found = updated(fleet)
    page = fleet.part(3) + RAM + 0x1000
    assert ways(found, page + 0x10) == [
        (1, Space.GVA, page + 0x10, 1), (3, Space.GPA, 0x1010, 1), (3, Space.GVA, 0x40_1010, 1)
    ]  # fmt: skip
    assert owners(found, page + 0x10) == ["RAM of guest 3 (g3), gpa 0x1010"]


@pytest.mark.parametrize(
    ("at", "owner"),
    [
        (lambda part: part + 0x70, "VMCB of guest 3 (g3), offset 0x70"),
        (lambda part: part + IOPM + 0x2FFF, "IOPM of guest 3 (g3), offset 0x2fff"),
        (lambda part: part + MSRPM, "MSRPM of guest 3 (g3), offset 0x0"),
        (lambda part: HSAVE + 8, "HSAVE of CPU 0, offset 0x8"),
        (lambda part: IMAGE + 0x3FFF, "image of the host, offset 0x3fff"),
        (lambda part: part + NPT, "nested PML4 of guest 3 (g3), for gpa 0x0 and on"),
        (lambda part: part + NPT + 0x3000, "nested page table of guest 3 (g3), for gpa 0x0 and on"),
        (lambda part: part + RAM + 0xF000, "page table of guest 3 (g3), for gva 0x400000 and on"),
    ],
)
def test_whose_it_is(at: object, owner: str) -> None:
    fleet = Fleet(2)
    assert callable(at)
    assert owner in owners(updated(fleet), at(fleet.part(3)))


def test_the_host_reaches_a_page_twice_by_name() -> None:
    fleet = Fleet(1)
    fleet.known_symbols = {1: Symbols([Symbol("main", 0x7FC0_0000_0000, 64)])}
    assert text(fleet, f"who-maps {IMAGE + 0x10:#x}").split("\n") == [
        "spa 0x10010",
        "  image of the host, offset 0x10",
        "mapped by:",
        "  the host  gva 0x10010                     rwx supervisor  2 MiB",
        "  the host  gva 0x7fc000000010 <main+0x10>  r-x supervisor  4 KiB",
    ]


def test_the_command_takes_addresses_of_any_space() -> None:
    fleet = Fleet(1)
    lines = text(fleet, "who-maps 2:0x400010").split("\n")
    assert lines[0] == f"spa {fleet.part(2) + RAM + 0x10:#x}"
    assert text(fleet, "who-maps 2:gpa:0x10").split("\n") == lines
    assert "  guest 2 (g2)  gpa 0x10" in text(fleet, "who-maps 2:gpa:0x10")
    with pytest.raises(CommandError, match="not mapped"):
        run_line(fleet, "who-maps 2:0x500000")
    nobody = text(fleet, "who-maps 0xdead0000").split("\n")
    assert nobody == ["spa 0xdead0000", "  no structure, page table or RAM of a guest that is known", "mapped by nobody"]


def test_many_addresses_of_one_page_are_cut_and_told() -> None:
    fleet = Fleet(1)
    for page in range(40):
        fleet.nested_tables[2].map(0x10_0000 + (page << 12), IMAGE)
    assert "at most 16 of each set of tables are listed" in text(fleet, f"who-maps {IMAGE:#x}")
    assert text(fleet, f"who-maps {IMAGE:#x} --limit 64").count("guest 2 (g2)  gpa") == 40


def test_virtual_processors_with_other_tables_are_listed_apart() -> None:
    fleet = Fleet(1)
    part = fleet.part(2)
    fleet.add_vcpu(2, part + 0x3C000, 0xD000)  # the second of its tables as a root: maps something else
    found = updated(fleet)
    labels = {mapper.label for mapper in found.mappers if mapper.space == Space.GVA and mapper.number == 2}
    assert labels == {"", f"VMCB {part + 0x3C000:#x}"}
    fleet.add_vcpu(2, part + 0x3D000, fleet.tables[2].root)
    assert len(updated(fleet).mappers) == len(found.mappers), "those with the same tables are not"


def test_without_nested_paging_the_tables_lead_to_memory_at_once() -> None:
    fleet = Fleet(1)
    fleet.shadow(2)
    found = updated(fleet)
    assert (2, Space.GVA, 0x40_0010, 1) in ways(found, fleet.part(2) + RAM + 0x10)
    assert "shadow PML4 of guest 2 (g2), for gva 0x0 and on" in owners(found, fleet.part(2) + NPT)


def test_other_mappers_join() -> None:
    class Domain:
        """An IOMMU domain with one page."""

        party, number, label, space, host, confines, complete = "device 00:03.0", None, "", Space.IOVA, False, True, True
        runs = Runs(column(0x2000), column(0x1000), column(IMAGE), column(W | 1 << 12))

        def shown(self, address: int) -> int:
            return address

        def tables(self) -> TableRows:
            return TableRows(column(1), column(0x30000), column(0))

    fleet = Fleet(1)
    found = ReverseMap(fleet.memory)
    found.update(fleet.host, fleet.guests)
    found.mappers.append(Domain())
    assert (None, Space.IOVA, 0x2010, 1) in ways(found, IMAGE + 0x10)
    assert "I/O page table of device 00:03.0, for iova 0x0 and on" in owners(found, 0x30008)


# Up to date


def test_only_what_has_changed_is_walked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = Fleet(8)
    found = updated(fleet)
    assert found.walked == 17
    walks: list[Dimension] = []
    whole = Dimension.walk

    def walk(self: Dimension) -> None:
        walks.append(self)
        whole(self)

    monkeypatch.setattr(Dimension, "walk", walk)
    assert found.update(fleet.host, fleet.guests)
    assert (found.walked, len(walks)) == (0, 0)
    fleet.tables[4].map(0x40_0000, 0x3000)
    assert found.update(fleet.host, fleet.guests)
    assert (found.walked, len(walks)) == (1, 0)
    page = fleet.part(4) + RAM + 0x3000
    assert [way[2] for way in ways(found, page) if way[:2] == (4, Space.GVA)] == [0x40_0000, 0x40_3000]
    fleet.nested_tables[5].map(0x1000, IMAGE, P | U)
    assert found.update(fleet.host, fleet.guests)
    assert (found.walked, len(walks)) == (2, 0), "the nested table, and what the guest's tables come to through it"
    assert {(5, Space.GPA, 0x1000, 1), (5, Space.GVA, 0x40_1000, 1)} <= set(ways(found, IMAGE))


def test_a_guest_table_that_has_moved_is_walked_anew() -> None:
    fleet = Fleet(1)
    found = updated(fleet)
    at = fleet.part(2) + RAM
    fleet.memory.write(at + 0x8000, fleet.memory.read(at + 0xF000, 0x1000))
    fleet.memory.write_u64(at + 0x8000, 0x7000 | P)
    fleet.nested_tables[2].map(0xF000, at + 0x8000)
    assert found.update(fleet.host, fleet.guests)
    assert (2, Space.GVA, 0x40_0000, 1) in ways(found, at + 0x7000)


def test_another_cr3_is_another_space_and_guests_come_and_go() -> None:
    fleet = Fleet(2)
    found = updated(fleet)
    fleet.change(2, paging=replace(fleet.guests[0].paging, cr3=0xD000))
    found.update(fleet.host, fleet.guests)
    assert (2, Space.GVA, 0x40_0000, 1) not in ways(found, fleet.part(2) + RAM)
    found.update(fleet.host, fleet.guests[1:])
    assert {mapper.number for mapper in found.mappers} == {1, 3}
    assert not any(area.number == 2 for area in found.areas)


def test_thousands_of_hostile_guests_share_a_bound() -> None:
    """Loops that describe more than anybody would wait for, in every guest."""
    fleet = Fleet(60)
    for tables in fleet.nested_tables.values():
        for index in range(512):
            tables.put(tables.root + 8 * index, tables.root | P | W | U)
    found = ReverseMap(fleet.memory, Limits(1 << 19, 1 << 16), Limits(1 << 21, 1 << 18))
    found.update(fleet.host, fleet.guests)
    assert sum(len(mapper.runs.start) for mapper in found.mappers) < 1 << 19
    assert sum(mapper.complete for mapper in found.mappers) == 1, "the host's"


def test_it_may_be_ended_within_one_guests_tables() -> None:
    fleet = Fleet(1)
    found = updated(fleet)
    told: list[float] = []

    def progress(part: float) -> bool:
        told.append(part)
        return len(told) < 3

    fleet.change(2, paging=replace(fleet.guests[0].paging, cr3=0xD000))
    assert not found.update(fleet.host, fleet.guests, progress=progress)
    assert told == sorted(told)
    assert not found.areas
    assert found.update(fleet.host, fleet.guests)
    assert found.mappers[-1].complete


def test_it_may_be_ended_and_the_map_of_a_memory_is_kept() -> None:
    fleet = Fleet(4)
    found = reverse_map_of(fleet.memory)
    assert reverse_map_of(fleet.memory) is found
    assert not found.update(fleet.host, fleet.guests, progress=lambda part: part < 0.5)
    assert found.update(fleet.host, fleet.guests)


def test_a_loop_in_a_guests_tables_is_told() -> None:
    fleet = Fleet(1)
    root = fleet.part(2) + RAM + 0xC000
    for index in range(512):
        fleet.memory.write_u64(root + 8 * index, 0xC000 | P | W | U)
    found = reverse_map_of(fleet.memory)
    found.each = Limits(1 << 20, 1 << 14)
    assert "? the tables of guest 2 (g2) are not known, or describe too much" in text(fleet, "who-maps 0")


@settings(max_examples=60, deadline=None)
@given(spaces(), st.integers(0, 15))
def test_the_reverse_is_the_reverse(space: tuple[BytesMemory, PagingState, Nested | None], page: int) -> None:
    """Of everything that single walks find."""
    memory, where, inner = space
    guest = GuestView(number=2, name="g", vmcbs=(), asid=1, ncr3=0, paging=where, nested=inner)
    found = ReverseMap(memory, Limits(1 << 17, 1 << 13), Limits(1 << 20, 1 << 16))
    found.update(HostView(paging=PagingState(1, 0, 0, 0)), [guest])
    mapper = found.mappers[-1]
    if not mapper.complete or where.mode == "off":
        return
    spa, expected, reached = page << 12, set(), 0
    for start, end, mapped in plain_space(memory, where, inner, 2000):
        reached = end
        if mapped is not None and mapped.target <= spa < mapped.target + end - start:
            expected.add(mapper.shown(start + spa - mapped.target))
    ours = {one.address for one in found.mappings(spa, 1 << 14) if one.party == mapper.party and one.space == Space.GVA}
    assert {address for address in ours if address & (1 << 57) - 1 < reached or reached >= 1 << 32} >= expected
    assert not {address for address in ours - expected if address < reached}


def test_leading_to() -> None:
    """Stretches that lie within others are found, too."""
    runs = Runs(column(0, 0x10000, 0x20000), column(0x8000, 0x1000, 0x1000), column(0, 0x2000, 0x9000), column(1, 2, 3))
    assert [row[3] for row in leading_to(runs, 0x2800, 9)] == [1, 2]
    assert [row[3] for row in leading_to(runs, 0x2800, 1)] == [1]
    assert [row[3] for row in leading_to(runs, 0x9000, 9)] == [3]
    assert not leading_to(runs, 0x8000, 9)
    assert not leading_to(runs, 0xA000, 9)
    assert [row[3] for row in ByTarget(runs).find(0x2800, 0x2801, 9)] == [1, 2]
    assert [row[3] for row in ByTarget(runs).find(0x7000, 0x9001, 9)] == [1, 3]
    assert not ByTarget(runs).find(0x8000, 0x9000, 9)
