"""`tui`: the full screen with panes for code, registers, VMCB and exits, and the console with its prompt."""

from __future__ import annotations

import contextlib
import subprocess
import termios
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from prompt_toolkit.application import Application
from prompt_toolkit.auto_suggest import AutoSuggestFromHistory
from prompt_toolkit.buffer import Buffer
from prompt_toolkit.enums import EditingMode
from prompt_toolkit.filters import Condition
from prompt_toolkit.formatted_text import StyleAndTextTuples
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent, merge_key_bindings
from prompt_toolkit.key_binding.bindings.auto_suggest import load_auto_suggest_bindings
from prompt_toolkit.key_binding.bindings.open_in_editor import load_open_in_editor_bindings
from prompt_toolkit.layout import (
    BufferControl,
    ConditionalContainer,
    DynamicContainer,
    Float,
    FloatContainer,
    HSplit,
    Layout,
    UIContent,
    UIControl,
    VSplit,
    Window,
)
from prompt_toolkit.layout.dimension import Dimension
from prompt_toolkit.layout.menus import CompletionsMenu
from prompt_toolkit.layout.processors import AppendAutoSuggestion, BeforeInput, HighlightMatchingBracketProcessor
from prompt_toolkit.mouse_events import MouseEvent, MouseEventType

from gdbstub.target import TargetError
from introspect.commands import CommandError
from vmdbg.console import paint
from vmdbg.console.output import blocking, clean
from vmdbg.console.prompt import LINE, standing_keys
from vmdbg.console.shell import Quit

if TYPE_CHECKING:
    from prompt_toolkit.input import Input
    from prompt_toolkit.output import Output as PtOutput

    from vmdbg.console.prompt import Prompt

__all__ = ["Screen"]

KEPT = 5000
"""Lines of the console that can be scrolled back to."""
NARROW = 110
"""Columns from which there is a second column of panes."""
RIGHT = 50
"""Columns of that: two registers beside each other."""

FIRST = 4
"""Lines that registers, VMCB and console get where there are too few, for one of any other pane."""


class _Pane(UIControl):
    """Lines made anew for each drawing, for the size that there is."""

    def __init__(self, lines: Callable[[int, int], list[StyleAndTextTuples]]) -> None:
        self._lines = lines

    def create_content(self, width: int, height: int) -> UIContent:
        lines = self._lines(width, height)
        return UIContent(
            lambda number: lines[number] if number < len(lines) else [], line_count=max(len(lines), 1), show_cursor=False
        )


class _Log(UIControl):
    """What the console said; the end of it, unless somebody has scrolled."""

    def __init__(self) -> None:
        self.lines: list[StyleAndTextTuples] = []
        self.behind = 0
        """Lines of the screen that are below what is shown."""

    def add(self, lines: list[StyleAndTextTuples]) -> None:
        self.lines += lines
        del self.lines[:-KEPT]
        self.behind = 0

    def scroll(self, lines: int) -> None:
        self.behind = max(0, self.behind + lines)

    def create_content(self, width: int, height: int) -> UIContent:
        wrapped: list[StyleAndTextTuples] = []
        for line in reversed(self.lines):
            wrapped[:0] = _wrapped(line, max(width, 1))
            if len(wrapped) >= height + self.behind:
                break
        self.behind = min(self.behind, max(0, len(wrapped) - height))
        end = len(wrapped) - self.behind
        shown = wrapped[max(0, end - height) : end]
        return UIContent(
            lambda number: shown[number] if number < len(shown) else [], line_count=max(len(shown), 1), show_cursor=False
        )

    def mouse_handler(self, mouse_event: MouseEvent) -> None:
        if mouse_event.event_type == MouseEventType.SCROLL_UP:
            self.scroll(3)
        elif mouse_event.event_type == MouseEventType.SCROLL_DOWN:
            self.scroll(-3)


def _wrapped(line: StyleAndTextTuples, width: int) -> list[StyleAndTextTuples]:
    """A line as lines of the screen."""
    lines: list[StyleAndTextTuples] = [[]]
    left = width
    for style, text, *_ in line:
        while text:
            if not left:
                lines.append([])
                left = width
            piece, text = text[:left], text[left:]
            lines[-1].append((style, piece))
            left -= len(piece)
    return lines


def styled(text: str, kind: str = "") -> list[StyleAndTextTuples]:
    """Lines of a text in the colours of its parts, or all in one."""
    lines: list[StyleAndTextTuples] = [[]]
    for own, piece in [(kind, text)] if kind else paint.fragments(text):
        style = f"class:{own.replace('.', '-')}" if own else ""
        first, *rest = piece.split("\n")
        lines[-1].append((style, first))
        lines += [[(style, each)] for each in rest]
    return lines


class ScreenOutput:
    """The console's pane."""

    interactive = True
    pager = False

    def __init__(self, screen: Screen) -> None:
        self._screen = screen

    @property
    def width(self) -> int:
        return max(self._screen.log_width, 40)

    @property
    def height(self) -> int | None:
        return None

    def show(self, text: str, kind: str = "") -> None:
        self._screen.log.add(styled("\n".join(map(clean, text.split("\n"))), kind))
        self._screen.app.invalidate()

    def progress(self, line: str) -> None:
        self._screen.busy = line
        if self._screen.app.is_running:
            self._screen.app._redraw()  # the loop waits for the command: nobody else draws

    def run(self, command: list[str], text: str | None = None) -> int:
        if text is not None:
            done = subprocess.run(command, input=text, text=True, check=False, capture_output=True, errors="replace")
            if said := (done.stdout + done.stderr).rstrip("\n"):
                self.show(said)
            return done.returncode
        return self._screen.aside(
            lambda: subprocess.run(command, check=False).returncode, waits=command[:1] != ["sh"] or len(command) > 2
        )


class Screen:
    """Of one prompt, whose line, history and completion it shares."""

    def __init__(self, prompt: Prompt, pt_input: Input | None = None, pt_output: PtOutput | None = None) -> None:
        self.prompt, self.shell, self.toolbar = prompt, prompt.shell, prompt.toolbar
        self.log, self.busy, self.left = _Log(), "", False
        self.log_width = 80
        self._panes: dict[tuple[str, int, int], tuple[str, list[StyleAndTextTuples]]] = {}
        self._shown: tuple[object, ...] = ()
        self._sizes: dict[str, tuple[int, int]] = {}
        self.buffer = Buffer(
            completer=prompt.completer,
            history=prompt.history,
            auto_suggest=AutoSuggestFromHistory(),
            complete_while_typing=True,
            accept_handler=self._accept,
            name=LINE,
            multiline=False,
            enable_history_search=False,
        )
        self.app: Application[None] = Application(
            layout=self._layout(),
            key_bindings=merge_key_bindings([load_auto_suggest_bindings(), load_open_in_editor_bindings(), self._keys()]),
            full_screen=True,
            mouse_support=True,
            style=prompt.style,
            include_default_pygments_style=False,
            editing_mode=EditingMode.VI if self.shell.settings.keys == "vi" else EditingMode.EMACS,
            input=pt_input,
            output=pt_output,
        )
        self.output = ScreenOutput(self)

    # Panes

    def _layout(self) -> Layout:
        line = Window(
            BufferControl(
                self.buffer,
                lexer=self.prompt.lexer,
                include_default_input_processors=True,
                input_processors=[BeforeInput(self.toolbar.prompt), AppendAutoSuggestion(), HighlightMatchingBracketProcessor()],
            ),
            height=1,
            dont_extend_height=True,
        )
        log = Window(self.log, wrap_lines=False, height=Dimension(min=2, weight=FIRST))
        code, regs, vmcb, exits = (self._pane(name) for name in ("code", "regs", "vmcb", "exit"))
        stack = self._pane("stack")
        has_source = Condition(lambda: bool(self._content("source", *self._sizes.get("source", (80, 9)))[1]))
        source = ConditionalContainer(HSplit(self._pane("source")), has_source)
        console = HSplit([self._title(lambda: "console"), log, line])
        wide = VSplit(
            [
                HSplit([*code, source, *console.children]),
                Window(width=1, char="│", style="class:separator"),
                HSplit([*regs, *stack, *vmcb, *exits], width=lambda: Dimension.exact(max(RIGHT, self._columns() * 2 // 5))),
            ]
        )
        narrow = HSplit([*self._pane("code", 9), *self._pane("regs", 8), *console.children])
        body = DynamicContainer(lambda: wide if self._columns() >= NARROW else narrow)
        bar = Window(_Pane(lambda width, height: [self.toolbar.status(width)]), height=1, style="class:bottom-toolbar")
        hint = ConditionalContainer(
            Window(_Pane(lambda width, height: [self._hint()]), height=1), Condition(lambda: bool(self.busy or self._hint()))
        )
        menu = Float(CompletionsMenu(max_height=10, scroll_offset=1), xcursor=True, ycursor=True)
        return Layout(FloatContainer(HSplit([body, hint, bar]), [menu]), focused_element=line)

    def _columns(self) -> int:
        return self.app.output.get_size().columns if hasattr(self, "app") else 100

    def _hint(self) -> StyleAndTextTuples:
        return [("class:note", self.busy)] if self.busy else self.toolbar.hint(self.buffer.document.text_before_cursor)

    def _title(self, title: Callable[[], str]) -> Window:
        def line(width: int, height: int) -> list[StyleAndTextTuples]:
            text = title()[: width - 4]
            return [
                [
                    ("class:pane-title", "── "),
                    ("class:pane-name", text),
                    ("class:pane-title", " " + "─" * (width - len(text) - 4)),
                ]
            ]

        return Window(_Pane(line), height=1)

    def _pane(self, section: str, height: int | None = None) -> list[Window]:
        """Its title, and its lines: of registers and VMCB all that there are, if there is place; of the others what is left."""

        def rows() -> Dimension:
            wanted = height
            if wanted is None and section in ("regs", "vmcb"):
                wanted = max(1, len(self._content(section, *self._sizes.get(section, (RIGHT, 9)))[1]))
            return Dimension(min=1, weight=1) if wanted is None else Dimension(min=1, max=wanted, preferred=wanted, weight=FIRST)

        lines = _Pane(lambda width, height: self._content(section, width, height)[1])
        return [self._title(lambda: self._title_of(section)), Window(lines, height=rows, wrap_lines=False)]

    def _title_of(self, section: str) -> str:
        """That of the lines, which are drawn behind it: of the size that they had last."""
        return self._content(section, *self._sizes.get(section, (60, 9)))[0]

    def _content(self, section: str, width: int, height: int = 9) -> tuple[str, list[StyleAndTextTuples]]:
        """A section's title and lines, as it is now; looked at once for each stop and size."""
        self._sizes[section] = width, height
        control = self.shell.source.control
        where = self.toolbar.where()
        moment = (where, control is not None and control.running)
        if moment != self._shown:
            self._panes.clear()
            self._shown = moment
        key = (section, width, height)
        if key not in self._panes:
            try:
                title, lines = self.shell.source.panes((section,), width, max(height, 1))[section]
            except (CommandError, TargetError, KeyError) as error:
                title, lines = section, [str(error)]
            if section == "regs":
                title = "registers"
            self._panes[key] = title, styled("\n".join([f"-- {section}", *lines]))[1:] if lines else []
        return self._panes[key]

    # Keys

    def _keys(self) -> KeyBindings:
        keys = standing_keys(self._execute, self.shell, self.toolbar)

        @keys.add("pageup")
        def _up(event: KeyPressEvent) -> None:
            self.log.scroll(10)

        @keys.add("pagedown")
        def _down(event: KeyPressEvent) -> None:
            self.log.scroll(-10)

        @keys.add("c-c")
        @keys.add("<sigint>")
        def _interrupt(event: KeyPressEvent) -> None:
            control = self.shell.source.control
            if control is not None and control.running:
                for report in control.interrupt():
                    self.shell.report(report)
                self.toolbar.forget()
            else:
                self.buffer.reset()

        @keys.add("c-d", filter=Condition(lambda: not self.buffer.text))
        @keys.add("f12")
        def _leave(event: KeyPressEvent) -> None:
            self.app.exit()

        @keys.add("c-l")
        def _redraw(event: KeyPressEvent) -> None:
            event.app.renderer.clear()

        return keys

    def _accept(self, buffer: Buffer) -> bool:
        line = buffer.text if buffer.text.strip() else self.prompt.repeated()
        if line:
            self.log.add([[*self.toolbar.prompt(), *self.prompt.lexer.line(line)]])
            self.prompt.remember(line)
            self._execute(line)
        return False

    def _execute(self, line: str) -> None:
        try:
            with self._signals():
                self.shell.execute(line)
        except Quit:
            self.left = True
            self.app.exit()
        self.prompt.apply()
        self.app.editing_mode = EditingMode.VI if self.shell.settings.keys == "vi" else EditingMode.EMACS
        self.toolbar.forget()
        if self.shell.wants_screen:
            self.shell.wants_screen = False
            self.app.exit()

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """While a command runs ^C is a signal, which can end it: the loop that reads keys waits."""
        try:
            descriptor = self.app.input.fileno()
            before = termios.tcgetattr(descriptor)
        except (OSError, termios.error, NotImplementedError, ValueError):
            yield
            return
        changed = list(before)
        changed[3] |= termios.ISIG
        termios.tcsetattr(descriptor, termios.TCSANOW, changed)
        try:
            yield
        finally:
            termios.tcsetattr(descriptor, termios.TCSANOW, before)

    def aside(self, act: Callable[[], int], *, waits: bool) -> int:
        """Something that wants the terminal for itself. It `waits` for Enter before the panes cover what was said."""
        app = self.app
        app.renderer.erase(leave_alternate_screen=True)
        with app.input.detach(), app.input.cooked_mode(), blocking():
            status = act()
            if waits:
                with contextlib.suppress(EOFError, KeyboardInterrupt):
                    input("[Enter: back to the panes] ")
        app.renderer.reset()
        app.invalidate()
        return status

    async def run(self) -> bool:
        """Until the user leaves the screen; False if he leaves the console, too."""
        shell = self.shell
        before, shown = shell.output, shell.settings.context
        shell.output, shell.settings.context = self.output, ()
        try:
            await self.app.run_async()
        finally:
            shell.output = before
            if not shell.settings.context:
                shell.settings.context = shown
        return not self.left
