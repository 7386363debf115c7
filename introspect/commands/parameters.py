"""What a command may be given: parameters with kinds, which read words, complete them, and say what they are."""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, Protocol, TypeVar

from introspect.commands.context import HOST_NUMBER, CommandError, Context, GuestView, HostView
from introspect.commands.devices import DeviceView, device_names, device_view
from introspect.commands.scan import Attaching
from introspect.exits import ExitCode
from introspect.expression import HOST, ExpressionError, Space, UnknownName, parse, parse_address
from introspect.pci import RequesterId
from introspect.source_lines import SourceLines, is_line
from introspect.symbols import Symbol as LoadedSymbol
from introspect.symbols import Symbols
from introspect.vmcb import VMCB

__all__ = [
    "Address", "Candidate", "Choice", "CommandName", "ExitCodeKind", "Expression", "Field", "File", "Flag", "Format", "Guest",
    "Kind", "Layout", "Located", "Misfit", "Number", "Owner", "Parameter", "Physical", "Requester", "Rest", "Symbol", "Text",
    "lacking", "parse_number", "remedy_of", "unknown_line",
]  # fmt: skip

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
_MAX = (1 << 64) - 1
_MANY = 300
"""Symbols that completion offers at most: more help nobody."""
_FEW = 20_000
"""So many are looked at letter by letter."""


class Misfit(Exception):
    """A word is none of this kind: the rule it breaks, and what to do instead. `meant`: it was meant to be one all the same."""

    def __init__(self, rule: str, remedy: str = "", meant: bool = False) -> None:
        super().__init__(rule)
        self.rule, self.remedy, self.meant = rule, remedy, meant


class Candidate(NamedTuple):
    """What a word may become, and what that is in a few words."""

    text: str
    meaning: str = ""


class Kind(Protocol[T_co]):
    """How one parameter is read."""

    @property
    def noun(self) -> str:
        """What it is, with its article: "a number"."""

    def take(self, context: Context, words: list[str]) -> T_co:
        """Take as many of the words as it wants, at least one.  Raises `Misfit`, with the words as they were."""

    def complete(self, context: Context, prefix: str) -> Iterable[Candidate]: ...


class _OneWord(ABC, Generic[T]):
    """A kind that is one word; subclasses parse it."""

    def take(self, context: Context, words: list[str]) -> T:
        value = self.parse(context, words[0])
        words.pop(0)
        return value

    @abstractmethod
    def parse(self, context: Context, word: str) -> T:
        """The value of a word.  Raises `Misfit`."""

    def complete(self, context: Context, prefix: str) -> Iterable[Candidate]:
        return ()


@dataclass(frozen=True, eq=False)
class Parameter(Generic[T]):
    """One parameter of a command.  Positional, and if it has an `option` ("--guest") also by that, anywhere in the line.

    `only_option`: by nothing else.  The value of one that is left out is `default`.
    """

    name: str
    kind: Kind[T]
    optional: bool = False
    option: str = ""
    only_option: bool = False
    default: T | None = None
    help: str = ""

    @property
    def synopsis(self) -> str:
        if isinstance(self.kind, Flag):
            return f"[{self.option}]"
        if self.only_option:
            return f"[{self.option} {self.name}]"
        return f"[{self.name}]" if self.optional else self.name

    @property
    def title(self) -> str:
        """How it may be given: "GUEST, --guest"."""
        if isinstance(self.kind, Flag):
            return self.option
        if self.only_option:
            return f"{self.option} {self.name}"
        return f"{self.name}, {self.option}" if self.option else self.name


def parse_number(word: str) -> int | None:
    """A number in C notation (underscores allowed), or None."""
    try:
        return int(word, 0)
    except ValueError:
        return None


@dataclass(frozen=True)
class Number(_OneWord[int]):
    """A number in C notation, within low..high."""

    low: int = 0
    high: int = _MAX
    noun: str = "a number"

    def parse(self, context: Context, word: str) -> int:
        value = parse_number(word)
        if value is None:
            raise Misfit(f"it must be {self.noun}", "write it as 4096 or 0x1000")
        if not self.low <= value <= self.high:
            raise Misfit(f"it must be within {self.low:#x} and {self.high:#x}")
        return value


@dataclass(frozen=True)
class Text(_OneWord[str]):
    """Any word."""

    noun: str = "a word"

    def parse(self, context: Context, word: str) -> str:
        return word


@dataclass(frozen=True)
class File(_OneWord[str]):
    """The name of a file."""

    noun: str = "a file"

    def parse(self, context: Context, word: str) -> str:
        if not word or "\0" in word:
            raise Misfit("it must be the name of a file")
        return word


@dataclass(frozen=True)
class Choice(_OneWord[str]):
    """One of these words."""

    choices: tuple[str, ...]
    meanings: tuple[str, ...] = ()

    @property
    def noun(self) -> str:
        return f"one of {', '.join(self.choices)}"

    def parse(self, context: Context, word: str) -> str:
        if word not in self.choices:
            raise Misfit(f"it must be {self.noun}")
        return word

    def complete(self, context: Context, prefix: str) -> Iterable[Candidate]:
        meanings = self.meanings or ("",) * len(self.choices)
        return map(Candidate, self.choices, meanings)


@dataclass(frozen=True)
class Flag:
    """An option without a value, which is true where it stands."""

    noun: str = "a flag"

    def take(self, context: Context, words: list[str]) -> bool:
        return True

    def complete(self, context: Context, prefix: str) -> Iterable[Candidate]:
        return ()


def known_guests(context: Context) -> str:
    known = ", ".join(f"{guest.number} ({guest.name})" for guest in context.guests)
    if known:
        return f"the guests are {known}"
    return "`guests --scan` looks for guests" if isinstance(context, Attaching) else "no guest has been entered by VMRUN yet"


def find_guest(context: Context, word: str) -> GuestView | None:
    return next((guest for guest in context.guests if word in (str(guest.number), guest.name)), None)


def _guest_candidates(context: Context) -> Iterator[Candidate]:
    return (Candidate(str(guest.number), guest.name) for guest in context.guests)


@dataclass(frozen=True)
class Guest(_OneWord[GuestView]):
    """A guest, by its number or name."""

    noun: str = "a guest"

    def parse(self, context: Context, word: str) -> GuestView:
        guest = find_guest(context, word)
        if guest is None:
            raise Misfit("no guest has this number or name", known_guests(context))
        return guest

    def complete(self, context: Context, prefix: str) -> Iterable[Candidate]:
        return _guest_candidates(context)


@dataclass(frozen=True)
class Owner(_OneWord[GuestView | HostView]):
    """A guest, or the hypervisor as `host`."""

    noun: str = "a guest, or host"

    def parse(self, context: Context, word: str) -> GuestView | HostView:
        if word == "host":
            return context.host
        return Guest().parse(context, word)

    def complete(self, context: Context, prefix: str) -> Iterable[Candidate]:
        return (Candidate("host", "the hypervisor"), *_guest_candidates(context))


class Located(NamedTuple):
    """An address that has been evaluated: whose, in which space, where."""

    owner: GuestView | HostView
    space: Space
    offset: int

    def __str__(self) -> str:
        if isinstance(self.owner, DeviceView):
            return f"{self.owner.device}:{self.space}:{self.offset:#x}"
        return f"{'host' if self.owner.number == HOST_NUMBER else self.owner.number}:{self.space}:{self.offset:#x}"


@dataclass(frozen=True)
class AddressWord:
    """`owner:space:offset`, the first two optional, as it was written; what it means depends on who is asked about."""

    text: str
    space: Space
    """If it names none."""

    def locate(self, context: Context, owner: GuestView | HostView | None = None) -> Located:
        """`owner`: whose it is if it names none; without one, who is selected.  Raises `CommandError`."""
        owner = owner or context.selected or context.host
        line = is_line(self.text) if ":" in self.text else None
        if line is not None and RequesterId.parse(":".join(line[:2])) is None:  # 00:03.0:2000 is a device's address
            return self._of_line(context, owner, *line)
        try:
            address = parse_address(self.text, context.names(owner.number))
            named = address.owner
            if named is not None:
                device = RequesterId.parse(named)
                if device is not None:
                    owner = device_view(context, device)
                    if address.space not in (None, Space.IOVA):
                        raise CommandError(self.text, "a device has I/O addresses alone", f"write {device}:iova:0x1000")
                    return Located(owner, Space.IOVA, address(context.scope(owner.number)).offset)
                owner = _named_owner(context, named)
            offset = address(context.scope(owner.number)).offset
        except ExpressionError as error:
            what, remedy = f"{error.value} (column {error.position + 1} of {self.text})", remedy_of(context, error, owner.number)
            raise CommandError(what, error.rule, remedy) from None
        return Located(owner, address.space or self.space, offset)

    def _of_line(self, context: Context, owner: GuestView | HostView, named: str, file: str, line: int) -> Located:
        """Of a line of the source: "exits.c:256"."""
        owner = _named_owner(context, named) if named else owner
        symbols = context.symbols(owner.number)
        address = SourceLines.of(symbols).address(file, line) if symbols is not None else None
        if address is None:
            raise unknown_line(context, self.text, owner.number)
        return Located(owner, Space.GVA, address)


def remedy_of(context: Context, error: ExpressionError, number: int) -> str:
    """What to do about an expression of an inferior: to give that its symbols first, if a name is not known and it has none."""
    if not isinstance(error, UnknownName) or (error.owner is not None and error.owner != HOST and not error.owner.isdecimal()):
        return error.remedy
    number = number if error.owner is None else HOST_NUMBER if error.owner == HOST else int(error.owner)
    return f"{lacking(number)}; {error.remedy}" if context.symbols(number) is None else error.remedy


def unknown_line(context: Context, text: str, number: int) -> CommandError:
    """Of a line of the source, of which an inferior has no code."""
    remedy = lacking(number) if context.symbols(number) is None else "name a symbol, or give the file with the symbols"
    return CommandError(text, "no code is known of this line", remedy)


def lacking(number: int) -> str:
    """In words, that an inferior has no symbols, and how it gets some."""
    host = number == HOST_NUMBER
    who, option = ("the hypervisor", "host") if host else (f"guest {number}", f"guest{number}")
    return f"{who} has no symbols: give some with --symbols {option}=FILE, or `symbols {number} FILE`"


def _named_owner(context: Context, word: str) -> GuestView | HostView:
    found = context.host if word == "host" else find_guest(context, word)
    if found is None and word == str(HOST_NUMBER):
        return context.host
    if found is None:
        raise CommandError(word, "no guest has this number", known_guests(context))
    return found


def _like(symbols: Symbols, name: str) -> list[LoadedSymbol]:
    """Symbols that begin with a name, then those that have it, or where that does not take long its letters, in order."""
    letters = re.compile(".*".join(map(re.escape, name)), re.IGNORECASE) if len(symbols) < _FEW else None
    ranks: tuple[list[LoadedSymbol], ...] = [], [], []
    for symbol in symbols:
        if symbol.name.startswith(name):
            ranks[0].append(symbol)
            if len(ranks[0]) == _MANY:
                break
        elif name in symbol.name:
            ranks[1].append(symbol)
        elif letters is not None and letters.search(symbol.name):
            ranks[2].append(symbol)
    return [symbol for rank in ranks for symbol in rank][:_MANY]


def _operands(context: Context, prefix: str, owner: GuestView | HostView | None = None) -> Iterator[Candidate]:
    """Names that continue an expression: `before` is what stands before the last name in it."""
    at = len(prefix)
    while at and (prefix[at - 1].isalnum() or prefix[at - 1] in "_.$"):
        at -= 1
    before, name = prefix[:at], prefix[at:]
    if before.endswith(":"):
        word = before[:-1].rpartition(":")[2] if before[:-1].rpartition(":")[2] != "gva" else before[:-1].rpartition(":")[0]
        owner = context.host if word == "host" else find_guest(context, word) or owner
    owner = owner or context.selected or context.host
    symbols = context.symbols(owner.number)
    if symbols is not None and name:
        for symbol in _like(symbols, name):
            yield Candidate(before + symbol.name, f"{symbol.address:#x}")
    for known in context.names(owner.number).known():
        if name and known.startswith(name.removeprefix("$")):
            yield Candidate(before + "$" * name.startswith("$") + known, "register, field or fact")


@dataclass(frozen=True)
class Address(_OneWord[AddressWord]):
    """An address: `[owner:][space:]expression`."""

    space: Space = Space.GVA
    noun: str = "an address"

    def parse(self, context: Context, word: str) -> AddressWord:
        if not word:
            raise Misfit("it must be an address", "write it as 0x1000, 2:gva:0x1000 or 2:main+0x10")
        return AddressWord(word, self.space)

    def complete(self, context: Context, prefix: str) -> Iterable[Candidate]:
        if ":" not in prefix:
            yield Candidate("host:", "the hypervisor's")
            for guest in context.guests:
                yield Candidate(f"{guest.number}:", f"of {guest.name}")
            for device, name in device_names(context).items():
                yield Candidate(f"{RequesterId(device)}:iova:", f"as {name} has it")
        if prefix.count(":") < 2:
            before = prefix[: prefix.rfind(":") + 1]
            if before.removesuffix(":") not in list(Space):
                words = ("linear", "guest-physical", "system-physical", "a device's")
                for space, meaning in zip(Space, words, strict=True):
                    yield Candidate(f"{before}{space}:", meaning)
        yield from _operands(context, prefix)


@dataclass(frozen=True)
class Physical(_OneWord[AddressWord]):
    """A system-physical address unless it says another space."""

    noun: str = "a system-physical address"

    def parse(self, context: Context, word: str) -> AddressWord:
        return Address(Space.SPA).parse(context, word)

    def complete(self, context: Context, prefix: str) -> Iterable[Candidate]:
        return Address(Space.SPA).complete(context, prefix)


@dataclass(frozen=True)
class ExpressionWord:
    """An expression as it was written."""

    text: str

    def value(self, context: Context, owner: GuestView | HostView | None = None) -> int:
        """Of the owner, or who is selected.  Raises `CommandError`."""
        number = (owner or context.selected or context.host).number
        try:
            return parse(self.text, context.names(number))(context.scope(number))
        except ExpressionError as error:
            what, remedy = f"{error.value} (column {error.position + 1} of {self.text})", remedy_of(context, error, number)
            raise CommandError(what, error.rule, remedy) from None


@dataclass(frozen=True)
class Expression:
    """An expression: all the words that are left."""

    noun: str = "an expression"

    def take(self, context: Context, words: list[str]) -> ExpressionWord:
        text = " ".join(words)
        words.clear()
        return ExpressionWord(text)

    def complete(self, context: Context, prefix: str) -> Iterable[Candidate]:
        return _operands(context, prefix)


@dataclass(frozen=True)
class Requester(_OneWord[RequesterId]):
    """A device, by its bus, device and function number."""

    noun: str = "a device's bus:device.function"

    def parse(self, context: Context, word: str) -> RequesterId:
        found = RequesterId.parse(word)
        if found is None:
            raise Misfit(f"it must be {self.noun}, in hexadecimal", "write it as 00:03.0")
        return found

    def complete(self, context: Context, prefix: str) -> Iterable[Candidate]:
        return [Candidate(str(RequesterId(device)), name) for device, name in device_names(context).items()]


@dataclass(frozen=True)
class Symbol(_OneWord[str]):
    """The name of a symbol, or a part of one."""

    noun: str = "a symbol"

    def parse(self, context: Context, word: str) -> str:
        return word

    def complete(self, context: Context, prefix: str) -> Iterable[Candidate]:
        return _operands(context, prefix)


@dataclass(frozen=True)
class Field(_OneWord[str]):
    """A field of the VMCB."""

    noun: str = "a field of the VMCB"

    def parse(self, context: Context, word: str) -> str:
        name = next((field.name for field in VMCB if word.lower() in (field.name, field.short)), None)
        if name is None:
            raise Misfit("a VMCB has no field of this name", "`vmcb` lists them, and completion knows them")
        return name

    def complete(self, context: Context, prefix: str) -> Iterable[Candidate]:
        return (Candidate(field.name, field.group) for field in VMCB)


@dataclass(frozen=True)
class ExitCodeKind(_OneWord[int]):
    """An exit code, by number or name."""

    noun: str = "an exit code"

    def parse(self, context: Context, word: str) -> int:
        if word.upper() in ExitCode.__members__:
            return ExitCode[word.upper()].value
        value = parse_number(word)
        if value is None or not 0 <= value <= _MAX:
            raise Misfit("there is no exit code of this name", "names are as in `exits`: npf, cpuid, vmmcall; or a number")
        return value

    def complete(self, context: Context, prefix: str) -> Iterable[Candidate]:
        upper = prefix.isupper()
        return (Candidate(code.name if upper else code.name.lower(), f"{code.value:#x}") for code in ExitCode)


class Layout(NamedTuple):
    """What a format asks for: how many, how they are written, of which size. `letter` and `size` are empty where it says
    nothing."""

    repeat: int = 1
    letter: str = ""
    size: str = ""


_FORMAT = re.compile(r"/(\d*)([oxdutzcafsibhwg]*)")
_MAX_COUNT = 1 << 16
_FORMATS = (
    ("8gx", "words of 8 bytes"), ("16xb", "bytes"), ("4dw", "signed words of 4 bytes"), ("4a", "addresses by symbol"),
    ("s", "a string"), ("8i", "instructions"), ("x", "hexadecimal"), ("t", "binary"), ("c", "a character"),
)  # fmt: skip
"""Some to choose from."""


@dataclass(frozen=True)
class Format(_OneWord[Layout]):
    """gdb's /FMT: a count, a letter of `letters` and, where `sizes`, a size of b, h, w and g."""

    letters: str
    sizes: bool = True
    noun: str = "a format as gdb's, /8gx"

    def parse(self, context: Context, word: str) -> Layout:
        found = _FORMAT.fullmatch(word)
        letters = "".join(one for one in found[2] if one in self.letters) if found else ""
        sizes = "".join(one for one in found[2] if one in "bhwg" and self.sizes) if found else ""
        if found is None or len(letters) > 1 or len(sizes) > 1 or len(letters + sizes) != len(found[2]):
            size = ", and b, h, w or g" if self.sizes else ""
            rule = f"it must be / with a count, one of {' '.join(self.letters)}{size}"
            raise Misfit(rule, f"write it as /8g{self.letters[0]}", word.startswith("/"))
        count = int(found[1] or 1) if len(found[1]) < 8 else _MAX_COUNT + 1
        if not 0 < count <= _MAX_COUNT:
            raise Misfit(f"the count must be within 1 and {_MAX_COUNT}", meant=True)
        return Layout(count, letters, sizes)

    def complete(self, context: Context, prefix: str) -> Iterable[Candidate]:
        for text, meaning in _FORMATS:
            if self.sizes == (text[0].isdigit() or text == "s") and set(text) & set(self.letters):
                yield Candidate(f"/{text}", meaning)


@dataclass(frozen=True)
class CommandName:
    """One of the registry's commands: all the words that are left."""

    names: Callable[[], Iterable[Candidate]]
    noun: str = "a command"

    def take(self, context: Context, words: list[str]) -> str:
        text = " ".join(words)
        words.clear()
        return text

    def complete(self, context: Context, prefix: str) -> Iterable[Candidate]:
        return self.names()


@dataclass(frozen=True)
class Rest:
    """All the words that are left, for a command with a grammar of its own, which also completes: from the words so far."""

    noun: str
    candidates: Callable[[Context, Sequence[str]], Iterable[Candidate]] = lambda context, words: ()

    def take(self, context: Context, words: list[str]) -> tuple[str, ...]:
        taken = tuple(words)
        words.clear()
        return taken

    def complete(self, context: Context, prefix: str) -> Iterable[Candidate]:
        return self.candidates(context, ())
