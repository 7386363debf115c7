"""The console's commands on itself."""

from __future__ import annotations

import os
import shlex
import tempfile
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from introspect.commands import Arguments, Command, CommandError, Context, Result, worded
from introspect.commands.parameters import Candidate, File, Flag, Parameter
from introspect.commands.render import columns
from vmdbg.console.settings import CHOICES
from vmdbg.results import Text

if TYPE_CHECKING:
    from vmdbg.console.shell import Shell

__all__ = ["ShellCommands"]


class _Path(File):
    """The name of a file, completed from the file system."""

    def complete(self, context: Context, prefix: str) -> Iterator[Candidate]:
        folder, name = os.path.split(prefix)
        try:
            with os.scandir(os.path.expanduser(folder) or ".") as entries:
                for entry in sorted(entries, key=lambda entry: entry.name)[:500]:
                    if name or not entry.name.startswith("."):
                        yield Candidate(os.path.join(folder, entry.name) + ("/" if entry.is_dir() else ""), "")
        except OSError:
            return


_FILE = Parameter("FILE", _Path())
_OPTIONAL_FILE = Parameter("FILE", _Path(), optional=True)
_RUN = Parameter("RUN", Flag(), option="--run", only_option=True, optional=True, help="carry it out afterwards")


class ShellCommands:
    """Those of one shell."""

    def __init__(self, shell: Shell) -> None:
        self.shell = shell

    def commands(self) -> Iterator[Command]:
        yield worded(
            "set",
            "set [NAME VALUE ...]",
            "Choose how the console behaves, or list what is chosen.\n"
            + "\n".join(f"  {name:9} {meaning}" for name, (_, meaning) in CHOICES.items()),
            self._set,
            self._settings,
            ("set context regs code", "set"),
        )
        yield worded(
            "alias",
            "alias [NAME [COMMAND]]",
            "Give a command, or the beginning of one, a name; or list such names.\nWhat follows the name in a line is added.",
            self._alias,
            self._names,
            ("alias pg walk --access w", "alias pg"),
        )
        yield worded("unalias", "unalias NAME", "Take such a name back.", self._unalias, self._names, ("unalias pg", "unalias w"))
        yield Command(
            "source",
            self._source,
            "Carry out the commands of a file, or the Python of one that ends in .py.",
            (_FILE,),
            "Errors are shown; the rest is carried out.",
            ("source setup.vmdbg", "source census.py"),
        )
        yield Command(
            "edit",
            self._edit,
            "Edit a file of commands in $EDITOR.",
            (_OPTIONAL_FILE, _RUN),
            "Without a FILE a new one, which is carried out afterwards. ^X^E edits the line that is being typed.",
            ("edit setup.vmdbg --run", "edit"),
        )
        yield worded(
            "py",
            "py PYTHON",
            "Evaluate, or execute, Python.\n"
            "Every command is a function: walk('2:counter', access='w') gives its result, with .text() and .json().\n"
            "`vm` has them all, also those that Python has another word for: vm.help('walk'), vm.continue_(1000).\n"
            "`_` is the last result, `context` what commands run on (introspect.commands.Context).\n"
            "The whole line is Python's: quote nothing, pipe nothing.",
            self._unreachable,
            lambda context, words: self.shell.python.names(),
            ("py len(exits().json())", "py [g['number'] for g in guests().json()['guests']]"),
        )
        yield worded(
            "shell",
            "shell [COMMAND]",
            "Run a command of the system's shell, or that shell itself; ! does the same.",
            self._unreachable,
            lambda context, words: (),
            ("shell cat setup.vmdbg", "!ls *.vmdbg"),
        )
        yield worded(
            "echo", "echo WORDS", "Show these words.", self._echo, lambda context, words: (), ("echo hello", "echo 'two  spaces'")
        )
        yield Command(
            "tui",
            self._tui,
            "Fill the screen with panes: code, registers, stack, VMCB, exits, console. Again: leave it.",
            (),
            "PgUp and PgDn, or the mouse wheel, scroll the console; F12 leaves.",
            ("tui", "tui # in a narrow window"),
        )
        yield worded(
            "send",
            "send TEXT",
            "Send a line to the guest's serial port.",
            self._send,
            lambda context, words: (),
            ("send ls -l", "send 'x  y'"),
        )
        yield worded(
            "quit",
            "quit",
            "Leave. A machine of this process ends; one behind a stub does not.",
            self._quit,
            lambda context, words: (),
            ("quit", "q"),
        )

    def _settings(self, context: Context, words: Sequence[str]) -> Iterator[Candidate]:
        if not words:
            for name, (_, meaning) in CHOICES.items():
                yield Candidate(name, f"{meaning} ({self.shell.settings.said(name)})")
        elif words[0] in CHOICES:
            for value in CHOICES[words[0]][0]:
                if value not in words[1:]:
                    yield Candidate(value, "now" if value in self.shell.settings.said(words[0]).split() else "")

    def _names(self, context: Context, words: Sequence[str]) -> Iterator[Candidate]:
        if not words:
            for name, meaning in self.shell.aliases.items():
                yield Candidate(name, meaning)
        else:
            for name, command in self.shell.registry.commands.items():
                yield Candidate(name, command.summary)

    def _set(self, context: Context, arguments: Arguments) -> Text:
        words, arguments.words = arguments.words, []
        settings = self.shell.settings
        if len(words) > 1:
            settings.set(words[0], words[1:])
            if self.shell.source.control is not None:
                self.shell.source.control.by_lines = settings.steps == "line"
            return Text("")
        if words and words[0] not in CHOICES:
            settings.set(words[0], [])
        rows = [(name, settings.said(name), meaning) for name, (_, meaning) in CHOICES.items() if not words or name == words[0]]
        return Text("\n".join(columns(rows)), {"settings": {name: value for name, value, _ in rows}})

    def _alias(self, context: Context, arguments: Arguments) -> Text:
        words, arguments.words = arguments.words, []
        aliases = self.shell.aliases
        if len(words) < 2:
            rows = [(name, meaning) for name, meaning in sorted(aliases.items()) if not words or name == words[0]]
            if words and not rows:
                raise arguments.error(words[0], "there is no such alias", "give the command, too")
            return Text("\n".join(columns(rows)), {"aliases": dict(rows)})
        aliases[words[0]] = shlex.join(words[1:])
        return Text("")

    def _unalias(self, context: Context, arguments: Arguments) -> Text:
        name = " ".join(arguments.words)
        arguments.words = []
        if self.shell.aliases.pop(name, None) is None:
            raise arguments.error(name or "nothing", "there is no such alias", "`alias` lists them")
        return Text("")

    def _source(self, context: Context, arguments: Arguments) -> _Done:
        return _Done(self.shell.run_file(arguments[_FILE]))

    def _edit(self, context: Context, arguments: Arguments) -> _Done:
        name = arguments.get(_OPTIONAL_FILE)
        editor = os.environ.get("VISUAL") or os.environ.get("EDITOR") or "vi"
        if name is not None:
            name = os.path.expanduser(name)
            status = self.shell.output.run([*shlex.split(editor), name])
            return _Done(status or (self.shell.run_file(name) if arguments.get(_RUN) else 0))
        with tempfile.NamedTemporaryFile("w", prefix="vmdbg-", suffix=".vmdbg", delete=False) as file:
            file.write("# Commands; they are carried out when the editor ends.\n")
        try:
            return _Done(self.shell.output.run([*shlex.split(editor), file.name]) or self.shell.run_file(file.name))
        finally:
            os.unlink(file.name)

    def _echo(self, context: Context, arguments: Arguments) -> Text:
        words, arguments.words = arguments.words, []
        return Text(" ".join(words))

    def _tui(self, context: Context, arguments: Arguments) -> Text:
        if not self.shell.output.interactive:
            raise CommandError("tui", "there is no terminal to fill", "start vmdbg console on one")
        self.shell.wants_screen = True
        return Text("")

    def _send(self, context: Context, arguments: Arguments) -> Text:
        words, arguments.words = arguments.words, []
        send = getattr(self.shell.source, "send", None)
        if send is None:
            raise CommandError("send", "the serial port is not the console's", "start without --serial, on an image")
        send((" ".join(words) + "\n").encode())
        return Text("")

    def _quit(self, context: Context, arguments: Arguments) -> Result:
        from vmdbg.console.shell import Quit

        raise Quit

    def _unreachable(self, context: Context, arguments: Arguments) -> Result:
        """Lines of these are taken as they are, before words are made of them."""
        raise CommandError(arguments.command.name, "something must follow it", f"`help {arguments.command.name}`")


class _Done:
    """Something was carried out, with a status of its own."""

    def __init__(self, status: int) -> None:
        self.exit_status = status

    def text(self) -> str:
        return ""

    def json(self) -> object:
        return {"status": self.exit_status}
