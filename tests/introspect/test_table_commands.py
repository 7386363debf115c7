"""`pt` and `npt`: ranges as text and JSON, tables that are not in order, and the picture."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from introspect.commands import Cancelled, CommandError, GuestView, HostView, run_line
from introspect.commands.memory_picture import picture
from introspect.commands.render import amount_text
from introspect.dimension import Limits
from introspect.memtypes import Caching, Mtrrs
from introspect.paging import Nested, PagingState
from introspect.reverse_map import reverse_map_of
from introspect.sources import BytesMemory
from introspect.tables import list_nested

from .fleet import IMAGE, RAM, Fleet
from .tables import NX, G, P, Tables, U, W, nested
from .test_tables import spaces
from .world import World

PAT = 0x0007_0406_0007_0406


def lines(fleet: Fleet, line: str) -> list[str]:
    result = run_line(fleet, line)
    json.dumps(result.json())
    text = result.text().split("\n")
    assert all(one == one.rstrip() for one in text)
    return text


def test_a_guest_through_both_dimensions() -> None:
    fleet = Fleet(1)
    fleet.tables[2].map(0x40_4000, 0x8000, P | G)
    fleet.tables[2].map(0x40_5000, 0x20000, P | W)
    ram = fleet.part(2) + RAM
    assert lines(fleet, "pt 2") == [
        "linear addresses of guest 2 (g2), 4-level paging over 4-level nested paging: 20 KiB mapped, 4 tables",
        "  start     end       size    rights                 pages             type          leads to",
        f"  0x400000  0x403fff  16 KiB  rwx supervisor         4 KiB over 4 KiB  PA0 over PA0  spa {ram:#x}",
        f"  0x404000  0x404fff  4 KiB   r-x supervisor global  4 KiB over 4 KiB  PA0 over PA0  spa {ram + 0x8000:#x}",
        "  the guest's tables map these, but the nested ones do not (#NPF):",
        "    0x405000-0x405fff  4 KiB  gpa 0x20000",
    ]  # fmt: skip


def test_nested_tables_and_the_host() -> None:
    fleet = Fleet(1)
    fleet.nested_tables[2].map(0x20_0000, 0, P | W | U | NX, level=2)
    fleet.nested_tables[2].map(0x1000, IMAGE)
    fleet.nested_tables[2].map(0x5000, IMAGE, P | W)
    ram = fleet.part(2) + RAM
    assert lines(fleet, "npt 2")[1:] == [
        "  start     end       size    rights             pages  type  leads to",
        f"  0x0       0x4fff    20 KiB  rwx                4 KiB  PA0   spa {ram:#x} ... (scattered)",
        f"  0x5000    0x5fff    4 KiB   none (U is clear)  4 KiB  PA0   spa {IMAGE:#x}",
        f"  0x6000    0xffff    40 KiB  rwx                4 KiB  PA0   spa {ram + 0x6000:#x}",
        "  0x200000  0x3fffff  2 MiB   rw-                2 MiB  PA0   spa 0x0",
    ]  # fmt: skip
    assert len(lines(fleet, "npt 2 --linear")) == 8
    assert lines(fleet, "npt 2 --linear --limit 1")[-1] == "  ... (5 more ranges; --limit 0 lists all)"
    assert "rwx supervisor" in lines(fleet, "pt host")[2]
    fleet.selected = fleet.guests[0]
    assert lines(fleet, "npt")[0].startswith("guest-physical addresses of guest 2 (g2)")
    assert lines(fleet, "pt")[0].startswith("linear addresses of guest 2 (g2)")


def test_memory_types_by_name_where_the_pat_is_known() -> None:
    fleet = Fleet(1)
    fleet.change(2, caching=Caching(0x01_0406 << 8 | 6, PAT, Mtrrs()))
    fleet.tables[2].change(0x40_1000, 1, add=1 << 3)
    fleet.tables[2].change(0x40_2000, 1, add=1 << 4)
    fleet.nested_tables[2].change(0x3000, 1, add=1 << 4 | 1 << 3)
    found = json.loads(json.dumps(run_line(fleet, "pt 2 --linear").json()))
    assert [one["type"] for one in found["ranges"]] == ["WB", "WB", "WT", "UC"]
    assert [one["type"] for one in run_line(fleet, "npt 2").json()["ranges"]] == ["WB", "UC", "WB"]  # type: ignore[index]


def test_gmet_says_whose_code_it_is() -> None:
    fleet = Fleet(1)
    guest = fleet.guests[0]
    assert guest.nested is not None
    fleet.change(2, nested=replace(guest.nested, gmet=True))
    fleet.nested_tables[2].change(0x1000, 1, drop=U)
    assert "rwx x by user (GMET)" in lines(fleet, "npt 2")[2]
    assert "rwx x by supervisor (GMET)" in lines(fleet, "npt 2")[3]
    assert "rwx x by supervisor (GMET)" in "\n".join(lines(fleet, "pt 2"))


def test_tables_that_are_not_in_order() -> None:
    fleet = Fleet(1)
    tables = fleet.tables[2]
    tables.put(tables.entry(1 << 39, 4), 0xDEAD_F000 | P | W)
    tables.put(tables.entry(2 << 39, 4), tables.root | P | W)
    tables.change(0x40_1000, 1, add=1 << 51)
    fleet.nested_tables[2].change(0x8000, 1, add=1 << 51)
    entry = tables.entry(0x40_1000, 1)
    text = "\n".join(lines(fleet, "pt 2"))
    spa = fleet.part(2) + RAM + entry
    assert f"! 0x401000-0x401fff: PTE at spa {spa:#x} is {tables.get(entry):#x}, which has reserved bits set: it faults" in text
    assert "! 0x8000000000-0xffffffffff: the page-directory-pointer table at 0xdeadf000 is at a guest-physical address that" in text
    assert f"the page-directory-pointer table at {tables.root:#x} is one of those above it" in text
    assert "! nested tables: 0x8000-0x8fff: PTE at spa" in text
    fleet.nested_tables[2].put(fleet.nested_tables[2].entry(1 << 39, 4), 0xDEAD_F000 | P | W | U)
    assert "0xdeadf000 is (partly) where there is no memory" in "\n".join(lines(fleet, "npt 2"))


def test_whoever_asked_may_stop_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    def progress(self: Fleet, part: float, what: str) -> None:
        raise Cancelled

    monkeypatch.setattr(Fleet, "progress", progress)
    assert lines(Fleet(1), "npt 2")[1:] == [
        "  nothing is mapped", "  ? 0x0-0xffffffffffff: not looked at, for the tables describe too much, or it took too long"
    ]  # fmt: skip
    with pytest.raises(CommandError, match="stopped before all tables were read"):
        run_line(Fleet(1), "who-maps 0")


def test_without_nested_paging_there_is_no_nested_table() -> None:
    fleet = Fleet(1)
    fleet.change(2, nested=None, ncr3=None)
    with pytest.raises(CommandError, match="it runs without nested paging; its page tables: pt 2"):
        run_line(fleet, "npt 2")


def test_json_has_what_the_text_has() -> None:
    fleet = Fleet(1)
    found = json.loads(json.dumps(run_line(fleet, "pt 2").json()))
    assert {"who", "space", "mode", "nested_mode", "bytes", "tables", "ranges", "left_out", "refused", "problems", "unknown"} <= found.keys()
    assert found["ranges"] == [
        {
            "start": 0x40_0000, "last": 0x40_3FFF, "spa": fleet.part(2) + RAM, "linear": True, "writable": True, "executable": True,
            "user": False, "global": False, "page_sizes": [4096], "nested_page_sizes": [4096], "type": "PA0 over PA0",
        }
    ]  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(spaces(), st.integers(0, 20))
def test_no_table_is_too_odd_for_any_command(space: tuple[BytesMemory, PagingState, Nested | None], page: int) -> None:
    """Text and JSON, whatever lies in memory: loops, reserved bits, tables where there is no memory."""
    memory, where, inner = space
    guests = [
        GuestView(number=number, name="g", vmcbs=(0x1000 * number,), asid=1, ncr3=inner.ncr3 if inner else None, paging=where, nested=inner)
        for number in (2, 3)
    ]
    found = reverse_map_of(memory)
    found.each, found.together = Limits(1 << 18, 1 << 13), Limits(1 << 20, 1 << 15)
    world = World(memory, guests, guests[0], host=HostView(paging=where))
    for line in ("pt --limit 8", "pt host --linear --limit 8", f"who-maps {page << 12:#x}", "audit isolation", "npt --limit 8"):
        if line.startswith("npt") and inner is None:
            continue
        result = run_line(world, line)
        assert result.text()
        json.dumps(result.json())


# The picture


def drawn(fleet: Fleet, path: Path) -> ElementTree.Element:
    result = run_line(fleet, f"npt 2 --map {path}")
    assert result.text() == f"Guest-physical memory of guest 2 (g2): {result.json()['ranges']} ranges, drawn in {path}"  # type: ignore[index]
    return ElementTree.fromstring(path.read_text())


def titles(root: ElementTree.Element) -> list[str]:
    return [element.text or "" for element in root.iter("{http://www.w3.org/2000/svg}title")]


def test_the_picture_says_what_maps_where(tmp_path: Path) -> None:
    fleet = Fleet(1)
    fleet.nested_tables[2].map(0x20_0000, 0x1_0000_0000, P | U, level=2)
    root = drawn(fleet, tmp_path / "map.svg")
    ram = fleet.part(2) + RAM
    whole = "\n".join(titles(root))
    assert f"gpa 0x0-0xffff\nto spa {ram:#x}-{ram + 0xFFFF:#x}\nrwx: read, write, execute\n64 KiB in pages of 4 KiB" in whole
    assert "gpa 0x200000-0x3fffff\nto spa 0x100000000-0x1001fffff\nr-x: read, execute\n2 MiB in pages of 2 MiB" in whole
    assert "nothing maps 0x10000-0x1fffff" in whole
    text = (tmp_path / "map.svg").read_text()
    assert not re.search(r"(href|src|url\(|<script|<link)", text), "it needs nothing else"


def test_as_html_and_refused(tmp_path: Path) -> None:
    fleet = Fleet(1)
    fleet.change(2, name="<b>&")
    path = tmp_path / "map.html"
    run_line(fleet, f"npt 2 --map {path}")
    text = path.read_text()
    assert text.startswith("<!DOCTYPE html>")
    assert "guest 2 (&lt;b&gt;&amp;)" in text
    with pytest.raises(CommandError, match="cannot be written"):
        run_line(fleet, f"npt 2 --map {tmp_path / 'no' / 'map.svg'}")


def test_thousands_of_ranges_are_drawn_together() -> None:
    memory = BytesMemory(1 << 20)
    tables = Tables(memory, "4-level", range(0x1000, 1 << 20, 0x1000))
    for page in range(4000):
        tables.map(page << 12, (page * 37 % 5000) << 12, P | U | (W if page % 3 else 0))
    tables.map(1 << 30, 1 << 30, P | W | U, level=2)
    text = picture(list_nested(memory, nested("4-level", tables.root)), "many")
    found = titles(ElementTree.fromstring(text))
    assert len(text) < 200_000
    assert any("mixed" in title and "scattered over spa" in title for title in found)
    assert any(title.startswith("gpa 0x40000000-0x401fffff\nto spa 0x40000000") for title in found)
    assert "4,001 linear ranges" in text


def test_nothing_to_draw() -> None:
    text = picture(list_nested(BytesMemory(0x1000), nested("4-level", 0)), "none")
    assert "nothing is mapped" in text
    ElementTree.fromstring(text)


def test_amounts() -> None:
    sizes = (0, 512, 1536, 4096, 2101248, 1 << 21, (1 << 30) + 4096, 3 << 29, 1 << 52)
    assert list(map(amount_text, sizes)) == [
        "0 bytes", "512 bytes", "1.5 KiB", "4 KiB", "2052 KiB", "2 MiB", "1024.0 MiB", "1536 MiB", "4096 TiB",
    ]  # fmt: skip
