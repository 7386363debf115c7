"""`vmdbg test` as a user has it: real machines, gdb and pytest, in one run whose reports are looked at."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import xml.etree.ElementTree as Xml
from pathlib import Path

import pytest

from tests.console.tmux import Terminal
from tests.patience import PATIENCE, until
from tests.testkit.commands import HYPERVISOR, Run, command, run
from vmdbg.cli import main
from vmdbg.testkit import example

EXAMPLE = Path(example.__file__).parent

needs_gdb = pytest.mark.skipif(shutil.which("gdb") is None, reason="no gdb")
FILES = {
    "boot.toml": f"""
image = "{HYPERVISOR}"
serial = "hello from the guest"

[[job]]
name = "boots"
serial = ["hello from the guest", "/^done$/"]
serial-never = "panic"
exits = ["2: cpuid", "npf if gpa == 0x8000", "npf x2", "vmmcall if rax == 0"]
exits-never = ["shutdown", "npf if gpa < 0x8000"]

[[job]]
name = "everything is wrong"
status = [3, 5]
serial = "good bye"
serial-never = ["done", "good bye"]
exits = ["vmmcall", "cpuid"]
exits-never = "npf if gpa == 0x9000"

[[job]]
name = "loops"
script = "endless.vmdbg"
wall = 1

[[job]]
name = "turns"
matrix = {{ cpus = [1, 2], tlb = ["coherent", "strict"] }}

[[job]]
name = "out of instructions"
instructions = 1000

[[job]]
name = "out of ticks"
ticks = 5000

[[job]]
name = "stopped as it should be"
matrix = {{ cpus = [1, 2] }}
ticks = 136_000
status = 124
exits = "ioio x20"
exits-never = "cpuid"

[[job]]
name = "stopped in time"
instructions = 24_000
status = [1, 124]

[[job]]
name = "out of instructions in a script"
instructions = 2000
script = "machine.py"

[[job]]
name = "not now"
skip = "it waits for a bug to be mended"

[[job]]
name = "in python"
script = "machine.py"
status = 1

[[job]]
name = "back in time"
script = "back.vmdbg"
exits = ["vmmcall", "cpuid", "vmmcall if in_host == 0"]
exits-never = "ioio if in_host == 0"

[[job]]
name = "too much"
script = "much.py"
output = "never"
output-limit = "64K"

[[job]]
name = "hungry"
script = "hungry.py"

[[job]]
name = "golden"
golden = {{ file = "boot.exits", rip = "function" }}
options.symbols = "2={EXAMPLE / "guest.elf"}"

[[job]]
name = "golden, from the beginning again"
script = "over.vmdbg"
golden = {{ file = "boot.exits", rip = "function" }}
exits = ["cpuid", "vmmcall"]
options.symbols = "2={EXAMPLE / "guest.elf"}"

[[job]]
name = "another trace"
golden = {{ file = "other.exits", rip = "function" }}
options.symbols = "2={EXAMPLE / "guest.elf"}"

[[job]]
name = "no trace"
golden = "none.exits"
""",
    "endless.vmdbg": "py while True: pass\n",
    "back.vmdbg": "snapshot a\ncontinue\nrestore a\ncontinue\n",
    "over.vmdbg": "tb 2:0x1000\ncontinue\n" + "restart\n" * 4 + "continue\n",
    "much.py": "while True: print('much' * 1000)\n",
    "machine.py": 'stop = machine.run(until="2:0x1000")\nassert stop.reached\nmachine.run()\nassert machine.serial.endswith("done\\n")\n',
    "hungry.py": "held = [bytearray(1 << 30) for _ in range(64)]\n",
    "crash.vmdbg": f'# /// job\n# image = "{HYPERVISOR}"\n# ///\npy __import__("os").kill(__import__("os").getpid(), 11)\n',
    "killed.py": f'# /// job\n# image = "{HYPERVISOR}"\n# ///\nimport os\nos.kill(os.getpid(), 9)\n',
    "leaves.py": f'# /// job\n# image = "{HYPERVISOR}"\n# ///\nimport os\nos._exit(3)\n',
    "lines.vmdbg": f'# /// job\n# image = "{HYPERVISOR}"\n# output = "as expected: rip"\n# ///\nexpect rip != 0\nexpect rip == 5\necho no more\n',
    "test_some.py": """
import os, pytest
def test_good(): pass
def test_bad(): assert [1, 2] == [1, 3], "they differ"
def test_crash(): os.kill(os.getpid(), 6)
@pytest.mark.skip(reason="not today")
def test_skipped(): pass
@pytest.mark.xfail(reason="known")
def test_known(): assert False
@pytest.mark.parametrize("n", [1, 2])
def test_numbers(n): assert n == 1
@pytest.fixture
def broken(): raise OSError("no such luck")
def test_setup(broken): pass
def test_last(): pass
""",
    "test_wrong.py": "import no_such_module\n",
}


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """All of the files above at once."""
    folder = tmp_path_factory.mktemp("tests")
    for name, text in FILES.items():
        (folder / name).write_text(text)
    shutil.copy(EXAMPLE / "golden/example.exits", folder / "boot.exits")
    trace = (EXAMPLE / "golden/example.exits").read_text()
    (folder / "other.exits").write_text(trace.replace("CPUID", "VMMCALL", 1))
    return run(folder, ".", "-j", "3", "--json", "out/r.json", "--junit", "out/r.xml", "--html", "out/r.html", "--snapshots", "kept")


def reasons(ran: Run, name: str) -> list[str]:
    found: list[str] = ran.tests[name]["reasons"]
    return found


def test_all_are_there(ran: Run) -> None:
    assert ran.status == 1, ran.errors
    verdicts = {name.removeprefix("boot.toml::"): one["verdict"] for name, one in ran.tests.items()}
    passed = [name for name, verdict in verdicts.items() if verdict == "passed"]
    assert passed == [
        "boots", "turns[cpus=1,tlb=coherent]", "turns[cpus=1,tlb=strict]", "turns[cpus=2,tlb=coherent]", "turns[cpus=2,tlb=strict]",
        "stopped as it should be[cpus=1]", "stopped as it should be[cpus=2]", "stopped in time", "in python", "back in time", "golden", "golden, from the beginning again",
        "test_some.py::test_good", "test_some.py::test_numbers[1]", "test_some.py::test_last",
    ]  # fmt: skip
    assert [name for name, verdict in verdicts.items() if verdict == "skipped"] == [
        "not now", "test_some.py::test_skipped", "test_some.py::test_known",
    ]  # fmt: skip
    errors = {name for name, verdict in verdicts.items() if verdict == "error"}
    assert errors == {
        "hungry", "crash.vmdbg", "killed.py", "leaves.py", "test_some.py::test_crash", "test_some.py::test_setup",
        "test_wrong.py::(collection)",
    }  # fmt: skip


def test_expectations(ran: Run) -> None:
    found = reasons(ran, "boot.toml::everything is wrong")
    assert found[0] == "exit status 1, expected 3 or 5: the guest ended the run with status 1"
    assert found[1:3] == ["the serial port has not printed 'good bye'", "the serial port has printed 'done', which it must not"]
    assert re.fullmatch(r"exit 'npf if gpa == 0x9000' must not come, and has: \d+ t=\d+ .* NPF .*info2=0x9000.*", found[3])
    assert found[4].startswith("no exit 'cpuid' has come behind 'vmmcall'; the one before was ")
    assert len(found) == 5


def test_budgets(ran: Run) -> None:
    loops = ran.tests["boot.toml::loops"]
    assert loops["reasons"][0] == loops["ended"]
    assert loops["ended"].startswith("the wall budget of 1 s is used up at RIP 0x10000c of the hypervisor")
    spent, silent = reasons(ran, "boot.toml::out of instructions")
    assert silent == "the serial port has not printed 'hello from the guest'"
    assert spent.startswith("the budget instructions = 1000 is used up at RIP 0x")
    assert 1000 <= ran.tests["boot.toml::out of instructions"]["ticks"] <= 15000
    assert reasons(ran, "boot.toml::out of ticks")[0].startswith("the budget ticks = 5000 is used up at RIP 0x")
    in_script = reasons(ran, "boot.toml::out of instructions in a script")
    assert in_script[0].startswith("the budget instructions = 2000 is used up at RIP 0x")
    assert not any("machine.py" in reason for reason in in_script), "what the script says of that is no reason"
    assert reasons(ran, "boot.toml::too much")[0] == "it has printed more than 65536 bytes (output-limit)"
    assert reasons(ran, "boot.toml::hungry") == ["not enough memory (address-space)"]


def test_crashes_cost_their_test_only(ran: Run) -> None:
    assert reasons(ran, "crash.vmdbg")[0] == "its process was killed by SIGSEGV (segmentation fault)"
    assert "Fatal Python error: Segmentation fault" in ran.tests["crash.vmdbg"]["output"], "where it was"
    assert reasons(ran, "killed.py")[0].startswith("its process was killed by SIGKILL (killed); it had ")
    assert reasons(ran, "leaves.py")[0] == "its process has ended with status 3 before the test was over"
    assert reasons(ran, "test_some.py::test_crash")[0] == "its process was killed by SIGABRT (aborted)"


def test_scripts(ran: Run) -> None:
    (why,) = reasons(ran, "lines.vmdbg")
    assert why.startswith("lines.vmdbg:6: rip == 5: it does not hold; rip is ")
    output = ran.tests["lines.vmdbg"]["output"]
    assert "as expected: rip != 0" in output
    assert "no more" not in output


def test_pytest(ran: Run) -> None:
    assert "they differ" in reasons(ran, "test_some.py::test_bad")[0]
    assert "E   AssertionError: they differ" in reasons(ran, "test_some.py::test_bad")[1]
    assert reasons(ran, "test_some.py::test_setup")[0] == "setup: OSError: no such luck"
    assert reasons(ran, "test_some.py::test_skipped") == ["not today"]
    assert reasons(ran, "test_some.py::test_known") == ["fails, as expected: known"]
    assert "No module named 'no_such_module'" in reasons(ran, "test_wrong.py::(collection)")[0]
    assert ran.tests["test_some.py::test_bad"]["line"] == 4


def test_golden_traces(ran: Run) -> None:
    other = ran.tests["boot.toml::another trace"]
    assert re.match(r"other\.exits: exit \d+ .* differs: CPUID instead of VMMCALL$", other["reasons"][0])
    assert [line[0] for line in other["trace_diff"].splitlines()[1:] if line[:1] in "-+"] or "CPUID" in other["trace_diff"]
    assert reasons(ran, "boot.toml::no trace") == [
        "golden: there is no none.exits yet; record it: vmdbg test --record 'boot.toml::no trace'"
    ]


def test_what_a_failure_shows(ran: Run) -> None:
    one = ran.tests["boot.toml::everything is wrong"]
    assert one["serial"] == "hello from the guest\ndone\n"
    assert one["status"] == 1
    assert one["exits"][0].split()[:3] == ["#", "time", "guest"]
    assert any("VMMCALL" in line for line in one["exits"][-2:])
    assert {"context", "guests"} <= one["sections"].keys()
    assert one["reproduce"][:2] == ["vmdbg test 'boot.toml::everything is wrong'", f"vmdbg run {HYPERVISOR}"]


def test_its_machine_is_kept(ran: Run) -> None:
    saved = Path(ran.tests["boot.toml::out of instructions"]["reproduce"][-1].split()[-1])
    assert saved.parent == ran.folder / "kept"
    done = subprocess.run(
        [sys.executable, "-m", "vmdbg", "console", str(saved), "-c", "time"], capture_output=True, text=True, timeout=PATIENCE, check=True
    )
    assert done.stdout == f"{ran.tests['boot.toml::out of instructions']['ticks']} ticks\n"


def test_the_command_that_reproduces_does(ran: Run) -> None:
    again = run(ran.folder, "boot.toml::out of instructions", "test_some.py::test_numbers", "--json", "out/r2.json")
    assert again.status == 1
    assert [line.split(" s  ")[1] for line in again.said.splitlines() if line.startswith("[")] == [
        "boot.toml::out of instructions", "test_some.py::test_numbers[1]", "test_some.py::test_numbers[2]",
    ]  # fmt: skip


def test_json(ran: Run) -> None:
    report = ran.report
    assert report["schema"] == 1
    assert report["counts"] == {"passed": 15, "failed": 11, "error": 7, "skipped": 3, "not run": 0}
    assert len(report["tests"]) == sum(report["counts"].values())


def test_junit(ran: Run) -> None:
    top = Xml.parse(ran.folder / "out/r.xml").getroot()
    assert (top.tag, top.get("tests"), top.get("failures"), top.get("errors"), top.get("skipped")) == ("testsuites", "36", "11", "7", "3")
    cases = {f"{case.get('classname')}::{case.get('name')}": case for case in top.iter("testcase")}
    bad = cases["boot.toml::everything is wrong"].find("failure")
    assert bad is not None
    assert bad.get("message") == "exit status 1, expected 3 or 5: the guest ended the run with status 1"
    assert "$ vmdbg test 'boot.toml::everything is wrong'" in (bad.text or "")
    assert cases["boot.toml::boots"].find("failure") is None
    assert cases["crash.vmdbg::crash"].find("error") is not None
    skipped = cases["boot.toml::not now"].find("skipped")
    assert skipped is not None
    assert skipped.get("message") == "it waits for a bug to be mended"


def test_lines_of_a_log(ran: Run) -> None:
    assert re.search(r"^\[\d+/\d+\] pass +\d+\.\d\d s  boot\.toml::boots$", ran.said, re.MULTILINE)
    assert re.search(r"^\[\d+/\d+\] ERROR +\d+\.\d\d s  crash\.vmdbg\n    its process was killed by SIGSEGV", ran.said, re.MULTILINE)
    assert re.search(r"^15 passed, 11 failed, 7 error, 3 skipped in [\d.]+ s; 3 at once, \d+% busy$", ran.said, re.MULTILINE)


# gdb


GDB = {
    "good.gdb": "break *0x1000 thread 1\ndelete\nmonitor expect rip != 0\ncontinue\n",
    "monitor.gdb": "echo before\\n\nmonitor expect rip == 5\necho behind\\n\n",
    "status.gdb": "if $rip != 5\n  quit 7\nend\n",
    "python.gdb": "python\nassert gdb.selected_inferior().pid == 2, 'wrong one'\nend\n",
    "unknown.gdb": "print nothing_of_this_name\n",
    "mistyped.gdb": "break mian\ncontinue\n",
    "loop.gdb": "while 1\nend\n",
    "good.mi": '-data-evaluate-expression 1+1\n^done value="2"\n-break-insert main\n^done bkpt.func=/.*/ bkpt.number="1"\n-exec-continue\n'
    '^running\n*stopped reason="breakpoint-hit" frame.addr=/0x[0-9a-f]+/\n-interpreter-exec console "monitor time"\n@ ticks\n',
    "answer.mi": '-data-evaluate-expression 1+1\n^done value="3"\n',
    "error.mi": "-data-evaluate-expression nothing_of_this_name\n",
    "stop.mi": '-break-insert main\n-exec-continue\n*stopped reason="signal-received"\n',
    "form.mi": "^done\n",
}


@needs_gdb
def test_gdb_and_mi_scripts(tmp_path: Path) -> None:
    for name, text in GDB.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "loop.toml").write_text('script = "loop.gdb"\nwall = 1\n')
    (tmp_path / "out").mkdir()
    named = sorted({*GDB, "loop.toml"} - {"loop.gdb"})
    done = run(tmp_path, *named, "--image", str(HYPERVISOR), "-j", "3", "--json", "out/r.json", "--junit", "out/r.xml")
    found = {name: one["reasons"][:1] for name, one in done.tests.items()}
    told = found.pop("monitor.gdb")[0]
    assert told.startswith("monitor.gdb:2: rip == 5: it does not hold; rip is ")
    assert found == {
        "good.gdb": [], "good.mi": [],
        "status.gdb": found["status.gdb"],
        "python.gdb": ["python.gdb:3: AssertionError: wrong one"],
        "unknown.gdb": ['unknown.gdb:1: No symbol "nothing_of_this_name" in current context.'],
        "mistyped.gdb": ['mistyped.gdb:1: Function "mian" not defined.'],
        "loop.toml": [done.tests["loop.toml"]["ended"]],
        "answer.mi": ['answer.mi:2: ^done value="3": gdb has answered ^done value="2"'],
        "error.mi": [
            "error.mi:1: -data-evaluate-expression nothing_of_this_name: ^error: No symbol \"nothing_of_this_name\" in current context."
        ],
        "stop.mi": found["stop.mi"],
        "form.mi": ["form.mi:1: ^done: nothing was asked yet; a command goes before what is expected"],
    }  # fmt: skip
    assert found["status.gdb"][0].startswith("gdb has ended with status 7")
    assert found["stop.mi"][0].startswith('stop.mi:3: *stopped reason="signal-received": gdb has told *stopped reason="breakpoint-hit"')
    assert found["loop.toml"][0].startswith("the wall budget of 1 s is used up")
    assert "before" in done.tests["monitor.gdb"]["output"]
    assert "behind" not in done.tests["monitor.gdb"]["output"]
    assert done.tests["good.gdb"]["status"] == 1
    assert (tmp_path / "out/r.xml").exists()
    assert done.tests["status.gdb"]["reproduce"][0] == f"vmdbg test status.gdb --image {HYPERVISOR}"


# How a run ends


def test_fail_fast(tmp_path: Path) -> None:
    bad = "[[job]]\nserial = 'never'\n"
    (tmp_path / "many.toml").write_text(f'image = "{HYPERVISOR}"\n' + bad * 20)
    (tmp_path / "out").mkdir()
    done = run(tmp_path, "many.toml", "-x", "--json", "out/r.json")
    assert done.status == 1
    assert done.report["counts"] == {"passed": 0, "failed": 1, "error": 0, "skipped": 0, "not run": 19}
    assert done.report["interrupted"] == "many.toml::job 1 failed, and --fail-fast was given"


def test_interrupt(tmp_path: Path) -> None:
    """^C: what has run is reported, nothing is left behind."""
    (tmp_path / "slow.toml").write_text(
        f'image = "{HYPERVISOR}"\n[[job]]\nname = "quick"\n[[job]]\nname = "slow"\nscript = "slow.py"\n[[job]]\nname = "later"\n'
    )
    (tmp_path / "slow.py").write_text(
        "import os, subprocess\np = subprocess.Popen(['sleep', '1000'])\nq = subprocess.Popen(['sleep', '1000'], start_new_session=True)\n"
        "open('pids', 'w').write(f'{os.getpid()} {p.pid} {q.pid}')\nos.rename('pids', 'ready')\np.wait()\n"
    )
    (tmp_path / "out").mkdir()
    with subprocess.Popen(command("slow.toml", "--json", "out/r.json"), cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        until((tmp_path / "ready").exists)
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=PATIENCE)
    done = Run(process.returncode, said, "", tmp_path)
    assert done.status == 130
    assert [one["verdict"] for one in done.tests.values()] == ["passed", "not run", "not run"]
    assert done.report["interrupted"] == "interrupted (SIGINT)"
    for pid in (tmp_path / "ready").read_text().split():
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)


def test_what_a_job_leaves_behind_is_gone_before_the_next(tmp_path: Path) -> None:
    """Also as a process that has ended and nobody has waited for."""
    (tmp_path / "two.toml").write_text(
        f'image = "{HYPERVISOR}"\n[[job]]\nname = "leaves"\nscript = "leaves.py"\n[[job]]\nname = "looks"\nscript = "looks.py"\n'
    )
    (tmp_path / "leaves.py").write_text(
        "import subprocess\nleft = [subprocess.Popen(['sleep', '1000'], start_new_session=away) for away in (False, True) for _ in range(8)]\n"
        "open('left', 'w').write(' '.join(str(one.pid) for one in left))\n"
    )
    (tmp_path / "looks.py").write_text(
        "import os\nup = os.getppid()\nchildren = open(f'/proc/{up}/task/{up}/children').read().split()\n"
        "assert children == [str(os.getpid())], children\n"
        "for pid in open('left').read().split():\n    assert not os.path.exists(f'/proc/{pid}'), pid\n"
    )
    done = run(tmp_path, "two.toml")
    assert done.status == 0, done.said


def test_what_is_printed_at_last_counts_too(tmp_path: Path) -> None:
    """The limit holds whether or not its process has ended before what it has printed is read."""
    (tmp_path / "much.toml").write_text(f'image = "{HYPERVISOR}"\nscript = "much.py"\noutput-limit = "64K"\n[[job]]\n')
    (tmp_path / "much.py").write_text("print('x' * 66000)\n")
    (tmp_path / "out").mkdir()
    done = run(tmp_path, "much.toml", "--json", "out/r.json")
    assert [one["reasons"][0] for one in done.tests.values()] == ["it has printed more than 65536 bytes (output-limit)"]


LATE = """
import os, time, types
from vmdbg.testkit import schedule
schedule.time = types.SimpleNamespace(monotonic=lambda: time.monotonic() + 1e6 * os.path.exists("late"))
"""
"""A clock that is far ahead once there is a file."""


def test_who_has_ended_is_not_late(tmp_path: Path) -> None:
    """Though `vmdbg test` did not come to look until its time was over."""
    (tmp_path / "sitecustomize.py").write_text(LATE)
    (tmp_path / "one.toml").write_text(f'image = "{HYPERVISOR}"\nscript = "one.py"\n[[job]]\n')
    (tmp_path / "one.py").write_text(
        "import os, time\nopen('pid', 'w').write(str(os.getpid()))\nos.rename('pid', 'ready')\nwhile not os.path.exists('go'): time.sleep(0.01)\n"
    )
    (tmp_path / "out").mkdir()
    with subprocess.Popen(
        command("one.toml", "--json", "out/r.json"), cwd=tmp_path, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    ) as process:  # fmt: skip
        until((tmp_path / "ready").exists)
        process.send_signal(signal.SIGSTOP)
        (tmp_path / "go").touch()
        job = Path("/proc") / (tmp_path / "ready").read_text() / "stat"
        until(lambda: job.read_text().rpartition(") ")[2][0] == "Z")
        (tmp_path / "late").touch()
        process.send_signal(signal.SIGCONT)
        said, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, said


def refused(folder: Path, words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """What is said to a command line that leads to no run."""
    monkeypatch.chdir(folder)
    status: object = None
    try:
        status = main(["test", *words])
    except SystemExit as error:
        status = error.code
    assert status == 2
    said = capsys.readouterr()
    assert said.out == ""
    return said.err


def test_a_snapshot_is_an_image(tmp_path: Path) -> None:
    made = [sys.executable, "-m", "vmdbg", "run", str(HYPERVISOR), "--memory", "64M", "--save-at", "100000,middle.snapshot"]
    subprocess.run(made, cwd=tmp_path, timeout=PATIENCE, check=False)
    (tmp_path / "on.toml").write_text('image = "middle.snapshot"\nticks = 1_000_000\nserial = "done"\nserial-never = "hello"\n')
    done = run(tmp_path, "on.toml")
    assert done.status == 0, done.said


def test_mistakes_are_told_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "good.toml").write_text(f'image = "{HYPERVISOR}"\n')
    (tmp_path / "bad.toml").write_text('image = "none.elf"\n')
    (tmp_path / "worse.toml").write_text(f'image = "{HYPERVISOR}"\nwall = true\n')
    assert refused(tmp_path, ["."], capsys, monkeypatch).splitlines() == [
        f'vmdbg: bad.toml:1: image: there is no file "none.elf"; paths are relative to {tmp_path}',
        "vmdbg: worse.toml:2: wall: true is no number of seconds; write 20, or 0.5",
    ]


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["none"], "vmdbg: none: there is no such file or directory; name a test, or a directory with some"),
        (["."], "vmdbg: .: there are no tests; `vmdbg test --list` shows what there is"),
        ([".", "--image", "none"], "vmdbg: --image none: there is no such file; name the image to boot"),
        ([".", "--cpus", "0"], "vmdbg: argument --cpus: '0' CPUs are not possible; choose 1 to 64"),
        ([".", "-j", "0"], "vmdbg test: argument -j/--jobs: '0' tests at once are not possible; choose 1 to 1024, or auto; see"),
    ],
)
def test_usage(
    tmp_path: Path, words: list[str], error: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = refused(tmp_path, words, capsys, monkeypatch)
    assert said.startswith(error)
    assert said.count("\n") == 1


def test_snapshots_go_where_files_can_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "good.toml").write_text(f'image = "{HYPERVISOR}"\n')
    said = refused(tmp_path, ["good.toml", "--snapshots", "good.toml"], capsys, monkeypatch)
    assert said == "vmdbg: --snapshots good.toml: File exists; choose a directory that can be written\n"


def test_no_machine(tmp_path: Path) -> None:
    """What only shows when it is built names the job, too."""
    (tmp_path / "a.toml").write_text('image = "a.toml"\n')
    done = run(tmp_path, "a.toml")
    assert (done.status, "    a.toml:1: a.toml is not ELF, " in done.said) == (1, True), done.said


def test_who_reads_may_have_seen_enough(tmp_path: Path) -> None:
    """Reports are written all the same."""
    (tmp_path / "a.toml").write_text(f'image = "{HYPERVISOR}"\nmatrix.cpus = [1, 2, 3]\n')
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        command("a.toml", "--json", "r.json"), cwd=tmp_path, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=PATIENCE, check=False
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads((tmp_path / "r.json").read_text())["counts"]["passed"] == 3


def test_record(tmp_path: Path) -> None:
    (tmp_path / "g.toml").write_text(f'image = "{HYPERVISOR}"\n[[job]]\nname = "a"\ngolden = "a.exits"\n[[job]]\nname = "b"\nserial = "x"\ngolden = "b.exits"\n')
    done = run(tmp_path, "g.toml", "--record")
    assert "exits recorded in a.exits" in done.said
    assert (tmp_path / "a.exits").exists()
    assert not (tmp_path / "b.exits").exists(), "what fails otherwise is no example"
    assert run(tmp_path, "g.toml::a").status == 0


def test_terminal(tmp_path: Path) -> None:
    """The live display goes away, failures and the summary stay."""
    (tmp_path / "t.toml").write_text(
        f'image = "{HYPERVISOR}"\n[[job]]\nname = "good"\n[[job]]\nname = "bad"\nserial = "never"\n[[job]]\nname = "slow"\nscript = "s.py"\n'
    )
    (tmp_path / "s.py").write_text("import time, pathlib\nwhile not pathlib.Path('go').exists(): time.sleep(0.05)\n")
    terminal = Terminal(tmp_path, f"sh -c 'cd {tmp_path} && {sys.executable} -m vmdbg test t.toml'")
    try:
        terminal.sees("▸ t.toml::slow", "2/3", "✓ 1 passed", "✗ 1 failed")
        (tmp_path / "go").touch()
        screen = terminal.sees("left with 1")
        assert "▸" not in screen
        assert "✗ t.toml::bad" in screen
        assert "the serial port has not printed 'never'" in screen
        assert "2 passed, 1 failed in" in screen
    finally:
        terminal.close()


NOTHING = "0" * 32


def test_fingerprint(tmp_path: Path) -> None:
    told = subprocess.run(
        [sys.executable, "-m", "vmdbg", "run", str(HYPERVISOR), "--fingerprint"], capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    trace = told.stderr.partition("trace=")[2].split()[0]
    (tmp_path / "f.toml").write_text(
        f'image = "{HYPERVISOR}"\n[[job]]\nname = "same"\nfingerprint = "{trace}"\n[[job]]\nname = "other"\nfingerprint = "{NOTHING}"\n'
    )
    done = run(tmp_path, "f.toml", "-j", "2")
    assert re.search(r"pass .*f\.toml::same", done.said)
    assert f"the run's fingerprint is {trace}, expected {NOTHING}; `vmdbg run --against FILE` shows where two runs part" in done.said
