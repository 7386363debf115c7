"""What is released: the source distribution, the wheel that is built of it, and that wheel in an environment of its own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.gdbstub.gdb import GDBS
from tests.patience import PATIENCE
from vmdbg.attach import MODULE

TOP = Path(__file__).resolve().parents[1]
OURS = ("vmdbg", "gdbstub", "introspect")
FOLDERS = (*OURS, "examples", "docs", "tests", "benchmarks")
FILES = ("pyproject.toml", "setup.py", "MANIFEST.in", "Makefile", "README.md", "CHANGELOG.md", "LICENSE")
NOT_SOURCE = shutil.ignore_patterns("build", "data", "__pycache__", ".pytest_cache", "pytest-cache-files-*", "*.so", "*.o", "_generated")
EXTENSION_SOURCE = re.compile(r"vmdbg/(engine|svm)/\w+\.[ch]")
IMAGES = ("hypervisor.elf", "hypervisor.debug", "guest64.elf", "guestpae.elf", "guestreal.elf", "gueststray.elf")


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def copy(into: Path) -> Path:
    """What is under version control, or would be."""
    for name in FOLDERS:
        shutil.copytree(TOP / name, into / name, ignore=NOT_SOURCE)
    for name in FILES:
        shutil.copy(TOP / name, into)
    return into


def build(source: Path, into: Path, *options: str, **environment: str) -> str:
    """`python -m build` with the packages of this environment; what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", *options, "--outdir", into, source],
        capture_output=True, text=True, env={**os.environ, "SOURCE_DATE_EPOCH": "1700000000", **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@dataclass(frozen=True)
class Released:
    source: Path
    sdist: Path
    wheel: Path
    names: frozenset[str]
    """In the wheel."""


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Released:
    """A source distribution, and the wheel that is built of nothing else."""
    source = copy(tmp_path_factory.mktemp("source"))
    into = tmp_path_factory.mktemp("dist")
    build(source, into)
    wheel = next(into.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        return Released(source, next(into.glob("*.tar.gz")), wheel, frozenset(archive.namelist()))


class Installed:
    """A wheel in an environment of its own; the packages that it needs are those of this one."""

    def __init__(self, wheel: Path, place: Path) -> None:
        venv.create(place, symlinks=True)
        self.python = place / "bin/python"
        self.packages = next((place / "lib").glob("python*/site-packages"))
        # Of a path that a .pth file adds no .pth files are read: the checkout, installed as editable, is not among them.
        (self.packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
        subprocess.run(
            [sys.executable, "-m", "pip", "--python", self.python, "install", "-q", "--no-deps", "--no-index", wheel],
            check=True, capture_output=True,
        )  # fmt: skip
        self.place = place

    def __call__(self, *words: str | Path, status: int = 0, **environment: str) -> str:
        """Run a program of its; what it printed."""
        program, *rest = words
        done = subprocess.run(
            [self.place / "bin" / program, *rest], cwd=self.place, capture_output=True, text=True, timeout=PATIENCE,
            env={**os.environ, "PYTHONSAFEPATH": "1", **environment},
        )  # fmt: skip
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout + done.stderr


@pytest.fixture(scope="module")
def installed(released: Released, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    return Installed(released.wheel, tmp_path_factory.mktemp("venv"))


def compiled() -> None:
    if sys.platform != "linux" or any(shutil.which(tool) is None for tool in ("make", "gcc", "ld", "objcopy")):
        pytest.skip("make, gcc and binutils, which compile the demo, are not in PATH")


def test_source_distribution_is_complete(released: Released) -> None:
    with tarfile.open(released.sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    expected = {name for name in files(released.source) if not name.startswith("vmdbg.egg-info/")}
    assert expected - names == set()
    made = {name for name in names - expected if not name.startswith("vmdbg.egg-info/")}
    assert made == {"PKG-INFO", "setup.cfg"}


def test_wheel_has_all_of_the_packages_and_nothing_else(released: Released) -> None:
    ours = {name for name in files(released.source) if name.split("/")[0] in OURS and not EXTENSION_SOURCE.fullmatch(name)}
    made = {name for name in released.names if name.startswith("vmdbg/demo/hypervisor/") or name.endswith(".so") or ".dist-info/" in name}
    assert released.names - made == ours


def test_wheel_has_what_gdb_loads_its_types_and_licence(released: Released) -> None:
    assert {str(MODULE.relative_to(TOP)), str(MODULE.with_suffix(".json").relative_to(TOP))} <= released.names
    assert {f"{name}/py.typed" for name in OURS} <= released.names
    assert "introspect/commands/examples.json" in released.names
    assert any(name.endswith("licenses/LICENSE") for name in released.names)


def test_metadata_is_as_an_index_wants_it(released: Released) -> None:
    subprocess.run([sys.executable, "-m", "twine", "check", "--strict", released.wheel, released.sdist], check=True)


def test_wheel_has_the_demo_and_no_paths_of_who_built_it(released: Released) -> None:
    compiled()
    there = {name.removeprefix("vmdbg/demo/hypervisor/") for name in released.names if name.startswith("vmdbg/demo/hypervisor/")}
    assert {name for name in there if name.startswith("build/")} == {f"build/{name}" for name in IMAGES}
    assert files(released.source / "examples/hypervisor") <= there
    with zipfile.ZipFile(released.wheel) as archive:
        binaries = [name for name in released.names if name.endswith((".so", ".elf", ".debug"))]
        named = [name for name in binaries if re.search(rb"/tmp/|/build/|/home/", archive.read(name))]
    assert not named


def test_installed(installed: Installed) -> None:
    where = installed("python", "-c", "import vmdbg, gdbstub, introspect; print(vmdbg.__file__, gdbstub.__file__, introspect.__file__)")
    assert [Path(name).is_relative_to(installed.packages) for name in where.split()] == [True] * 3
    assert re.fullmatch(r"vmdbg \d+\.\d+\.\d+\n", installed("vmdbg", "--version"))


@pytest.mark.skipif(not GDBS, reason="there is no gdb here")
def test_installed_demo(installed: Installed) -> None:
    compiled()
    said = installed("vmdbg", "demo")
    assert "All as told" in said
    assert "56          return sum;" in said, "gdb finds the sources"
    directory = re.findall(r"cd (.*/hypervisor)$", said, re.MULTILINE)
    assert (installed.place / directory[0] / "build/hypervisor.elf").exists()


def test_installed_demo_to_try_by_hand(installed: Installed, tmp_path: Path) -> None:
    compiled()
    installed("vmdbg", "demo", "--copy", tmp_path / "mine")
    subprocess.run(["make", "-s", "-B", "-C", tmp_path / "mine"], check=True, capture_output=True)
    assert "hypervisor: all well" in installed("vmdbg", "run", tmp_path / "mine/build/hypervisor.elf", status=1)
    assert "exists; name a directory that is to be made" in installed("vmdbg", "demo", "--copy", tmp_path / "mine", status=2)


def test_demo_without_a_gdb(installed: Installed, tmp_path: Path) -> None:
    compiled()
    shown = installed("vmdbg", "demo", status=2, PATH=str(tmp_path))
    assert shown == "vmdbg: there is no gdb; install it (apt install gdb, or pip install gdb-for-pwndbg)\n"


def test_installed_example_of_the_test_kit(installed: Installed) -> None:
    said = installed("python", "-m", "pytest", "-p", "no:cacheprovider", "--pyargs", "vmdbg.testkit.example")
    assert re.search(r"\d+ passed", said)
    assert "failed" not in said


def test_without_a_compiler(released: Released, tmp_path: Path) -> None:
    """The twins in Python do the work, and the demo says what lacks."""
    tools = tmp_path / "tools"
    tools.mkdir()
    said = build(released.source, tmp_path, "--wheel", PATH=str(tools))
    assert "vmdbg is built without its demo hypervisor (no make here)" in said
    wheel = next(tmp_path.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        built = {name for name in archive.namelist() if name.endswith((".so", ".elf"))}
    assert built == {f"vmdbg/testkit/example/{name}.elf" for name in ("guest", "hypervisor")}, "shipped as they are"
    installed = Installed(wheel, tmp_path / "venv")
    lacks = installed("vmdbg", "demo", status=2)
    assert lacks.startswith("vmdbg: this installation has no demo hypervisor: ")
    assert lacks.count("\n") == 1
    sector = tmp_path / "sector.img"  # writes 20 to port F4
    sector.write_bytes(b"\xb0\x14\xe6\xf4\xf4".ljust(510, b"\0") + b"\x55\xaa")
    installed("vmdbg", "run", sector, status=20 << 1 | 1)
