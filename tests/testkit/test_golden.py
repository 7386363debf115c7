"""Golden exit traces: the file, what is compared, and how a difference reads."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Unpack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from introspect.exitlog import ExitRecord
from introspect.exits import ExitCode
from vmdbg.testkit import GoldenError, Tolerance, Trace, compare
from vmdbg.testkit.golden import FIELDS, Seen, Tolerances

NPF, IOIO, CPUID, INTR, VMMCALL, MSR = (int(ExitCode[name]) for name in ("NPF", "IOIO", "CPUID", "INTR", "VMMCALL", "MSR"))


def seen(
    number: int, code: int, *, guest: int = 2, rip: int = 0x1000, symbol: str = "", insn: bytes = b"", **fields: int
) -> Seen:  # fmt: skip
    f = fields.get
    return Seen(ExitRecord(
        number, guest, f("time", number * 10), rip, code, f("info1", 0), f("info2", 0), f("intinfo", 0), f("cpu", 0), f("vmcb", 0),
        f("host_rip", 0), rax=f("rax", 0), rcx=f("rcx", 0), insn=insn,
    ), symbol)  # fmt: skip


def trace(*exits: Seen, **tolerance: Unpack[Tolerances]) -> Trace:
    return Trace(exits, Tolerance().changed(**tolerance), "image", "cpus=1")


def stored(tmp_path: Path, one: Trace) -> Trace:
    one.save(tmp_path / "deep" / "x.exits")
    return Trace.load(tmp_path / "deep" / "x.exits")


KINDS = ((IOIO, 0x3F80010, 0x2000), (CPUID, 0, 0), (NPF, 1 << 32 | 4, 0x5000), (VMMCALL, 0, 0))
BOOT = tuple(
    seen(n, code, rip=0x1000 + n % 7, rax=n, info1=info1, info2=info2, symbol=f"f{n % 7}+0x{n:x}")
    for n, (code, info1, info2) in ((n, KINDS[n % 4]) for n in range(1, 41))
)


def without(*numbers: int) -> tuple[Seen, ...]:
    return tuple(one for one in BOOT if one.record.number not in numbers)


def text(golden: Trace, run: Trace) -> str:
    found = compare(golden, run)
    assert found is not None
    return found.text()


def test_the_file_says_what_it_holds(tmp_path: Path) -> None:
    one = trace(
        seen(1, IOIO, info1=0x3F80E10, info2=0x1001, rax=0x36, insn=b"\xee", symbol="put+0x1a"), seen(2, INTR), seen(3, NPF, time=7),
        seen(4, 0x7777, guest=3), skip="INTR", reorder="guests", rip="function",
    )  # fmt: skip
    assert list(one.lines()) == [
        "vmdbg exit trace 1", "image: image", "options: cpus=1", "ignore:", "skip: INTR",
        "reorder: guests", "rip: function", "exact: no", "exits: 3", "",
        "2 IOIO rip=0x1000 info1=0x3f80e10 info2=0x1001 rax=0x36 insn=ee ; put+0x1a", "2 NPF rip=0x1000", "3 0x7777 rip=0x1000",
    ]  # fmt: skip
    again = stored(tmp_path, one)
    assert list(again.lines()) == list(one.lines())
    assert compare(again, one) is None


def test_exits_stand_guest_by_guest_where_their_order_is_free(tmp_path: Path) -> None:
    one = trace(seen(1, NPF, guest=3), seen(2, NPF), reorder="guests")
    assert [row.record.guest for row in stored(tmp_path, one).exits] == [2, 3]


@given(st.lists(st.tuples(
    st.integers(2, 9), st.sampled_from([*map(int, ExitCode), 0x1234]), st.integers(0, 2**64 - 1), st.binary(max_size=15), st.text(max_size=20),
), max_size=20))  # fmt: skip
def test_what_is_written_is_read(rows: list[tuple[int, int, int, bytes, str]]) -> None:
    import tempfile

    exits = [seen(n, code, guest=guest, rip=value, intinfo=value, insn=insn, symbol=symbol) for n, (guest, code, value, insn, symbol) in enumerate(rows)]
    with tempfile.TemporaryDirectory() as folder:
        again = stored(Path(folder), trace(*exits, exact=True))
    for one, other in zip(exits, again.exits, strict=True):
        assert all(getattr(one.record, name) == getattr(other.record, name) for name in ("guest", "code", *FIELDS))


HEADER = "vmdbg exit trace 1\nimage: x\noptions:\nignore:\nskip:\nreorder:\nrip: address\nexact: no\nexits: {}\n\n"
WRONG = [
    ("", ':1: a golden trace begins with "vmdbg exit trace 1"'),
    ("vmdbg exit trace 2\n", ":1: version 2 is not known here, 1 is"),
    ("vmdbg exit trace 1\nimage: x\n\n", ":3: the header lacks options, ignore, skip, reorder, rip, exact, exits"),
    ("vmdbg exit trace 1\ncolour: red\n", ":2: 'colour: red' is no line of a header"),
    (HEADER.format(2) + "2 NPF\n", "1 exits, but its header says 2: it is cut off"),
    (HEADER.format(1) + "NPF 2\n", ":11: 'NPF 2' is no exit"),
    (HEADER.format(1) + "2 NFP\n", ":11: there is no EXITCODE 'NFP'"),
    (HEADER.format(1) + "2 NPF rip=12x\n", ":11: rip=12x: a number is meant"),
    (HEADER.format(1) + "2 NPF rip=0x1 rip=0x2\n", ":11: 'rip=0x2': a field is NAME=VALUE, each once"),
    (HEADER.format(1) + "2 NPF gpa=1\n", ":11: 'gpa=1': a field is NAME=VALUE, each once; names are rip, info1"),
    (HEADER.format(1) + "2 NPF insn=zz\n", ":11: insn=zz: these are 1 to 15 bytes"),
    (HEADER.format(1) + "2 NPF rip=0x" + "f" * 17 + "\n", "a number is meant"),
    (HEADER.format(0).replace("skip:", "skip: TEA"), ":5: skip: there is no EXITCODE 'TEA'"),
    (HEADER.format(0).replace("ignore:", "ignore: NPF.tea"), ":4: ignore: 'NPF.tea' is no field of an exit"),
    (HEADER.format(0).replace("reorder:", "reorder: cpus"), ":6: reorder: 'cpus' is not understood; write guests"),
    (HEADER.format(0).replace("rip: address", "rip: x\x1b[2J"), ":7: rip: 'x\\x1b[2J' is not understood; write address or symbol or function"),
    (HEADER.format(1) + "\x1b]0;owned\x07 x\n", ":11: '?]0;owned? x' is no exit"),
]


@pytest.mark.parametrize(("content", "words"), WRONG)
def test_what_is_wrong_with_a_file_is_said(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "x.exits"
    path.write_text(content)
    with pytest.raises(GoldenError) as caught:
        Trace.load(path)
    assert f"{path}" in str(caught.value)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@given(st.binary(max_size=300), st.text(max_size=300))
def test_no_file_is_worse_than_refused(tail: bytes, words: str) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x"
        for content in (tail, HEADER.format(1).encode() + tail, HEADER.format(1).encode() + b"2 NPF " + words.encode("utf-8", "replace")):
            path.write_bytes(content)
            try:
                Trace.load(path)
            except GoldenError as error:
                assert "\n" not in str(error)  # noqa: PT017 - it may also be taken


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(GoldenError, match=r"there is no such golden trace; record it \(pytest --vmdbg-record\)"):
        Trace.load(tmp_path / "none")
    with pytest.raises(GoldenError, match="Is a directory"):
        Trace.load(tmp_path)
    with pytest.raises(GoldenError, match="choose a file that can be written"):
        trace().save(tmp_path)


# What differs


def test_an_exit_that_lacks() -> None:
    found = compare(trace(*BOOT), trace(*without(17)))
    assert found is not None
    assert (found.at, found.lacks, found.adds, found.agree) == (16, 1, 0, 23)
    assert found.text() == """\
golden trace: exit 17 (#18 of this run) differs: NPF instead of CPUID
     #   guest  exit     rip               what
     13  2      CPUID    0x1006 <f6+0xd>   CPUID
     14  2      NPF      0x1000 <f0+0xe>   NPF (nested page fault): read of the final address, gpa 0x5000, not present
     15  2      VMMCALL  0x1001 <f1+0xf>   VMMCALL
     16  2      IOIO     0x1002 <f2+0x10>  IOIO (port access that the IOPM intercepts): OUT port 0x3f8, 8-bit, next rIP 0x2000
  -  17  2      CPUID    0x1003 <f3+0x11>  CPUID
     18  2      NPF      0x1004 <f4+0x12>  NPF (nested page fault): read of the final address, gpa 0x5000, not present
     19  2      VMMCALL  0x1005 <f5+0x13>  VMMCALL
this run lacks 1 exit of the golden trace; behind that 23 agree"""


def test_an_exit_that_is_new() -> None:
    words = text(trace(*without(17)), trace(*BOOT))
    assert words.splitlines()[0] == "golden trace: exit 17 (#17 of this run) differs: CPUID instead of NPF"
    assert words.splitlines()[-1] == "this run has 1 exit that the golden trace has not; behind that 23 agree"


def test_a_field_that_differs() -> None:
    changed = [*BOOT]
    changed[9] = seen(10, NPF, rip=0x1234, rax=10, info1=1 << 32 | 4, info2=0xB000, symbol="g+0x4")
    lines = text(trace(*BOOT), trace(*changed)).splitlines()
    assert lines[0] == "golden trace: exit 10 (#10 of this run) differs: rip, info2"
    assert lines[-3:] == [
        "  rip: 0x1003 <f3+0xa> in the golden trace (-), 0x1234 <g+0x4> in this run (+)",
        "  info2: 0x5000 in the golden trace (-), 0xb000 in this run (+)",
        "1 exit of the golden trace came as 1 exit; behind that 30 agree",
    ]


def test_a_run_without_symbols() -> None:
    """Recorded by function, and run without: RIPs are the same, and do not agree."""
    bare = [Seen(one.record) for one in BOOT]
    by_function = trace(*BOOT, rip="function")
    lines = text(by_function, trace(*bare)).splitlines()
    assert lines[0].endswith("differs: rip")
    assert lines[-2:-1] == [
        "  by function RIPs are compared, and this run has no symbol there; run it with those of guest 2 (symbols)"
    ]
    assert "golden trace has no symbol there; record it anew with those of guest 2" in text(trace(*bare, rip="symbol"), trace(*BOOT))


def test_a_run_that_ends_early_or_goes_on() -> None:
    assert "differs: this run has ended, where the golden trace has 5 more" in text(trace(*BOOT), trace(*BOOT[:35]))
    assert "differs: the golden trace has ended, this run goes on with 5 more" in text(trace(*BOOT[:35]), trace(*BOOT))
    assert text(trace(*BOOT), trace()).splitlines()[-1] == "this run lacks 40 exits of the golden trace; behind that both end"


def test_runs_that_never_agree_again() -> None:
    other = trace(*(seen(n, INTR) for n in range(1, 1000)))
    assert text(trace(*BOOT), other).splitlines()[-1] == "golden trace (-): 40 exits, this run (+): 999; they do not agree soon again"


def test_another_guest() -> None:
    words = text(trace(seen(1, NPF), seen(2, NPF, guest=3)), trace(seen(1, NPF, guest=3), seen(2, NPF)))
    assert words.startswith("golden trace: exit 1 (#1 of this run) differs: guest 3 instead of guest 2")


TOLERATED = [
    ({}, (seen(1, NPF, time=1, cpu=1, host_rip=1, vmcb=1),), (seen(1, NPF, time=2, cpu=2, host_rip=2, vmcb=2),)),
    ({}, (seen(1, NPF, rax=1), seen(2, CPUID, rcx=1), seen(3, MSR, rax=1)), (seen(1, NPF, rax=2), seen(2, CPUID, rcx=2), seen(3, MSR, rax=2))),
    ({}, (seen(1, IOIO, info1=0x3F80010, rax=0x141),), (seen(1, IOIO, info1=0x3F80010, rax=0x241),)),
    ({}, (seen(1, IOIO, info1=0x3F80041, rax=1),), (seen(1, IOIO, info1=0x3F80041, rax=2),)),
    ({"ignore": ["rax"]}, (seen(1, CPUID, rax=1),), (seen(1, CPUID, rax=2),)),
    ({"ignore": "CPUID.rax,NPF.info1"}, (seen(1, CPUID, rax=1), seen(2, VMMCALL, rax=1)), (seen(1, CPUID, rax=2), seen(2, VMMCALL, rax=1))),
    ({"skip": "INTR VMMCALL"}, (seen(1, NPF), seen(2, INTR)), (seen(1, VMMCALL), seen(2, NPF))),
    ({"reorder": "guests"}, (seen(1, NPF), seen(2, CPUID, guest=3)), (seen(1, CPUID, guest=3), seen(2, NPF))),
    ({"rip": "symbol"}, (seen(1, NPF, rip=1, symbol="f+0x4"),), (seen(1, NPF, rip=9, symbol="f+0x4"),)),
    ({"rip": "function"}, (seen(1, IOIO, rip=1, info2=2, symbol="f+0x4"),), (seen(1, IOIO, rip=9, info2=10, symbol="f+0x8"),)),
]


@pytest.mark.parametrize(("tolerance", "golden", "run"), TOLERATED)
def test_tolerances(tmp_path: Path, tolerance: Tolerances, golden: tuple[Seen, ...], run: tuple[Seen, ...]) -> None:
    """What is granted in the file, or in the call, is no difference; without it, it is one."""
    assert compare(stored(tmp_path, trace(*golden, **tolerance)), trace(*run)) is None
    assert compare(trace(*golden), trace(*run), Tolerance().changed(**tolerance)) is None
    assert compare(trace(*golden, exact=True), trace(*run)) is not None


@pytest.mark.parametrize(("tolerance", "golden", "run"), [
    ({"ignore": "NPF.rax"}, seen(1, CPUID, rax=1), seen(1, CPUID, rax=2)),
    ({}, seen(1, IOIO, info1=0x3F80010, rax=0x41), seen(1, IOIO, info1=0x3F80010, rax=0x42)),
    ({}, seen(1, MSR, info1=1, rax=1), seen(1, MSR, info1=1, rax=2)), ({}, seen(1, MSR, rcx=1), seen(1, MSR, rcx=2)),
    ({}, seen(1, MSR, info1=1), seen(1, MSR, info1=0)), ({"exact": True}, seen(1, NPF, rax=1), seen(1, NPF, rax=2)),
    ({"rip": "symbol"}, seen(1, NPF, symbol="f+0x4"), seen(1, NPF, symbol="f+0x8")),
    ({"rip": "function"}, seen(1, NPF, rip=1), seen(1, NPF, rip=2)),
    ({"rip": "function"}, seen(1, NPF, info2=1, symbol="f"), seen(1, NPF, info2=2, symbol="f")),
    ({"reorder": "guests"}, seen(1, NPF), seen(1, NPF, guest=3)),
])  # fmt: skip
def test_tolerances_grant_no_more(tolerance: Tolerances, golden: Seen, run: Seen) -> None:
    assert compare(trace(golden, **tolerance), trace(run)) is not None


def test_exact_traces_hold_the_hosts_fields(tmp_path: Path) -> None:
    golden = stored(tmp_path, trace(seen(1, NPF, time=5, host_rip=0x100, vmcb=0x800), exact=True))
    assert "2 NPF rip=0x1000 time=0x5 host_rip=0x100 vmcb=0x800" in list(golden.lines())
    found = compare(golden, trace(seen(1, NPF, time=6, host_rip=0x100, vmcb=0x800)))
    assert found is not None
    assert found.fields == ("time",)


def test_the_earliest_difference_of_all_guests_is_told() -> None:
    golden = trace(*(seen(n, NPF, guest=2 + n % 2) for n in range(1, 20)), reorder="guests")
    run = trace(*(seen(n, CPUID if n in (7, 10) else NPF, guest=2 + n % 2) for n in range(1, 20)))
    assert re.match(r"golden trace: exit 4 of guest 3 \(#7 of this run\) differs: CPUID instead of NPF", text(golden, run))


def test_what_a_file_does_not_hold_cannot_be_compared(tmp_path: Path) -> None:
    golden = stored(tmp_path, trace(*BOOT, skip="INTR"))
    for less, words in (
        (Tolerance(), "recorded with skip=INTR, which cannot be taken back; record it anew"),
        (Tolerance(exact=True, skip=("INTR",)), "recorded with exact=False, which cannot be taken back; record it anew"),
    ):
        with pytest.raises(GoldenError, match=re.escape(words)):
            compare(golden, trace(*BOOT), less)


@pytest.mark.parametrize(("given_", "words"), [
    ({"ignore": "tea"}, "ignore: 'tea' is no field of an exit; there are rip, info1"),
    ({"ignore": "TEA.rip"}, "ignore: there is no EXITCODE 'TEA'"), ({"skip": "TEA"}, "skip: there is no EXITCODE 'TEA'"),
    ({"reorder": "all"}, "reorder: 'all' is not understood; write guests"),
    ({"rip": "line"}, "rip: 'line' is not understood; write address or symbol or function"),
])  # fmt: skip
def test_tolerances_that_are_none(given_: Tolerances, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        Tolerance().changed(**given_)
