"""The prompt: prompt_toolkit over the shell, on the event loop that the machine runs on."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from prompt_toolkit import PromptSession
from prompt_toolkit.application import Application, run_in_terminal
from prompt_toolkit.auto_suggest import AutoSuggestFromHistory
from prompt_toolkit.buffer import CompletionState
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.enums import DEFAULT_BUFFER, EditingMode
from prompt_toolkit.filters import has_focus
from prompt_toolkit.formatted_text import StyleAndTextTuples
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.styles import DynamicStyle

from gdbstub.target import TargetError
from vmdbg.console.completion import ConsoleCompleter
from vmdbg.console.lexer import ConsoleLexer
from vmdbg.console.output import TerminalOutput
from vmdbg.console.shell import Quit
from vmdbg.console.style import PLAIN, STYLE
from vmdbg.console.toolbar import Toolbar

if TYPE_CHECKING:
    from prompt_toolkit.input import Input
    from prompt_toolkit.output import Output as PtOutput

    from vmdbg.console.screen import Screen
    from vmdbg.console.shell import Shell

__all__ = ["KEYS", "Prompt", "PromptOutput", "history_in", "standing_keys"]

KEYS = {"f5": "continue", "f10": "next", "f11": "step"}
REPEATED = ("step", "next", "stepi", "nexti", "continue", "until", "finish")
"""Commands that an empty line makes again."""
LINE = "LINE"
"""The buffer of the full screen's line."""
IDLE_SECONDS = 0.02
REDRAW_SECONDS = 0.2


def history_in(path: Path | None) -> History:
    """That of a file, if there may be one."""
    if path is None:
        return InMemoryHistory()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600))
    except OSError:
        return InMemoryHistory()
    return FileHistory(str(path))


class PromptOutput(TerminalOutput):
    """A terminal: above the prompt while that waits."""

    def __init__(self, out: TextIO | None = None) -> None:
        super().__init__(out)
        self.waiting: Callable[[], bool] = lambda: False
        self._pending: list[str] = []
        self._task: asyncio.Future[None] | None = None
        self.direct = False

    def write(self, text: str) -> None:
        if self.direct or not self.waiting():
            super().write(text)
            return
        self._pending.append(text)
        if self._task is None or self._task.done():
            self._task = asyncio.ensure_future(self._flush())

    async def _flush(self) -> None:
        while self._pending:
            await run_in_terminal(self._take)

    def _take(self) -> None:
        text = "".join(self._pending)
        self._pending.clear()
        super().write(text)

    async def settle(self) -> None:
        """Until all is written."""
        if self._task is not None:
            await self._task


def standing_keys(run: Callable[[str], None], shell: Shell, toolbar: Toolbar) -> KeyBindings:
    """The keys that carry out a command and leave the line as it is."""
    keys = KeyBindings()
    for key, line in KEYS.items():
        keys.add(key)(lambda event, line=line: run(line))

    @keys.add("f1")
    def _help(event: KeyPressEvent) -> None:
        command = shell.command_of(shell.expanded(event.current_buffer.text))
        run(f"help {command.name}" if command is not None else "help")

    @keys.add("tab", filter=has_focus(DEFAULT_BUFFER) | has_focus(LINE))
    def _complete(event: KeyPressEvent) -> None:
        """The best candidate at once, the next ones behind it."""
        buffer = event.current_buffer
        if buffer.complete_state:
            buffer.complete_next()
        else:
            found = list(buffer.completer.get_completions(buffer.document, CompleteEvent(completion_requested=True)))
            if found:
                buffer.complete_state = CompletionState(buffer.document, found)
                buffer.go_to_completion(0)

    return keys


class Prompt:
    """One console on a terminal."""

    def __init__(
        self,
        shell: Shell,
        output: PromptOutput,
        history: Path | None = None,
        poll: Callable[[], None] = lambda: None,
        pt_input: Input | None = None,
        pt_output: PtOutput | None = None,
    ) -> None:
        """`poll` is called now and then, between two slices."""
        self.shell, self.output, self.poll = shell, output, poll
        self.toolbar = Toolbar(shell)
        self._repeat, self._ends = "", False
        keys = standing_keys(self._run_standing, shell, self.toolbar)
        keys.add("c-c")(self._interrupt)
        keys.add("<sigint>")(self._interrupt)
        self.history = history_in(history)
        self.completer, self.lexer = ConsoleCompleter(shell), ConsoleLexer(shell)
        self.style = DynamicStyle(lambda: STYLE if self.output.colour else PLAIN)
        self.screen: Screen | None = None
        self._devices = pt_input, pt_output
        self.session: PromptSession[str] = PromptSession(
            self.toolbar.prompt,
            completer=self.completer,
            lexer=self.lexer,
            history=self.history,
            auto_suggest=AutoSuggestFromHistory(),
            complete_while_typing=True,
            key_bindings=keys,
            bottom_toolbar=self._bottom,
            enable_open_in_editor=True,
            enable_history_search=False,
            reserve_space_for_menu=7,
            mouse_support=False,
            style=self.style,
            include_default_pygments_style=False,
            input=pt_input,
            output=pt_output,
        )
        output.waiting = lambda: self.session.app.is_running

    def _bottom(self) -> StyleAndTextTuples:
        app = self.session.app
        return self.toolbar.bottom(app.current_buffer.document.text_before_cursor, app.output.get_size().columns)

    def apply(self) -> None:
        """The settings that are the prompt's."""
        settings = self.shell.settings
        self.session.editing_mode = EditingMode.VI if settings.keys == "vi" else EditingMode.EMACS
        self.output.pager = settings.pager
        self.output.colour = self.output.may_colour and settings.colour

    # Keys

    def _run_standing(self, line: str) -> None:
        """A command above the prompt, whose line stays."""

        def carry_out() -> None:
            self.output.direct = True
            try:
                self._execute(line)
            except Quit:
                self.session.app.exit(exception=EOFError)
            finally:
                self.output.direct = False

        self.session.app.create_background_task(_awaited(run_in_terminal(carry_out)))

    def _interrupt(self, event: KeyPressEvent) -> None:
        control = self.shell.source.control
        if control is not None and control.running:
            for report in control.interrupt():
                self.shell.report(report)
            self.toolbar.forget()
        elif event.current_buffer.text:
            event.current_buffer.reset()
        else:
            self.output.show("`quit` or ^D leaves", "hint")

    def _execute(self, line: str) -> None:
        self.shell.execute(line)
        self.apply()
        self.toolbar.forget()

    def leave(self) -> None:
        """From outside, as a signal does: the terminal is left as it was found."""
        self._ends = True
        if self.screen is not None:
            self.screen.left = True
            self.screen.app.exit()
        elif self.session.app.is_running:
            self.session.app.exit(exception=EOFError)

    def remember(self, line: str) -> str:
        """For an empty line to make it again, if it is a step."""
        command = self.shell.command_of(self.shell.expanded(line))
        self._repeat = line if command is not None and command.name in REPEATED else ""
        return line

    def repeated(self) -> str:
        return self._repeat

    async def _show_screen(self) -> bool:
        """The full screen, until that is left; False if the console is left with it."""
        from vmdbg.console.screen import Screen

        self.shell.wants_screen = False
        self.screen = Screen(self, *self._devices)
        try:
            return await self.screen.run()
        finally:
            self.screen = None
            self.toolbar.forget()

    @property
    def _app(self) -> Application[Any]:
        """What is drawn now."""
        return self.screen.app if self.screen is not None else self.session.app

    # The loop

    async def run(self) -> int:
        """Until the user leaves."""
        self.apply()
        runner = asyncio.ensure_future(self._run_machine())
        try:
            while not self._ends:
                try:
                    line = await self.session.prompt_async()
                except EOFError:
                    break
                except KeyboardInterrupt:
                    continue
                try:
                    self._execute(self.remember(line) if line.strip() else self._repeat)
                    if self.shell.wants_screen and not await self._show_screen():
                        break
                except Quit:
                    break
        finally:
            runner.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await runner
            await self.output.settle()
        return 0

    async def _run_machine(self) -> None:
        drawn, shown = 0.0, ""
        loop = asyncio.get_running_loop()
        while True:
            self.poll()
            control = self.shell.source.control
            ran = control is not None and control.running
            if control is not None and ran:
                try:
                    for report in control.advance():
                        self.shell.report(report)
                        self.toolbar.forget()
                except TargetError as error:
                    self.shell.output.show(str(error), "error")
            self.shell.tell()
            now, state = loop.time(), self.toolbar.state()[1]
            if (state != shown or (ran and now - drawn > REDRAW_SECONDS)) and self._app.is_running:
                drawn, shown = now, state
                self.toolbar.forget()
                self._app.invalidate()
            await asyncio.sleep(0 if ran else IDLE_SECONDS)


async def _awaited(awaitable: Awaitable[object]) -> None:
    await awaitable
