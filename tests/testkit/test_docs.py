"""docs/jobs.md says what is so."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path

from tests.testkit import job_keys
from vmdbg.testkit.jobs import Defaults, read_file
from vmdbg.testkit.mi_scripts import read
from vmdbg.testkit.outcome import Outcome, Report

TEXT = job_keys.PAGE.read_text(encoding="utf-8")


def block(kind: str, beginning: str) -> str:
    """A piece of code of the page."""
    found = [text for text in re.findall(rf"^```{kind}\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE) if text.startswith(beginning)]
    assert len(found) == 1
    return str(found[0])


def test_table_of_keys() -> None:
    assert job_keys.page() == TEXT, "run `python -m tests.reference`"


def test_the_job_file_is_one(tmp_path: Path) -> None:
    (tmp_path / "build").mkdir()
    for name in ("build/hypervisor.elf", "counts.gdb"):
        (tmp_path / name).touch()
    path = tmp_path / "boot.toml"
    path.write_text(block("toml", "# boot.toml"), encoding="utf-8")
    jobs = read_file(path, "boot.toml", Defaults())
    assert [job.name for job in jobs] == [
        "boots", "the stray guest is stopped", "counts[cpus=1]", "counts[cpus=2]", "counts[cpus=4]",
    ]  # fmt: skip


def test_the_mi_script_is_one() -> None:
    steps = read(block("text", "-break-insert main"))
    assert [len(step.expected) for step in steps] == [1, 2, 1]


def test_json() -> None:
    described = block("text", '{"schema"')
    report = json.loads(Report("", [Outcome("", "", 1, "")], 1, 1, 1, "").as_json())
    for name in (*report, *(field.name for field in fields(Outcome)), "id"):
        assert f'"{name}": ' in described
