# SPDX-License-Identifier: GPL-2.0-or-later
"""Values of a job file that are not what they should be."""

from __future__ import annotations

__all__ = ["WrongValue", "shown"]


class WrongValue(ValueError):
    """A value that its key does not take: the rule and the remedy, in words.  `at` leads to the part that is meant."""

    def __init__(self, words: str, *at: str | int) -> None:
        super().__init__(words)
        self.at = at


def shown(value: object) -> str:
    """A value as TOML has it, shortened."""
    text = {True: "true", False: "false"}[value] if isinstance(value, bool) else (
        f'"{value}"' if isinstance(value, str) else "a table" if isinstance(value, dict) else
        "an array" if isinstance(value, list) else str(value))  # fmt: skip
    text = text.encode("unicode_escape").decode("ascii")
    return text if len(text) <= 60 else f"{text[:57]}..."
