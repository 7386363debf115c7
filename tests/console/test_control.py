"""Running and stopping: steps, breakpoints, conditions, whose stop it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from introspect.disassembly import Instruction
from tests.console.talking import Talk, live
from vmdbg.console.control import Goal

Start = Callable[..., Talk]


def instruction(t: Talk) -> Instruction:
    """The one that comes next."""
    found = t.control.instruction(t.control.selected)
    assert found is not None
    return found


def test_continue_to_a_breakpoint(talk: Start) -> None:
    t = talk()
    assert t("break main") == f"Breakpoint 1 at {t.source.locate('main')[2]:#x} <main> of the host"
    assert t("continue").startswith("Breakpoint 1\nthe host at ")
    assert t.at() == "main"
    assert t.control.points[1].hits == 1


def test_step_is_one_instruction_and_goes_off_its_breakpoint(talk: Start) -> None:
    t = talk()
    t("break main")
    t("c")
    before = t.pc
    here = instruction(t)
    t("step")
    assert t.pc == before + len(here.code)
    assert t.control.points[1].hits == 1


def test_step_into_and_next_over_a_call(talk: Start) -> None:
    t = talk()
    t("tbreak main")
    t("c")
    while (here := instruction(t)).mnemonic != "call":
        t("step")
    call, behind = t.pc, here.address + len(here.code)
    assert t.at().startswith("main")
    t("next")
    assert t.pc == behind
    t("restart")
    t(f"until {call:#x}")
    t("step")
    assert t.pc == here.target
    t("finish")
    assert t.pc == behind


def test_a_breakpoint_within_stops_next(talk: Start) -> None:
    t = talk()
    t("tbreak main")
    t("break serial_start")
    t("c")
    assert "Breakpoint 2" in t("next 100")
    assert t.at() == "serial_start"


def test_a_breakpoint_of_a_guest_waits_for_it(talk: Start) -> None:
    t = talk()
    assert t("tbreak 2:work") == "Temporary breakpoint 1 waits for guest 2"
    assert "waits for it" in t("points")
    said = t("continue")
    assert "[guest 2 has appeared]" in said
    assert "Temporary breakpoint 1" in said
    assert (t.control.selected.pid, t.at()) == (2, "work")
    assert t("points").startswith("No breakpoints")
    assert t.source.context.selected is not None
    assert t("here").startswith("guest 2, 64-bit, 4-level over 4-level, CPL 0, ASID 1, ")


def test_lines_of_the_source(talk: Start, hypervisor: Path) -> None:
    source = hypervisor.parents[1] / "exits.c"
    line = next(n for n, text in enumerate(source.read_text().splitlines(), 1) if " handle_exit(" in text)
    t = talk()
    t(f"break exits.c:{line + 1}")
    said = t("c")
    assert t.at() == "handle_exit"
    assert f"<handle_exit>, exits.c:{line}" in said or f"<handle_exit>, exits.c:{line + 1}" in said
    assert f"=>  {line + 1:4}" in t("context source") or f"=>  {line:4}" in t("context source")
    assert "<work> of guest 2" in t("tbreak 2:guest64.c:50")
    t("delete 1")
    t("c")
    assert t.control.selected.pid == 2
    assert t.errors("break nothing.c:1") == [
        "nothing.c:1: no code is known of this line; name a symbol, or give the file with the symbols"
    ]


def test_steps_by_lines(talk: Start) -> None:
    t = talk()
    t("set steps line")
    t("tbreak 2:work")
    t("c")

    def line() -> int:
        return int(t.source.where().line.partition(":")[2])

    first, seen = line(), []
    for _ in range(6):
        t("next")
        seen.append(line())
    assert seen[0] == first + 1
    assert all(one != other for one, other in zip([first, *seen], seen, strict=False))
    assert t.control.selected.pid == 2
    pc = t.pc
    here = instruction(t)
    t("si")
    assert t.pc == pc + len(here.code) or here.target is not None
    t("finish")
    assert t.at().startswith("main+")
    t("restart")
    t("tbreak main")
    t("c")
    t("next 3")
    assert t.at().startswith("main+")  # over the calls
    t("restart")
    t("tbreak main")
    t("c")
    while t.at().startswith("main"):
        t("step")
    assert not t.at().startswith("main")  # into one
    t("step 2")
    assert t.source.where().line


def test_a_step_by_lines_where_none_are_known(talk: Start) -> None:
    t = talk()
    t("tbreak 3:0")  # a guest without symbols
    t("catch guest-start guest 3")
    t("c")
    t("inferior 3")
    t("set steps line")
    before = t.pc
    t("step")
    assert t.pc != before
    assert t.source.where().line == ""


def test_steps_of_a_guest_stay_in_it(talk: Start) -> None:
    t = talk()
    t("tbreak 2:work")
    t("c")
    for _ in range(40):
        t("step")
        assert t.control.selected.pid == 2


def test_conditions(talk: Start) -> None:
    t = talk()
    t("break 2:work if rdi == 3")
    t("c")
    assert t.source.context.registers(2)["rdi"] == 3
    assert t.control.points[1].hits == 1
    assert t.errors("break main if nothing_of_the_sort") != []
    assert t.errors("break main if")[0].startswith("if: ")
    assert len(t.control.points) == 1


def test_a_condition_without_a_value_stops_and_says_so(talk: Start) -> None:
    t = talk()
    t("break main if u8[0xdead00000000] == 1")
    assert "its condition has no value" in t("c")


def test_until_a_time(talk: Start) -> None:
    t = talk()
    assert "guest time 1000000 is reached" in t("continue 1000000")
    at = t.source.driver.now
    assert at >= 1_000_000
    t("restart")
    t("step 5")
    t("stop-at 1000000")
    t("continue")
    first = t.pc
    t("restart")
    t("continue 1000000")
    assert (t.source.driver.now, t.pc) == (at, first)


def test_disable_enable_delete(talk: Start) -> None:
    t = talk()
    t("break main")
    t("tbreak handle_exit")
    assert "disabled" in t("disable 1")
    t("c")
    assert t.at() == "handle_exit"
    t("restart")
    t("enable")
    t("c")
    assert t.at() == "main"
    assert t("delete").startswith("No breakpoints")
    assert t.errors("delete 7") == ["7: there is no such breakpoint; there are none; usage: delete [N]"]


def test_two_breakpoints_at_one_place(talk: Start) -> None:
    t = talk()
    t("break main")
    t("break main if 0")
    t("delete 1")
    t("break handle_exit")
    t("c")
    assert t.at() == "handle_exit"


def test_watch_and_catch_are_the_machines(talk: Start) -> None:
    t = talk()
    t("tbreak 2:work")
    t("c")
    t("watch counter 8 w")
    assert "watchpoint 1 on gva:" in t("c")
    t("watch delete 1")
    t("catch vmexit npf")
    assert "#VMEXIT NPF" in t("c")


def test_the_end(talk: Start) -> None:
    t = talk()
    assert "[the guest ended the run with status 1]" in t("c")
    assert t.errors("c") == ["continue: there is nothing to run: the guest ended the run with status 1; `restart` starts over"]
    assert t.errors("step")
    assert t("restart").startswith("the machine stands before its first instruction")
    assert t.at() == "_start"
    t("step")
    assert t.at() == "_start+0x1"


def test_who_is_there(talk: Start) -> None:
    t = talk()
    t("tbreak 5:main")
    t("c")
    assert t("inferior 2").splitlines()[2].startswith("*  2 ")
    assert t("inferior").splitlines()[2].startswith("*  2 ")
    assert t("here").startswith("guest 2")
    t("inferior host")
    assert t("here").startswith("the host")
    assert t.errors("inferior 9")[0].startswith("9: N: there is no such inferior; there are 1 (hypervisor), 2 (guest 2)")
    assert "*  1" in t("thread 1")
    assert t.errors("thread 4") == ["4: inferior 1 has no such thread; it has 1; usage: thread [N]"]


def test_somebody_else_holds_the_machine(talk: Start) -> None:
    t = talk()
    t("break main")
    t.source.driver.holder = "gdb"
    t.control.release()
    assert t.errors("continue") == ["continue: gdb holds the machine; use its commands, or disconnect it; reading works"]
    assert t("here").startswith("the host")
    assert list(t.source.debugger.breakpoints) == [] or not any(p.inserted for p in t.source.debugger.breakpoints)
    t.source.driver.holder = ""
    t.control.take_back()
    t("c")
    assert t.at() == "main"


@pytest.mark.parametrize("line", ["step 50", "next 50", "break handle_exit if rax == 0x1234", "watch 2:gpa:0x109000 8 w"])
def test_debugging_does_not_change_the_run(talk: Start, hypervisor: Path, line: str) -> None:
    undisturbed = live(hypervisor)
    control = undisturbed.control
    control.go(Goal())
    while control.running:
        list(control.advance())
    t = talk()
    t("tbreak 2:work")
    t("c")
    t(line)
    t("delete")
    for _ in range(3):
        t("step 7")
    t("watch delete 1")
    while not t.source.driver.ended:
        t("c")
    assert t.source.driver.now == undisturbed.driver.now
    assert t.source.context.exits(None, 4096) == undisturbed.context.exits(None, 4096)
    undisturbed.close()
