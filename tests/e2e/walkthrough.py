"""Pages that are carried out: what stands in their blocks is done as printed, and the output compared.

`python -m tests.e2e.walkthrough PAGE SECTION FOLDER` does it in a folder, and writes the output that came into the page.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.patience import PATIENCE

_BLOCK = re.compile(r"^```(console|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_FILE = re.compile(r"# ([\w./-]+\.py)(, further)?\n")


@dataclass
class Step:
    """A command with the output that the page prints, or a file with its contents."""

    command: str = ""
    output: str = ""
    file: str = ""
    contents: str = ""
    further: bool = False


def section(page: str, title: str) -> str:
    found = re.search(rf"^## {re.escape(title)}\n.*?(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
    assert found is not None, f"there is no section {title}"
    return found[0]


def steps(text: str) -> Iterator[Step]:
    for kind, body in _BLOCK.findall(text):
        if kind == "python":
            name = _FILE.match(body)
            if name is not None:
                yield Step(file=name[1], contents=body, further=bool(name[2]))
            continue
        for part in re.split(r"^\$ ", body, flags=re.MULTILINE)[1:]:
            command, _, output = part.partition("\n")
            yield Step(command, output)


def plain(output: str) -> str:
    """Without what is another thing each time, how long it took, or with each version, a run's identity."""
    return re.sub(r"(?<=^identity )[0-9a-f]+", "...", re.sub(r"\bin \d+\.\d+s( \(\d+:\d+:\d+\))?", "in 0.00s", output), flags=re.MULTILINE)


def follow(text: str, folder: Path) -> Iterator[tuple[Step, str]]:
    """Do all that stands in a text, from a folder on; each command with its output, paths as seen from the folder."""
    tools = Path(sys.executable).parent
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "VMDBG", "PY_COLORS"))},
        "PATH": f"{tools}:{os.environ['PATH']}", "COLUMNS": "80", "TERM": "dumb", "NO_COLOR": "1",
    }  # fmt: skip
    environment.pop("CI", None)
    place = folder
    for step in steps(text):
        if step.file:
            with (place / step.file).open("a" if step.further else "w", encoding="utf-8") as file:
                file.write(("\n\n" if step.further else "") + step.contents)
            continue
        done = subprocess.run(
            ["bash", "-c", f"{step.command}\npwd > {folder}/.place"], cwd=place, env=environment,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, timeout=PATIENCE,
        )  # fmt: skip
        place = Path((folder / ".place").read_text().strip())
        yield step, done.stdout.replace(f"{folder}/", "")


def check(text: str, folder: Path) -> None:
    """All that is printed must come."""
    for step, output in follow(text, folder):
        assert plain(output) == plain(step.output), step.command


def main(page: Path, title: str, folder: Path) -> None:
    text = page.read_text(encoding="utf-8")
    at = text.index(section(text, title))
    for step, output in follow(section(text, title), folder):
        printed = f"$ {step.command}\n{step.output}"
        at = text.index(printed, at)
        new = printed if plain(output) == plain(step.output) else f"$ {step.command}\n{output}"
        text = text[:at] + new + text[at + len(printed) :]
        at += len(new)
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
