"""Lines carried out: aliases, files, scripts, Python, commands of the user's own; and that nothing ends a console."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from introspect.commands import Arguments, Cancelled, Command, Context, Result
from introspect.commands.parameters import Number, Parameter
from tests.console.talking import Talk
from vmdbg.console.serial import ConsoleSerial
from vmdbg.console.settings import CHOICES
from vmdbg.console.shell import Quit
from vmdbg.results import Text

Start = Callable[..., Talk]


def test_aliases(talk: Start) -> None:
    t = talk()
    assert t("i b") == t("info breakpoints") == t("points")
    t("alias hosts walk --access x host:main")
    assert t("hosts --json") == t("walk --access x host:main --json")
    assert "hosts" in t("alias")
    t("unalias hosts")
    assert t.errors("hosts") == ["hosts: no such command; try help"] or t.errors("hosts")
    assert t.errors("unalias hosts") == ["hosts: there is no such alias; `alias` lists them; usage: unalias NAME"]


def test_pipes_go_through_a_shell(talk: Start) -> None:
    t = talk()
    expected = t("rules")
    t("rules | grep EFER | head -3")
    assert t.output.programs == [(["sh", "-c", "grep EFER | head -3"], expected + "\n")]
    assert t.output.said == []


def test_redirects(talk: Start) -> None:
    t = talk()
    path = t.folder / "out"
    expected = t("time")
    t(f"time > {path}")
    t(f"time >> {path}")
    assert path.read_text() == f"{expected}\n{expected}\n"
    assert t.errors("time > /nonexistent/f")[0].endswith("No such file or directory: '/nonexistent/f'")
    assert t.shell.status == 1


def test_scripts_go_on_behind_errors(talk: Start) -> None:
    t = talk()
    script = t.folder / "script"
    script.write_text("nonsense\n# a comment\n\ntime\n")
    said = t(f"source {script}")
    assert "nonsense: no such command" in said
    assert said.endswith("0 ticks")
    assert t.shell.status == 1


def test_a_script_waits_for_stops(talk: Start) -> None:
    t = talk(waits=False)
    script = t.folder / "script"
    script.write_text("tbreak 2:work\ncontinue\nhere\n")
    assert "RIP 0xffffffff80100228 <work>" in t(f"source {script}")


def test_a_script_that_sources_itself_ends(talk: Start) -> None:
    t = talk()
    script = t.folder / "script"
    script.write_text(f"source {script}\n")
    assert "one of them sources itself" in t(f"source {script}")


@pytest.mark.parametrize("content", [b"\xff\xfe\0\1", b"time\0\n"])
def test_a_script_that_is_no_text(talk: Start, content: bytes) -> None:
    t = talk()
    (t.folder / "script").write_bytes(content)
    t(f"source {t.folder / 'script'}")
    assert t.shell.status == 1
    assert t.errors("source /nonexistent") == ["/nonexistent: no such file or directory; name a text file that can be read"]


def test_edit(talk: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    t = talk()
    monkeypatch.delenv("VISUAL", raising=False)
    monkeypatch.setenv("EDITOR", "ed -s")
    script = t.folder / "my script"
    script.write_text("time\n")
    assert t(f"edit '{script}' --run") == "0 ticks"
    assert t.output.programs == [(["ed", "-s", str(script)], None)]
    t("edit")
    assert t.output.programs[1][0][:2] == ["ed", "-s"]
    assert not Path(t.output.programs[1][0][2]).exists()


def test_settings(talk: Start) -> None:
    t = talk()
    t("set context regs code")
    assert "context    regs code" in t("set")
    said = t("step")
    assert "── the host: protected mode, 32-bit" in said
    assert "── code at _start+0x1 " in said
    assert "── stack" not in said
    t("set context off")
    assert t("step").startswith("the host at ")
    assert t.errors("set context regs nothing")
    assert t.errors("set keys ed") == ["ed: keys takes one of emacs, vi; write set keys emacs"]
    assert t.errors("set colours on") == [f"colours: there is no such setting; choose of {', '.join(CHOICES)}"]


# Python


def test_python_has_the_commands(talk: Start) -> None:
    t = talk()
    t("tbreak 2:work")
    t("c")
    assert t("py walk('2:counter').json()['verdict']['gpa']") == "1085440 (0x109000)"
    assert t("py walk('2:counter', access='w')") == t("walk 2:counter --access w")
    assert t("py vm.guests().json()['selected']") == "2"
    assert t("py _") == "2"
    t("here")
    assert t("py _.number") == "2"
    assert t("py x = 7") == ""
    assert t("py x * 6") == "42 (0x2a)"
    assert t("py print(context.selected.asid)") == "1"


def test_python_runs_the_machine(talk: Start) -> None:
    t = talk()
    t("py vm.tbreak('main'); vm.continue_()")
    assert t.at() == "main"
    before = t.pc
    t("py vm.step(2); step(1)")
    assert t.pc > before


def test_python_files(talk: Start) -> None:
    t = talk()
    script = t.folder / "script.py"
    script.write_text("for _ in range(3):\n    step()\nfound = [guest for guest in guests().json()['guests']]\n")
    t(f"source {script}")
    assert t("py found") == "[]"
    script.write_text("x = (\n")
    assert "Python says" in t.errors(f"source {script}")[0]
    script.write_text("\n1 / 0\n")
    assert t.errors(f"source {script}") == [f"ZeroDivisionError: division by zero (line 2 of {script})"]


@pytest.mark.parametrize(
    "line",
    ["py 1 / 0", "py (", "py raise SystemExit", "py import sys; sys.exit(3)", "py walk('zzz')", "py vm.nothing()", "py '\\0'", "py \0",
     "py (lambda f: f(f))(lambda f: f(f))", "py raise BaseException('x')", "py del vm, context, _", "py vm.walk"],
)  # fmt: skip
def test_python_does_not_end_a_console(talk: Start, line: str) -> None:
    t = talk()
    t(line)
    assert t("py vm.time()") == "0 ticks"


# Commands of the user's own

COMMANDS = """
from vmdbg.console import command

@command("npfs")
def npfs(vm, guest: int = 2, most: int = 10, loud: bool = False):
    "Count nested page faults."
    found = sum(one["name"] == "NPF" for one in vm.exits(guest, 4096).json())
    return f"{min(found, most)}{'!' if loud else ''}"

@command("place", "Where something is.")
def place(vm, address):
    return vm.walk(address)
"""


def test_commands_of_the_user(talk: Start) -> None:
    t = talk()
    path = t.folder / "commands.py"
    path.write_text(COMMANDS)
    t("tbreak 5:main")
    t("c")
    t("catch vmexit npf")
    t("c")
    assert t("npfs 5 --loud") == "1!"
    assert t("npfs 5 0") == "0"
    assert t("place 2:counter") == t("walk 2:counter")
    assert "Count nested page faults." in t("help npfs")
    assert t.errors("npfs 5 x")[0].startswith("x: ")


def test_they_are_read_again_when_they_change(talk: Start) -> None:
    t = talk()
    path = t.folder / "commands.py"
    assert t.errors("hello")
    path.write_text("from vmdbg.console import command\n\n@command('hello', 'x')\ndef hello(vm): return 'one'\n")
    assert t("hello") == "one"
    path.write_text("from vmdbg.console import command\n\n@command('hello', 'x')\ndef hello(vm): return 'other'\n")
    assert t("hello") == "other"
    path.write_text("this is no Python\n")
    said = t("time")
    assert said.startswith(f"{path}")
    assert "SyntaxError" in said
    assert said.endswith("0 ticks")
    assert t("time") == "0 ticks"
    assert t.errors("hello")
    path.write_text("raise SystemExit\n")
    assert t.errors("time") == [f"{path}, line 1: SystemExit"]
    path.unlink()
    assert t("time") == "0 ticks"


def test_they_take_no_name_that_is_taken(talk: Start) -> None:
    t = talk()
    (t.folder / "commands.py").write_text("from vmdbg.console import command\n\n@command('walk', 'x')\ndef walk(vm): return 'mine'\n")
    assert t.errors("time") == [f"{t.folder / 'commands.py'}: there is already a command walk; name it differently"]


# Long commands, and what goes wrong


def _slow(talk: Talk, steps: int, looks: bool, pressed: int | None = None) -> None:
    """A command `slow`, amid which ^C is pressed."""

    def run(context: Context, arguments: Arguments) -> Result:
        for step in range(steps):
            if step == pressed:
                signal.raise_signal(signal.SIGINT)
            time.sleep(0.01)
            if looks:
                context.progress(step / steps, "counting")
        return Text("done")

    talk.source.registry.add(Command("slow", run, "Take a while."))


def test_a_bar_after_a_second(talk: Start) -> None:
    t = talk()
    _slow(t, 130, True)
    assert t("slow") == "done"
    assert t.output.bars[-1] == ""
    assert any("%  counting  (^C cancels)" in bar for bar in t.output.bars)
    t.output.bars.clear()
    t("time")
    assert t.output.bars == [""]


@pytest.mark.parametrize("looks", [True, False])
def test_interrupts_cancel(talk: Start, looks: bool) -> None:
    t = talk()
    _slow(t, 30000, looks, pressed=20)
    before = signal.getsignal(signal.SIGINT)
    assert t("slow") == "cancelled"
    assert t.shell.status == 130
    assert signal.getsignal(signal.SIGINT) is before
    assert t("time") == "0 ticks"


@pytest.mark.parametrize("amid", ["begin", "a slice", "what is told"])
def test_an_interrupt_stops_the_machine(talk: Start, monkeypatch: pytest.MonkeyPatch, amid: str) -> None:
    t = talk()
    place, name = {"begin": (t.shell, "_ask"), "a slice": (t.control, "advance"), "what is told": (t.output, "show")}[amid]
    done, pressed = getattr(place, name), list[bool]()

    def pressing(*arguments: object) -> object:
        if not pressed:
            pressed.append(True)
            signal.raise_signal(signal.SIGINT)
        return done(*arguments)

    monkeypatch.setattr(place, name, pressing)
    said = t("c")
    assert pressed
    assert "interrupted" in said
    assert not t.control.running
    assert not t.source.driver.ended


def test_a_mistake_of_ours_is_told_and_survived(talk: Start) -> None:
    t = talk()

    def run(context: Context, arguments: Arguments) -> Result:
        raise ZeroDivisionError("ours")

    t.source.registry.add(Command("broken", run, "x"))
    assert t.errors("broken") == ["ZeroDivisionError: ours; this is a mistake of vmdbg's: `set traceback on` shows where"]
    t("set traceback on")
    assert "Traceback" in t.errors("broken")[0]


def test_json_of_an_error(talk: Start) -> None:
    t = talk()
    assert json.loads(t("walk zzz --json"))["error"]["rule"] == "there is no such name"


def test_a_refusal_of_the_machine_as_json(talk: Start) -> None:
    t = talk()
    found = json.loads(t("break 0xffffffffffff0000000000 --json"))
    assert set(found["error"]) == {"value", "rule", "remedy"}
    assert t.shell.status == 1
    missing = t.folder / "missing" / "core"
    assert json.loads(t(f"save core {missing} --json"))["error"]["rule"]


def test_a_stop_as_json_is_all_that_is_shown(talk: Start) -> None:
    t = talk()
    t("tbreak 2:work")
    answer = json.loads(t("continue --json"))
    assert answer["command"] == "continue"
    stop = answer["result"]
    assert (stop["text"], stop["inferior"], stop["symbol"], stop["breakpoints"]) == ("Temporary breakpoint 1", 2, "work", [1])
    assert stop["notes"] == ["[guest 2 has appeared]", "[breakpoint 1: 2:work is 0xffffffff80100228]"]
    assert stop["pc"] == t.pc
    assert stop["time"] == t.source.driver.now
    assert t.shell.last is not None
    assert t.shell.last.json() == stop
    returned = json.loads(t("finish --json"))["result"]
    assert returned["notes"] == [f"runs until it returns to {returned['pc']:#x}"]
    assert json.loads(t("step --json"))["result"]["line"].startswith("guest64.c:")
    limited = json.loads(t("continue 1000 --json"))["result"]
    assert limited["text"] == f"guest time {returned['time'] + 4 + 1000} is reached"
    still = json.loads(t("interrupt --json"))["result"]
    assert still == {**limited, "text": "it does not run"}


def test_what_the_guest_prints_is_in_the_result(talk: Start) -> None:
    t = talk()
    serial = t.source.debugger.machine.config.serial
    assert isinstance(serial, ConsoleSerial)
    serial.show = t.shell.serial
    t("tbreak 2:work")
    stop = json.loads(t("continue --json"))["result"]
    assert any(line.startswith("hypervisor: SVM revision 1") for line in stop["serial"])
    said = t("continue 3000000").splitlines()
    assert any(line.startswith("guest 2: 32-bit PAE guest") for line in said)
    assert "guest 3: CR0" not in t("set serial off") + t("continue 6000000")


def test_a_stop_goes_where_the_line_says(talk: Start) -> None:
    t = talk(waits=False)
    t("tbreak main")
    path = t.folder / "stop"
    t(f"continue --json > {path}")
    assert not t.control.running
    assert json.loads(path.read_text())["result"]["symbol"] == "main"
    t("nexti | grep main")
    (command, text), = t.output.programs
    assert command == ["sh", "-c", "grep main"]
    assert text is not None
    assert text.startswith("the host at 0x1013d")
    assert t.output.said == []


def test_a_stop_is_the_last_result(talk: Start) -> None:
    t = talk()
    t("tbreak main")
    t("continue")
    assert t("py _.json()['symbol']") == "main"
    assert t("py vm.stepi(2).json()['inferior']") == "1"
    assert t("py vm.stepi().text()").startswith("the host at ")


def test_an_interrupt_as_json(talk: Start) -> None:
    t = talk(waits=False)
    t("tbreak main")
    t("continue > /dev/null")
    t.source.debugger.write_memory(t.control.selected, t.pc, b"\xeb\xfe")
    assert t("continue --json") == ""
    assert t.control.running
    stop = json.loads(t("interrupt --json"))
    assert (stop["command"], stop["result"]["text"], stop["result"]["symbol"]) == ("interrupt", "interrupted", "main")


def test_quit(talk: Start) -> None:
    t = talk()
    for line in ("quit", "q", "exit"):
        with pytest.raises(Quit):
            t(line)


def test_findings_are_a_status(talk: Start) -> None:
    class Found:
        exit_status = 3

        def text(self) -> str:
            return "three"

        def json(self) -> object:
            return 3

    t = talk()
    t.source.registry.add(Command("find", lambda context, arguments: Found(), "x", (Parameter("N", Number(), optional=True),)))
    assert t("find") == "three"
    assert t.shell.status == 3
    t("time")
    assert t.shell.status == 3


def test_cancelled_is_no_error_of_python(talk: Start) -> None:
    t = talk()

    def run(context: Context, arguments: Arguments) -> Result:
        raise Cancelled

    t.source.registry.add(Command("gone", run, "x"))
    assert t("gone") == "cancelled"


_WORDS = st.sampled_from([
    "walk", "vmcb", "guests", "exits", "x", "context", "break", "tbreak", "delete", "step", "next", "finish", "until", "inferior", "thread", "set",
    "alias", "unalias", "echo", "watch", "catch", "help", "where", "points", "host:", "2:", "spa:0", "main", "0x1000", "-1", "if", "rax", "|", ">",
    "'", '"', "--json", "--guest", "py", "(", ")", "[", "\0", "\x1b", "é", "2", "99999999999999999999", "never", "stop-at", "send", "#", "$rax",
])  # fmt: skip


def test_any_line_is_survived(talk: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    t = talk()
    monkeypatch.chdir(tmp_path)
    t("tbreak main")
    t("c")

    @settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(_WORDS, min_size=1, max_size=5).map(" ".join) | st.text(max_size=20))
    def survives(line: str) -> None:
        if line.lstrip().startswith(("!", "shell", "edit", "source", "q", "sh", "ed", "so", "exit", "load", "save", "dump")):
            return
        t(line)
        for kind, text in t.output.said:
            assert not (kind == "error" and "mistake of vmdbg's" in text), (line, text)

    survives()
    assert t("time").endswith("ticks")
