"""The pytest plugin, in suites of its users: fixtures, markers, options, reports, and what it leaves alone."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from tests.patience import PATIENCE
from tests.testkit.conftest import EXAMPLE

MARK = f"pytestmark = pytest.mark.vmdbg({str(EXAMPLE / 'hypervisor.elf')!r}, symbols={{2: {str(EXAMPLE / 'guest.elf')!r}}})"
HEAD = f"import pytest\nimport vmdbg\nfrom vmdbg.testkit import *\n{MARK}\n"
QUIET = ("-p", "no:cacheprovider", "-q", "--strict-markers", "--strict-config")


def sections(result: pytest.RunResult) -> dict[str, str]:
    """Of a report, by title."""
    parts = re.split(r"^-{3,} (vmdbg [^-]*?) -{3,}$|^(=+ .* =+)$", result.stdout.str(), flags=re.MULTILINE)
    found: dict[str, str] = {}
    title = ""
    for part in parts:
        if part is None:
            continue
        if part.startswith("vmdbg "):
            title = part
        elif part.startswith("="):
            title = ""
        elif title:
            found[title], title = part.strip("\n"), ""
    return found


def test_what_a_failed_test_tells(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(HEAD + """
def test_it(guest):
    expect_exit(guest, "NPF", gpa=0xa000)
    assert guest.read(0x1000, 4) == b"none"
""")  # fmt: skip
    result = pytester.runpytest(*QUIET, "--junit-xml=report.xml")
    result.assert_outcomes(failed=1)
    found = sections(result)
    assert list(found) == ["vmdbg machine", "vmdbg last exits", "vmdbg context", "vmdbg serial output", "vmdbg again"]
    assert "hypervisor.elf: guest 2 at 0x1063 <work+0xb>: catchpoint" in found["vmdbg machine"]
    assert found["vmdbg last exits"].splitlines()[-1].endswith("NPF (nested page fault): read of the final address, gpa 0xa000, not present")
    assert "-- guest 2: protected mode, 32-bit" in found["vmdbg context"]
    assert found["vmdbg serial output"] == "hello from the guest"
    report = ElementTree.parse(pytester.path / "report.xml").find(".//testcase/system-out")
    assert report is not None
    assert report.text is not None
    for title, text in found.items():
        assert title in report.text
        assert text.splitlines()[0] in report.text


def test_an_error_that_explains_itself_shows_the_tests_line_alone(pytester: pytest.Pytester) -> None:
    """But all of the way with --full-trace, and of what is no error of a test's."""
    pytester.makepyfile(HEAD + """
def test_it(machine):
    machine.run(until="2:wrok")

def test_function(machine):
    machine.run(until=lambda machine: 1 / 0)
""")  # fmt: skip
    result = pytester.runpytest(*QUIET)
    text = result.stdout.str()
    result.stdout.fnmatch_lines([">       machine.run(until=\"2:wrok\")", "E *CommandFailed: wrok: *; did you mean work?", "*.py:7: CommandFailed"])
    assert "errors.py" not in text
    assert "runner.py" in text, "whose mistake it is, is not known"
    assert "errors.py" in pytester.runpytest(*QUIET, "--full-trace").stdout.str()


def test_the_printed_commands_lead_back(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(HEAD + """
def test_it(guest):
    expect_exit(guest, "NPF", gpa=0xa000)
    assert False
""")  # fmt: skip
    again = sections(pytester.runpytest(*QUIET))["vmdbg again"].splitlines()
    assert again[-1] == "    pytest test_the_printed_commands_lead_back.py::test_it"
    there, beginning = ([sys.executable, "-m", *shlex.split(line)] for line in (again[1], again[3]))
    done = subprocess.run([*there, "-c", "exits 2 1"], capture_output=True, text=True, check=False, timeout=PATIENCE, cwd=pytester.path)
    assert "gpa 0xa000" in done.stdout, done
    done = subprocess.run(beginning, capture_output=True, text=True, check=False, timeout=PATIENCE, cwd=pytester.path)
    assert done.stdout == "hello from the guest\n"
    assert "--max-time 138310 reached" in done.stderr


def test_snapshots_go_where_they_are_wanted(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(HEAD + """
@pytest.mark.parametrize("what", ["a/b", "c d"])
def test_it(machine, boot, what):
    boot().run()
    assert False
""")  # fmt: skip
    found = sections(pytester.runpytest(*QUIET, "--vmdbg-snapshots=kept"))
    assert sorted(path.name for path in (pytester.path / "kept").iterdir()) == [
        f"test_snapshots_go_where_they_are_wanted.py-test_it-{what}-{n}.snapshot" for what in ("a-b", "c-d") for n in (1, 2)
    ]
    assert "it has not run" in found["vmdbg machine of machine 1"]
    assert "the guest ended the run with status 1" in found["vmdbg machine of machine 2"]


def test_a_guest_that_loops_fails(pytester: pytest.Pytester) -> None:
    """However often the test runs it on, and in gdb's hands, too."""
    pytester.path.joinpath("loop.bin").write_bytes(b"\xeb\xfe")
    pytester.makepyfile("""
import pytest
pytestmark = pytest.mark.vmdbg("loop.bin", flat=0x100000, mode="long", wall=0.5)

def test_run(machine):
    while True:
        machine.run(ticks=100_000)

@pytest.mark.skipif(%r, reason="no gdb")
def test_gdb(gdb):
    gdb.resume()
""" % (shutil.which("gdb") is None))  # fmt: skip
    result = pytester.runpytest(*QUIET)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["E * vmdbg.api.errors.TimeUp: the time for this machine is over: it stands at host, 0x100000, guest time *"])
    assert "jmp 0x100000" in sections(result)["vmdbg context"]


def test_where_options_come_from(pytester: pytest.Pytester) -> None:
    for name in ("hypervisor.elf", "guest.elf"):
        shutil.copy(EXAMPLE / name, pytester.path / name)
    shutil.copy(EXAMPLE / "hypervisor.elf", pytester.path / "other.elf")
    pytester.makeini("""
[pytest]
vmdbg_image = hypervisor.elf
vmdbg_options = --cpus 2 --symbols 2=guest.elf --memory=64M
""")  # fmt: skip
    pytester.makepyfile("""
import pytest

def test_by_file(machine):
    assert machine.image.name == "hypervisor.elf"
    assert len(machine.cpus) == 2
    assert machine.options["memory"] == "64M"

def test_by_words(machine):
    assert machine.image.name == "other.elf"
    assert machine.options["tlb"] == "strict"
    assert len(machine.cpus) == 3

@pytest.mark.vmdbg("hypervisor.elf", cpus=4)
class TestClosest:
    @pytest.mark.vmdbg(tlb="coherent")
    def test_marker(self, machine, boot):
        assert machine.image.name == "hypervisor.elf"
        assert len(machine.cpus) == 4
        assert machine.options["tlb"] == "coherent"
        assert len(boot(cpus=1).cpus) == 1
        assert boot("other.elf").image.name == "other.elf"
""")  # fmt: skip
    pytester.runpytest(*QUIET, "-k", "not words").assert_outcomes(passed=2)
    pytester.runpytest(*QUIET, "-k", "not file", "--vmdbg-image=other.elf", "--vmdbg-options=--tlb strict --cpus 3").assert_outcomes(passed=2)


@pytest.mark.parametrize(("marker", "words"), [
    ("", "no image is named; write @pytest.mark.vmdbg(\"hypervisor.elf\"), --vmdbg-image, or vmdbg_image in the ini file"),
    ("'none.elf'", "none.elf, which the marker names, is no file in"), (f"{str(EXAMPLE / 'hypervisor.elf')!r}, cpus=99", "'99' CPUs are not possible"), (f"{str(EXAMPLE / 'hypervisor.elf')!r}, cpu=2", "cpu: a machine has no such option; it takes"),
    ("'a', 'b'", "the marker vmdbg takes one image"), ("'a', wall='x'", "wall=x: seconds that the machines of a test may run are meant"),
    (f"{str(EXAMPLE / 'hypervisor.elf')!r}, guest=1", "guest=1: guests are numbered from 2"),
])  # fmt: skip
def test_mistakes_are_told_in_a_line(pytester: pytest.Pytester, marker: str, words: str) -> None:
    pytester.makepyfile(f"import pytest\n@pytest.mark.vmdbg({marker})\ndef test_it(guest): pass")
    result = pytester.runpytest(*QUIET)
    result.assert_outcomes(errors=1)
    told = result.stdout.str().partition(" ERROR at setup of test_it ")[2].splitlines()
    assert words in told[1]
    assert told[2].startswith(("=" * 8, "-" * 8)), "and that is all"


def test_machines_are_gone_behind_their_test(pytester: pytest.Pytester) -> None:
    """Each has gibibytes of address space, and a session many tests."""
    pytester.makepyfile(HEAD + """
import gc

@pytest.mark.parametrize("number", range(3))
def test_it(guest, golden, number):
    gc.collect()
    assert len([one for one in gc.get_objects() if isinstance(one, vmdbg.Machine)]) == 1
    assert number != 1
""")  # fmt: skip
    pytester.runpytest_subprocess(*QUIET).assert_outcomes(passed=2, failed=1)


def test_reports_are_the_same_each_time(pytester: pytest.Pytester) -> None:
    """No addresses of Python's objects."""
    pytester.makepyfile(HEAD + "def test_it(machine, guest, golden, boot): assert not (machine, guest, golden)")
    assert "object at 0x" not in pytester.runpytest(*QUIET).stdout.str()


def test_a_snapshot_that_cannot_be_kept_ends_nothing(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(HEAD + "def test_it(machine): assert False\ndef test_next(): pass")
    result = pytester.runpytest(*QUIET, "--vmdbg-snapshots=/dev/null/x")
    result.assert_outcomes(failed=1, passed=1)
    assert "no snapshot: " in sections(result)["vmdbg again"]


def test_a_guest_that_never_comes(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(HEAD + "@pytest.mark.vmdbg(guest=3)\ndef test_it(guest): pass")
    result = pytester.runpytest(*QUIET)
    result.stdout.fnmatch_lines(["guest 3 has not appeared: *the guest ended the run with status 1"])
    assert "hello from the guest" in sections(result)["vmdbg serial output"]


def test_golden_traces_are_recorded_when_asked(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(HEAD + """
@pytest.mark.parametrize("cpus", [1, 2])
def test_it(boot, golden, machine, cpus):
    machine.run()
    golden()
    golden("named", ignore=["rax"], rip="function")
""")  # fmt: skip
    result = pytester.runpytest(*QUIET)
    result.assert_outcomes(failed=2)
    result.stdout.fnmatch_lines(["*there is no such golden trace; record it (pytest --vmdbg-record)"])
    result = pytester.runpytest(*QUIET, "--vmdbg-record")
    result.assert_outcomes(passed=2)
    result.stdout.fnmatch_lines(["*golden exit traces recorded*", "*golden/test_it-1.exits", "*golden/named.exits", "*golden/test_it-2.exits"])
    assert sorted(path.name for path in (pytester.path / "golden").iterdir()) == ["named.exits", "test_it-1.exits", "test_it-2.exits"]
    result = pytester.runpytest(*QUIET)
    result.assert_outcomes(passed=2)
    assert "recorded" not in result.stdout.str()
    path = pytester.path / "golden" / "named.exits"
    path.write_text(path.read_text().replace("2 CPUID", "2 HLT"))
    result = pytester.runpytest(*QUIET)
    result.assert_outcomes(failed=2)
    result.stdout.fnmatch_lines(["E *golden/named.exits: exit 22 (#22 of this run) differs: CPUID instead of HLT"])


def test_side_by_side(pytester: pytest.Pytester) -> None:
    """With pytest-xdist what tests tell comes from other processes."""
    pytester.makepyfile(HEAD + """
def test_fails(machine):
    machine.run()
    assert False

def test_records(machine, golden):
    machine.run()
    golden()
""")  # fmt: skip
    result = pytester.runpytest_subprocess(*QUIET, "-n", "2", "--vmdbg-record", "--junit-xml=report.xml")
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["*golden exit traces recorded*", "golden/test_records.exits"])
    found = sections(result)
    assert found["vmdbg serial output"] == "hello from the guest\ndone"
    report = ElementTree.parse(pytester.path / "report.xml").find(".//testcase/system-out")
    assert report is not None
    assert "vmdbg context" in str(report.text)


def test_more_exits_than_the_ring_holds(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(HEAD + """
@pytest.mark.vmdbg(exit_ring=4)
def test_it(machine, golden):
    machine.run()
    assert len(machine.exits()) == 4
    golden()
""")  # fmt: skip
    pytester.runpytest(*QUIET, "--vmdbg-record").assert_outcomes(passed=1)
    assert "exits: 32" in (pytester.path / "golden" / "test_it.exits").read_text()


@pytest.mark.skipif(shutil.which("gdb") is None, reason="gdb is not in PATH")
def test_nothing_outlives_its_test(pytester: pytest.Pytester) -> None:
    """Also where it fails, or a fixture does."""
    pytester.makepyfile(HEAD + """
kept = []

def test_fails(gdb, machine):
    kept.append((gdb, machine))
    gdb.run_to("main")
    assert gdb.eval("$rip") == 0

@pytest.fixture
def broken(gdb, machine):
    kept.append((gdb, machine))
    raise RuntimeError

def test_broken(broken): pass

def test_all_is_gone():
    assert len(kept) == 2
    for gdb, machine in kept:
        assert machine.closed
        with pytest.raises(GdbError):
            gdb.execute("info inferiors")
""")  # fmt: skip
    result = pytester.runpytest(*QUIET)
    result.assert_outcomes(passed=1, failed=1, errors=1)
    assert "Temporary breakpoint 1, main ()" in sections(result)["vmdbg gdb"]


def test_suites_that_do_not_use_it_are_left_alone(pytester: pytest.Pytester) -> None:
    """Nothing is loaded, nothing is reported, and their fixtures of the same names are theirs."""
    pytester.makepyfile("""
import sys
import pytest

@pytest.fixture
def machine():
    return "ours"

def test_fails(machine):
    assert machine == "ours"
    loaded = [name for name in sys.modules if name.split(".")[0] in ("unicorn", "capstone", "numpy", "introspect", "gdbstub")]
    assert loaded == []
    assert not {"vmdbg.machine", "vmdbg.api", "vmdbg.testkit.fixtures"} & set(sys.modules)
    assert False, "as it should"
""")  # fmt: skip
    result = pytester.runpytest_subprocess(*QUIET, "-p", "no:hypothesispytest", "--junit-xml=report.xml")
    result.stdout.fnmatch_lines(["E *AssertionError: as it should"])
    assert "vmdbg " not in result.stdout.str()
    assert ElementTree.parse(pytester.path / "report.xml").find(".//system-out") is None


def test_it_is_documented_where_pytest_looks(pytester: pytest.Pytester) -> None:
    fixtures = pytester.runpytest("--fixtures", "-p", "no:cacheprovider").stdout.str()
    for name in ("boot", "machine", "guest", "gdb", "golden"):
        assert re.search(rf"^{name} -- .*plugin.py:\d+$", fixtures, re.MULTILINE), name
    assert "@pytest.mark.vmdbg(image=None, *, guest=2, wall=120, **options)" in pytester.runpytest("--markers").stdout.str()
    helped = pytester.runpytest("--help").stdout.str()
    for option in ("--vmdbg-image", "--vmdbg-options", "--vmdbg-record", "--vmdbg-snapshots", "vmdbg_image", "vmdbg_wall"):
        assert option in helped


@pytest.mark.skipif(shutil.which("make") is None or shutil.which("gcc") is None, reason="make and gcc are not in PATH")
def test_the_shipped_images_are_those_of_the_sources(tmp_path: Path) -> None:
    for file in EXAMPLE.iterdir():
        if file.suffix in (".S", ".ld") or file.name == "Makefile":
            shutil.copy(file, tmp_path)
    subprocess.run(["make", "-s"], cwd=tmp_path, check=True, env={**os.environ, "MAKEFLAGS": ""})
    for name in ("hypervisor", "guest"):
        for place in (tmp_path, EXAMPLE):
            subprocess.run(["objcopy", "-O", "binary", place / f"{name}.elf", tmp_path / f"{name}.{place.name}"], check=True)
        assert (tmp_path / f"{name}.{tmp_path.name}").read_bytes() == (tmp_path / f"{name}.{EXAMPLE.name}").read_bytes()
