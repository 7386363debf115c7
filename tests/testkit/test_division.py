"""Files of pytest's under `vmdbg test`: divided between processes, ended, with pytest's temporary files."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tests.testkit.commands import HYPERVISOR, Run, run
from vmdbg.testkit.scratch import scratch


def test_a_pytest_file_that_loops(tmp_path: Path) -> None:
    (tmp_path / "test_loop.py").write_text("def test_good(): pass\ndef test_loop():\n    while True: pass\ndef test_behind(): pass\n")
    (tmp_path / "out").mkdir()
    # Enough to come to the loop.
    done = run(tmp_path, "test_loop.py", "--wall", "10", "--json", "out/r.json")
    tests = done.tests
    assert tests["test_loop.py::test_loop"]["reasons"][0].startswith("the wall budget of 10 s is used up")
    assert "line 3 in test_loop" in tests["test_loop.py::test_loop"]["output"], "where it was"
    assert tests["test_loop.py::test_behind"]["verdict"] == "passed", "the rest goes on in another process"
    assert tests["test_loop.py::test_good"]["verdict"] == "passed"


def divided(folder: Path, text: str, *words: str) -> Run:
    (folder / "test_one.py").write_text(text)
    (folder / "out").mkdir()
    return run(folder, "test_one.py", "--json", "out/r.json", *words)


MEET = """
import os, pathlib, time

def meet(mine, other):
    pathlib.Path(mine).touch()
    until = time.monotonic() + 300
    while not os.path.exists(other):
        assert time.monotonic() < until, "the other one does not run meanwhile"
        time.sleep(0.01)
"""


def test_tests_of_one_file_run_side_by_side(tmp_path: Path) -> None:
    """Reports have them in the file's order all the same."""
    done = divided(tmp_path, MEET + """
def test_a(): meet("a", "c")
def test_b(): meet("b", "c")
def test_c(): meet("c", "b")
def test_d(): assert False
""", "-j", "3")  # fmt: skip
    assert [(one["name"], one["verdict"]) for one in done.report["tests"]] == [
        ("test_a", "passed"), ("test_b", "passed"), ("test_c", "passed"), ("test_d", "failed"),
    ], done.said  # fmt: skip
    assert done.status == 1
    assert "[4/4]" in done.said


def test_tests_of_a_group_stay_together(tmp_path: Path) -> None:
    """In one process, which takes what others have left; fixtures of a class end with its tests, whoever runs the next."""
    done = divided(tmp_path, MEET + """
import pytest
pids = []
current = []

@pytest.fixture(scope="class", autouse=True)
def open_class(request):
    assert not current, "another class's fixture is open"
    current.append(request.cls)
    yield
    current.clear()

class TestOne:
    @pytest.mark.xdist_group("g")
    def test_first(self):
        pids.append(os.getpid())
        meet("first", "beside")
    def test_beside(self): meet("beside", "first")

class TestTwo:
    @pytest.mark.xdist_group(name="g")
    def test_second(self): assert pids == [os.getpid()]
    def test_more(self): pass

class TestThree:
    def test_last(self): pass
    @pytest.mark.xdist_group("g")
    def test_third(self): assert pids == [os.getpid()]
""", "-j", "2")  # fmt: skip
    assert done.status == 0, done.said
    assert done.report["counts"]["passed"] == 6


def test_who_crashes_or_ends_leaves_the_others(tmp_path: Path) -> None:
    done = divided(tmp_path, MEET + """
def test_crash():
    meet("crash", "beside")
    os.abort()
def test_beside(): meet("beside", "crash")
def test_last(): pass
""", "-j", "2")  # fmt: skip
    assert [one["verdict"] for one in done.report["tests"]] == ["error", "passed", "passed"]
    assert done.tests["test_one.py::test_crash"]["reasons"][0].startswith("its process was killed by SIGABRT")


def test_what_pytest_itself_ends_is_not_run(tmp_path: Path) -> None:
    done = divided(tmp_path, "import pytest\ndef test_a(): pass\ndef test_b(): pytest.exit('enough')\ndef test_c(): pass\n")
    assert [(one["name"], one["verdict"]) for one in done.report["tests"]][::2] == [("test_a", "passed"), ("test_c", "not run")]
    assert done.tests["test_one.py::test_c"]["reasons"] == ["pytest has ended before it"]


def test_tests_that_are_others_in_each_process(tmp_path: Path) -> None:
    done = divided(tmp_path, MEET + """
import pytest
def test_a():
    meet("a", "b")
    meet("a", "d")
def test_b(): meet("b", "a")
@pytest.mark.parametrize("pid", [os.getpid()])
def test_c(pid): pass
def test_d(): meet("d", "a")
""", "-j", "2")  # fmt: skip
    wrong = [one["reasons"][0] for one in done.report["tests"] if one["verdict"] == "error"]
    assert wrong == ["one process has collected it and another has not: a file must have the same tests each time"]


def test_what_has_run_of_a_file_is_reported(tmp_path: Path) -> None:
    """Where the first failure ends the run, amid others."""
    done = divided(tmp_path, MEET + """
def test_good(): pass
def test_bad():
    meet("bad", "slow")
    assert False
def test_slow():
    meet("slow", "bad")
    time.sleep(1000)
def test_later(): pass
""", "-j", "2", "-x")  # fmt: skip
    verdicts = {one["name"]: one["verdict"] for one in done.report["tests"]}
    assert verdicts == {"test_good": "passed", "test_bad": "failed", "test_slow": "not run", "test_later": "not run"}
    assert done.tests["test_one.py::test_slow"]["reasons"] == ["test_one.py::test_bad failed, and --fail-fast was given"]


def test_pytest_has_the_options_of_the_command_line(tmp_path: Path) -> None:
    """The image, the machine, where snapshots go, and that golden traces are recorded."""
    text = """
def test_it(machine, golden):
    machine.run()
    assert len(machine.debugger.machine.cpus) == 2
    golden()
def test_fails(machine):
    assert False
"""
    done = divided(tmp_path, text, "--image", str(HYPERVISOR), "--cpus", "2", "--snapshots", "kept", "--record")
    assert "exits recorded in golden/test_it.exits" in done.said, done.said
    assert (tmp_path / "golden/test_it.exits").exists()
    failed = done.tests["test_one.py::test_fails"]
    again, plain, opens = failed["reproduce"][:3]
    assert again == f"vmdbg test test_one.py::test_fails --image {HYPERVISOR} --cpus=2 --snapshots {tmp_path}/kept"
    assert plain.startswith(f"pytest test_one.py::test_fails --vmdbg-image={HYPERVISOR} --vmdbg-options=--cpus=2")
    assert opens == "vmdbg console --snapshot kept/test_one.py-test_fails.snapshot"
    assert (tmp_path / "kept/test_one.py-test_fails.snapshot").exists()
    assert sorted(failed["sections"]) == ["context", "machine"], "exits and what was printed have places of their own"


def test_snapshots_outlive_the_run(tmp_path: Path) -> None:
    """However many files there are; pytest by itself keeps those of three."""
    for number in range(5):
        (tmp_path / f"test_{number}.py").write_text(
            f'import pytest\n@pytest.mark.vmdbg("{HYPERVISOR}")\ndef test_it(machine): assert False\n'
        )
    (tmp_path / "out").mkdir()
    done = run(tmp_path, ".", "-j", "2", "--json", "out/r.json")
    opened = [one["reproduce"][2].split()[-1] for one in done.report["tests"]]
    assert len({*opened}) == 5
    assert all(Path(path).exists() for path in opened)


def test_temporary_files_of_the_last_runs_stay(tmp_path: Path) -> None:
    """And those of runs that go on, whenever they began."""
    with subprocess.Popen(["sleep", "1000"]) as other:
        first = scratch(tmp_path)
        first.rename(first.with_name(f"1-{other.pid}"))
        made = [scratch(tmp_path) for _ in range(4)]
        for one in made:  # as if each were of a process that has ended
            assert one.name.endswith(f"-{os.getpid()}")
        (first.parent / "notes").touch()
        for one in made:
            one.rename(one.with_name(f"{one.name.partition('-')[0]}-{2**22 + 1}"))
        scratch(tmp_path)
        other.kill()
    assert sorted(one.name.partition("-")[0] for one in first.parent.iterdir()) == ["1", "4", "5", "6", "notes"]
