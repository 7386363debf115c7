# SPDX-License-Identifier: GPL-2.0-or-later
"""The Python API on the demo hypervisor: running, stops, guests, exits, commands."""

from __future__ import annotations

from pathlib import Path

import pytest

import vmdbg
from introspect.commands.binding import method_name
from introspect.commands.tables import Space
from introspect.commands.walk import Walked
from introspect.exits import ExitCode
from introspect.paging import Translation
from tests import api_source, reference
from tests.api.conftest import IMAGE
from vmdbg import Machine, Reason
from vmdbg.api.results import Stopped


def test_the_generated_modules_are_current() -> None:
    if not IMAGE.exists():
        pytest.skip("the demo hypervisor is not built: no gcc and ld for x86-64")
    again = "run `python -m tests.reference`"
    with Machine(IMAGE) as machine:
        assert api_source.COMMANDS.read_text() == api_source.commands_module(machine.registry.commands.values()), again
    assert api_source.FIELDS.read_text() == api_source.fields_module(), again
    assert api_source.KEYWORDS.read_text() == api_source.keywords_module(), again


# Running


def test_run_until_a_location_then_an_event(machine: Machine) -> None:
    stop = machine.run(until="host:main")
    assert (stop.reason, stop.reached, stop.symbol) == (Reason.BREAKPOINT, True, "main")
    assert stop.inferior == machine.host
    assert stop.exit_status is None
    stop = machine.run(until="guest-start")
    assert (stop.reason, stop.inferior.number) == (Reason.CATCHPOINT, 2)
    assert [guest.number for guest in machine.guests] == [2]
    assert any("guest 2 has appeared" in note for note in stop.notes)
    stop = machine.run(until="vmexit npf if gpa >= 0x100000")
    assert stop.reached
    assert "NPF" in stop.text
    assert machine.breakpoints == machine.catchpoints == ()


def test_run_until_a_function_says_so(machine: Machine) -> None:
    asked: list[int] = []

    def many(given: Machine) -> bool:
        asked.append(given.exit_count)
        return given.exit_count >= 10

    stop = machine.run(until=many)
    assert (stop.reason, stop.reached) == (Reason.CONDITION, True)
    assert asked == list(range(1, 11))  # the exit that it is asked at is one of them
    assert machine.catchpoints == ()


def test_what_a_function_raises_comes_out_and_nothing_stays(machine: Machine) -> None:
    def fails(_: Machine) -> bool:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        machine.run(until=fails)
    assert machine.catchpoints == ()
    assert machine.run(until="2:tick").reached


def test_run_until_one_of_the_points_passes_others(machine: Machine) -> None:
    passed = machine.breakpoint("host:handle_exit")
    wanted = machine.breakpoint("2:tick")
    stop = machine.run(until=wanted)
    assert stop.points == (wanted,)
    assert passed.hits > 0
    assert machine.run(until=[passed, wanted]).points == (passed,)
    wanted.delete()
    with pytest.raises(vmdbg.Error, match="not set any more"):
        machine.run(until=wanted)


def test_another_breakpoint_ends_the_run_but_is_not_what_was_asked_for(machine: Machine) -> None:
    other = machine.breakpoint("host:handle_exit")
    stop = machine.run(until="2:tick")
    assert (stop.reached, stop.points) == (False, (other,))


def test_limits_are_stops_and_the_run_goes_on_as_without(machine: Machine, whole: Machine) -> None:
    stop = machine.run(ticks=1_000_000)
    assert stop.reason == Reason.LIMIT
    assert not stop.reached or stop.exit_status is None
    assert stop.time >= 1_000_000
    assert machine.run(wall=0.01).reason == Reason.LIMIT
    end = machine.run()
    assert (end.reason, end.exit_status, end.time) == (Reason.ENDED, 1, whole.time)
    assert machine.serial == whole.serial
    assert [one.line() for one in machine.exits()] == [one.line() for one in whole.exits()]


@pytest.mark.parametrize("limits", [{"ticks": 0}, {"wall": -1.0}, {"instructions": 0}])
def test_a_limit_of_nothing_is_an_error(machine: Machine, limits: dict[str, int]) -> None:
    with pytest.raises(vmdbg.Error, match="a limit is more than 0"):
        machine.run(**limits)


def test_the_end_is_a_stop_and_then_there_is_nothing_to_run(whole: Machine) -> None:
    assert whole.stop is not None
    assert whole.stop.ended
    assert whole.exit_status == 1
    with pytest.raises(vmdbg.Error, match="nothing to run"):
        whole.run()


def test_restart(machine: Machine) -> None:
    point = machine.breakpoint("2:tick")
    assert machine.run().points == (point,)
    machine.restart()
    assert (machine.exit_status, machine.time, machine.stop, point.address) == (None, 0, None, None)
    assert machine.run().points == (point,)
    assert point.hits == 2


def test_steps(machine: Machine) -> None:
    machine.run(until="2:tick")
    guest = machine.guest(2)
    before = guest.pc
    stop = guest.step()
    assert (stop.reason, stop.inferior) == (Reason.STEP, guest)
    assert guest.pc != before
    stop = guest.finish()
    assert (stop.reason, stop.points) == (Reason.STEP, ())
    assert stop.symbol.startswith("timer_entry+")
    machine.run(until="2:work")
    line = machine.command("here").text().split("guest64.c:")[1].split(",")[0]
    guest.next(lines=True)
    assert machine.command("here").text().split("guest64.c:")[1].split(",")[0] != line


# Guests


def test_guests(machine: Machine) -> None:
    with pytest.raises(vmdbg.Error, match="guest-start"):
        machine.guest(2)
    machine.run(until="2:tick")
    guest = machine.guests[2]
    assert guest is machine.guest(2)
    assert guest.rip == guest.registers["rip"] == guest.registers.rip == guest.pc == guest.symbol("tick")
    assert guest.symbol(guest.rip) == "tick"
    assert machine.guest("guest 2") is guest
    assert guest in machine.guests
    assert 2 in machine.guests
    with pytest.raises(vmdbg.Error, match="no guest has this number"):
        machine.guest(99)
    with pytest.raises(KeyError, match="no register of this name"):
        guest.registers["nonsense"]
    assert not hasattr(guest.registers, "nonsense")


def test_memory(machine: Machine) -> None:
    machine.run(until="2:tick")
    guest = machine.guest(2)
    address = guest.address_of("counter")
    assert guest.read("counter", 8) == guest.read(address, 8)
    guest.write_int("counter", 77)
    assert guest.read_int("counter") == guest.eval("u64[counter]") == 77
    found = guest.walk("counter")
    assert isinstance(found, Walked)
    verdict = found.walk.verdict
    assert isinstance(verdict, Translation)
    assert guest.read(f"gpa:{verdict.gpa:#x}", 8) == machine.host.read(f"spa:{verdict.spa:#x}", 8) == (77).to_bytes(8, "little")
    guest.write(address, b"abc\0")
    assert guest.string("counter") == "abc"
    with pytest.raises(vmdbg.Error, match=r"0x5000_?000.* is not mapped"):
        guest.read(0x50000000, 4)
    with pytest.raises(vmdbg.Error, match="nothing was written"):
        guest.write(0x50000000, b"x")
    with pytest.raises(vmdbg.Error, match="does not fit"):
        guest.write_int("counter", 1 << 64)


def test_registers_can_be_set(machine: Machine) -> None:
    machine.run(until="2:tick")
    registers = machine.guest(2).registers
    registers["rbx"] = 0x1234
    registers.r12 = 5
    assert (registers.rbx, registers["r12"]) == (0x1234, 5)
    assert {"rip", "cr3", "efer", "cs.base"} <= set(registers)


def restarted(machine: Machine) -> Machine:
    machine.restart()
    return machine


def test_vmcb_fields_have_names_and_types(machine: Machine) -> None:
    machine.run(until="vmexit vmmcall guest 2")
    machine.run(until="host:handle_exit")
    vmcb = machine.guest(2).vmcb
    assert vmcb.exitcode is ExitCode.VMMCALL
    assert vmcb.exit_name == "VMMCALL"
    assert vmcb.guest_asid == vmcb["asid"] == vmcb["guest_asid"] == machine.guest(2).asid
    assert vmcb.v_intr.v_intr_masking == 1
    assert "v_intr_masking" in vmcb.v_intr.names
    assert vmcb.efer.SVME == 1
    assert vmcb.cs_attrib == vmcb["cs.attrib"]
    vmcb.tsc_offset = 42
    assert vmcb["tsc_offset"] == 42
    with pytest.raises(AttributeError, match="exitcod: a VMCB has no such field; did you mean exitcode"):
        vmcb.exitcod  # type: ignore[attr-defined]  # noqa: B018
    with pytest.raises(AttributeError, match="exitcod"):
        vmcb.exitcod = 3  # type: ignore[attr-defined]
    with pytest.raises(vmdbg.Error, match="no such field"):
        vmcb["nonsense"]
    with pytest.raises(vmdbg.Error, match="4 bytes"):
        vmcb.guest_asid = 1 << 40
    with pytest.raises(vmdbg.Error, match="has not run a VMCB"):
        restarted(machine).cpus[0].vmcb  # noqa: B018 - it raises


# Points


def test_a_breakpoint_with_a_condition(machine: Machine) -> None:
    machine.run(until="2:tick")
    point = machine.guest(2).breakpoint("work", when="$rdi > 2")
    stop = machine.run(ticks=50_000_000)
    assert stop.points == (point,)
    assert point.hits == 1
    assert machine.guest(2).registers.rdi > 2
    point.enabled = False
    assert machine.run(ticks=1_000_000).reason == Reason.LIMIT
    point.delete()
    point.delete()
    assert not point.exists


def test_where_there_are_several_each_condition_counts(machine: Machine) -> None:
    machine.run(until="2:tick")
    guest = machine.guest(2)
    high, low = guest.breakpoint("work", when="$rdi > 3"), guest.breakpoint("work", when="$rdi == 2")
    assert machine.run().points == (low,)
    assert machine.run().points == (high,)
    machine.restart()
    high.delete()
    always = machine.breakpoint("2:work")
    assert machine.run().points == (always,)
    always.delete()
    assert machine.run().points == (low,)
    unreadable = machine.guest(2).breakpoint("work", when="u64[0x50000000] == 1")
    stop = machine.run()
    assert (stop.symbol, unreadable.hits) == ("work", 0)
    assert "its condition has no value" in stop.text


def test_one_of_a_guest_to_come_waits_for_it(machine: Machine) -> None:
    point = machine.breakpoint("2:work", once=True)
    assert point.address is None
    assert machine.run().points == (point,)
    assert not point.exists
    assert machine.stop is not None
    assert machine.stop.points[0] == point


@pytest.mark.parametrize("location", ["2:nonsense", "2:nonsense.c:12", "host:nonsense", "3:tick"])
def test_a_location_that_nobody_knows_is_an_error_at_once(machine: Machine, location: str) -> None:
    with pytest.raises(vmdbg.Error):
        machine.run(until=location)
    assert machine.breakpoints == ()


def test_a_name_of_a_guest_without_symbols_says_how_it_gets_some(machine: Machine) -> None:
    """Also where there is one already, and whoever is asked."""
    machine.run(until="vmexit vmmcall guest 3")
    guest, remedy = machine.guest(3), r"guest 3 has no symbols: give some with symbols=\{3: FILE\}"
    for use in (lambda: machine.breakpoint("3:main"), lambda: guest.breakpoint("main"), lambda: guest.breakpoint("guestpae.c:106"),
                lambda: guest.address_of("main"), lambda: guest.watch("main"), lambda: machine.host.eval("u64[3:main]"),
                lambda: machine.command("break 3:main")):  # fmt: skip
        with pytest.raises(vmdbg.Error, match=remedy):
            use()
    with pytest.raises(vmdbg.Error, match=r"wrok.*no such name; did you mean work\?"):
        machine.guest(2).address_of("wrok")


def test_watchpoints_say_who_wrote(machine: Machine) -> None:
    machine.run(until="2:tick")
    point = machine.guest(2).watch("counter")
    stop = machine.run()
    assert (stop.reason, stop.points) == (Reason.WATCHPOINT, (point,))
    assert "was written by an instruction" in stop.text
    assert point.hits == 1
    assert list(machine.watchpoints) == [point]
    point.delete()
    assert not machine.watchpoints


def test_catchpoints(machine: Machine) -> None:
    machine.run(until="guest-start")
    point = machine.guest(2).catch("vmexit vmmcall")
    other = machine.catch("catch vmexit npf if gpa == 1")
    stop = machine.run()
    assert stop.points == (point,)
    assert stop.inferior.number == 2
    assert point.hits == 1
    assert other.hits == 0
    with pytest.raises(vmdbg.Error, match="it must be one of"):
        machine.catch("nonsense")
    with pytest.raises(vmdbg.Error, match="names no event"):
        machine.catch("delete all")


# What happened


def test_exits(whole: Machine) -> None:
    machine = whole
    everything = machine.exits()
    assert everything[-1].number == machine.exit_count
    exits = machine.exits(guest=2, code="VMMCALL", last=1)
    assert [one.name for one in exits] == ["VMMCALL"]
    assert exits[0].exitcode is ExitCode.VMMCALL
    assert exits[0].symbol.startswith("hypercall+")
    faults = machine.exits(code=0x400, where=lambda one: one.guest == 3)
    assert faults
    assert all(one.gpa is not None and one.write is not None for one in faults)
    assert machine.exits(since=machine.exit_count) == []
    assert machine.exits(last=0) == []
    assert machine.guest(2).last_exit == machine.exits(guest=machine.guest(2))[-1]
    with pytest.raises(vmdbg.Error, match="no such EXITCODE"):
        machine.exits(code="NONSENSE")


def test_serial_is_the_scripts(whole: Machine) -> None:
    assert whole.serial.startswith("hypervisor: SVM revision 1")
    assert whole.serial_bytes.decode() == whole.serial


# Commands


def test_every_command_is_a_method(machine: Machine) -> None:
    """With the parameters of its own: what is given by name reaches the command."""
    machine.run(until="2:tick")
    assert {method_name(name) for name in machine.registry.commands} <= set(dir(machine.commands))
    found = machine.npt(2, limit=3)
    assert isinstance(found, Space)
    assert found.json() == machine.command("npt 2 --limit 3").json()
    assert machine.guest(2).npt(limit=3).json() == found.json()
    assert machine.commands.walk("2:counter", access="w").json() == machine.command("walk 2:counter --access w").json()
    assert machine.x("/2gx", "2:counter").text() == machine.command("x/2gx 2:counter").text()
    assert machine.commands.context(section=["regs", "stack"]).text() == machine.command("context regs stack").text()
    assert machine.commands.exits(by="code").json() == machine.command("exits --by code").json()
    assert machine.guest(2).context(section=["regs"]).text() != machine.host.context(section=["regs"]).text()
    with pytest.raises(vmdbg.CommandFailed) as caught:
        machine.npt(77)
    assert (caught.value.value, bool(caught.value.rule), bool(caught.value.remedy)) == ("77", True, True)


def test_results_have_types_that_hold(machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each method's annotation is what its examples give."""
    monkeypatch.chdir(tmp_path)  # some write files
    machine.run(ticks=reference.DEMO.time)
    for command in machine.registry.commands.values():
        for line in command.examples:
            if not line.startswith(("save", "dump", "load", "exits --", "npt --map", "skinit verify", "restart")):
                try:
                    result = machine.command(line)
                except vmdbg.Error:
                    continue
                kinds = api_source.results(command)
                assert isinstance(result, tuple(kind for kind in kinds if kind is not type(None))), line


def test_commands_that_run_the_machine_end_when_it_stops(machine: Machine) -> None:
    found = machine.command("continue 1000")
    assert isinstance(found, Stopped)
    assert found.stop.reason == Reason.LIMIT
    shown = found.json()
    assert isinstance(shown, dict)
    assert (shown["reason"], shown["inferior"]) == ("limit", 1)
    stop = machine.commands.until("host:main").stop
    assert stop.symbol == "main"
    assert machine.stop == stop
    machine.command("break handle_exit")
    assert machine.breakpoints[0].location == "handle_exit"
    assert machine.run().points == machine.breakpoints


def test_numbers_have_bounds(machine: Machine) -> None:
    host = machine.host
    for use in (lambda: host.read(-1, 8), lambda: host.read(1 << 64, 8), lambda: host.read(0x100000, -1), lambda: host.step(0),
                lambda: host.registers.__setitem__("rax", -1), lambda: host.registers.__setitem__("rax", 1 << 64),
                lambda: host.breakpoint(-1), lambda: machine.breakpoint(1 << 64), lambda: host.watch("main", "w", 0),
                lambda: machine.run(until=()), lambda: machine.run(wall=float("nan"))):  # fmt: skip
        with pytest.raises(vmdbg.Error) as caught:
            use()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("line", ["nonsense", "walk", "vmcb 99", "exits x y", "'"])
def test_errors_are_one_line(machine: Machine, line: str) -> None:
    with pytest.raises(vmdbg.Error) as caught:
        machine.command(line)
    assert "\n" not in str(caught.value)


def test_reading_changes_nothing(machine: Machine, whole: Machine) -> None:
    """A run that was looked at all the time ends as one that was not."""
    while not machine.run(ticks=20_000_000).ended:
        for guest in machine.guests:
            repr((guest, guest.registers, guest.vmcb.as_dict(), guest.walk(guest.pc)))
        repr((machine, machine.guests, machine.exits(last=5)))
    assert machine.time == whole.time


def test_what_is_shown_in_a_notebook(machine: Machine) -> None:
    stop = machine.run(until="2:tick")
    shown = [one._repr_html_() for one in (stop, machine.guests, machine.exits())]
    shown += [machine.guest(2).registers._repr_html_(), machine.guest(2).vmcb._repr_html_()]
    for html in shown:
        assert "<table>" in html
        assert "\x1b" not in html
    assert "&lt;tick&gt;" in stop._repr_html_()
