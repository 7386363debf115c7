"""`py`: Python on the same commands."""

from __future__ import annotations

import builtins
import contextlib
import io
import keyword
import pprint
import traceback
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from gdbstub.target import TargetError
from introspect.commands import CommandError, Result
from introspect.commands.parameters import Candidate

if TYPE_CHECKING:
    from vmdbg.console.shell import Shell

__all__ = ["Api", "Python"]


class Api:
    """The commands as methods: `vm.walk("2:counter", access="w")`."""

    def __init__(self, shell: Shell) -> None:
        self._shell = shell

    def __getattr__(self, name: str) -> Callable[..., Result]:
        if name.startswith("__"):
            raise AttributeError(name)
        asked = name.rstrip("_")

        def call(*values: object, **options: object) -> Result:
            return self._shell.call(asked, *values, **options)

        known = asked in self._shell.registry.commands or any(asked == _identifier(one) for one in self._shell.registry.commands)
        if not known:
            raise AttributeError(f"there is no command {asked}; vm.help() lists them")
        call.__name__ = name
        return call

    def __dir__(self) -> list[str]:
        return [_identifier(name) for name in self._shell.registry.commands]

    def __repr__(self) -> str:
        return f"<the commands of {self._shell.source.name}: vm.help() lists them>"


def _identifier(name: str) -> str:
    word = name.replace(" ", "_").replace("-", "_")
    return word + "_" if keyword.iskeyword(word) else word


class Python:
    """One console's names, which stay from line to line."""

    def __init__(self, shell: Shell) -> None:
        self.shell = shell
        self.last: object = None
        self.space: dict[str, Any] = {"__name__": "__console__", "vm": Api(shell)}
        self._own: set[str] = set()

    def refresh(self) -> None:
        """Names of commands that came, of those that the user has no other use for."""
        api = self.space["vm"] if isinstance(self.space.get("vm"), Api) else Api(self.shell)
        for name in dir(api):
            if name not in self.space and not hasattr(builtins, name):
                self.space[name] = getattr(api, name)
                self._own.add(name)
        self.space.setdefault("vm", api)
        self.space["context"] = self.shell.source.context
        self.space["_"] = self.last

    def names(self) -> Iterator[Candidate]:
        """For completion."""
        self.refresh()
        for name, value in self.space.items():
            if not name.startswith("__"):
                command = self.shell.registry.commands.get(name.replace("_", " ")) or self.shell.registry.commands.get(
                    name.rstrip("_")
                )
                yield Candidate(name, command.summary if command is not None and name in self._own else type(value).__name__)

    def run(self, text: str) -> int:
        """A line: the value of an expression is shown, and is `_` from then on."""
        try:
            code, shows = compile(text, "<py>", "eval"), True
        except SyntaxError:
            shows = False
            try:
                code = compile(text, "<py>", "exec")
            except (SyntaxError, ValueError, OverflowError, MemoryError, RecursionError) as error:
                raise CommandError(text, f"Python says: {error}", "`help py` has examples") from None
        except (ValueError, OverflowError, MemoryError, RecursionError) as error:
            raise CommandError(repr(text), f"Python says: {error}", "`help py` has examples") from None
        return self._run(code, shows)

    def run_text(self, text: str, path: str) -> int:
        """A file."""
        try:
            return self._run(compile(text, path, "exec"), False)
        except (SyntaxError, ValueError) as error:
            raise CommandError(path, f"Python says: {error}", "correct it") from None

    def _run(self, code: Any, shows: bool) -> int:
        self.refresh()
        printed, value = io.StringIO(), None
        try:
            with contextlib.redirect_stdout(printed):
                value = eval(code, self.space)
                if shows and value is not None:
                    self.last = value
                    print(shown(value))
        except (CommandError, TargetError, KeyboardInterrupt):
            raise
        except SystemExit:
            pass
        except BaseException as error:
            self._show(printed)
            lines = traceback.format_exception_only(error)
            frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/vmdbg/console/" not in frame.filename]
            where = f" (line {frames[0].lineno} of {frames[0].filename})" if frames and frames[0].filename != "<py>" else ""
            self.shell.output.show(f"{lines[-1].strip()}{where}", "error")
            return 1
        self._show(printed)
        return 0

    def _show(self, printed: io.StringIO) -> None:
        if text := printed.getvalue().rstrip("\n"):
            self.shell.output.show(text)


def shown(value: object) -> str:
    """A value for the user: a result as its text, a number in both bases."""
    if hasattr(value, "text") and hasattr(value, "json") and callable(value.text):
        return str(value.text())
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > 9:
        return f"{value} ({value:#x})"
    return value if isinstance(value, str) else pprint.pformat(value, width=100)
