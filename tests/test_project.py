"""What the project says of itself: packages, version, the tables of README.md."""

from __future__ import annotations

import argparse
import re
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest

from vmdbg.cli import parser

TOP = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((TOP / "pyproject.toml").read_text(encoding="utf-8"))
README = (TOP / "README.md").read_text(encoding="utf-8")
OURS = ("vmdbg", "gdbstub", "introspect")


def table(heading: str) -> list[list[str]]:
    """The rows of the first table below a heading of the README, without its head."""
    section = README.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows[2:]]


def options(command: str) -> dict[str, str]:
    """Each option of a command as its help writes it ("--memory SIZE"), to its help text."""
    commands = next(a for a in parser()._actions if isinstance(a, argparse._SubParsersAction))
    found = {}
    for action in commands.choices[command]._actions:
        if not action.option_strings or "--help" in action.option_strings:
            continue
        name = ", ".join(action.option_strings)
        value = action.metavar or ("|".join(action.choices) if action.choices else "")
        if action.nargs == "?":
            value = f"[{value}]"
        found[f"{name} {value}".strip()] = action.help or ""
    return found


def test_version() -> None:
    assert PROJECT["project"]["version"] == version("vmdbg")
    changelog = (TOP / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## [{version('vmdbg')}]" in changelog


def test_every_package_is_listed() -> None:
    there = {
        ".".join(path.parent.relative_to(TOP).parts) for name in OURS for path in (TOP / name).rglob("__init__.py")
    }
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == there


def test_readme_lists_the_options_of_run() -> None:
    assert {row[0].strip("`"): row[1] for row in table("Options")} == options("run")


def test_gdb_takes_the_machine_options_of_run() -> None:
    run, gdb = options("run"), options("gdb")
    assert run.keys() - gdb.keys() == {"--gdb [ADDR]", "--allow-remote", "--gdb-log FILE", "--wait", "--console", "--save-at TICK,FILE"}
    assert gdb.keys() - run.keys() == {"--print-module"}


@pytest.mark.parametrize("page", ["README.md", *sorted(str(page.relative_to(TOP)) for page in (TOP / "docs").glob("*.md"))])
def test_pages_name_only_files_that_exist(page: str) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", (TOP / page).read_text(encoding="utf-8")):
        assert ((TOP / page).parent / target).exists(), target
