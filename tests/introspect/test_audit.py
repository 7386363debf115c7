"""Whether guests are kept apart: each way in which they may not be, alone, and none where nothing is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import pytest

from introspect.audit import RULES, Finding, Severity, audit_isolation
from introspect.commands import exit_status, run_line
from introspect.commands.mappers import Audit
from introspect.dimension import NO_TABLES, TableRows
from introspect.expression import Space
from introspect.reverse_map import ReverseMap
from introspect.runs import Runs, column
from introspect.vmcb import VMCB

from .fleet import HSAVE, IMAGE, IOPM, MSRPM, NPT, RAM, Fleet
from .tables import NX, P, U, W

FREE = 0x3_0000
"""A gpa that no guest has."""


def fleet(count: int = 2) -> Fleet:
    """In which nothing is wrong, whoever asks."""
    made = Fleet(count)
    made.host_tables.change(0, 2, add=NX)
    made.host_tables.change(0x20_0000, 2, add=NX)
    for tables in made.tables.values():
        for page in range(4):
            tables.change(0x40_0000 + (page << 12), 1, add=NX)
    return made


def audit(made: Fleet, *others: Device) -> list[Finding]:
    found = ReverseMap(made.memory)
    assert found.update(made.host, made.guests)
    found.mappers += others
    return audit_isolation(found, {guest.number: guest.parent for guest in made.guests})


def told(made: Fleet, *others: Device) -> list[tuple[str, str, str, str]]:
    return [(one.severity.word, one.rule, one.who, one.what) for one in audit(made, *others)]


def test_nothing_is_wrong() -> None:
    assert not audit(fleet())
    result = run_line(fleet(), "audit isolation")
    assert result.text() == "no findings, in 5 sets of tables"
    assert exit_status(result) == 0


def test_two_guests_write_a_page() -> None:
    made = fleet()
    page = made.part(2) + RAM + 0x2000
    made.nested_tables[3].map(FREE, page)
    made.nested_tables[3].map(FREE + 0x1000, page + 0x1000)
    (found,) = audit(made)
    assert found == Finding(
        Severity.HIGH, "shared-writable", "guest 2 (g2), guest 3 (g3)", "both write", ((page, page + 0x2000),), 0x2000
    )  # fmt: skip


def test_one_guest_reads_what_another_writes() -> None:
    made = fleet()
    made.nested_tables[2].map(FREE, made.part(3) + RAM, P | U)
    assert told(made) == [
        ("medium", "written-and-read", "guest 3 (g3), guest 2 (g2)", "guest 2 (g2) reads what guest 3 (g3) writes")
    ]  # fmt: skip


def test_what_all_only_read_is_no_finding() -> None:
    made = fleet()
    for tables in made.nested_tables.values():
        tables.map(FREE, 0x2_8000, P | U)
    assert not audit(made)


def test_a_guest_within_a_guest_shares_its_memory() -> None:
    made = fleet(3)
    for number in (3, 4):
        made.nested_tables[number].map(FREE, made.part(2) + RAM)
    made.change(3, parent=2)
    assert [one[2] for one in told(made)] == ["guest 2 (g2), guest 4 (g4)", "guest 3 (g3), guest 4 (g4)"]
    made.change(4, parent=3)
    assert not audit(made)


@pytest.mark.parametrize(
    ("where", "what"),
    [
        (lambda part: part, "VMCB of guest 3 (g3)"),
        (lambda part: part + IOPM, "IOPM of guest 3 (g3)"),
        (lambda part: part + MSRPM, "MSRPM of guest 3 (g3)"),
        (lambda part: part + NPT, "tables that confine guest 3 (g3)"),
        (lambda part: HSAVE, "HSAVE of CPU 0"),
        (lambda part: 0x2_0000, "page tables of the host"),
    ],
)
def test_a_guest_reaches_a_structure(where: Callable[[int], int], what: str) -> None:
    for flags, severity, rule, verb in ((P | W | U, "critical", "control-writable", "writes"), (P | U, "high", "control-readable", "reads")):
        made = fleet()
        made.nested_tables[2].map(FREE, where(made.part(3)), flags)
        assert told(made) == [(severity, rule, "guest 2 (g2)", f"{verb} {what}")]


def test_a_map_that_nobody_looks_at_is_none() -> None:
    made = fleet()
    vmcb = bytearray(made.memory.read(made.part(3), 0x1000))
    VMCB.write(vmcb, "intercept_misc1", 0)
    made.memory.write(made.part(3), bytes(vmcb))
    made.nested_tables[2].map(FREE, made.part(3) + IOPM)
    assert not audit(made)


def test_a_map_that_several_share_is_one_finding() -> None:
    made = fleet(3)
    for number in (3, 4):
        vmcb = bytearray(made.memory.read(made.part(number), 0x1000))
        VMCB.write(vmcb, "iopm_base_pa", made.part(2) + IOPM)
        made.memory.write(made.part(number), bytes(vmcb))
    made.nested_tables[3].map(FREE, made.part(2) + IOPM)
    assert told(made) == [("critical", "control-writable", "guest 3 (g3)", "writes IOPM of guest 2 (g2) and 2 more")]


def test_its_own_are_no_exception() -> None:
    made = fleet()
    made.nested_tables[2].map(FREE, made.part(2) + NPT)
    assert told(made) == [("critical", "control-writable", "guest 2 (g2)", "writes tables that confine guest 2 (g2)")]


def test_a_guest_reaches_the_image() -> None:
    for flags, severity, rule in ((P | W | U, "critical", "image-writable"), (P | U, "high", "image-readable")):
        made = fleet()
        made.nested_tables[2].map(FREE, IMAGE + 0x3000, flags)
        assert [one[:2] for one in told(made)] == [(severity, rule)]
        made.nested_tables[2].map(FREE, IMAGE + 0x4000, flags)
        assert not audit(made)


def test_a_large_page_reaches_too_far() -> None:
    made = fleet()
    made.nested_tables[3].map(0x40_0000, 0, level=2)
    rules = {one.rule for one in audit(made)}
    assert rules == {"control-writable", "image-writable", "shared-writable"}


def test_an_entry_that_grants_nobody_anything_is_none() -> None:
    made = fleet()
    made.nested_tables[2].map(FREE, IMAGE, P | W)
    assert not audit(made)


def test_user_code_reaches_tables() -> None:
    made = fleet()
    made.nested_tables[2].map(FREE, made.part(3) + NPT)
    made.tables[2].map(0x50_0000, FREE, P | U | NX)
    assert ("critical", "user-reaches-tables", "user code of guest 2 (g2)", "reaches tables that confine guest 3 (g3)") in told(made)
    made = fleet()
    made.host_tables.map(0x7FC0_0000_1000, made.part(2), P | U)
    made.host_tables.change(0x7FC0_0000_1000, 1, add=NX)
    assert told(made) == [("high", "user-reaches-tables", "user code of the host", "reaches VMCB of guest 2 (g2)")]


def test_writable_code() -> None:
    made = fleet()
    made.tables[2].change(0x40_0000, 1, drop=NX)
    made.tables[3].map(0x50_0000, 0, P | W | U)
    made.host_tables.change(0x20_0000, 2, drop=NX)
    assert told(made) == [
        ("medium", "writable-executable", "the host", "supervisor pages are writable and executable"),
        ("low", "writable-executable", "guest 2 (g2)", "supervisor pages are writable and executable"),
        ("low", "writable-executable", "guest 3 (g3)", "user pages are writable and executable"),
    ]


def test_without_nested_paging_the_tables_in_the_vmcb_confine() -> None:
    made = fleet()
    made.shadow(2)
    made.tables[2].change(0x40_0000, 1, add=NX)
    assert not audit(made)
    made.tables[2].map(0x40_1000, made.part(2) + NPT, P | W | NX)
    assert told(made) == [("critical", "control-writable", "guest 2 (g2)", "writes tables that confine guest 2 (g2)")]


class Device:
    """One that reaches a page, as an IOMMU's tables would say."""

    party, number, label, space, host, confines, complete = "device 00:03.0", None, "", Space.IOVA, False, True, True

    def __init__(self, target: int) -> None:
        self.runs = Runs(column(0), column(0x1000), column(target), column(P | W | U | 1 << 12))

    def shown(self, address: int) -> int:
        return address

    def tables(self) -> TableRows:
        return NO_TABLES


def test_devices_are_agents() -> None:
    made = fleet()
    assert told(made, Device(made.part(2))) == [
        ("critical", "control-writable", "device 00:03.0", "writes VMCB of guest 2 (g2)")
    ]  # fmt: skip
    assert [one[1:3] for one in told(made, Device(made.part(2) + RAM))] == [
        ("shared-writable", "guest 2 (g2), device 00:03.0")
    ]  # fmt: skip


def test_the_command_and_its_exit_status() -> None:
    made = fleet()
    made.nested_tables[2].map(FREE, made.part(3) + RAM, P | U)
    result = run_line(made, "audit isolation")
    page = made.part(3) + RAM
    assert result.text().split("\n") == [
        f"written-and-read: {RULES['written-and-read'].says}; {RULES['written-and-read'].remedy}",
        f"  medium  guest 3 (g3), guest 2 (g2)  guest 2 (g2) reads what guest 3 (g3) writes  4 KiB  spa {page:#x}-{page + 0xFFF:#x}",
        "1 finding, the worst medium, in 5 sets of tables",
    ]
    assert exit_status(result) == 1
    assert exit_status(run_line(made, "audit isolation --fail-at high")) == 0
    document = json.loads(json.dumps(result.json()))
    assert document["findings"][0]["severity"] == "medium"
    assert document["exit_status"] == 1
    assert exit_status(Audit((), Severity.LOW, 1, ("guest 2",))) == 1, "what was not looked at is not proved"


def test_hundreds_of_guests_that_share_everything_take_no_longer() -> None:
    made = fleet(250)
    for tables in made.nested_tables.values():
        for page in range(8):
            tables.map(page << 12, IMAGE + 0x8000 + (page << 12))
    found = audit(made)
    assert all(one.severity >= Severity.HIGH for one in found)
    assert any("only the first pairs are told" in one.what for one in found)


def test_it_may_be_ended() -> None:
    made = fleet()
    made.nested_tables[2].map(FREE, made.part(3))
    found = ReverseMap(made.memory)
    found.update(made.host, made.guests)
    assert not audit_isolation(found, {}, progress=lambda part: False)
    assert replace(audit(made)[0], bytes=0).severity == Severity.CRITICAL


def test_what_was_not_compared_wholly_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guests without a finding have not passed, if only a part of what they reach was looked at."""
    monkeypatch.setattr("introspect.audit._PIECES", 0)
    made = fleet()
    for number in (2, 3):
        made.nested_tables[number].map(FREE, HSAVE, P | U)
        made.nested_tables[number].map(FREE + 0x2000, NPT, P | U)
    result = run_line(made, "audit isolation --fail-at critical")
    assert exit_status(result) == 1
    assert isinstance(result, Audit)
    assert set(result.incomplete) >= {"guest 2 (g2)", "guest 3 (g3)"}
    assert "nothing is proved of them" in result.text()
