"""The picture of exits: well-formed, self-contained, and true to the numbers."""

from __future__ import annotations

import re
from xml.etree import ElementTree

from hypothesis import given, settings
from hypothesis import strategies as st

from introspect.exit_plot import page, svg
from introspect.exitlog import ExitRecord

from .test_exitlog import LOG, RECORDS

NAMES = {2: "guest 2", 3: '<script>alert("3")</script>&'}


def texts(image: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(image).iter("{http://www.w3.org/2000/svg}text")]


def test_what_it_says() -> None:
    said = texts(svg(LOG, NAMES, 4_000_000_000))
    assert "7 #VMEXITs in 240 ns of guest time" in said
    assert {"guest 2", "5 exits", "2 exits", NAMES[3], "IOIO", "NPF", "CPUID", "MSR", "INVALID"} <= set(said)
    assert "128 ns, 63.8 ns each" in said  # of IOIO


def test_every_exit_is_in_a_column() -> None:
    titles = re.findall(r"<title>(\d+) [A-Z]+</title>", svg(LOG, NAMES, 4_000_000_000))
    assert sum(map(int, titles)) == len(LOG)


def test_nothing_is_loaded_from_elsewhere() -> None:
    found = page(LOG, NAMES, 4_000_000_000)
    assert "<script" not in found
    assert not re.search(r"\b(src|href)=|@import|url\(", found)


def test_no_exits() -> None:
    assert texts(svg([], {}, 1)) == ["No #VMEXIT is recorded."]


@settings(deadline=None)
@given(st.lists(RECORDS, max_size=12))
def test_any_records_give_an_image(records: list[ExitRecord]) -> None:
    ElementTree.fromstring(svg(records, NAMES, 4_000_000_000))
