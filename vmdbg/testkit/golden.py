# SPDX-License-Identifier: GPL-2.0-or-later
"""Golden exit traces: the #VMEXITs of a run in a file of text, made to be kept under version control and read in a diff.

    vmdbg exit trace 1
    image: hypervisor.elf sha256:5c1f...
    options: cpus=1 tlb=strict
    ignore:
    skip: INTR
    reorder: guests
    rip: function
    exact: no
    exits: 2

    2 IOIO rip=0xffffffff8010016c info1=0x3f80e10 info2=0xffffffff8010016d rax=0x36 insn=ee ; put+0x1a
    3 CPUID rip=0xc0100235 rax=0x40000000 insn=0fa2 ; vendor+0x25

An exit is a line: the guest, EXITCODE, fields that are not 0, and the symbol of RIP.  Lines that begin with # are comments.
What is not compared is not written, and with `reorder: guests` exits stand guest by guest: so that another recording
changes the lines of what has changed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypedDict, TypeVar, Unpack, get_args

from introspect.exitlog import ExitRecord, facts_of
from introspect.exits import ExitCode, exit_name
from vmdbg.api.errors import Error

__all__ = ["DEFAULT", "FIELDS", "GoldenError", "Rip", "Seen", "Tolerance", "Tolerances", "Trace", "View"]

MAGIC = "vmdbg exit trace"
VERSION = 1
LARGEST = 1 << 30
"""Bytes of a file that is read."""
MOST_DIGITS = 16

FIELDS = ("rip", "info1", "info2", "intinfo", "rax", "rcx", "insn", "time", "cpu", "host_rip", "vmcb")
"""What is kept of an exit besides its guest and EXITCODE, in the order of the file."""
_HOSTS = ("time", "cpu", "host_rip", "vmcb")
"""Those that any change of the hypervisor changes, though its guests do the same."""
_REGISTERS = ("rax", "rcx")
_ABOUT: Mapping[int, tuple[str, ...]] = {
    ExitCode.IOIO: ("rax",), ExitCode.CPUID: ("rax",), ExitCode.MSR: ("rax", "rcx"), ExitCode.VMMCALL: ("rax",),
}  # fmt: skip
"""The registers that an exit is about: what is written, which leaf, MSR, hypercall.  Others hold what was left there."""

Rip = Literal["address", "symbol", "function"]
Reorder = Literal["", "guests"]
RIPS: tuple[Rip, ...] = get_args(Rip)
REORDERS: tuple[Reorder, ...] = get_args(Reorder)


Choice = TypeVar("Choice", bound=str)


class Tolerances(TypedDict, total=False):
    """The fields of `Tolerance` as arguments; lists may be words of one text."""

    ignore: Iterable[str] | str
    skip: Iterable[str] | str
    reorder: str
    rip: str
    exact: bool


class GoldenError(Error):
    """A golden trace that is not there, or is none: one line with file, line, rule and remedy."""


def _code(name: str) -> int:
    """ValueError for what is neither a name nor a number."""
    member = ExitCode.__members__.get(name.upper().removeprefix("VMEXIT_"))
    return int(name, 0) & (1 << 64) - 1 if member is None else member.value


@dataclass(frozen=True, slots=True)
class Tolerance:
    """In what a run may differ from a golden trace.

    What the guests did is compared: who left, why, where, and rAX and rCX as far as the exit is about them.  With `exact` also
    when, on which CPU, and where the hypervisor and the VMCB lie: that is for runs of one and the same build.

    `ignore`: fields that are not compared, as "info2", or "NPF.info1" for one kind of exit.  `skip`: kinds of exits that are left
    out on both sides; INTR comes when timers of the host say so.  `reorder="guests"`: what each guest did is compared, in
    whatever order the guests ran.  `rip`: by "address", by "symbol" with offset, or by "function", so that code may move; then
    IOIO's EXITINFO2, which is the next RIP, is not compared.
    """

    ignore: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    reorder: Reorder = ""
    rip: Rip = "address"
    exact: bool = False

    def __post_init__(self) -> None:
        """ValueError with the rule and the remedy."""
        for word in self.ignore:
            code, _, name = word.rpartition(".")
            if name not in FIELDS:
                raise ValueError(f"ignore: {word!r} is no field of an exit; there are {', '.join(FIELDS)}")
            _known(code or "NPF", "ignore")
        for code in self.skip:
            _known(code, "skip")

    @classmethod
    def of(
        cls, ignore: Iterable[str] | str, skip: Iterable[str] | str, reorder: str, rip: str, exact: bool
    ) -> Tolerance:  # fmt: skip
        """Just these.  ValueError."""
        return cls(_words(ignore), _words(skip), _choice("reorder", reorder, REORDERS), _choice("rip", rip, RIPS), exact)

    def changed(self, **given: Unpack[Tolerances]) -> Tolerance:
        """With what is given: `ignore` and `skip` are added.  ValueError."""
        for key in given.keys() - Tolerances.__annotations__.keys():
            raise ValueError(f"{key}: there is no such tolerance; there are {', '.join(Tolerances.__annotations__)}")
        ignore, skip = [*self.ignore, *_words(given.get("ignore", ()))], [*self.skip, *_words(given.get("skip", ()))]
        return Tolerance.of(
            dict.fromkeys(ignore), dict.fromkeys(skip), given.get("reorder", self.reorder), given.get("rip", self.rip),
            given.get("exact", self.exact),
        )  # fmt: skip

    def within(self, other: Tolerance) -> str:
        """What this one compares and a file recorded with `other` does not hold; empty if there is nothing."""
        mine = self.ignore
        lacking = [f"ignore={word}" for word in other.ignore if not {word, word.rpartition(".")[2]} & {*mine}]
        lacking += [f"skip={code}" for code in other.skip if _code(code) not in {_code(own) for own in self.skip}]
        lacking += ["exact=False"] if self.exact and not other.exact else []
        lacking += [f"reorder={other.reorder}"] if other.reorder and not self.reorder else []
        return ", ".join(lacking)

    def lines(self) -> Iterator[str]:
        yield f"ignore: {' '.join(self.ignore)}".rstrip()
        yield f"skip: {' '.join(self.skip)}".rstrip()
        yield f"reorder: {self.reorder}".rstrip()
        yield f"rip: {self.rip}"
        yield f"exact: {'yes' if self.exact else 'no'}"


def _words(value: Iterable[str] | str) -> tuple[str, ...]:
    if isinstance(value, str):
        return tuple(value.replace(",", " ").split())
    words = tuple(value) if isinstance(value, Iterable) else (value,)
    if not all(isinstance(word, str) for word in words):
        raise ValueError(f"{value!r} is not understood; give words, in one text or a list")
    return words


def _choice(key: str, value: str, known: tuple[Choice, ...]) -> Choice:
    found = next((one for one in known if one == value), None)
    if found is None:
        raise ValueError(f"{key}: {value!r} is not understood; write {' or '.join(filter(None, known))}")
    return found


def _known(code: str, key: str) -> None:
    try:
        _code(code)
    except ValueError:
        raise ValueError(f"{key}: there is no EXITCODE {code!r}; write the manual's name, as NPF, or a number") from None


DEFAULT = Tolerance()


@dataclass(frozen=True, slots=True)
class Seen:
    """An exit with the symbol of its RIP: "tick+0x4", or nothing."""

    record: ExitRecord
    symbol: str = ""

    def rip(self, how: Rip) -> object:
        """What stands for RIP in a comparison."""
        if how == "address" or not self.symbol:
            return self.record.rip
        return self.symbol if how == "symbol" else re.sub(r"\+0x[0-9a-f]+$", "", self.symbol)


class View:
    """What of exits is compared under a tolerance."""

    def __init__(self, tolerance: Tolerance) -> None:
        self.how, self._exact = tolerance.rip, tolerance.exact
        self._skipped = {_code(code) for code in tolerance.skip}
        self._everywhere = {word for word in tolerance.ignore if "." not in word} | ({*_HOSTS} if not self._exact else set())
        self._within: dict[int, set[str]] = {ExitCode.IOIO.value: {"info2"}} if self.how != "address" else {}
        for code, _, name in (word.rpartition(".") for word in tolerance.ignore):
            if code:
                self._within.setdefault(_code(code), set()).add(name)
        self._names: dict[tuple[int, bool], tuple[str, ...]] = {}

    def skips(self, seen: Seen) -> bool:
        return seen.record.code in self._skipped

    def kept(self, seen: Seen) -> Iterator[tuple[str, int | bytes]]:
        """The fields that stand in a file, with their values."""
        names = self._compared(seen)
        for name in FIELDS:
            if name in names or (name == "info2" and seen.record.code == ExitCode.IOIO):
                yield name, self._plain(seen, name)

    def _compared(self, seen: Seen) -> tuple[str, ...]:
        code, reads = seen.record.code, _reads(seen.record)
        found = self._names.get((code, reads))
        if found is None:
            left_out = self._everywhere | self._within.get(code, set())
            if not self._exact:
                left_out |= set(_REGISTERS) - set(_ABOUT.get(code, ())) | ({"rax"} if reads else set())
            found = self._names[code, reads] = tuple(name for name in FIELDS if name not in left_out)
        return found

    def _plain(self, seen: Seen, name: str) -> int | bytes:
        value: int | bytes = getattr(seen.record, name)
        if name == "rax" and seen.record.code == ExitCode.IOIO and isinstance(value, int) and not self._exact:
            return value & (1 << 8 * facts_of(seen.record).get("size", 8)) - 1
        return value

    def _value(self, seen: Seen, name: str) -> object:
        return seen.rip(self.how) if name == "rip" else self._plain(seen, name)

    def key(self, seen: Seen) -> tuple[object, ...] | None:
        """All that is compared; None for an exit that is left out."""
        record = seen.record
        if self.skips(seen):
            return None
        return record.guest, record.code, *(self._value(seen, name) for name in self._compared(seen))

    def differing(self, one: Seen, other: Seen) -> tuple[str, ...]:
        """The fields in which two exits of one kind differ."""
        names = self._compared(one) if _reads(one.record) == _reads(other.record) else FIELDS
        return tuple(name for name in names if self._value(one, name) != self._value(other, name))


def _reads(record: ExitRecord) -> bool:
    """IN and RDMSR: what was in rAX before means nothing."""
    return (record.code == ExitCode.IOIO and bool(record.info1 & 1)) or (record.code == ExitCode.MSR and not record.info1)


@dataclass(frozen=True)
class Trace:
    """Exits in their order, and of what run they are."""

    exits: Sequence[Seen]
    tolerance: Tolerance = DEFAULT
    image: str = ""
    """Name and hash of the image."""
    options: str = ""
    source: str = field(default="", compare=False)
    """The file that it comes from."""

    def save(self, path: Path) -> None:
        """Write it.  GoldenError."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(f"{line}\n" for line in self.lines()), encoding="utf-8")
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) else error
            raise GoldenError(f"{path}: {why}; choose a file that can be written") from None

    def lines(self) -> Iterator[str]:
        yield f"{MAGIC} {VERSION}"
        yield f"image: {_one_line(self.image)}".rstrip()
        yield f"options: {_one_line(self.options)}".rstrip()
        yield from self.tolerance.lines()
        view = View(self.tolerance)
        kept = [seen for seen in self.exits if not view.skips(seen)]
        if self.tolerance.reorder:
            kept.sort(key=lambda seen: seen.record.guest)
        yield f"exits: {len(kept)}"
        yield ""
        for seen in kept:
            values = ((name, value.hex() if isinstance(value, bytes) else hex(value)) for name, value in view.kept(seen) if value)
            words = str(seen.record.guest), exit_name(seen.record.code), *(f"{name}={value}" for name, value in values)
            yield _one_line(" ".join(words) + (f" ; {seen.symbol}" if seen.symbol else ""))

    @classmethod
    def load(cls, path: Path) -> Trace:
        """Read one.  GoldenError names file and line."""
        try:
            if path.stat().st_size > LARGEST:
                raise GoldenError(f"{path}: it has more than {LARGEST} bytes; record a shorter run")
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise GoldenError(f"{path}: there is no such golden trace; record it (pytest --vmdbg-record)") from None
        except UnicodeDecodeError as error:
            raise GoldenError(f"{path}: byte {error.start} is no text: this is no golden trace; record it anew") from None
        except (OSError, ValueError) as error:  # a NUL in the name
            why = error.strerror if isinstance(error, OSError) else error
            raise GoldenError(f"{path}: {why}; it must be a file that can be read") from None
        return _Reader(str(path), text).trace()


def _one_line(text: str) -> str:
    """Symbols and names come from files of others."""
    return "".join(c if c.isprintable() else "?" for c in text)


class _Reader:
    """A file line by line."""

    HEADER = ("image", "options", "ignore", "skip", "reorder", "rip", "exact", "exits")

    def __init__(self, name: str, text: str) -> None:
        self.name = name
        self.lines = text.split("\n")
        self.number = 0

    def wrong(self, words: str) -> GoldenError:
        return GoldenError(f"{self.name}:{self.number}: {words}")

    def trace(self) -> Trace:
        """The records' numbers are lines of the file."""
        self.number = 1
        first = self.lines[0].split()
        if first[:-1] != MAGIC.split():
            raise self.wrong(f'a golden trace begins with "{MAGIC} {VERSION}"; record it anew')
        if first[-1] != str(VERSION):
            raise self.wrong(f"version {_short(first[-1])} is not known here, {VERSION} is; record it anew")
        header = self._header()
        exits = list(self._exits())
        if header["exits"] != str(len(exits)):
            raise self.wrong(f"{len(exits)} exits, but its header says {_short(header['exits'])}: it is cut off; record it anew")
        return Trace(exits, self._tolerance(header), header["image"], header["options"], self.name)

    def _header(self) -> dict[str, str]:
        found: dict[str, str] = {}
        while self.number < len(self.lines):
            line = self.lines[self.number]
            self.number += 1
            if not line.strip():
                break
            if line.startswith("#"):
                continue
            key, colon, value = line.partition(":")
            if not colon or key not in self.HEADER:
                raise self.wrong(f"{_short(line)!r} is no line of a header; it has {', '.join(self.HEADER)}")
            found[key] = value.strip()
        missing = [key for key in self.HEADER if key not in found]
        if missing:
            raise self.wrong(f"the header lacks {', '.join(missing)}; record it anew")
        return found

    def _tolerance(self, header: dict[str, str]) -> Tolerance:
        try:
            exact = _choice("exact", header["exact"], ("yes", "no")) == "yes"
            return Tolerance.of(header["ignore"], header["skip"], header["reorder"], header["rip"], exact)
        except ValueError as error:
            self.number = 1 + next(n for n, line in enumerate(self.lines) if line.startswith(str(error).partition(":")[0] + ":"))
            raise self.wrong(str(error)) from None

    def _exits(self) -> Iterator[Seen]:
        for line in self.lines[self.number :]:
            self.number += 1
            if line.strip() and not line.startswith("#"):
                yield self._exit(line)

    def _exit(self, line: str) -> Seen:
        values, _, symbol = line.partition(" ; ")
        words = values.split()
        if len(words) < 2 or not re.fullmatch(r"[0-9]{1,9}", words[0]):
            raise self.wrong(f"{_short(line)!r} is no exit; it begins with a guest's number and EXITCODE, as \"2 NPF\"")
        try:
            code = _code(words[1])
        except ValueError:
            raise self.wrong(f"there is no EXITCODE {_short(words[1])!r}; write the manual's name, as NPF, or a number") from None
        found: dict[str, int | bytes] = {}
        for word in words[2:]:
            name, _, value = word.partition("=")
            if name not in FIELDS or name in found:
                raise self.wrong(f"{_short(word)!r}: a field is NAME=VALUE, each once; names are {', '.join(FIELDS)}")
            found[name] = self._value(name, value)
        insn = found.pop("insn", b"")
        n = {name: value for name, value in found.items() if isinstance(value, int)}.get
        assert isinstance(insn, bytes)
        record = ExitRecord(
            self.number, int(words[0]), n("time", 0), n("rip", 0), code, n("info1", 0), n("info2", 0), n("intinfo", 0),
            n("cpu", 0), n("vmcb", 0), n("host_rip", 0), rax=n("rax", 0), rcx=n("rcx", 0), insn=insn,
        )  # fmt: skip
        return Seen(record, symbol.strip())

    def _value(self, name: str, text: str) -> int | bytes:
        if name == "insn":
            if re.fullmatch(r"(?:[0-9a-f]{2}){1,15}", text):
                return bytes.fromhex(text)
            raise self.wrong(f"insn={_short(text)}: these are 1 to 15 bytes, as insn=0fa2")
        if re.fullmatch(rf"0x[0-9a-f]{{1,{MOST_DIGITS}}}|[0-9]{{1,20}}", text):
            return int(text, 0)
        raise self.wrong(f"{name}={_short(text)}: a number is meant, as {name}=0x1f")


def _short(text: str) -> str:
    printable = _one_line(text)
    return printable if len(printable) <= 40 else f"{printable[:40]}..."
