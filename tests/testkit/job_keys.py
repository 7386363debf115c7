"""docs/jobs.md's table of keys, made from the keys themselves."""

from __future__ import annotations

from pathlib import Path

from vmdbg.testkit.keys import KEYS

PAGE = Path(__file__).resolve().parents[2] / "docs/jobs.md"
BEGIN, END = "<!-- keys: python -m tests.reference -->\n", "<!-- end -->\n"


def table() -> str:
    rows = ["| key | takes | | without it |", "| --- | --- | --- | --- |"]
    rows += [
        "| " + " | ".join(cell.replace("|", "\\|") for cell in (f"`{key.name}`", key.takes, key.help, key.without)) + " |"
        for key in KEYS.values()
    ]
    return "\n".join(rows) + "\n"


def page() -> str:
    """docs/jobs.md with the table as it should be."""
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    return before + BEGIN + "\n" + table() + "\n" + END + rest.partition(END)[2]
