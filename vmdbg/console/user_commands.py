"""Commands of the user's own, from files of Python that are read again when they change.

from vmdbg.console import command

@command("npfs", "Count the nested page faults of a guest.")
def npfs(vm, guest: int = 2):
    return sum(one["name"] == "NPF" for one in vm.exits(guest, 4096).json())
"""

from __future__ import annotations

import inspect
import os
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from introspect.commands import Arguments, Command, Context, Result
from introspect.commands.parameters import Address, Flag, Guest, Number, Parameter
from introspect.commands.parameters import Text as Word
from vmdbg.console.python import Api, shown
from vmdbg.results import Text

if TYPE_CHECKING:
    from vmdbg.console.shell import Shell

__all__ = ["UserCommands", "command"]

F = TypeVar("F", bound=Callable[..., object])
_collected: list[tuple[str, str, Callable[..., object]]] = []


def command(name: str, summary: str = "") -> Callable[[F], F]:
    """Make a function a command. Its first parameter is the API (`vm`); the others are the command's.

    Their kinds are those of their annotations (int, bool as an option without value, str), or of their names: `guest` is a
    guest's number or name, `address` an address, given as text. Those with defaults may be left out. What it returns is shown.
    """

    def take(function: F) -> F:
        _collected.append((name, summary or (inspect.getdoc(function) or name).split("\n")[0], function))
        return function

    return take


def made(shell: Shell, name: str, summary: str, function: Callable[..., object]) -> Command:
    """The entry of the registry."""
    parameters = [_parameter(one) for one in list(inspect.signature(function).parameters.values())[1:]]

    def run(context: Context, arguments: Arguments) -> Result:
        values = []
        for parameter in parameters:
            value: Any = arguments.get(parameter)
            values.append(
                getattr(value, "text", value) if isinstance(parameter.kind, Address) else getattr(value, "number", value)
            )
        found = function(Api(shell), *values)
        if hasattr(found, "text") and hasattr(found, "json"):
            result: Result = found
            return result
        return Text("" if found is None else shown(found))

    return Command(name, run, summary, tuple(parameters), (inspect.getdoc(function) or "").partition("\n")[2].strip())


def _parameter(one: inspect.Parameter) -> Parameter[Any]:
    optional = one.default is not inspect.Parameter.empty
    default = one.default if optional else None
    kind = str(one.annotation if isinstance(one.annotation, str) else getattr(one.annotation, "__name__", ""))
    if kind == "bool":
        return Parameter(one.name.upper(), Flag(), True, f"--{one.name.replace('_', '-')}", True, bool(default))
    if one.name == "guest":
        return Parameter("GUEST", Guest(), optional, "--guest", default=default)
    if one.name == "address":
        return Parameter("ADDRESS", Address(), optional, default=default)
    return Parameter(one.name.upper(), Number() if kind == "int" else Word(), optional, default=default)


class UserCommands:
    """Of some files, each as it was when it was read last."""

    def __init__(self, shell: Shell, files: Sequence[Path]) -> None:
        self.shell, self.files = shell, list(files)
        self._read: dict[Path, tuple[int, int]] = {}
        self._names: dict[Path, list[str]] = {}

    def refresh(self) -> None:
        """Read what has changed. A file with an error in it loses its commands, until it is corrected."""
        for path in self.files:
            try:
                found = os.stat(path)
                version = found.st_mtime_ns, found.st_size
            except (OSError, ValueError):
                version = 0, -1
            if self._read.get(path, (0, -1)) == version:
                continue
            self._read[path] = version
            for name in self._names.pop(path, []):
                self.shell.registry.remove(name)
            if version[1] >= 0:
                self._load(path)

    def _load(self, path: Path) -> None:
        _collected.clear()
        names = self._names[path] = []
        try:
            space = {"__name__": f"vmdbg_user_{path.stem}", "__file__": str(path)}
            exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), space)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
            where = f", line {frames[-1].lineno}" if frames else ""
            self.shell.output.show(f"{path}{where}: {traceback.format_exception_only(error)[-1].strip()}", "error")
            return
        for name, summary, function in _collected:
            if name in self.shell.registry.names:
                self.shell.output.show(f"{path}: there is already a command {name}; name it differently", "error")
                continue
            try:
                self.shell.registry.add(made(self.shell, name, summary, function))
                names.append(name)
            except (ValueError, TypeError) as error:
                self.shell.output.show(f"{path}: {name}: {error}", "error")
        _collected.clear()
