"""Job files as they are read: what they mean, and each mistake as one line with file, line and key."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from introspect.exitlog import ExitRecord
from introspect.exits import ExitCode
from vmdbg.testkit import keys
from vmdbg.testkit.collecting import collect
from vmdbg.testkit.exit_patterns import ExitPattern, Progress
from vmdbg.testkit.jobs import Defaults, Job, JobError, read_file


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "x.elf").write_bytes(b"no matter")
    (tmp_path / "y.elf").write_bytes(b"no matter")
    return tmp_path


def read(folder: Path, text: str, defaults: Defaults | None = None) -> list[Job]:
    path = folder / "a.toml"
    path.write_text(text, encoding="utf-8")
    return read_file(path, "a.toml", defaults or Defaults())


def test_a_file_is_one_job(folder: Path) -> None:
    (job,) = read(folder, 'image = "x.elf"\noptions = { cpus = 2, tlb = "strict", hpet = true, tpm = false }\nwall = 2.5\n')
    assert (job.name, job.id, job.kind, job.image) == ("a", "a.toml", "run", "x.elf")
    assert job.words == ("--cpus=2", "--tlb=strict", "--hpet")
    assert (job.values[keys.WALL], job.values[keys.TICKS]) == (2.5, None)


def test_keys_above_are_those_of_all_jobs(folder: Path) -> None:
    one, two = read(
        folder,
        'image = "x.elf"\nwall = 9\noptions = { cpus = 2, memory = "64M" }\n[[job]]\nname = "one"\n[[job]]\nimage = "y.elf"\nwall = 3\n'
        "options.cpus = 4\n",
    )
    assert (one.id, one.image, one.values[keys.WALL], one.words) == ("a.toml::one", "x.elf", 9, ("--cpus=2", "--memory=64M"))
    assert (two.name, two.image, two.values[keys.WALL], two.words) == ("job 2", "y.elf", 3, ("--cpus=4", "--memory=64M"))
    assert (one.line, two.line) == (4, 6)


def test_matrix(folder: Path) -> None:
    jobs = read(
        folder, 'name = "m"\nimage = "x.elf"\noptions.memory = "64M"\nmatrix = { cpus = [1, 2], hpet = [true, false], image = ["x.elf", "y.elf"] }'
    )
    assert len(jobs) == 8
    assert jobs[1].name == "m[cpus=1,hpet=true,image=y.elf]"
    assert (jobs[1].image, jobs[1].words) == ("y.elf", ("--memory=64M", "--cpus=1", "--hpet"))
    assert jobs[-1].words == ("--memory=64M", "--cpus=2")


def test_the_command_line_says_what_the_job_does_not(folder: Path) -> None:
    defaults = Defaults(str(folder / "y.elf"), ("--cpus=3",))
    (job,) = read(folder, "wall = 3", defaults)
    assert (job.image, job.words, job.given) == (str(folder / "y.elf"), ("--cpus=3",), ("--image", str(folder / "y.elf"), "--cpus=3"))
    (job,) = read(folder, 'image = "x.elf"\noptions.cpus = 2', defaults)
    assert (job.image, job.words) == ("x.elf", ("--cpus=3", "--cpus=2")), "the last one counts"


X = 'image = "x.elf"\n'
MISTAKES = [
    ("no image", "wall = 3\n", "a.toml:1: image: it is missing"),
    ("missing image", 'wall = 3\nimage = "z.elf"', 'a.toml:2: image: there is no file "z.elf"; paths are relative to'),
    ("missing image of a job", X + '[[job]]\n[[job]]\n\nimage = "z.elf"', 'a.toml:5: image: there is no file "z.elf"'),
    ("image in a matrix", 'wall = 3\n[matrix]\nimage = ["x.elf",\n"z.elf"]', 'a.toml:3: matrix.image: there is no file "z.elf"'),
    ("missing script", X + 'script = "z.gdb"', 'a.toml:2: script: there is no file "z.gdb"'),
    ("unknown key", X + "\nimagine = 3", "a.toml:3: imagine: there is no such key; did you mean image?"),
    ("unknown key, nothing near", X + "qqq = 3", "a.toml:2: qqq: there is no such key; there are name, image,"),
    ("an option as key", X + "cpus = 3", "a.toml:2: cpus: there is no such key; it is an option: write options = { cpus = ... }"),
    ("wrong type", X + "[[job]]\nname = 3", "a.toml:3: name: 3 is no text; write it in quotes"),
    ("wrong type in a list", X + 'serial = ["a",\n4]', "a.toml:3: serial: 4 is no text"),
    ("empty text", 'image = ""', "a.toml:1: image: the text is empty; write what is meant, or leave the key out"),
    ("a directory as image", 'image = "."', 'a.toml:1: image: "." is no plain file; paths are relative to'),
    ("missing file of an option", X + 'options.initrd = ["x.elf",\n"z.img"]', 'a.toml:3: options.initrd: there is no file "z.img"'),
    ("a number as file", X + "options.initrd = 3", "a.toml:2: options.initrd: initrd takes a value (FILE), not 3"),
    ("too little space", X + 'address-space = "64M"', 'a.toml:2: address-space: "64M" is less than an empty machine takes'),
    ("a status of no run", X + "status = [1,\n2]", "a.toml:3: status: no run ends with status 2; write 0 for a power-off, 124 for"),
    ("output of no script", X + 'output = "x"', "a.toml:2: output: there is no script that could print it; name one"),
    ("exits of the hypervisor", X + 'exits = "1:npf"', 'a.toml:2: exits: "1:npf": there is no guest 1; the hypervisor is 1'),
    ("fingerprint", X + 'fingerprint = "x"', 'a.toml:2: fingerprint: "x" is no fingerprint; write the 32 digits'),
    ("empty matrix", X + "matrix.cpus = []", "a.toml:2: matrix.cpus: the list is empty; name at least one value"),
    ("NUL", 'image = "a\\u0000"', "a.toml:1: image: "),
    ("a number as text", X + 'wall = "3"', 'a.toml:2: wall: "3" is no number of seconds; write 20, or 0.5'),
    ("no time", X + "wall = 0", "a.toml:2: wall: 0 is no number of seconds"),
    ("not a number", X + "wall = nan", "a.toml:2: wall: nan is no number of seconds"),
    ("a truth as number", X + "ticks = true", "a.toml:2: ticks: true is no number of at least 1"),
    ("negative budget", X + "instructions = -1", "a.toml:2: instructions: -1 is no number of at least 1"),
    ("size", X + 'output-limit = "lots"', 'a.toml:2: output-limit: "lots" is no size; write "64K", "16M" or "2G"'),
    ("status", X + 'status = [1,\n"2"]', 'a.toml:3: status: "2" is no exit status'),
    ("regular expression", X + 'serial = "/(/"', 'a.toml:2: serial: "/(/" is no regular expression'),
    ("exit code", X + 'exits = ["npf",\n"nfp"]', 'a.toml:3: exits: "nfp" is no exit code'),
    ("exit count", X + 'exits = "npf x0"', 'a.toml:2: exits: "npf x0": x0 is no count'),
    ("exit condition", X + 'exits-never = "npf if gpb > 3"', "a.toml:2: exits-never: \"npf if gpb > 3\": gpb (column 1 behind if): there is no"),
    ("options", X + "options = 3", "a.toml:2: options: 3 is no table"),
    ("unknown option", X + "[options]\n\ncpu = 3", "a.toml:4: options.cpu: there is no option cpu; did you mean cpus"),
    ("value of an option", X + "options = { cpus = 99 }", "a.toml:2: options.cpus: '99' CPUs are not possible; choose 1 to 64"),
    ("choice", X + 'options.tlb = "lazy"', "a.toml:2: options.tlb: invalid choice: 'lazy'"),
    ("type of an option", X + "options.cpus = true", "a.toml:2: options.cpus: cpus takes a value (N), not true"),
    ("type of a flag", X + "options.hpet = 1", "a.toml:2: options.hpet: hpet takes true or false, not 1"),
    ("device", X + 'options.device = ["edu",\n"toaster"]', "a.toml:3: options.device: there is no device 'toaster'"),
    ("once", X + "options.cpus = [1, 2]", "a.toml:2: options.cpus: cpus is given once"),
    ("ours", X + 'options.serial = "null"', "a.toml:2: options.serial: serial is no option of a test; the test reads the serial port"),
    ("matrix", X + "matrix.cpus = 2", "a.toml:2: matrix.cpus: 2 is no list of values; write cpus = [1, 2]"),
    ("matrix value", X + "matrix.cpus = [1,\n\n0]", "a.toml:2: matrix.cpus: '0' CPUs are not possible"),
    ("endless matrix", X + f"matrix = {{ cpus = {[1] * 400}, memory = {['1M'] * 400} }}", "a.toml:2: matrix: it makes 160000 jobs of one"),
    ("names", X + '[[job]]\nname = "a"\n[[job]]\nname = "a"', "a.toml:4: name: 'a' is taken by the job of line 2"),
    ("one bracket", X + "[job]\n", "a.toml:2: a table is no list of jobs; write [[job]] in double brackets"),
    ("golden", X + 'golden = { file = "x", tolerate = 3 }', "a.toml:2: golden.tolerate: there is no such key; there are file, ignore"),
    ("golden field", X + 'golden = { file = "x", ignore = ["rup"] }', "a.toml:2: golden.ignore: 'rup' is no field of an exit"),
    ("golden file", X + "golden = {}", "a.toml:2: golden: the file is missing"),
    ("no TOML", X + "wall = \n", "a.toml:2: no TOML: invalid value"),
    ("no TOML at the end", X + "wall =", "a.toml:2: no TOML: invalid value"),
    ("nested", "a = " + "[" * 5000, "a.toml:1: no TOML"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "line"), [pytest.param(text, line, id=name) for name, text, line in MISTAKES])
def test_mistakes(folder: Path, text: str, line: str) -> None:
    with pytest.raises(JobError) as caught:
        read(folder, text)
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)


def test_every_key_has_its_mistake_told() -> None:
    """None that a value of another type could come through."""
    for key in keys.KEYS.values():
        for value in (object(), 1j, None):
            with pytest.raises(ValueError, match=r"."):
                key.read(value)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda inner: st.lists(inner, max_size=3)
                    | st.dictionaries(st.text(max_size=4), inner, max_size=3), max_leaves=6), st.sampled_from(sorted(keys.KEYS)))  # fmt: skip
def test_any_value_of_any_key(value: object, name: str) -> None:
    """Taken, or refused in one line."""
    words = ""
    try:
        keys.KEYS[name].read(value)
    except ValueError as error:
        words = str(error)
    assert "\n" not in words


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200))
def test_any_file(folder: Path, data: bytes) -> None:
    path = folder / "b.toml"
    path.write_bytes(data)
    with pytest.raises(JobError, match=r"^b\.toml"):
        read_file(path, "b.toml", Defaults())


# Patterns of exits


def record(number: int, code: ExitCode, guest: int = 2, info2: int = 0) -> ExitRecord:
    return ExitRecord(number, guest, number * 100, 0x1000, code.value, 0, info2)


RUN = [
    record(1, ExitCode.CPUID), record(2, ExitCode.NPF, info2=0x8000), record(3, ExitCode.NPF, 3, 0x9000),
    record(4, ExitCode.NPF, info2=0x9000), record(5, ExitCode.VMMCALL),
]  # fmt: skip


@pytest.mark.parametrize(
    ("wanted", "missing"),
    [
        (["cpuid", "npf", "vmmcall"], ""),
        (["CPUID", "NPF x3", "0x81"], ""),
        (["npf x4"], "no exit 'npf x4' has come, 3 of 4 came"),
        (["2: npf x2", "vmmcall"], ""),
        (["vmmcall", "cpuid"], "no exit 'cpuid' has come behind 'vmmcall'"),
        (["3:npf if gpa == 0x9000"], ""),
        (["2:npf if gpa == 0x9000", "any", "any"], "no exit 'any' has come behind 'any'"),
        (["vmmcall if gpa == 0"], "no exit 'vmmcall if gpa == 0' has come"),
    ],
)
def test_exits_in_their_order(wanted: list[str], missing: str) -> None:
    progress = Progress([ExitPattern.parse(text) for text in wanted], [])
    for one in RUN:
        progress.see(one)
    assert progress.missing == missing


def test_exits_that_must_not_come() -> None:
    progress = Progress([], [ExitPattern.parse(text) for text in ("npf if gpa > 0x8fff", "shutdown", "4: any")])
    for one in RUN:
        progress.see(one)
    assert [(pattern.text, one.number) for pattern, one in progress.forbidden] == [("npf if gpa > 0x8fff", 3)]


# What a directory has


def test_directories(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    block = '# /// job\n# image = "x.elf"\n# ///\n'
    for name, text in {
        "jobs.toml": 'image = "x.elf"\n[[job]]\nname = "a"\nscript = "setup.gdb"\n', "setup.gdb": "continue\n", "own.gdb": block,
        "talk.mi": block, "lines.vmdbg": block, "script.py": block, "plain.py": "", "test_it.py": "", "pyproject.toml": "[project]",
        "other.toml": "[things]\n", ".hidden.toml": "=", "deeper/more.toml": 'image = "../x.elf"', ".git/no.toml": "=",
    }.items():  # fmt: skip
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(text)
    for name in ("waits.toml", "waits.gdb", "test_waits.py"):
        os.mkfifo(name)  # nobody writes into them
    found = collect(["."], Defaults())
    assert not found.errors
    assert found.notes == ["other.toml: passed over: it has neither [[job]] nor a key of jobs"]
    assert [task.id for task in found.tasks] == [
        "jobs.toml::a", "lines.vmdbg", "own.gdb", "script.py", "talk.mi", "test_it.py", "deeper/more.toml",
    ]  # fmt: skip
    assert [task.id for task in collect([".", "jobs.toml"], Defaults(), ["*mi", "MORE"]).tasks] == [
        "talk.mi", "test_it.py", "deeper/more.toml",
    ], "which tests a file of pytest's has is not known yet"  # fmt: skip
    assert collect(["setup.gdb"], Defaults()).errors[0].startswith("setup.gdb:1: image: none is named; say --image FILE")
    assert [task.id for task in collect(["setup.gdb"], Defaults(str(folder / "x.elf"))).tasks] == ["setup.gdb"]
    assert collect(["jobs.toml::b"], Defaults()).errors == ["jobs.toml::b: there is no such job; there are a"]
    assert collect(["none", "a\0b"], Defaults()).errors[0].startswith("none: there is no such file or directory")


def test_a_mistake_in_a_script_names_its_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    Path("s.gdb").write_text('# A test of mine.\n\n# /// job\n# image = "x.elf"\n#\n# wal = 3\n# ///\ncontinue\n')
    assert collect(["s.gdb"], Defaults()).errors == ["s.gdb:6: wal: there is no such key; did you mean wall?"]
