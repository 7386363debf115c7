"""Exits by what they are about, and what they cost."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from introspect.exitlog import KEYS, RECORD_FACTS, ExitRecord, facts_of, group, subject, what
from introspect.exits import IOIO, NPF_INFO, ExitCode
from introspect.facts import EXIT_FACTS

U64 = st.integers(0, 2**64 - 1)
RECORDS = st.builds(
    ExitRecord, number=st.integers(1, 1 << 40), guest=st.integers(2, 9), time=U64, rip=U64,
    code=st.one_of(st.sampled_from([int(code) for code in ExitCode]), U64), info1=U64, info2=U64, intinfo=U64,
    cpu=st.integers(0, 63), vmcb=U64, host_rip=U64, entered=U64, resumed=U64, rax=U64, rcx=U64,
    insn=st.binary(max_size=15), bits=st.sampled_from((16, 32, 64)),
)  # fmt: skip

OUT_E9 = 0xE9 << 16 | IOIO.SZ8
IN_3FD = 0x3FD << 16 | IOIO.SZ8 | IOIO.IN
WRITE = NPF_INFO.W | NPF_INFO.FINAL
LOG = [
    ExitRecord(1, 2, 100, 0x1000, ExitCode.CPUID, 0, 0, entered=40, resumed=130),
    ExitRecord(2, 2, 200, 0x1000, ExitCode.IOIO, OUT_E9, 0x1002, entered=130, resumed=700),
    ExitRecord(3, 3, 800, 0x1000, ExitCode.IOIO, IN_3FD, 0x1002, entered=700, resumed=810),
    ExitRecord(4, 2, 900, 0x2000, ExitCode.NPF, WRITE, 0xFEE0_0300, entered=810, resumed=950),
    ExitRecord(5, 2, 960, 0x2000, ExitCode.NPF, WRITE, 0xFEE0_00B0, entered=950, resumed=965),
    ExitRecord(6, 2, 970, 0x3000, ExitCode.MSR, 1, 0, entered=965, resumed=971, rcx=0xFFFF_FFFF_C000_0080),
    ExitRecord(7, 3, 1000, 0x9000, ExitCode.INVALID, 0, 0, entered=1000),
]


def test_time_in_guest_and_in_host() -> None:
    assert [(record.in_guest, record.in_host) for record in LOG] == [
        (60, 30), (70, 500), (100, 10), (90, 50), (10, 5), (5, 1), (0, None),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("code", [("IOIO", 2, 510), ("NPF", 2, 55), ("CPUID", 1, 30), ("MSR", 1, 1), ("INVALID", 1, 0)]),
        ("port", [("0xe9 w", 1, 500), ("0x3fd r", 1, 10)]),
        ("gpa", [("guest 2 0xfee00000 w", 2, 55)]),
        ("msr", [("0xc0000080 w", 1, 1)]),
        (
            "rip",
            [
                ("guest 2 0x1000 <g2+0x1000>", 2, 530), ("guest 2 0x2000 <g2+0x2000>", 2, 55),
                ("guest 3 0x1000 <g3+0x1000>", 1, 10), ("guest 2 0x3000 <g2+0x3000>", 1, 1), ("host 0x9000 <gNone+0x9000>", 1, 0),
            ],
        ),
    ],
)
def test_histograms(key: str, expected: list[tuple[str, int, int]]) -> None:
    """What costs the host most time is first; a gpa is its page's; a RIP is its guest's, of a refused VMRUN the host's."""
    found = group(LOG, key, lambda who, address: f"g{who}+{address:#x}")
    assert [(one.label, one.count, one.in_host) for one in found] == expected


def test_a_group_tells_its_most_expensive_exit() -> None:
    io = group(LOG, "code")[0]
    assert (io.most, io.most_number, io.mean_in_host, io.codes) == (500, 2, 255.0, (("IOIO", 2),))
    (invalid,) = (one for one in group(LOG, "code") if one.label == "INVALID")
    assert (invalid.ended, invalid.mean_in_host) == (0, 0.0)


def test_in_words() -> None:
    assert what(LOG[5]).endswith("WRMSR 0xc0000080")
    assert "while delivering exception #PF" in what(ExitRecord(1, 2, 0, 0, ExitCode.NPF, WRITE, 0, 0x8000_030E))


def test_another_key_is_refused() -> None:
    with pytest.raises(ValueError, match="counted by code, rip, gpa, port, msr"):
        subject(LOG[0], "colour")


@given(st.lists(RECORDS, max_size=20))
def test_any_records(records: list[ExitRecord]) -> None:
    """Each exit is in one group at most, and every exit in one by code and by RIP."""
    for key in KEYS:
        counted = sum(one.count for one in group(records, key))
        assert counted == sum(subject(record, key) is not None for record in records)
        assert counted == len(records) or key not in ("code", "rip")
    for record in records:
        assert what(record)
        assert facts_of(record).keys() <= EXIT_FACTS | RECORD_FACTS
        assert record.in_guest >= 0
        assert record.in_host is None or record.in_host >= 0
