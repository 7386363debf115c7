"""The prompt, typed into through prompt_toolkit's pipe."""

from __future__ import annotations

import asyncio
import io
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.enums import EditingMode
from prompt_toolkit.formatted_text import fragment_list_to_text
from prompt_toolkit.input import PipeInput, create_pipe_input
from prompt_toolkit.key_binding.vi_state import InputMode
from prompt_toolkit.output import DummyOutput

from gdbstub.server import new_event_loop
from introspect.commands.parameters import Candidate
from tests.console.talking import Talk, live
from tests.patience import PATIENCE
from vmdbg.console.completion import ConsoleCompleter, fuzzy, signature
from vmdbg.console.lexer import ConsoleLexer
from vmdbg.console.prompt import Prompt, PromptOutput
from vmdbg.console.screen import Screen
from vmdbg.console.shell import Shell
from vmdbg.console.source import LiveSource
from vmdbg.console.toolbar import Toolbar

Start = Callable[..., Talk]
F1, F5, F10, F11, F12 = "\x1bOP", "\x1b[15~", "\x1b[21~", "\x1b[23~", "\x1b[24~"


class Typist:
    """Types, and waits for what is to be seen."""

    def __init__(self, prompt: Prompt, pipe: PipeInput, out: io.StringIO) -> None:
        self.prompt, self.pipe, self.out = prompt, pipe, out
        self.shell = prompt.shell

    def type(self, keys: str) -> None:
        self.pipe.send_text(keys)

    async def until(self, holds: Callable[[], bool], what: str = "") -> None:
        end = time.monotonic() + PATIENCE
        while not holds():
            assert time.monotonic() < end, f"{what}; {self.line!r}; {self.out.getvalue()[-2000:]}"
            await asyncio.sleep(0.01)

    async def sees(self, text: str) -> None:
        await self.until(lambda: text in self.out.getvalue(), text)

    @property
    def line(self) -> str:
        return self.prompt.session.app.current_buffer.text


@pytest.fixture
def typing(hypervisor: Path, tmp_path: Path) -> Callable[[Callable[[Typist], Awaitable[None]]], Typist]:
    """Run a conversation to its end, and ^D."""

    @contextmanager
    def made() -> Iterator[Typist]:
        source = live(hypervisor)
        out = io.StringIO()
        with create_pipe_input() as pipe, create_app_session(input=pipe, output=DummyOutput()):
            output = PromptOutput(out)
            output.pager = False
            shell = Shell(source, output, waits=False, folders=[tmp_path])
            shell.settings.pager = False
            prompt = Prompt(shell, output, tmp_path / "history", pt_input=pipe, pt_output=DummyOutput())
            yield Typist(prompt, pipe, out)
        source.close()

    def run(conversation: Callable[[Typist], Awaitable[None]]) -> Typist:
        with made() as typist:

            async def both() -> None:
                running = asyncio.ensure_future(typist.prompt.run())
                await typist.until(lambda: typist.prompt.session.app.is_running)
                try:
                    await conversation(typist)
                finally:
                    typist.type("\x03")  # an empty line, so that ^D leaves
                    await asyncio.sleep(0.05)
                    typist.type("\x04")
                    await asyncio.wait_for(running, PATIENCE)

            loop = new_event_loop()
            try:
                loop.run_until_complete(both())
            finally:
                loop.close()
            return typist

    return run


Typing = Callable[[Callable[[Typist], Awaitable[None]]], Typist]


def test_a_line(typing: Typing) -> None:
    async def talk(t: Typist) -> None:
        t.type("time\r")
        await t.sees("0 ticks\n")
        t.type("nonsense\r")
        await t.sees("nonsense: no such command")

    typing(talk)


def test_the_prompt_lives_while_the_machine_runs(typing: Typing) -> None:
    async def talk(t: Typist) -> None:
        source = t.shell.source
        assert isinstance(source, LiveSource)
        control = source.control
        t.type("tbreak main\r")
        await t.sees("Temporary breakpoint 1 at")
        t.type("continue\r")
        await t.sees("Temporary breakpoint 1\n")
        await t.sees("── the host: 64-bit")
        assert control.last_stop is not None
        source.debugger.write_memory(control.selected, control.pc(control.selected) or 0, b"\xeb\xfe")  # jmp to itself
        t.type("continue\r")
        await t.until(lambda: control.running and t.prompt.session.app.is_running)
        t.type("guests\r")
        await t.sees("No guest has been entered by VMRUN yet.")
        assert control.running
        t.type("\x03")
        await t.sees("interrupted")
        assert not control.running

    typing(talk)


def test_keys_run_and_leave_the_line(typing: Typing) -> None:
    async def talk(t: Typist) -> None:
        source = t.shell.source
        t.type("tbreak main\r")
        await t.sees("Temporary breakpoint 1 at")
        t.type("walk 0x1")
        await t.until(lambda: t.line == "walk 0x1")
        t.type(F5)
        await t.sees("── code at main ")
        assert t.line == "walk 0x1"
        t.type(F11)
        await t.sees("── code at main+0x1 ")
        before = source.where().pc
        t.type(F10)
        await t.until(lambda: source.where().pc != before)
        t.type(F1)
        await t.sees("Translate a linear address")
        assert t.line == "walk 0x1"

    typing(talk)


def test_an_empty_line_steps_again(typing: Typing) -> None:
    async def talk(t: Typist) -> None:
        source = t.shell.source
        t.type("step\r")
        await t.until(lambda: source.where().pc == 0x10000D)
        t.type("\r")
        await t.until(lambda: source.where().pc == 0x10000E)
        t.type("time\r")
        await t.sees("2 ticks")
        t.type("\r")
        await asyncio.sleep(0.1)
        assert source.where().pc == 0x10000E

    typing(talk)


def test_interrupt_clears_the_line(typing: Typing) -> None:
    async def talk(t: Typist) -> None:
        t.type("walk something")
        await t.until(lambda: t.line == "walk something")
        t.type("\x03")
        await t.until(lambda: t.line == "")
        t.type("\x03")
        await t.sees("`quit` or ^D leaves")

    typing(talk)


def test_completion_and_history(typing: Typing, tmp_path: Path) -> None:
    async def talk(t: Typist) -> None:
        t.type("wal\t")
        await t.until(lambda: t.line.startswith("walk"))
        t.type("\x03")
        await t.until(lambda: t.line == "")
        t.type("rules | cat > /dev/null\r")
        await t.until(lambda: (tmp_path / "history").read_text().endswith("+rules | cat > /dev/null\n"))
        t.type("rul")
        await t.until(lambda: t.prompt.session.app.current_buffer.suggestion is not None)
        t.type("\x05")  # ^E takes what is suggested
        await t.until(lambda: t.line == "rules | cat > /dev/null")

    typing(talk)


def test_vi_keys(typing: Typing) -> None:
    async def talk(t: Typist) -> None:
        t.type("set keys vi\r")
        await t.until(lambda: t.prompt.session.editing_mode == EditingMode.VI)
        t.type("tixe")
        await t.until(lambda: t.line == "tixe")
        t.type("\x1b")
        await t.until(lambda: t.prompt.session.app.vi_state.input_mode == InputMode.NAVIGATION)  # it was no beginning of a sequence
        t.type("ccecho vi\r")
        await t.sees("vi\n")
        t.type("set keys emacs\r")
        await t.until(lambda: t.prompt.session.editing_mode == EditingMode.EMACS)

    typing(talk)


def test_the_full_screen(typing: Typing) -> None:
    async def talk(t: Typist) -> None:
        control = t.shell.source.control
        assert control is not None
        t.type("tbreak 2:work\rtui\r")
        await t.until(lambda: t.prompt.screen is not None and t.prompt.screen.app.is_running)
        screen = t.prompt.screen
        assert isinstance(screen, Screen)

        def said() -> str:
            return "\n".join(fragment_list_to_text(line) for line in screen.log.lines)

        t.type("continue\r")
        await t.until(lambda: "Temporary breakpoint 1" in said(), "stop")
        t.type("guests | grep 0x800000\r")
        await t.until(lambda: "*    2 " in said(), "guests")
        code = "\n".join(fragment_list_to_text(line) for line in screen._content("code", 80, 12)[1])
        assert code.startswith("=>  0xffffffff80100228  <work>")
        assert len(code.split("\n")) == 12
        t.type("walk 2:cou")
        await t.until(lambda: screen.buffer.text == "walk 2:cou")
        t.type(F11)
        await t.until(lambda: "work+0x1" in said(), "step")
        assert screen.buffer.text == "walk 2:cou"
        t.type("\x03")
        await t.until(lambda: screen.buffer.text == "")
        t.type("tui\r")
        await t.until(lambda: t.prompt.screen is None)
        t.type("here\r")
        await t.sees("<work+0x1>")
        t.type("tui\r")
        await t.until(lambda: t.prompt.screen is not None and t.prompt.screen.app.is_running)
        t.type(F12)
        await t.until(lambda: t.prompt.screen is None)

    typing(talk)


def test_no_menu_on_an_empty_line(typing: Typing) -> None:
    """Lines come faster than candidates do: those of a line that was accepted meanwhile are nobody's any more."""

    async def talk(t: Typist) -> None:
        control = t.shell.source.control
        assert control is not None
        t.type("tbreak 2:work\rtui\r")
        await t.until(lambda: t.prompt.screen is not None and t.prompt.screen.app.is_running)
        screen = t.prompt.screen
        assert screen is not None
        buffer, offered = screen.buffer, list[str]()

        def look(_: object) -> None:
            if buffer.complete_state is not None and buffer.complete_state.completions:
                offered.append(buffer.text)

        buffer.on_completions_changed += look
        t.type("continue\r")
        await t.until(lambda: control.last_stop is not None and not control.running, "stop")
        for keys in (F11, f"time\r{F11}", f"s\r{F11}{F10}", f"time\x03{F11}", f"\r{F11}", f"t\x7f{F11}", f"  {F11}", f"\x03time\r{F5}"):
            t.type(keys)
            await asyncio.sleep(0.2)
            await t.until(lambda: not buffer.text.strip() and buffer.complete_state is None, repr(keys))
            assert "" not in map(str.strip, offered), (keys, offered)
        t.type("\x03")
        t.type("tim")
        await t.until(lambda: "tim" in offered, "a menu")
        t.type("\x03")
        await t.until(lambda: buffer.text == "")
        t.type(F12)
        await t.until(lambda: t.prompt.screen is None)

    typing(talk)


# Without a loop


def completions(talk: Talk, text: str) -> dict[str, str]:
    completer = ConsoleCompleter(talk.shell)
    found = completer.get_completions(Document(text), CompleteEvent())
    return {text[: len(text) + one.start_position] + one.text: one.display_meta_text for one in found}


def test_completion_by_the_kind_of_argument(talk: Start) -> None:
    t = talk()
    t("tbreak 2:work")
    t("c")
    assert completions(t, "wlk")["walk"].startswith("Translate a linear address")
    assert completions(t, "bre")["break"] == "Stop at an address."
    assert completions(t, "w")["w"] == "= walk"
    assert completions(t, "walk 2:cou") == {"walk 2:counter": "0xffffffff80109000"}
    assert "walk 2:counter" in completions(t, "walk 2:ctr")
    assert "walk 2:expected_work" in completions(t, "w 2:exwo".replace("w ", "walk ", 1))
    assert completions(t, "w 2:cou") == {"w 2:counter": "0xffffffff80109000"}
    accesses = {f"walk 2:counter 2 {access}" for access in ("r", "w", "x", "ru", "wu", "xu", "rs", "ws", "xs")}
    assert set(completions(t, "walk 2:counter 2 ")) == accesses
    assert completions(t, "walk 2:counter --a") == {"walk 2:counter --access": "read, write or execute (r); ru ... xs say as whom, too"}
    assert "host" in {word.split()[-1] for word in completions(t, "inferior ")}
    assert completions(t, "inferior ")["inferior 2"] == "guest 2"
    assert list(completions(t, "set keys ")) == ["set keys emacs", "set keys vi"]
    assert "break 2:work if" in completions(t, "break 2:work ")
    assert "break 2:work if counter" in completions(t, "break 2:work if cou")
    assert "exits | grep" in completions(t, "exits | gre")
    assert "py guests" in completions(t, "py gue")
    assert "py vm.walk" in completions(t, "py vm.wal")
    assert "help walk" in completions(t, "help wa")
    (t.folder / "script").touch()
    assert f"source {t.folder}/script" in completions(t, f"source {t.folder}/scr")
    for text in ("", "'", "walk '", "nonsense x", "set nothing ", "|", "py vm.", "py vm.walk.", "walk 9:", "\0", "walk :::", "break x if ("):
        completions(t, text)


def test_the_best_come_first() -> None:
    names = [Candidate(name) for name in ("the_counter", "count", "c_o_u_n_t", "other", "recount")]
    assert [one.text for one, _ in fuzzy("count", names)] == ["count", "recount", "the_counter", "c_o_u_n_t"]
    assert fuzzy("ct", [Candidate("count")])[0][1] == (0, 4)
    assert fuzzy("", names)[0][0].text == "the_counter"


def test_signatures(talk: Start) -> None:
    t = talk()
    walk = t.source.registry.commands["walk"]

    def marked(words: list[str]) -> tuple[str, str]:
        parts = signature(walk, words)
        current = [text for style, text, *_ in parts if style == "class:hint-current"]
        return current[0] if current else "", parts[-1][1]

    assert marked([]) == ("", walk.summary)
    assert marked([""]) == ("GVA", "GVA: an address")
    assert marked(["x", ""])[0] == "[GUEST|host]"
    assert marked(["x", "--cpl", ""]) == ("[--cpl CPL]", "CPL: the privilege of the access; else the current one")
    assert marked(["x", "--access", "r", "host", ""])[0] == "[ACCESS]"
    toolbar = Toolbar(t.shell)
    assert fragment_list_to_text(toolbar.hint("walk ")).startswith("walk GVA [GUEST|host] [ACCESS] [--cpl CPL] [--vmcb PA]")
    assert fragment_list_to_text(toolbar.hint("w 2:x"))[:8] == "walk GVA"
    assert toolbar.hint("wal") == []
    assert toolbar.hint("nonsense ") == []
    assert fragment_list_to_text(toolbar.hint("set keys ")).startswith("set [NAME VALUE ...]")


def test_the_toolbar(talk: Start) -> None:
    t = talk()
    toolbar = Toolbar(t.shell)
    assert fragment_list_to_text(toolbar.status(200)) == (
        " stopped  the host │ protected mode, 32-bit no paging │ CPL 0 │ _start │ boot.S:20 │ 0 ticks"
    )
    t("tbreak 2:work")
    t("c")
    toolbar.forget()
    said = fragment_list_to_text(toolbar.status(200))
    assert said.startswith(" stopped  guest 2 │ 64-bit 4-level/4-level │ CPL 0 │ work │ guest64.c:50 │ VMMCALL │ ASID 1 │ CR3 0x102000 │ nCR3 0x801000 │ 5 88")
    assert len(fragment_list_to_text(toolbar.status(60))) <= 60
    assert fragment_list_to_text(toolbar.prompt()) == "guest 2> "
    t.source.driver.holder = "gdb"
    assert toolbar.state()[1] == " gdb holds it "
    t.source.driver.holder = ""
    t("c")
    assert toolbar.state()[1] == " ended "


@pytest.mark.parametrize(
    ("text", "kind", "piece"),
    [
        ("walk 2:counter --access w", "command", "walk"),
        ("walk 2:counter --access w", "owner", "2"),
        ("walk 2:counter --access w", "symbol", "counter"),
        ("walk 2:counter --access w", "option", "--access"),
        ("walk host:gva:0x1000", "space", "gva"),
        ("walk host:gva:0x1000", "number", "0x1000"),
        ("wal", "command-begun", "wal"),
        ("zzz", "command-unknown", "zzz"),
        ("vmrun why 2", "command", "vmrun why"),
        ("exits | grep NPF", "pipe", "|"),
        ("exits | grep NPF", "foreign", " grep NPF"),
        ("exits > file", "pipe", ">"),
        ("break main if $rax > 5 || rcx", "keyword", "if"),
        ("break main if $rax > 5 || rcx", "register", "$rax"),
        ("break main if $rax > 5 || rcx", "register", "rcx"),
        ("time # now", "comment", "# now"),
        ("echo 'a b'", "string", "'a b'"),
        ("py vm.walk(1)", "foreign", " vm.walk(1)"),
        ("!ls", "foreign", "!ls"),
    ],
)
def test_highlighting(talk: Start, text: str, kind: str, piece: str) -> None:
    t = talk()
    pieces = ConsoleLexer(t.shell).line(text)
    assert fragment_list_to_text(pieces) == text
    assert (f"class:{kind}", piece) in [(one[0], one[1]) for one in pieces]


@pytest.mark.parametrize("text", ["", " ", "'", "walk '", "\0", "é\u200b", "| | |", "  py", "walk 99:x 7:y"])
def test_highlighting_keeps_the_text(talk: Start, text: str) -> None:
    t = talk()
    assert fragment_list_to_text(ConsoleLexer(t.shell).line(text)) == text
