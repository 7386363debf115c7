# SPDX-License-Identifier: GPL-2.0-or-later
"""Job files: what a test boots, does and expects, as TOML. docs/jobs.md is the reference; `keys.py` the table of keys."""

from __future__ import annotations

import contextlib
import difflib
import itertools
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from vmdbg.testkit import keys, machine_options
from vmdbg.testkit.keys import KEYS, Values
from vmdbg.testkit.outcome import test_id
from vmdbg.testkit.positions import positions
from vmdbg.testkit.wrong import WrongValue, shown

__all__ = ["Defaults", "Job", "JobError", "block_of", "read_file", "read_script"]

MOST = 100_000
"""Jobs of a file, matrix included."""
LARGEST = 8 << 20
"""Bytes of a file."""
_OPEN, _CLOSE = re.compile(r"\s*(?:#|//)\s*/// job\s*"), re.compile(r"\s*(?:#|//)\s*///\s*")
_COMMENT = re.compile(r"\s*(?:#|//) ?(.*)")


class JobError(Exception):
    """A test that cannot be: one line with file, line, key, rule and remedy."""


@dataclass(frozen=True, slots=True)
class Job:
    """A machine, what is done with it, and what is expected."""

    name: str
    file: str
    """Where it stands, as the user named it."""
    line: int
    folder: Path
    """Paths of the job are relative to it."""
    image: str
    words: tuple[str, ...] = ()
    """The machine's options, as for `vmdbg run`."""
    values: Values = field(default_factory=lambda: Values({}))
    given: tuple[str, ...] = ()
    """What of it comes from the command line, as words of one."""

    @property
    def id(self) -> str:
        """What `-k` looks at, and what `vmdbg test` takes to run this one alone."""
        return test_id(self.file, self.name)

    @property
    def kind(self) -> str:
        """What carries the script out: gdb, mi, python, console; or none: run."""
        script = self.values[keys.SCRIPT]
        return {".gdb": "gdb", ".mi": "mi", ".py": "python"}.get(Path(script).suffix, "console") if script else "run"


@dataclass(frozen=True, slots=True)
class Defaults:
    """What the command line says of jobs that do not say it themselves."""

    image: str = ""
    words: tuple[str, ...] = ()


class _Reader:
    """One table of keys, and whose it is."""

    def __init__(self, file: str, lines: Mapping[tuple[str | int, ...], int], first: int = 1) -> None:
        self.file, self.lines, self.first = file, lines, first

    def line(self, path: tuple[str | int, ...]) -> int:
        """Of the innermost part of a path that stands somewhere."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path, 1) + self.first - 1

    def error(self, path: tuple[str | int, ...], words: str) -> JobError:
        key = ".".join(str(part) for part in path if isinstance(part, str) and part != "job")
        return JobError(f"{self.file}:{self.line(path)}: {key}: {words}" if key else f"{self.file}:{self.line(path)}: {words}")

    def values(self, table: Mapping[str, object], path: tuple[str | int, ...]) -> dict[str, object]:
        found: dict[str, object] = {}
        for name, value in table.items():
            key = KEYS.get(name)
            if key is None:
                near = difflib.get_close_matches(name, KEYS, n=2, cutoff=0.5)
                if name in machine_options.known():
                    words = f"it is an option: write options = {{ {name} = ... }}"
                else:
                    words = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(KEYS)}"
                raise self.error((*path, name), f"there is no such key; {words}")
            try:
                found[name] = key.read(value)
            except WrongValue as wrong:
                raise self.error((*path, name, *wrong.at), str(wrong)) from None
        return found

    def words(self, table: Mapping[str, object], path: tuple[str | int, ...]) -> dict[str, list[str]]:
        """The words of each option of a table."""
        found: dict[str, list[str]] = {}
        for name, value in table.items():
            try:
                found[name] = machine_options.words_of(name, value)
            except WrongValue as wrong:
                raise self.error((*path, name, *wrong.at), str(wrong)) from None
        return found


def read_file(path: Path, shown_as: str, defaults: Defaults) -> list[Job]:
    """The jobs of a TOML file.  Raises `JobError` for the first thing that is wrong with it."""
    return _jobs(_text(path, shown_as), path.parent.absolute(), shown_as, defaults, path.stem, 1)


def read_script(path: Path, shown_as: str, defaults: Defaults) -> list[Job]:
    """A script as a test: what it needs stands in comments at its top, or comes from the command line.

    Raises `JobError`, also if no image is named anywhere.
    """
    text = _text(path, shown_as)
    block, first = block_of(text)
    stated = f"script = {_quoted(path.name)}\n"
    if not block and not defaults.image:
        raise JobError(
            f"{shown_as}:1: image: none is named; say --image FILE, or name the script in a job file, or write at its top "
            '`# /// job`, `# image = "FILE"` and `# ///`, a line each'
        )
    return _jobs(stated + block, path.parent.absolute(), shown_as, defaults, path.stem, first - 1)


def _quoted(text: str) -> str:
    return '"' + "".join(c if c.isprintable() and c not in '"\\' else f"\\U{ord(c):08x}" for c in text) + '"'


def block_of(text: str) -> tuple[str, int]:
    """The TOML in a script's comments between `/// job` and `///`, and in which line it begins."""
    lines = text.splitlines()
    begin = next((number for number, line in enumerate(lines) if _OPEN.fullmatch(line)), None)
    if begin is None:
        return "", 1
    found = []
    for line in lines[begin + 1 :]:
        comment = _COMMENT.fullmatch(line)
        if _CLOSE.fullmatch(line) or comment is None:
            break
        found.append(comment[1])
    return "\n".join(found) + "\n", begin + 2


def _text(path: Path, shown_as: str) -> str:
    try:
        if path.stat().st_size > LARGEST:
            raise JobError(f"{shown_as}:1: the file has more than {LARGEST >> 20} MiB; split it")
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise JobError(f"{shown_as}:{line}: the file is not UTF-8; save it so") from None
    except (OSError, ValueError) as error:
        raise JobError(f"{shown_as}: {getattr(error, 'strerror', None) or error}; name a file that can be read") from None


def _jobs(text: str, folder: Path, file: str, defaults: Defaults, stem: str, first: int) -> list[Job]:
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        found = re.search(r" \(at line (\d+), column \d+\)", str(error))
        line = int(found[1]) if found else text.count("\n") + (not text.endswith("\n"))
        words = str(error).replace(found[0], "") if found else str(error)
        raise JobError(f"{file}:{line + first - 1}: no TOML: {words.lower()}; correct it (https://toml.io)") from None
    except RecursionError:
        raise JobError(f"{file}:{first}: no TOML that can be read: it is nested too deeply; flatten it") from None
    reader = _Reader(file, positions(text), first)
    entries = tables.pop("job", None)
    common = reader.values(tables, ())
    if entries is None:
        return list(_matrix(reader, {}, common, (), defaults, folder, stem))
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise reader.error(("job",), f"{shown(entries)} is no list of jobs; write [[job]] in double brackets")
    jobs: list[Job] = []
    for number, entry in enumerate(entries):
        path = ("job", number)
        jobs += _matrix(reader, common, reader.values(entry, path), path, defaults, folder, f"job {number + 1}")
    names: dict[str, Job] = {}
    for job in jobs:
        if job.name in names:
            other = names[job.name].line
            raise JobError(f"{file}:{job.line}: name: {job.name!r} is taken by the job of line {other}; choose another")
        names[job.name] = job
    return jobs


def _matrix(
    reader: _Reader, common: Mapping[str, object], own: Mapping[str, object], path: tuple[str | int, ...], defaults: Defaults,
    folder: Path, name: str,
) -> Iterator[Job]:  # fmt: skip
    """The jobs of one table, which goes before what is common to the file; of tables in it, key by key."""
    with contextlib.chdir(folder):
        values = {**common, **own}
        shared, mine = Values(common)[keys.OPTIONS], Values(own)[keys.OPTIONS]
        words = {**reader.words(shared, ("options",)), **reader.words(mine, (*path, "options"))}
        axes_here, axes_above = Values(own)[keys.MATRIX], Values(common)[keys.MATRIX]
        matrix: dict[str, list[object]] = {**axes_above, **axes_here}
        at = (*path, "matrix") if axes_here else ("matrix",)
        count = 1
        for axis in matrix.values():
            count *= len(axis)
        if count > MOST:
            raise reader.error(at, f"it makes {count} jobs of one; {MOST} are the most")
        name = Values(values)[keys.NAME] or name
        for chosen in itertools.product(*matrix.values()):
            axes = dict(zip(matrix, chosen, strict=True))
            image = str(axes.pop("image", Values(values)[keys.IMAGE] or defaults.image))
            turned = {**words, **reader.words(axes, at)}
            suffix = ",".join(f"{axis}={_plain(value)}" for axis, value in zip(matrix, chosen, strict=True))
            job = Job(
                f"{name}[{suffix}]" if suffix else name, reader.file, reader.line(path), folder, image,
                (*defaults.words, *itertools.chain.from_iterable(turned.values())), Values(values),
                (*(["--image", image] if image and image == defaults.image else []), *defaults.words),
            )  # fmt: skip
            _check(reader, job, own, path)
            yield job


def _plain(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _check(reader: _Reader, job: Job, own: Mapping[str, object], path: tuple[str | int, ...]) -> None:
    """What only the whole job shows: an image, and files that are there."""

    def at(key: str) -> tuple[str | int, ...]:
        return (*path, key) if key in own or key not in job.values.given else (key,)

    if not job.image:
        raise reader.error(at("image"), "it is missing; name the image to boot")
    script = job.values[keys.SCRIPT]
    for key, name in ((keys.IMAGE, job.image), (keys.SCRIPT, script)):
        if name and not (job.folder / name).is_file():
            here = (*path, "matrix", "image") if key is keys.IMAGE and "image" in job.values[keys.MATRIX] else at(key.name)
            there = (job.folder / name).exists()
            rule = f"{shown(name)} is no plain file" if there else f"there is no file {shown(name)}"
            raise reader.error(here, f"{rule}; paths are relative to {job.folder}")
    if job.values[keys.PRINTS] and not script:
        raise reader.error(at("output"), "there is no script that could print it; name one, or say it of the guest with serial")
