"""The command registry: what a command is, what it may ask for, how a line becomes a result.

A command typed in the console, sent as gdb's `monitor`, called from Python or run on a dump is the same entry.
"""

import difflib
import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from introspect.exitlog import ExitRecord
from introspect.memtypes import Caching
from introspect.paging import Nested, PagingState
from introspect.rules import Processor
from introspect.sources import Memory

__all__ = ["Arguments", "Command", "CommandError", "Context", "ExitRecord", "GuestView", "Registry", "Result"]


class CommandError(Exception):
    """A command that cannot be carried out: the offending value, the rule it breaks, and what to do instead."""

    def __init__(self, value: str, rule: str, remedy: str) -> None:
        super().__init__(f"{value}: {rule}; {remedy}")
        self.value, self.rule, self.remedy = value, rule, remedy


@dataclass(frozen=True, slots=True)
class GuestView:
    """One guest as the commands see it. `vmcbs`: system-physical addresses, one for each virtual processor."""

    number: int
    name: str
    vmcbs: tuple[int, ...]
    asid: int
    ncr3: int | None
    """None without nested paging."""
    paging: PagingState
    nested: Nested | None
    parent: int | None = None
    """The guest whose hypervisor runs it; None under the hypervisor of the machine."""
    inner: int | None = None
    """System-physical address of the VMCB that the hypervisor in `parent` made for it, if that is known."""
    caching: Caching | None = None
    """What decides its memory types, if that is known."""

    def __str__(self) -> str:
        return f"guest {self.number} ({self.name})"


class Context(Protocol):
    """What a machine, a dump or a remote stub offers to the commands."""

    @property
    def memory(self) -> Memory: ...

    @property
    def processor(self) -> Processor: ...

    @property
    def host_paging(self) -> PagingState: ...

    @property
    def host_caching(self) -> Caching | None:
        """What decides the host's memory types, if that is known."""

    @property
    def guests(self) -> Sequence[GuestView]: ...

    @property
    def selected(self) -> GuestView | None:
        """The guest that a command means if none is named; None while the host is selected."""

    def exits(self, guest: int | None, count: int) -> Sequence[ExitRecord]:
        """The last `count` exits of one guest, or of all, oldest first."""


class Result(Protocol):
    """What a command found out."""

    def text(self) -> str:
        """Aligned plain text without a final newline."""

    def json(self) -> object:
        """The same as JSON-able values; numbers stay numbers."""


class Arguments:
    """The words after a command's name, taken one by one; every error shows the synopsis."""

    def __init__(self, context: Context, synopsis: str, words: Sequence[str]) -> None:
        self.context, self.synopsis, self.words = context, synopsis, list(words)

    def error(self, value: str, rule: str, remedy: str = "") -> CommandError:
        return CommandError(value, rule, f"{remedy}{'; ' if remedy else ''}usage: {self.synopsis}")

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
        word = self.peek()
        for guest in self.context.guests if word is not None else ():
            if word in (str(guest.number), guest.name):
                self.words.pop(0)
                return guest
        return None

    def guest(self) -> GuestView:
        """The guest the next word names, or the selected one."""
        guest = self.named_guest()
        if guest is None and self.words:
            raise self.error(self.words[0], "no guest has this number or name", self._known())
        return guest or self.selected_guest()

    def space(self) -> GuestView | None:
        """The guest the next word names; None for the word "host"; without either what is selected."""
        return None if self.choice(("host",)) else self.named_guest() or self.context.selected

    def selected_guest(self) -> GuestView:
        if self.context.selected is None:
            raise self.error("GUEST", "missing, and no guest is selected", self._known())
        return self.context.selected

    def _known(self) -> str:
        known = ", ".join(f"{guest.number} ({guest.name})" for guest in self.context.guests)
        return f"the guests are {known}" if known else "no guest has been entered by VMRUN yet"

    def done(self) -> None:
        """Refuse what is left."""
        if self.words:
            raise self.error(self.words[0], "not understood here", self._known())


def parse_number(word: str) -> int | None:
    """A number in C notation (underscores allowed), or None."""
    try:
        return int(word, 0)
    except ValueError:
        return None


@dataclass(frozen=True, slots=True)
class Command:
    """An entry of the registry. `name` may be two words; `synopsis` is the name with its arguments."""

    name: str
    synopsis: str
    help: str
    """First line: what it shows. Then, after a blank line, details."""
    run: Callable[[Context, Arguments], Result]


class Registry:
    """Commands by name. Names may be shortened as long as one command fits."""

    def __init__(self, commands: Iterable[Command] = ()) -> None:
        self.commands: dict[str, Command] = {}
        for command in commands:
            self.add(command)

    def add(self, command: Command) -> None:
        """ValueError if the name is taken."""
        if command.name in self.commands:
            raise ValueError(f"there is already a command {command.name!r}; name the new one differently")
        self.commands[command.name] = command

    def find(self, words: Sequence[str]) -> tuple[Command, Sequence[str]]:
        """The command that the first words name, and the words after the name."""
        for count in (2, 1):
            name = " ".join(words[:count])
            if len(words) >= count and name in self.commands:
                return self.commands[name], words[count:]
        for count in (2, 1):
            name = " ".join(words[:count])
            fitting = [known for known in self.commands if known.startswith(name)]
            if len(words) >= count and len(fitting) == 1:
                return self.commands[fitting[0]], words[count:]
            if len(fitting) > 1:
                raise CommandError(name, "more than one command begins so", f"choose from {', '.join(fitting)}")
        near = difflib.get_close_matches(words[0], self.commands, n=2, cutoff=0.5)
        raise CommandError(words[0], "no such command", f"try {' or '.join([*near, 'help'])}")

    def run_line(self, context: Context, line: str) -> Result:
        """Parse and run one line; `CommandError` for anything wrong with it. An empty line is `help`."""
        try:
            words = shlex.split(line)
        except ValueError as error:
            raise CommandError(line, str(error).lower(), "close the quotation") from error
        command, rest = self.find(words or ["help"])
        return command.run(context, Arguments(context, command.synopsis, rest))
