"""Consoles on the demo hypervisor."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.console.talking import ROOT, Talk


@pytest.fixture(scope="session")
def hypervisor() -> Path:
    """The demo's image, built."""
    if shutil.which("make") is None or shutil.which("gcc") is None:
        pytest.skip("make and gcc, which build the demo hypervisor, are not in PATH")
    subprocess.run(["make", "-s", "-C", ROOT / "examples/hypervisor"], check=True, capture_output=True)
    return ROOT / "examples/hypervisor/build/hypervisor.elf"


@pytest.fixture
def talk(hypervisor: Path, tmp_path: Path) -> Iterator[Callable[..., Talk]]:
    """A shell on a machine with the demo, whose output is kept; closed with the test."""
    made: list[Talk] = []

    def start(**settings: bool) -> Talk:
        made.append(Talk(hypervisor, tmp_path, **settings))
        return made[-1]

    yield start
    for each in made:
        each.close()
