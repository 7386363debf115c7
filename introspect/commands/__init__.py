"""The commands: each is one entry of a registry, with typed results that render as text and as JSON."""

from collections.abc import Mapping
from dataclasses import dataclass

from introspect.commands import avic, exits, guests, permissions, vmcb, walk
from introspect.commands.registry import (
    Arguments,
    Command,
    CommandError,
    Context,
    ExitRecord,
    GuestView,
    Registry,
    Result,
)
from introspect.commands.render import columns, jsonable

__all__ = [
    "Arguments", "Command", "CommandError", "Context", "ExitRecord", "GuestView", "Registry", "Result",
    "default_registry", "run_line",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Help:
    """Synopsis and help of some commands; of one, in full."""

    commands: Mapping[str, str]

    def text(self) -> str:
        if len(self.commands) == 1:
            ((synopsis, text),) = self.commands.items()
            return f"{synopsis}\n{text}"
        return "\n".join(columns((synopsis, text.partition("\n")[0]) for synopsis, text in self.commands.items()))

    def json(self) -> object:
        return jsonable(self.commands)


def default_registry() -> Registry:
    """A registry of all commands of this package, to which a machine may add its own."""
    modules = (guests, walk, vmcb, exits, permissions, avic)
    registry = Registry(command for module in modules for command in module.COMMANDS)

    def show_help(context: Context, arguments: Arguments) -> Result:
        if not arguments.words:
            return Help({command.synopsis: command.help for command in registry.commands.values()})
        command, rest = registry.find(arguments.words)
        arguments.words = list(rest)
        arguments.done()
        return Help({command.synopsis: command.help})

    registry.add(Command("help", "help [COMMAND]", "List the commands, or explain one.", show_help))
    return registry


_DEFAULT = default_registry()


def run_line(context: Context, line: str) -> Result:
    """Run one line with the commands of this package; `CommandError` for anything wrong with it."""
    return _DEFAULT.run_line(context, line)
