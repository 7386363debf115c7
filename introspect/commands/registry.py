"""The command registry: what a command is, what it may be given, how a line becomes a result.

A command typed in the console, sent as gdb's `monitor`, called from Python or run on a dump is the same entry.
"""

import difflib
import json
import re
import shlex
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import resources
from typing import Any, NamedTuple, TypeVar, cast

from introspect.commands.context import CommandError, Context, GuestView, HostView, Result
from introspect.commands.parameters import (
    Candidate,
    Flag,
    Format,
    Misfit,
    Parameter,
    Rest,
    find_guest,
    known_guests,
    parse_number,
)

__all__ = [
    "SCHEMA", "Arguments", "Command", "Completion", "Registry", "as_json", "error_json", "example_outputs", "failure_json",
    "worded",
]  # fmt: skip

T = TypeVar("T")
SCHEMA = 1
"""Version of what `--json` gives: it changes when a name or a type in it does, not when something is added."""
_JSON = "--json"
_UNQUOTED = re.compile(r"[ !#-&(-\[\]-~]*")
"""Lines in which shlex, which takes a while, would find nothing that `split` does not: ASCII without quotes and backslashes."""


@dataclass(frozen=True)
class Command:
    """An entry of the registry. `name` may be two words."""

    name: str
    run: "Callable[[Context, Arguments], Result]"
    summary: str
    """One line: what it shows or does."""
    parameters: tuple[Parameter[Any], ...] = ()
    details: str = ""
    examples: tuple[str, ...] = ()
    """Lines to try; what they gave in a real run is kept beside, see `example_outputs`."""
    usage: str = ""
    """The synopsis of a command with a grammar of its own."""
    aliases: tuple[str, ...] = ()
    """Other names that it has."""

    @property
    def synopsis(self) -> str:
        if self.usage:
            return self.usage
        format, rest = (self.parameters[:1], self.parameters[1:]) if self.formatted else ((), self.parameters)
        name = self.name + "".join(parameter.synopsis for parameter in format)
        return " ".join([name, *(parameter.synopsis for parameter in rest)])

    @cached_property
    def formatted(self) -> bool:
        """Whether the first parameter may stick to the name, as in gdb's x/8gx."""
        return bool(self.parameters) and isinstance(self.parameters[0].kind, Format)

    @cached_property
    def options(self) -> dict[str, Parameter[Any]]:
        return {parameter.option: parameter for parameter in self.parameters if parameter.option}

    @cached_property
    def positional(self) -> list[Parameter[Any]]:
        return [p for p in self.parameters if not p.only_option and not isinstance(p.kind, Flag)]

    @cached_property
    def own_grammar(self) -> bool:
        """Whether it reads its words itself, those that look like options too."""
        return any(isinstance(parameter.kind, Rest) for parameter in self.parameters)


def worded(
    name: str, usage: str, help: str, run: "Callable[[Context, Arguments], Result]",
    candidates: Callable[[Context, Sequence[str]], Iterable[Candidate]] | None = None, examples: tuple[str, ...] = (),
) -> Command:  # fmt: skip
    """A command that takes its words one by one.  `help`: the summary in its first line, then details.

    Without `candidates` completion offers the words of the usage, and guests.
    """
    summary, _, details = help.partition("\n")
    literal = [Candidate(word) for word in dict.fromkeys(re.findall(r"[a-z][a-z0-9-]+", usage.removeprefix(name)))]

    def offered(context: Context, words: Sequence[str]) -> Iterable[Candidate]:
        return [*literal, *(Candidate(str(guest.number), guest.name) for guest in context.guests)]

    rest = Parameter("WORDS", Rest("words of its own", candidates or offered), optional=True)
    return Command(name, run, summary, (rest,), details, examples, usage)


class Arguments:
    """What a command was given: `arguments[PARAMETER]` is the value, or the parameter's default.

    A command with a grammar of its own takes `words` one by one; every error shows the synopsis.
    """

    def __init__(self, context: Context, command: Command, words: Sequence[str]) -> None:
        """CommandError for words that do not fit the command's parameters."""
        self.context, self.command = context, command
        self.words = list(words)
        self._values: dict[Parameter[Any], Any] = {}
        if not command.own_grammar:
            self._parse()

    @classmethod
    def none(cls, context: Context, command: Command) -> "Arguments":
        """What a program gives them, one by one with `give`, to a command without a grammar of its own."""
        found = cls.__new__(cls)
        found.context, found.command, found.words, found._values = context, command, [], {}
        return found

    def give(self, parameter: Parameter[Any], words: Sequence[str]) -> None:
        """The value of one, as words. CommandError if they are none."""
        left = list(words)
        try:
            self._values[parameter] = True if isinstance(parameter.kind, Flag) else parameter.kind.take(self.context, left)
        except Misfit as misfit:
            raise self._misfit(words[0], parameter, misfit) from None
        if left and not isinstance(parameter.kind, Flag):
            raise self.error(left[0], f"{parameter.name} is {parameter.kind.noun}, and nothing behind it")

    def __getitem__(self, parameter: Parameter[T]) -> T:
        """The value of one that is required, or has a default."""
        value: Any = self._values.get(parameter, parameter.default)
        return cast(T, value)

    def get(self, parameter: Parameter[T]) -> T | None:
        """The value of an optional one; its default, or None, if it was left out."""
        return self._values.get(parameter, parameter.default)

    def given(self, parameter: Parameter[Any]) -> bool:
        return parameter in self._values

    def error(self, value: str, rule: str, remedy: str = "") -> CommandError:
        return CommandError(value, rule, f"{remedy}{'; ' if remedy else ''}usage: {self.command.synopsis}")

    def _parse(self) -> None:
        words = self._take_options()
        skipped: list[tuple[Parameter[Any], Misfit]] = []
        for parameter in self.command.positional:
            if parameter in self._values or not words:
                continue
            try:
                self._values[parameter] = parameter.kind.take(self.context, words)
            except Misfit as misfit:
                if misfit.meant or not parameter.optional:
                    raise self._misfit(words[0], parameter, misfit) from None
                skipped.append((parameter, misfit))
        for parameter in self.command.positional:
            if parameter not in self._values and not parameter.optional:
                raise self.error(parameter.name, "missing", f"give {parameter.kind.noun}")
        if words:
            if len(skipped) == 1:
                raise self._misfit(words[0], *skipped[0])
            reasons = " and ".join(f"no {parameter.name} ({misfit.rule})" for parameter, misfit in skipped)
            raise self.error(words[0], f"it is {reasons}" if reasons else "not understood here", known_guests(self.context))
        self.words = []

    def _misfit(self, word: str, parameter: Parameter[Any], misfit: Misfit) -> CommandError:
        return self.error(word or "''", f"{parameter.name}: {misfit.rule}", misfit.remedy)

    def _take_options(self) -> list[str]:
        """Read the options; the words that are none."""
        options, words = self.command.options, list(self.words)
        left: list[str] = []
        while words:
            word = words.pop(0)
            if word == "--":
                return [*left, *words]
            if not word.startswith("--"):
                left.append(word)
                continue
            name, equals, value = word.partition("=")
            parameter = options.get(name)
            if parameter is None:
                near = difflib.get_close_matches(name, options, n=1) or list(options)
                known = f"it takes {', '.join(near)}" if near else "it takes none"
                raise self.error(name, f"`{self.command.name}` has no such option", known)
            if isinstance(parameter.kind, Flag):
                if equals:
                    raise self.error(word, f"{name} takes no value")
                self._values[parameter] = True
                continue
            if equals:
                words.insert(0, value)
            if not words:
                raise self.error(name, f"{parameter.name} is missing behind it", f"give {parameter.kind.noun}")
            taken = [words.pop(0)]
            try:
                self._values[parameter] = parameter.kind.take(self.context, taken)
            except Misfit as misfit:
                raise self._misfit(value or taken[0], parameter, misfit) from None
        return left

    # For commands with a grammar of their own

    def peek(self) -> str | None:
        return self.words[0] if self.words else None

    def number(self, name: str, low: int = 0, high: int = (1 << 64) - 1) -> int:
        """The next word as a number in C notation, within low..high."""
        if not self.words:
            raise self.error(name, "missing")
        word = self.words.pop(0)
        value = parse_number(word)
        if value is None:
            raise self.error(word, f"{name} must be a number", "write it as 4096 or 0x1000")
        if not low <= value <= high:
            raise self.error(word, f"{name} must be within {low:#x} and {high:#x}")
        return value

    def choice(self, choices: Iterable[str]) -> str | None:
        """The next word if it is one of these."""
        return self.words.pop(0) if self.words and self.words[0] in choices else None

    def named_guest(self) -> GuestView | None:
        """The next word as the number or name of a guest, if it is one."""
        guest = find_guest(self.context, self.words[0]) if self.words else None
        if guest is not None:
            self.words.pop(0)
        return guest

    def selected_guest(self) -> GuestView:
        """The guest that is meant if none is named."""
        if self.context.selected is None:
            raise self.error("GUEST", "missing, and no guest is selected", known_guests(self.context))
        return self.context.selected

    def guest_or_selected(self, parameter: Parameter[GuestView]) -> GuestView:
        return self.get(parameter) or self.selected_guest()

    def owner_or_selected(self, parameter: Parameter[GuestView | HostView]) -> GuestView | HostView:
        return self.get(parameter) or self.context.selected or self.context.host

    def done(self) -> None:
        """Refuse what is left."""
        if self.words:
            raise self.error(self.words[0], "not understood here", known_guests(self.context))


class Completion(NamedTuple):
    """What the last word of a line may become; it begins at `start`."""

    start: int
    candidates: list[Candidate]


class _Call(NamedTuple):
    command: Command
    words: list[str]
    json: bool


class Registry:
    """Commands by name. Names may be shortened as long as one command fits."""

    def __init__(self, commands: Iterable[Command] = ()) -> None:
        self.commands: dict[str, Command] = {}
        self.names: dict[str, Command] = {}
        """The commands by all their names."""
        self.elsewhere: Collection[str] = ()
        """Names of commands that others have, as a live machine where this is a dump's: to say so."""
        for command in commands:
            self.add(command)

    def add(self, command: Command) -> None:
        """ValueError if a name is taken."""
        for name in (command.name, *command.aliases):
            if name in self.names:
                raise ValueError(f"there is already a command {name!r}; name the new one differently")
            self.names[name] = command
        self.commands[command.name] = command

    def remove(self, name: str) -> None:
        """A command, by its name, with all its names; nothing if there is none."""
        command = self.commands.pop(name, None)
        self.names = {known: other for known, other in self.names.items() if other is not command}

    def find(self, words: Sequence[str]) -> tuple[Command, Sequence[str]]:
        """The command that the first words name, and the words after the name."""
        name, slash, format = words[0].partition("/")
        if slash and name:
            command, _ = self.find([name])
            if command.formatted:
                return command, [slash + format, *words[1:]]
        for count in (2, 1):
            name = " ".join(words[:count])
            if len(words) >= count and name in self.names:
                return self.names[name], words[count:]
            if len(words) >= count and name in self.elsewhere:
                rule, remedy = "memory does not tell this, only a machine that runs does", "ask with `vmdbg console IMAGE`"
                raise CommandError(name, rule, remedy)
        for count in (2, 1):
            name = " ".join(words[:count])
            fitting = {command.name: command for known, command in self.names.items() if known.startswith(name)}
            if len(words) >= count and len(fitting) == 1:
                return next(iter(fitting.values())), words[count:]
            if len(fitting) > 1:
                raise CommandError(name, "more than one command begins so", f"choose from {', '.join(fitting)}")
        near = difflib.get_close_matches(words[0], self.names, n=2, cutoff=0.5)
        raise CommandError(words[0], "no such command", f"try {' or '.join([*near, 'help'])}")

    def _read(self, line: str) -> _Call:
        try:
            words = line.split() if _UNQUOTED.fullmatch(line) else shlex.split(line)
        except ValueError as error:
            raise CommandError(line, str(error).lower(), "close the quotation") from error
        as_json = _JSON in words
        words = [word for word in words if word != _JSON]
        command, rest = self.find(words or ["help"])
        return _Call(command, list(rest), as_json)

    def run_line(self, context: Context, line: str) -> Result:
        """Parse and run one line; `CommandError` for anything wrong with it. An empty line is `help`."""
        call = self._read(line)
        return call.command.run(context, Arguments(context, call.command, call.words))

    def answer(self, context: Context, line: str) -> tuple[str, Result]:
        """What one line gives, as text, or with `--json` in it as that; and the result itself. CommandError as `run_line`."""
        call = self._read(line)
        result = call.command.run(context, Arguments(context, call.command, call.words))
        return (as_json(call.command.name, result) if call.json else result.text()), result

    def wants_json(self, line: str) -> bool:
        return _JSON in line.split()

    def call(self, context: Context, name: str, *values: object, **options: object) -> Result:
        """A command from Python: `call(context, "walk", "2:tick", access="w")`. CommandError as for the same line."""
        command = self.names.get(name.replace("_", " ")) or self.names.get(name.replace("_", "-"))
        if command is None:
            command, _ = self.find([name])
        words = [str(value) for value in values]
        for key, value in options.items():
            if value is not None and value is not False:
                words += [f"--{key.replace('_', '-')}", *([] if value is True else [str(value)])]
        return command.run(context, Arguments(context, command, words))

    # Completion

    def complete(self, context: Context, line: str) -> Completion:
        """What may stand where the line ends. Never raises for a line that is wrong."""
        start = len(line) - len(_last_word(line))
        prefix = line[start:]
        try:
            before = shlex.split(line[:start])
        except ValueError:
            before = line[:start].split()
        return Completion(start, list(_distinct(self._candidates(context, before, prefix))))

    def _candidates(self, context: Context, before: list[str], prefix: str) -> Iterator[Candidate]:
        if not before:
            stem, slash, _ = prefix.partition("/")
            if slash and stem in self.names and self.names[stem].formatted:
                for one in self.names[stem].parameters[0].kind.complete(context, prefix):
                    yield Candidate(stem + one.text, one.meaning)
                return
            for name, command in self.names.items():
                yield Candidate(name.split()[0], command.summary)
            return
        if len(before) == 1:
            for name, command in self.commands.items():
                if name.startswith(before[0] + " "):
                    yield Candidate(name.split()[1], command.summary)
        try:
            command, rest = self.find(before)
        except CommandError:
            return
        yield from _parameter_candidates(context, command, list(rest), prefix)


def _parameter_candidates(context: Context, command: Command, words: list[str], prefix: str) -> Iterator[Candidate]:
    if command.own_grammar:
        for parameter in command.parameters:
            if isinstance(parameter.kind, Rest):
                yield from parameter.kind.candidates(context, words)
        return
    options = command.options
    if words and words[-1] in options and not isinstance(options[words[-1]].kind, Flag):
        yield from options[words[-1]].kind.complete(context, prefix)
        return
    if prefix.startswith("--"):
        name, equals, value = prefix.partition("=")
        if equals and name in options:
            for candidate in options[name].kind.complete(context, value):
                yield Candidate(f"{name}={candidate.text}", candidate.meaning)
            return
        for option, parameter in options.items():
            if option not in words:
                yield Candidate(option, parameter.help or parameter.kind.noun)
        yield Candidate(_JSON, "the result as JSON")
        return
    left = _without_options(command, words)
    for parameter in command.positional:
        if left:
            try:
                parameter.kind.take(context, left)
            except (Misfit, CommandError):
                if not parameter.optional:
                    return
            continue
        yield from parameter.kind.complete(context, prefix)
        if not parameter.optional:
            return


def _without_options(command: Command, words: list[str]) -> list[str]:
    left, options, skip = [], command.options, False
    for word in words:
        if skip:
            skip = False
        elif word.startswith("--"):
            skip = word in options and not isinstance(options[word].kind, Flag)
        else:
            left.append(word)
    return left


def _distinct(candidates: Iterable[Candidate]) -> Iterator[Candidate]:
    seen = set()
    for candidate in candidates:
        if candidate.text not in seen:
            seen.add(candidate.text)
            yield candidate


def _last_word(line: str) -> str:
    found = re.search(r"\S*$", line)
    return found[0] if found else ""


def as_json(name: str, result: Result) -> str:
    """One line of JSON: the command's name, the version of the schema, the result."""
    return json.dumps({"command": name, "schema": SCHEMA, "result": result.json()})


def error_json(error: CommandError) -> str:
    """The same of a command that could not be carried out."""
    return failure_json(error.rule, error.value, error.remedy)


def failure_json(rule: str, value: str = "", remedy: str = "") -> str:
    """The same of what has gone wrong besides: a machine that refuses, a file that cannot be read."""
    return json.dumps({"schema": SCHEMA, "error": {"value": value, "rule": rule, "remedy": remedy}})


@cache
def example_outputs() -> Mapping[str, str]:
    """What the examples of all commands gave in a run of the demo hypervisor, by line."""
    try:
        text = resources.files("introspect.commands").joinpath("examples.json").read_text(encoding="utf-8")
        outputs: dict[str, str] = json.loads(text)
    except (OSError, ValueError):
        return {}
    return outputs

