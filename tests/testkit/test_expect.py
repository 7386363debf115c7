"""Assertions: what they take, where they leave the machine, and what they say."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import vmdbg
from vmdbg.testkit import Recording, Trace, assert_vmrun_ok, expect_exit, expect_isolation, expect_no_exit, expect_no_notice

Small = Callable[..., vmdbg.Machine]


@pytest.fixture
def guest(small: Small) -> vmdbg.Guest:
    machine = small()
    machine.run("guest-start")
    return machine.guests[2]


def failure(call: Callable[[], object]) -> str:
    with pytest.raises(AssertionError) as caught:
        call()
    return str(caught.value)


@pytest.mark.parametrize(("code", "facts", "number"), [
    ("CPUID", {}, 22), ("cpuid", {}, 22), (0x72, {}, 22), (None, {"rip": "vendor"}, 22), (None, {"info2": {0x8000, 0x9000}}, 23),
    ("NPF", {"gpa": 0xA000}, 25), ("NPF", {"gpa": range(0x9000, 0xB000)}, 24), ("NPF", {"gpa": {0xB000, 0xA000}}, 25),
    ("NPF", {"gpa": range(0xB000, 0x8000, -0x1000), "rip": "work+0xb"}, 24), ("IOIO", {"port": 0x3F8, "rax": ord("f")}, 7),
    ("IOIO", {"host_rip": "vmrun_instruction", "number": 3}, 3), ("VMMCALL", {"guest": 2, "cpu": 0}, None),
])  # fmt: skip
def test_exits_that_come(guest: vmdbg.Guest, code: str | int | None, facts: dict[str, int | range | str], number: int | None) -> None:
    expect: Callable[..., vmdbg.Exit] = expect_exit
    for whom in (guest, guest.machine):
        came = expect(whom, code, **facts)
        assert number in (None, came.number)
        assert guest.machine.exits()[-1] == came, "the machine stands at the exit"
        guest.machine.restart()
        guest.machine.run("guest-start")


def test_other_points_are_passed(guest: vmdbg.Guest) -> None:
    point = guest.breakpoint("work")
    assert expect_exit(guest, "NPF").number == 23
    assert point.exists
    assert not guest.machine.catchpoints


def test_an_exit_that_does_not_come(guest: vmdbg.Guest) -> None:
    words = failure(lambda: expect_exit(guest, "NPF", gpa=range(0x100000, 0x200000), write=1, ticks=100_000))
    assert words.splitlines()[0] == "expected NPF of guest 2 with gpa 0x100000-0x1fffff, write 0x1 within 100,000 ticks, which did not come"
    assert "the run ended with: " in words
    assert "what came instead: 30 exits (IOIO 25, NPF 4, CPUID 1)" in words
    nearest = words.split("nearest of 4 NPF:\n")[1].splitlines()[0]
    assert "0x1063 <work+0xb>: NPF" in nearest
    assert nearest.endswith("gpa 0xb000, not present  <- gpa is 0xb000; write is 0x0")
    assert words.splitlines()[-1].endswith("next rIP 0x103b")
    guest.machine.restart()
    guest.machine.run("guest-start")
    words = failure(lambda: expect_exit(guest, "NPF", ticks=500))
    assert words.startswith("expected NPF of guest 2 within 500 ticks, which did not come\nthe run ended with: ")
    assert re.search(r"guest time \d+ is reached\nwhat came instead: \d exits \(IOIO \d\)", words)


def test_instructions_are_counted_over_exits_that_are_not_meant(guest: vmdbg.Guest) -> None:
    """However often the run is begun anew for them."""
    wanted = {"rip": "print", "number": 29}
    expect: Callable[..., vmdbg.Exit] = expect_exit
    few, enough = 1, 1 << 14
    while enough - few > 1:
        middle = (few + enough) // 2
        guest.machine.restart()
        guest.machine.run("guest-start")
        try:
            expect(guest.machine.guests[2], "IOIO", within=middle, **wanted)
            enough = middle
        except AssertionError as error:
            assert f"within {middle:,} instructions, which did not come" in str(error)  # noqa: PT017
            few = middle
    guest.machine.restart()
    guest.machine.run("guest-start")
    stop = guest.machine.run(instructions=few)
    assert stop.reason == "limit"
    assert guest.machine.exit_count == 28
    guest.machine.run(instructions=1)
    assert guest.machine.exit_count == 29


def test_the_end_of_the_machine_and_behind(guest: vmdbg.Guest) -> None:
    assert "the run ended with: guest 2 at 0x102d <_start+0x2d>: the guest ended the run with status 1" in failure(lambda: expect_exit(guest, "MSR"))
    words = failure(lambda: expect_exit(guest, "CPUID"))
    assert "did not come; the machine had ended before: within=0 looks at what is remembered" in words
    assert expect_exit(guest, "CPUID", within=0).number == 22
    assert "which did not come" in failure(lambda: expect_exit(guest, "MSR", within=0))
    expect_no_exit(guest, "MSR", within=0)
    expect_no_exit(guest, "CPUID")


def test_exits_that_must_not_come(guest: vmdbg.Guest) -> None:
    expect_no_exit(guest, "NPF", gpa=range(0x8000))
    guest.machine.restart()
    guest.machine.run("guest-start")
    lines = failure(lambda: expect_no_exit(guest, "CPUID", rax=0x40000000)).splitlines()
    assert lines[0] == "expected no CPUID of guest 2 with rax 0x40000000, and it came:"
    assert re.fullmatch(r"  #22 t=\d+ guest 2 at 0x1043 <vendor\+0x5>: CPUID", lines[1])
    assert lines[2:4] == ["    rax 0x40000000", "before it, of guest 2:"]
    assert len(lines) == 9


@pytest.mark.parametrize(("facts", "words"), [
    ({"gpo": 1}, "gpo: exits have no such fact; did you mean gpa"), ({"tea": 1}, "tea: exits have no such fact; there are code, cpu"),
    ({"gpa": "work"}, "gpa='work': only rip and host_rip are compared with symbols"),
])  # fmt: skip
def test_facts_that_are_none(guest: vmdbg.Guest, facts: dict[str, int], words: str) -> None:
    expect: Callable[..., vmdbg.Exit] = expect_exit
    with pytest.raises(vmdbg.Error, match=re.escape(words)):
        expect(guest, "NPF", **facts)


def test_codes_that_are_none(guest: vmdbg.Guest) -> None:
    with pytest.raises(vmdbg.Error, match="nfp: a code is a number"):
        expect_exit(guest, "NFP")


def test_isolation(guest: vmdbg.Guest) -> None:
    """The guest gets its own nested page table."""
    machine = guest.machine
    expect_exit(guest, "CPUID")
    expect_isolation(machine)
    assert "writable-executable: " in failure(lambda: expect_isolation(machine, severity="low"))
    expect_isolation(machine, severity="low", allow=["writable-executable"])
    table = machine.host.address_of("nested_pt")
    machine.host.write(table + 8 * 15, (table | 7).to_bytes(8, "little"))
    words = failure(lambda: expect_isolation(machine))
    assert words.startswith("expected isolation, and it has holes:\ncontrol-writable: ")
    assert "critical  guest 2 (guest 2)" in words
    with pytest.raises(vmdbg.Error, match="severity: 'bad' is none; write low, medium"):
        expect_isolation(machine, severity="bad")
    with pytest.raises(vmdbg.Error, match="allow: there is no rule 'x'"):
        expect_isolation(machine, allow=["x"])


def test_vmrun(small: Small) -> None:
    machine = small()
    assert "VMRUN has not been executed yet" in failure(lambda: assert_vmrun_ok(machine))
    machine.run("guest-start")
    guest = machine.guests[2]
    assert_vmrun_ok(guest)
    assert_vmrun_ok(machine)
    expect_exit(guest, "CPUID")
    address = guest.vmcb.address
    machine.host.write(address + 0x58, bytes(4))  # ASID 0
    assert "ASID" in failure(lambda: assert_vmrun_ok(machine))
    machine.run()
    machine.host.write(address + 0x58, b"\1\0\0\0")
    assert "VMRUN has refused a VMCB of guest 2, 1 times; the last time: " in failure(lambda: assert_vmrun_ok(guest))
    assert "vmrun-fail t=" in failure(lambda: expect_no_notice(machine))
    expect_no_notice(machine, "stale", "shutdown")
    with pytest.raises(vmdbg.Error, match="'old': there are no such notices; there are vmrun-fail, shutdown, stale"):
        expect_no_notice(machine, "old")


def test_a_machine_records(small: Small, tmp_path: Path) -> None:
    """A golden trace at the end of a block that ends well, with the tolerances that were given."""
    machine, path = small(), tmp_path / "boot.exits"
    with pytest.raises(AssertionError), machine.record(path):
        expect_no_exit(machine, "CPUID")
    assert not path.exists()
    machine.restart()
    with machine.record(path, skip="IOIO") as recording:
        machine.run()
    recording.close()
    assert Trace.load(path).tolerance.skip == ("IOIO",)
    machine.restart()
    with machine.record() as recording:
        machine.run()
    recording.check(path)
    assert len(recording) == machine.exit_count == 32
    wrong: list[dict[str, Any]] = [{"skip": 5}, {"skp": "IOIO"}, {"rip": "nearly"}]
    for tolerance in wrong:
        with pytest.raises(ValueError, match=r"5 is not understood|skp: there is no such|rip: 'nearly'"):
            machine.record(path, **tolerance)
    with pytest.raises(vmdbg.Error, match="null byte; choose a file"):
        recording.save("\0")
    machine.close()
    with pytest.raises(vmdbg.Closed):
        machine.record()


@pytest.mark.parametrize("ring", [1, 3, 4096])
def test_recordings_leave_world_switches_as_they_are(small: Small, tmp_path: Path, ring: int) -> None:
    """All exits, in C where they are made there, in whatever ring."""
    told = tmp_path / "exits"
    with small(trace_exits=told) as machine:
        machine.run()
    machine = small(exit_ring=ring)
    with machine.record() as recording:
        machine.run()
    lines = [line for line in told.read_text().splitlines() if not line.startswith("#")]
    assert [seen.record.line() for seen in recording.trace().exits] == lines
    switcher = machine.debugger.machine.cpu.switcher
    assert switcher is None or switcher.made


def test_recordings_follow_the_machine(small: Small) -> None:
    """Back in time where a snapshot is restored, to the beginning where it starts over."""
    machine = small()
    with Recording(machine) as recording:
        expect_exit(machine, "NPF", gpa=0xA000)
        snapshot = machine.snapshot()
        machine.run()
        whole = [seen.record.number for seen in recording.trace().exits]
        machine.restore(snapshot)
        assert len(recording.trace().exits) == 25
        machine.run()
        assert [seen.record.number for seen in recording.trace().exits] == whole == list(range(1, 33))
        assert len(recording) == 32
        machine.restart()
        assert len(recording) == 0
        expect_exit(machine, "CPUID")
        assert [seen.record.number for seen in recording.trace().exits] == list(range(1, 23))
    machine.restart()
    machine.run()
    assert len(recording.trace().exits) == 22, "it has ended before"
    assert not machine.debugger.starting_over


def test_recordings_that_have_ended_stay(small: Small) -> None:
    machine = small()
    machine.run("guest-start")
    snapshot = machine.snapshot()
    with machine.record() as recording:
        machine.run()
    machine.restore(snapshot)
    assert (machine.exit_count, len(recording), len(recording.trace().exits)) == (0, 32, 32)
    assert repr(recording) == "<recording of hypervisor.elf, ended>"
