"""`vmdbg test` in a process of its own, and what it says."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.patience import PATIENCE
from vmdbg.testkit import example

HYPERVISOR = Path(example.__file__).parent / "hypervisor.elf"


@dataclass
class Run:
    status: int
    said: str
    errors: str
    folder: Path

    @property
    def tests(self) -> dict[str, dict[str, Any]]:
        return {one["id"]: one for one in self.report["tests"]}

    @property
    def report(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "out/r.json").read_text())
        return found


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "vmdbg", "test", *words]


def run(folder: Path, *words: str) -> Run:
    done = subprocess.run(command(*words), cwd=folder, capture_output=True, text=True, timeout=PATIENCE, check=False)
    return Run(done.returncode, done.stdout, done.stderr, folder)
