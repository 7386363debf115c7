"""`help`: what commands there are, and what one takes."""

from dataclasses import dataclass

from introspect.commands.context import Context
from introspect.commands.parameters import Candidate, CommandName, Parameter
from introspect.commands.registry import Arguments, Command, Registry, example_outputs
from introspect.commands.render import columns
from introspect.commands.topics import by_topic, topic_of

__all__ = ["Help", "help_command"]


@dataclass(frozen=True, slots=True)
class Help:
    """Synopsis and help of some commands; of one, in full."""

    commands: tuple[Command, ...]

    def text(self) -> str:
        if len(self.commands) == 1:
            return "\n".join(_explain(self.commands[0]))
        width = max((len(command.name) for command in self.commands), default=0)
        lines: list[str] = []
        for topic, commands in by_topic(self.commands):
            lines += [f"{topic}:", *(f"  {command.name.ljust(width)}  {command.summary}" for command in commands), ""]
        return "\n".join([*lines, "`help COMMAND` explains one; `--json` with any of them gives its result as JSON."])

    def json(self) -> object:
        return [
            {"name": c.name, "topic": topic_of(c.name), "synopsis": c.synopsis, "summary": c.summary, "details": c.details,
             "parameters": [{"name": p.name, "kind": p.kind.noun, "option": p.option, "optional": p.optional, "help": p.help}
                            for p in c.parameters],
             "examples": [{"line": line, "output": example_outputs().get(line)} for line in c.examples]}
            for c in self.commands
        ]  # fmt: skip


def _explain(command: Command) -> list[str]:
    lines = [command.synopsis, command.summary]
    if command.details:
        lines += ["", *command.details.split("\n")]
    rows = [
        (parameter.title, parameter.help or parameter.kind.noun) for parameter in command.parameters if not command.usage
    ]
    if rows:
        lines += ["", *columns(rows, "  ")]
    for line in command.examples:
        lines += ["", f"> {line}"]
        lines += [output] if (output := example_outputs().get(line)) else []
    return lines


def help_command(registry: Registry) -> Command:
    """`help` on the commands of a registry, those that it gets later too."""

    def names() -> list[Candidate]:
        return [Candidate(command.name, command.summary) for command in registry.commands.values()]

    name = Parameter("COMMAND", CommandName(names), optional=True)

    def run(context: Context, arguments: Arguments) -> Help:
        words = (arguments.get(name) or "").split()
        if not words:
            return Help(tuple(registry.commands.values()))
        command, rest = registry.find(words)
        if rest:
            raise arguments.error(rest[0], "not understood here", f"`help {command.name}` explains that command")
        return Help((command,))

    return Command("help", run, "List the commands, or explain one.", (name,), examples=("help who-maps", "help vmrun why"))
