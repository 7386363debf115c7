"""Lines of source files: from real line programs, and from files that are none."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from introspect.commands import CommandError, GuestView, HostView
from introspect.commands.parameters import AddressWord
from introspect.expression import Space
from introspect.paging import PagingState
from introspect.source_lines import SourceLines, is_line, read_lines
from introspect.sources import BytesMemory
from introspect.symbols import Symbols
from tests.introspect.world import World

SOURCE = """\
static int twice(int n)
{
    return 2 * n;
}

int first(int n)
{
    if (n > 3)
        n = twice(n);

    return n;
}
"""
OTHER = """\
\t.text
\t.globl other
other:
\tnop
\tret
"""


@pytest.fixture(scope="module", params=["-gdwarf-5", "-gdwarf-4"])
def elf(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program of two files, one in C and one in assembly."""
    if shutil.which("gcc") is None:
        pytest.skip("gcc, which makes the line programs, is not in PATH")
    folder = tmp_path_factory.mktemp("lines")
    (folder / "first.c").write_text(SOURCE)
    (folder / "other.S").write_text(OTHER)
    flags = ["-nostdlib", "-static", "-O0", request.param, "-Wl,-Ttext=0x100000,-e,first", "-Wl,-z,noexecstack"]
    subprocess.run(["gcc", *flags, "-o", "program", "first.c", "other.S"], cwd=folder, check=True, capture_output=True)
    return folder / "program"


def test_every_line_leads_back(elf: Path) -> None:
    lines, symbols = SourceLines.load(elf), Symbols.load(elf)
    for number in (2, 3, 7, 8, 9, 11):
        address = lines.address("first.c", number)
        assert address is not None
        place = lines.at(address)
        assert place is not None
        assert (place.path, place.line) == (elf.with_name("first.c"), number)
    assert lines.address("first.c", 2) == symbols.address("twice")
    assert lines.address("first.c", 7) == symbols.address("first")
    found = symbols.address("other")
    assert found is not None
    place = lines.at(found)
    assert place is not None
    assert str(place) == "other.S:4"


def test_a_line_without_code_is_the_next_one_with_some(elf: Path) -> None:
    lines = SourceLines.load(elf)
    assert lines.address("first.c", 10) == lines.address("first.c", 11)
    assert lines.address("first.c", 13) is None
    assert lines.address("nothing.c", 1) is None
    assert lines.address("irst.c", 2) is None
    assert lines.address(f"{elf.parent.name}/first.c", 2) == lines.address("first.c", 2)


def test_addresses_of_nothing(elf: Path) -> None:
    lines = SourceLines.load(elf)
    for address in (0, 0xFFFFF, 0x200000, (1 << 64) - 1):
        assert lines.at(address) is None


def test_relocated(elf: Path) -> None:
    lines, moved = SourceLines.load(elf), SourceLines.load(elf, 0x7000)
    address = lines.address("first.c", 8)
    assert address is not None
    assert moved.address("first.c", 8) == address + 0x7000
    assert moved.at(address + 0x7000) == lines.at(address)
    assert moved.at(0x10) is None


def test_the_text(elf: Path) -> None:
    path = elf.with_name("first.c")
    assert read_lines(path, 2, 2) == ["{", "    return 2 * n;"]
    assert read_lines(path, -3, 2) == SOURCE.splitlines()[:2]
    assert read_lines(path, 100, 2) == read_lines(path.with_name("nothing"), 1, 2) == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("exits.c:253", ("", "exits.c", 253)),
        ("2:guests/guest64.c:50", ("2", "guests/guest64.c", 50)),
        ("host:boot.S:1", ("host", "boot.S", 1)),
        ("2:gva:0x1000", None),
        ("00:03.0:iova:0x2000", None),
        ("main", None),
        ("spa:0", None),
        ("a.c:", None),
        ("a.c:99999999999", None),
    ],
)
def test_what_is_a_line(text: str, found: tuple[str, str, int] | None) -> None:
    assert is_line(text) == found


def test_as_an_address(elf: Path) -> None:
    paging = PagingState(0x11, 0, 0, 0)
    guest = GuestView(number=2, name="g", vmcbs=(), asid=1, ncr3=None, paging=paging)
    symbols = Symbols.load(elf)
    world = World(BytesMemory({}), guests=[guest], host=HostView(number=1, paging=paging), known_symbols={1: symbols, 2: symbols})
    for text, owner in (("first.c:8", 1), ("2:first.c:8", 2), ("1:first.c:8", 1)):
        found = AddressWord(text, Space.SPA).locate(world)
        assert (found.owner.number, found.space, found.offset) == (owner, Space.GVA, SourceLines.load(elf).address("first.c", 8))
    for text in ("first.c:99", "3:first.c:8"):
        with pytest.raises(CommandError):
            AddressWord(text, Space.GVA).locate(world)


def test_files_that_are_none(tmp_path: Path) -> None:
    for content in (b"", b"\x7fELF", bytes(4096)):
        path = tmp_path / f"file{len(content)}"
        path.write_bytes(content)
        lines = SourceLines.load(path)
        assert lines.at(0x100000) is None
        assert lines.address("first.c", 1) is None
    assert SourceLines.load(tmp_path / "nothing").at(0) is None


def test_damaged_line_programs(elf: Path, tmp_path: Path) -> None:
    whole = elf.read_bytes()

    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(st.tuples(st.integers(0, len(whole) - 1), st.integers(0, 255)), max_size=30), st.integers(64, len(whole)))
    def survives(changes: list[tuple[int, int]], length: int) -> None:
        data = bytearray(whole)
        for at, value in changes:
            data[at] = value
        path = tmp_path / "damaged"
        path.write_bytes(data[:length])
        lines = SourceLines(path)
        lines.at(0x100000)
        lines.address("first.c", 8)

    survives()
