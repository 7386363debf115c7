"""`vmdbg run` as its users start it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.gdbstub.gdb import Gdb
from tests.patience import PATIENCE

ROOT = Path(__file__).resolve().parents[2]


class Outcome(NamedTuple):
    """All that a run leaves behind."""

    status: int
    ticks: int
    """Final guest time."""
    serial: bytes
    exits: str
    """The exit trace."""
    fingerprint: str
    """Its identity and the hash of all that it did."""


def vmdbg(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command line to its end."""
    return subprocess.run(
        [sys.executable, "-m", "vmdbg", *arguments], cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        timeout=PATIENCE, check=False,
    )  # fmt: skip


def _ticks(errors: str) -> int:
    found = re.search(r"the run ended after (\d+) ticks", errors)
    assert found is not None, errors
    return int(found[1])


def _fingerprint(errors: str) -> str:
    found = re.search(r"fingerprint: identity=\w+ trace=\w+", errors)
    assert found is not None, errors
    return found[0]


def run(image: Path, folder: Path, *arguments: str) -> Outcome:
    """An undebugged run."""
    serial, trace = folder / "serial", folder / "exits"
    done = vmdbg("run", str(image), "-v", "--serial", f"file:{serial}", "--trace-exits", str(trace), "--fingerprint", *arguments)
    return Outcome(done.returncode, _ticks(done.stderr), serial.read_bytes(), trace.read_text(), _fingerprint(done.stderr))


def build_image(name: str, folder: Path) -> Path:
    """Compile one of tests/e2e/images."""
    elf = folder / f"{name}.elf"
    linker = "-Wl,-Ttext=0x100000,--build-id=none,-z,noexecstack,-z,max-page-size=4096"
    source = ROOT / "tests/e2e/images" / f"{name}.S"
    subprocess.run(
        ["gcc", "-nostdlib", "-static", "-g", linker, "-o", str(elf), str(source)], check=True, capture_output=True
    )  # fmt: skip
    return elf


class Served:
    """A machine that waits for gdb at its first instruction, in a process of its own."""

    def __init__(self, image: Path, folder: Path, *arguments: str) -> None:
        self.serial, self.trace = folder / "serial", folder / "exits"
        command = [
            sys.executable, "-m", "vmdbg", "run", str(image), "-v", "--serial", f"file:{self.serial}", "--trace-exits",
            str(self.trace), "--fingerprint", "--gdb", "0", "--wait", "--timeout", "1000", *arguments,
        ]  # fmt: skip
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        assert self.process.stderr is not None
        self.errors = ""
        while (found := re.search(r"extended-remote 127.0.0.1:(\d+)", self.errors)) is None:
            line = self.process.stderr.readline()
            assert line, self.errors
            self.errors += line
        self.port = int(found[1])

    def connect(self, gdb: Gdb) -> str:
        return gdb(f"target extended-remote 127.0.0.1:{self.port}")

    def ends_as(self, gdb: Gdb, undebugged: Outcome, *, changed: bool = False) -> None:
        """The machine runs to its end, and all that it leaves behind is what it leaves undebugged.  `changed`: the debugger has
        written something that leaves no trace but in the fingerprint."""
        assert f"exited with code 0{undebugged.status:o}" in gdb("continue")
        gdb.close()
        same(self.finish(), undebugged, changed=changed)

    def finish(self) -> Outcome:
        """Wait for the end of the machine, whose client must be gone or about to go."""
        self.errors += self.process.communicate(timeout=PATIENCE)[1]
        return Outcome(
            self.process.returncode, _ticks(self.errors), self.serial.read_bytes(), self.trace.read_text(),
            _fingerprint(self.errors),
        )

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


def same(outcome: Outcome, expected: Outcome, *, changed: bool = False) -> None:
    """Two runs have left the same behind; `changed`: but for the fingerprint.  pytest's own comparison takes minutes for such texts."""
    if changed:
        assert outcome.fingerprint != expected.fingerprint
        expected = expected._replace(fingerprint=outcome.fingerprint)
    for name, got, wanted in zip(Outcome._fields, outcome, expected, strict=True):
        if got != wanted:
            shown = [str(value)[-300:] for value in (got, wanted)]
            pytest.fail(f"{name} differs: {shown[0]!r} and not {shown[1]!r}")


def attach(gdb: Gdb, pid: int, symbols: Path | None = None, command: str = "file") -> str:
    """Attach to a guest in a new inferior; what gdb printed."""
    added = re.search(r"Added inferior (\d+)", gdb("add-inferior"))
    assert added is not None
    gdb(f"inferior {added[1]}")
    printed = gdb(f"{command} {symbols}") if symbols is not None else ""
    return printed + gdb(f"attach {pid}")


def reach(gdb: Gdb, function: str) -> None:
    """Continue to a function, over stops at which guests appear; no breakpoint is left."""
    gdb(f"break {function}")
    while f", {function} (" not in gdb("continue"):
        pass
    gdb("delete")


def exits_of(gdb: Gdb, guest: int, count: int = 1) -> list[tuple[int, str]]:
    """A guest's last exits: their numbers, counted over the whole machine, and what each was."""
    rows = [re.split(r"\s{2,}", line.strip()) for line in gdb(f"monitor exits {guest} {count}").splitlines()]
    return [(int(row[0]), row[-1]) for row in rows if row[0].isdigit()]
