"""Real machines in processes of their own, and stock gdb on them."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.served import ROOT, Served, build_image
from tests.gdbstub.gdb import GDBS, Gdb, newest
from vmdbg.attach import GDB_SETTINGS


@pytest.fixture(scope="session")
def examples() -> Path:
    """The directory of the examples, built."""
    if shutil.which("make") is None or shutil.which("gcc") is None:
        pytest.skip("make and gcc, which build the examples, are not in PATH")
    for name in ("hypervisor", "bootsector", "nested", "secure-loader", "assignment"):
        subprocess.run(["make", "-s", "-C", ROOT / "examples" / name], check=True, capture_output=True)
    return ROOT / "examples"


@pytest.fixture(scope="session")
def hypervisor(examples: Path) -> Path:
    return examples / "hypervisor/build/hypervisor.elf"


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Builds one of tests/e2e/images."""
    if shutil.which("gcc") is None:
        pytest.skip("gcc, which builds the test's image, is not in PATH")
    folder = tmp_path_factory.mktemp("images")

    def build(name: str) -> Path:
        elf = folder / f"{name}.elf"
        return elf if elf.exists() else build_image(name, folder)

    return build


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Served]]:
    """Start `vmdbg run --gdb` on an image with these further arguments; ended with the test."""
    started: list[Served] = []

    def start(image: Path, *arguments: str) -> Served:
        folder = tmp_path / str(len(started))
        folder.mkdir()
        started.append(Served(image, folder, *arguments))
        return started[-1]

    yield start
    for one in started:
        one.close()


@pytest.fixture
def gdb() -> Iterator[Gdb]:
    if shutil.which("gdb") is None:
        pytest.skip("gdb is not in PATH")
    one = Gdb()
    for setting in GDB_SETTINGS:
        one(setting)
    yield one
    one.close()


@pytest.fixture(params=["system", "newest"])
def each_gdb(request: pytest.FixtureRequest) -> Iterator[Gdb]:
    """The system's gdb, and the one that PyPI carries."""
    chosen = [program for program in GDBS if (program == newest()) == (request.param == "newest")]
    if not chosen:
        pytest.skip("gdb is not in PATH" if request.param == "system" else "gdb-for-pwndbg is not installed (make gdb, or pip)")
    one = Gdb(chosen[0])
    for setting in GDB_SETTINGS:
        one(setting)
    yield one
    one.close()
