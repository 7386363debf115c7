# SPDX-License-Identifier: GPL-2.0-or-later
"""Our docstrings are plain text with `code` in it and indented examples; autodoc wants reStructuredText."""

from __future__ import annotations

import re


def as_rst(lines: list[str]) -> list[str]:
    """A docstring's lines, indentation taken off, as reStructuredText that shows what was written."""
    out: list[str] = []
    example = False
    for line in lines:
        indented = line.startswith("    ")
        if line.strip() and not indented:
            example = False
        elif indented and not example and _ends_with_colon(out):
            example = True
            out.insert(_last(out) + 1, "")
            out.insert(_last(out) + 1, "::")
            out.append("")
        out.append(line if example else _text(line))
    return out


def _last(lines: list[str]) -> int:
    """The index of the last line that is not blank, or -1."""
    return max((at for at, line in enumerate(lines) if line.strip()), default=-1)


def _ends_with_colon(lines: list[str]) -> bool:
    """Whether what comes next is an example, set off by a blank line."""
    return bool(lines) and not lines[-1].strip() and lines[_last(lines)].endswith(":")


def _text(line: str) -> str:
    """`code` as a literal, also before a letter ("`Field`s"); no other markup."""
    parts = re.split(r"(?<![`\w])`([^`]+)`(?!`)", line)
    for at, part in enumerate(parts):
        if at % 2:
            follows = parts[at + 1][:1]
            parts[at] = f"``{part}``" + ("\\ " if follows.isalnum() or follows == "_" else "")
        elif not part.lstrip().startswith((":", "..")):
            parts[at] = re.sub(r"([*|])", r"\\\1", re.sub(r"(?<=\w)_(?!\w)", r"\\_", part))
    return "".join(parts)
