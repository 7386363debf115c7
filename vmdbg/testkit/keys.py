# SPDX-License-Identifier: GPL-2.0-or-later
"""The keys of a job file: one table, from which files are read, mistakes are told and docs/jobs.md is made."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from vmdbg.machine import LIMIT_REACHED
from vmdbg.testkit.exit_patterns import ExitPattern
from vmdbg.testkit.golden import DEFAULT, Tolerances
from vmdbg.testkit.wrong import WrongValue, shown

__all__ = ["KEYS", "Key", "Values"]

T = TypeVar("T")
_SIZE = re.compile(r"(\d+)([KMG]?)(?:i?B)?", re.IGNORECASE)
LEAST_SPACE = 3 << 30
"""Bytes of address space besides RAM with which a test begins: a gibibyte of it is the engine's, for translated code."""
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise WrongValue(f"{shown(value)} is no text; write it in quotes")
    if not value:
        raise WrongValue("the text is empty; write what is meant, or leave the key out")
    if "\0" in value:
        raise WrongValue(f"{shown(value)} has a NUL in it; leave it out")
    return value


def _texts(value: object) -> tuple[str, ...]:
    if isinstance(value, list):
        return tuple(_element(_text, index, one) for index, one in enumerate(value))
    return (_text(value),)


def _element(read: Callable[[object], T], index: int, value: object) -> T:
    try:
        return read(value)
    except WrongValue as error:
        raise WrongValue(str(error), index) from None


def _count(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 1 << 63:
        raise WrongValue(f"{shown(value)} is no number of at least 1; write 1000000, or 1_000_000")
    return value


def _seconds(value: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= 1e6:
        raise WrongValue(f"{shown(value)} is no number of seconds; write 20, or 0.5")
    return float(value)


def _bytes(value: object) -> int:
    """ "16M", of whatever."""
    match = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if match is None or not int(match[1]) or len(match[1]) > 12:
        raise WrongValue(f'{shown(value)} is no size; write "64K", "16M" or "2G"')
    return int(match[1]) * _UNITS[match[2].upper()]


def _address_space(value: object) -> int:
    size = _bytes(value)
    if size < LEAST_SPACE:
        raise WrongValue(f'{shown(value)} is less than an empty machine takes; write "3G" or more')
    return size


def _hash(value: object) -> str:
    text = _text(value)
    if not re.fullmatch(r"[0-9a-f]{32}", text):
        remedy = "write the 32 digits that `vmdbg run --fingerprint` prints behind trace="
        raise WrongValue(f"{shown(text)} is no fingerprint; {remedy}")
    return text


def _statuses(value: object) -> tuple[int, ...]:
    listed = value if isinstance(value, list) else [value]
    if not listed:
        raise WrongValue("the list is empty; name at least one status, or leave the key out")
    for index, one in enumerate(listed):
        if not isinstance(one, int) or isinstance(one, bool) or not 0 <= one <= 0xFFFF_FFFF_FF:
            raise WrongValue(f"{shown(one)} is no exit status; write a number, such as 1", *([index] if listed is value else []))
        if not one & 1 and one not in (0, LIMIT_REACHED):
            remedy = f"write 0 for a power-off, {LIMIT_REACHED} for a limit, or (value << 1) | 1 of port F4"
            raise WrongValue(f"no run ends with status {one}; {remedy}", *([index] if listed is value else []))
    return tuple(listed)


@dataclass(frozen=True, slots=True)
class TextPattern:
    """What the serial port, or a script, prints: plain text, or a regular expression between slashes."""

    text: str
    regex: re.Pattern[str]

    def search(self, where: str) -> bool:
        return self.regex.search(where) is not None


def _pattern(value: object) -> TextPattern:
    text = _text(value)
    if len(text) < 3 or not (text.startswith("/") and text.endswith("/")):
        return TextPattern(text, re.compile(re.escape(text)))
    try:
        return TextPattern(text, re.compile(text[1:-1], re.MULTILINE))
    except (re.error, OverflowError, RecursionError) as error:
        raise WrongValue(f"{shown(text)} is no regular expression: {error}; correct it, or leave the slashes out") from None


def _patterns(value: object) -> tuple[TextPattern, ...]:
    if isinstance(value, list):
        return tuple(_element(_pattern, index, one) for index, one in enumerate(value))
    return (_pattern(value),)


def _exit_pattern(value: object) -> ExitPattern:
    try:
        return ExitPattern.parse(_text(value))
    except ValueError as error:
        if isinstance(error, WrongValue):
            raise
        raise WrongValue(str(error)) from None


def _exit_patterns(value: object) -> tuple[ExitPattern, ...]:
    if isinstance(value, list):
        return tuple(_element(_exit_pattern, index, one) for index, one in enumerate(value))
    return (_exit_pattern(value),)


def _options(value: object) -> dict[str, object]:
    if not isinstance(value, dict):
        raise WrongValue(f'{shown(value)} is no table; write {{ cpus = 2, tlb = "strict" }}')
    return value


def _matrix(value: object) -> dict[str, list[object]]:
    table = _options(value)
    found: dict[str, list[object]] = {}
    for name, values in table.items():
        if not isinstance(values, list):
            raise WrongValue(f"{shown(values)} is no list of values; write {name} = [1, 2]", name)
        if not values:
            raise WrongValue("the list is empty; name at least one value, or leave it out", name)
        found[name] = values
    return found


@dataclass(frozen=True, slots=True)
class GoldenTrace:
    """A file, and in what a run may differ from it besides what the file says."""

    file: str
    tolerance: Tolerances


def _golden(value: object) -> GoldenTrace:
    table = value if isinstance(value, dict) else {"file": value}
    for name in table:
        if name not in ("file", *Tolerances.__annotations__):
            raise WrongValue(f"there is no such key; there are file, {', '.join(Tolerances.__annotations__)}", name)
    if "file" not in table:
        raise WrongValue('the file is missing; write { file = "boot.exits" }')
    file = table["file"]
    if not isinstance(file, str) or not file:
        raise WrongValue(f"{shown(file)} is no path; write it in quotes", *(["file"] if isinstance(value, dict) else []))
    tolerance: Tolerances = {}
    try:
        if "ignore" in table:
            tolerance["ignore"] = _texts(table["ignore"])
        if "skip" in table:
            tolerance["skip"] = _texts(table["skip"])
        if "reorder" in table:
            tolerance["reorder"] = _text(table["reorder"])
        if "rip" in table:
            tolerance["rip"] = _text(table["rip"])
        if "exact" in table:
            if not isinstance(table["exact"], bool):
                raise WrongValue(f"{shown(table['exact'])} is neither true nor false", "exact")
            tolerance["exact"] = table["exact"]
        DEFAULT.changed(**tolerance)
    except WrongValue:
        raise
    except ValueError as error:
        key, _, words = str(error).partition(": ")
        raise WrongValue(words, key) from None
    return GoldenTrace(file, tolerance)


@dataclass(frozen=True, eq=False)
class Key(Generic[T]):
    """`read` takes a value as tomllib gives it; it raises `WrongValue`."""

    name: str
    read: Callable[[object], T]
    default: T
    takes: str
    """For people."""
    help: str
    without: str = ""
    """What it means to leave it out."""


@dataclass(frozen=True, slots=True)
class Values:
    """What a job says."""

    given: Mapping[str, Any]

    def __getitem__(self, key: Key[T]) -> T:
        value: T = self.given.get(key.name, key.default)
        return value

    def __contains__(self, key: Key[Any]) -> bool:
        return key.name in self.given


_NOTHING: tuple[TextPattern, ...] = ()
_NO_EXITS: tuple[ExitPattern, ...] = ()
NAME = Key("name", _text, "", "text", "What the job is called in reports and for `-k`.",
           "the file's name, or its number in the file")  # fmt: skip
IMAGE = Key("image", _text, "", "a path", "The image to boot, as `vmdbg run` takes it.", "`--image` of the command line")
OPTIONS: Key[dict[str, object]] = Key(
    "options", _options, {}, "a table",
    "The machine: options of `vmdbg run` without their dashes, `{ cpus = 2, tlb = \"strict\", hpet = true }`. Those that may be "
    "repeated take an array.", "a machine as `vmdbg run` makes it")  # fmt: skip
MATRIX: Key[dict[str, list[object]]] = Key(
    "matrix", _matrix, {}, "a table of arrays",
    "The job once for each combination of values: `{ cpus = [1, 2], tlb = [\"coherent\", \"strict\"] }` is four jobs. Names are "
    "options, or `image`.", "one job")  # fmt: skip
SCRIPT = Key("script", _text, "", "a path",
             "What is done with the machine: a gdb script (.gdb), MI commands (.mi), Python (.py), or else lines of the console.",
             "the machine runs to its end")  # fmt: skip
INPUT = Key("input", _text, "", "text", "What the guest finds on the serial port: there from the beginning.", "nothing")
INSTRUCTIONS: Key[int | None] = Key(
    "instructions", _count, None, "a number",
    "Budget of guest time, in instructions of all CPUs together. Counting them makes a run two or three times as "
    "long.", "no end")  # fmt: skip
TICKS: Key[int | None] = Key("ticks", _count, None, "a number",
                             "The same in ticks, bytes of code executed (`--max-time`). It costs nothing.", "no end")  # fmt: skip
WALL = Key("wall", _seconds, 60.0, "seconds", "Budget of wall time, of the script and all that it starts too.", "60")
MEMORY = Key("address-space", _address_space, 6 << 30, "a size",
             "Address space that the test's process may have besides the machine's RAM. A machine takes some 2G, and while it "
             "starts over there are two.", "\"6G\"")  # fmt: skip
OUTPUT = Key("output-limit", _bytes, 16 << 20, "a size",
             "So much may the serial port, and so much may the script print; more ends the job.", "\"16M\"")  # fmt: skip
STATUS: Key[tuple[int, ...]] = Key(
    "status", _statuses, (), "a number, or several",
    "Exit status of the run, as `vmdbg run` has it: 0 for power-off, (value << 1) | 1 of port F4, 124 if it does not end by "
    "itself, also where `ticks` or `instructions` say when. A script must let the machine run to its end then.",
    "0 or 1; with a script, any")  # fmt: skip
SERIAL = Key("serial", _patterns, _NOTHING, "texts", "What the serial port must have printed: text, or `/a regular expression/`.")
SERIAL_NEVER = Key("serial-never", _patterns, _NOTHING, "texts", "What it must not have printed.")
PRINTS = Key("output", _patterns, _NOTHING, "texts", "What the script must have printed.")
EXITS = Key("exits", _exit_patterns, _NO_EXITS, "exit patterns",
            "#VMEXITs that must come in this order; others may come between.")  # fmt: skip
EXITS_NEVER = Key("exits-never", _exit_patterns, _NO_EXITS, "exit patterns", "#VMEXITs that must not come.")
GOLDEN: Key[GoldenTrace] = Key(
    "golden", _golden, GoldenTrace("", {}), "a path, or a table",
    "A golden exit trace to compare with, which `vmdbg test --record` writes. In a table beside `file`, what may differ: "
    "`ignore`, `skip`, `reorder`, `rip`; and `exact` ([regression.md](regression.md)).", "none")  # fmt: skip
FINGERPRINT = Key(
    "fingerprint", _hash, "", "text",
    "The hash of all that the run does, as `vmdbg run --fingerprint` prints it behind `trace=`.", "any")  # fmt: skip
SKIP = Key("skip", _text, "", "text", "Why the job is not run for now.")

KEYS: dict[str, Key[Any]] = {key.name: key for key in (
    NAME, IMAGE, OPTIONS, MATRIX, SCRIPT, INPUT, INSTRUCTIONS, TICKS, WALL, MEMORY, OUTPUT, STATUS, SERIAL, SERIAL_NEVER, PRINTS,
    EXITS, EXITS_NEVER, GOLDEN, FINGERPRINT, SKIP,
)}  # fmt: skip
