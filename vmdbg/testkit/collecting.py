# SPDX-License-Identifier: GPL-2.0-or-later
"""Which tests there are: those of the files and directories that a command line names."""

from __future__ import annotations

import faulthandler
import fnmatch
import os
import shlex
import tomllib
from collections.abc import Iterable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path

from vmdbg.testkit import keys, machine_options
from vmdbg.testkit.bench import SharedText
from vmdbg.testkit.child import Parent
from vmdbg.testkit.division import Division
from vmdbg.testkit.jobs import Defaults, Job, JobError, block_of, read_file, read_script
from vmdbg.testkit.keys import KEYS
from vmdbg.testkit.outcome import Outcome, Verdict
from vmdbg.testkit.schedule import Task
from vmdbg.timetravel.file import SnapshotFile, is_snapshot
from vmdbg.timetravel.tree import SnapshotError

__all__ = ["Tests", "collect"]

SCRIPTS = (".gdb", ".mi", ".vmdbg", ".py")
_OTHERS = frozenset(("pyproject.toml", "cargo.toml", "ruff.toml", "rustfmt.toml", "clippy.toml", "book.toml", "poetry.toml"))
"""TOML files of other tools, that nobody takes for job files."""
_PASSED_OVER = ("__pycache__", "node_modules", "venv")


@dataclass(slots=True)
class Tests:
    """Tests, and what is wrong with others."""

    tasks: list[Task] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Selection:
    """Which tests of those that were found are wanted: by patterns, and by names behind ::."""

    patterns: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    """Behind ::; all if there is none."""

    def __call__(self, id: str) -> bool:
        name = id.partition("::")[2]
        if self.names and not any(name == one or name.startswith((f"{one}::", f"{one}[")) for one in self.names):
            return False
        return not self.patterns or any(_fits(id, pattern) for pattern in self.patterns)


def _fits(id: str, pattern: str) -> bool:
    """A part of it, or with wildcards all of it."""
    id, pattern = id.lower(), pattern.lower()
    return pattern in id or fnmatch.fnmatchcase(id, pattern)


@dataclass(slots=True)
class JobTask:
    """A job in a process of its own."""

    job: Job
    record: bool = False
    snapshots: Path | None = None

    @property
    def id(self) -> str:
        return self.job.id

    @property
    def wall(self) -> float:
        return self.job.values[keys.WALL]

    @property
    def output_limit(self) -> int:
        return self.job.values[keys.OUTPUT]

    @property
    def address_space(self) -> int:
        options = machine_options.namespace(self.job.image, self.job.words)
        ram: int = options.memory
        path = self.job.folder / self.job.image
        if is_snapshot(path):
            with suppress(SnapshotError), closing(SnapshotFile(path)) as saved:
                ram = saved.config.memory
        return self.job.values[keys.MEMORY] + 2 * ram  # of two machines, while one starts over

    @property
    def folder(self) -> Path:
        return self.job.folder

    def run(self, printed: SharedText, parent: Parent) -> None:
        from vmdbg.testkit.carry_out import carry_out

        carry_out(self.job, printed, parent.tell, record=self.record, snapshots=self.snapshots)

    def skeleton(self, name: str = "") -> Outcome:
        from vmdbg.testkit.carry_out import skeleton

        return skeleton(self.job)

    def review(self, outcome: Outcome, printed: str) -> None:
        """What the script must have printed: an outcome that says nothing of it is not complete."""
        if outcome.verdict not in (Verdict.PASSED, Verdict.FAILED):
            return
        printed = printed.replace("\r\n", "\n")
        missing = [pattern.text for pattern in self.job.values[keys.PRINTS] if not pattern.search(printed)]
        if missing:
            outcome.verdict = Verdict.FAILED
            outcome.reasons += [f"the script has not printed {text!r}" for text in missing]

    @property
    def division(self) -> None:
        return None


@dataclass(slots=True)
class PytestTask:
    """A file of pytest's, in one process or several."""

    path: Path
    id: str
    wanted: Selection
    wall: float
    options: tuple[str, ...] = ()
    """Of pytest: what the command line says of machines."""
    scratch: Path | None = None
    """Where pytest's temporary files go."""
    output_limit: int = 64 << 20
    address_space: int = 32 << 30
    division: Division = field(default_factory=Division)

    @property
    def folder(self) -> Path:
        return Path.cwd()

    def run(self, printed: SharedText, parent: Parent) -> None:
        from vmdbg.testkit.pytests import run_file

        # Then it is killed; the output says where it was. pytest keeps what comes on descriptor 2.
        faulthandler.dump_traceback_later(self.wall, file=os.dup(2))
        own = [f"--basetemp={self.scratch / f'{self.path.stem}-{os.getpid()}'}"] if self.scratch is not None else []
        run_file(str(self.path), self.id, self.wanted, parent, options=[*self.options, *own], given=self.options)

    def skeleton(self, name: str = "") -> Outcome:
        from vmdbg.testkit.pytests import COLLECTION, commands_of

        name = name or COLLECTION
        return Outcome(name, self.id, 1, "pytest", reproduce=commands_of(self.id, name, self.options))

    def review(self, outcome: Outcome, printed: str) -> None:
        """pytest has judged."""


@dataclass(slots=True)
class _Search:
    """One command line."""

    defaults: Defaults
    patterns: tuple[str, ...]
    record: bool
    snapshots: Path | None
    pytest_wall: float
    found: Tests = field(default_factory=Tests)
    seen: set[str] = field(default_factory=set)

    def file(self, path: Path, shown_as: str, names: tuple[str, ...]) -> None:
        """One that was named, or that is surely a test."""
        if path.name.endswith(".py") and _is_pytest(path):
            self._add(PytestTask(path.absolute(), shown_as, Selection(self.patterns, names), self.pytest_wall, self._of_pytest()))
            return
        selection = Selection(self.patterns, names)
        try:
            read = read_script if path.suffix in SCRIPTS else read_file
            jobs = read(path, shown_as, self.defaults)
        except JobError as error:
            self.found.errors.append(str(error))
            return
        chosen = [job for job in jobs if selection(job.id)]
        if names and not chosen and not self.patterns:
            near = ", ".join(job.name for job in jobs[:8])
            self.found.errors.append(f"{shown_as}::{names[0]}: there is no such job; there are {near}")
        for job in chosen:
            self._add(JobTask(job, self.record, self.snapshots))

    def _of_pytest(self) -> tuple[str, ...]:
        """What the command line says, as pytest's plugin takes it."""
        said = {
            "--vmdbg-image": self.defaults.image, "--vmdbg-options": shlex.join(self.defaults.words),
            "--vmdbg-snapshots": str(self.snapshots or ""),
        }  # fmt: skip
        return *(f"{option}={value}" for option, value in said.items() if value), *(["--vmdbg-record"] if self.record else [])

    def _add(self, task: Task) -> None:
        if task.id not in self.seen:
            self.seen.add(task.id)
            self.found.tasks.append(task)

    def folder(self, top: Path) -> None:
        """All that are surely tests, in a directory and those in it."""
        for path in _files(top):
            if path.suffix == ".toml":
                self._toml(path)
            elif (path.suffix == ".py" and _is_pytest(path)) or (path.suffix in SCRIPTS and _has_block(path)):
                self.file(path, str(path), ())

    def _toml(self, path: Path) -> None:
        if path.name.lower() in _OTHERS:
            return
        try:
            names = tomllib.loads(path.read_text(encoding="utf-8")).keys()
        except (OSError, ValueError, RecursionError):
            names = KEYS.keys()  # read_file says what is wrong
        if names & {"job", *KEYS}:
            self.file(path, str(path), ())
        else:
            self.found.notes.append(f"{path}: passed over: it has neither [[job]] nor a key of jobs")


def _is_pytest(path: Path) -> bool:
    return path.name.startswith("test_") or path.name.endswith("_test.py")


def _has_block(path: Path) -> bool:
    try:
        return bool(block_of(path.read_text(encoding="utf-8", errors="replace"))[0])
    except OSError:
        return False


def _files(top: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(top):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in _PASSED_OVER)
        paths = (Path(folder, name) for name in sorted(files) if not name.startswith("."))
        yield from (path for path in paths if path.is_file())  # reading a pipe would wait for ever


def collect(
    words: Iterable[str], defaults: Defaults, patterns: Iterable[str] = (), *, record: bool = False,
    snapshots: Path | None = None, pytest_wall: float = 600.0,
) -> Tests:  # fmt: skip
    """The tests that words name: a file, FILE::NAME, or a directory."""
    search = _Search(defaults, tuple(patterns), record, snapshots, pytest_wall)
    named: dict[str, tuple[str, ...]] = {}
    for word in words:
        file, _, name = word.partition("::")
        before = named.get(file)
        named[file] = () if not name or before == () else (*(before or ()), name)
    for file, names in named.items():
        path = Path(file)
        try:
            if path.is_dir():
                search.folder(path)
            elif path.is_file():
                search.file(path, file, names)
            else:
                search.found.errors.append(f"{file}: there is no such file or directory; name a test, or a directory with some")
        except (OSError, ValueError) as error:
            search.found.errors.append(f"{file!r}: {error}; name a test, or a directory with some")
    return search.found
