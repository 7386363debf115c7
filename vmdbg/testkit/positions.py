# SPDX-License-Identifier: GPL-2.0-or-later
"""Where things stand in a TOML file. tomllib tells what a file says and not where: messages about a value name its line."""

from __future__ import annotations

import re
import tomllib

__all__ = ["Path", "positions"]

Path = tuple[str | int, ...]
"""Keys and indices that lead to a value: ("job", 0, "image")."""

_SPACE = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_BARE = re.compile(r"[A-Za-z0-9_-]+")
_STRING = re.compile(r'"""(?:\\.|[^\\])*?"{3,5}|\'\'\'.*?\'{3,5}|"(?:\\.|[^"\\])*"|\'[^\']*\'', re.DOTALL)
_SCALAR = re.compile(r"[^,\]}#\r\n]+")


def positions(text: str) -> dict[Path, int]:
    """The line, from 1, of each key, table and array element of a file that tomllib takes."""
    return _Scanner(text).scan()


class _Scanner:
    """It trusts the text to be TOML: what tomllib has refused does not come here."""

    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0
        self.found: dict[Path, int] = {}
        self.lengths: dict[Path, int] = {}
        """Of arrays of tables."""

    def scan(self) -> dict[Path, int]:
        table: Path = ()
        self._space()
        while self.at < len(self.text):
            if self._next("[["):
                array = self._within(self._key())
                count = self.lengths[array] = self.lengths.get(array, 0) + 1
                table = (*array, count - 1)
                self.found.setdefault(array, self._line())
                self.found[table] = self._line()
                self._next("]]")
            elif self._next("["):
                table = self._here(self._within(self._key()))
                self._note(table)
                self._next("]")
            else:
                self._pair(table)
            self._space()
        return self.found

    def _line(self) -> int:
        return self.text.count("\n", 0, self.at) + 1

    def _note(self, path: Path) -> None:
        """A table may be opened by its first key, and by those that lead to it."""
        for end in range(1, len(path) + 1):
            self.found.setdefault(path[:end], self._line())

    def _space(self) -> None:
        found = _SPACE.match(self.text, self.at)
        self.at = found.end() if found else self.at

    def _next(self, mark: str) -> bool:
        if not self.text.startswith(mark, self.at):
            return False
        self.at += len(mark)
        self._space()
        return True

    def _key(self) -> Path:
        """One with dots between its parts."""
        parts: list[str | int] = []
        while True:
            self._space()
            found = _STRING.match(self.text, self.at) or _BARE.match(self.text, self.at)
            if found is None:
                return tuple(parts)
            self.at = found.end()
            parts.append(next(iter(tomllib.loads(f"{found[0]} = 0"))))
            self._space()
            if not self._next("."):
                return tuple(parts)

    def _here(self, path: Path) -> Path:
        return (*path, self.lengths[path] - 1) if path in self.lengths else path

    def _within(self, key: Path) -> Path:
        """A key in brackets: on its way it leads into the last table of each array of tables."""
        path: Path = ()
        for part in key:
            path = (*self._here(path), part)
        return path

    def _pair(self, table: Path) -> None:
        begin = self.at
        path = (*table, *self._key())
        if self.at == begin:  # no TOML after all: go on, so that this ends
            self.at += 1
            return
        self._note(path)
        self._next("=")
        self._value(path)

    def _value(self, path: Path) -> None:
        if self._next("["):
            index = 0
            while not self._next("]") and self.at < len(self.text):
                self.found[(*path, index)] = self._line()
                self._value((*path, index))
                self._space()
                self._next(",")
                index += 1
        elif self._next("{"):
            while not self._next("}") and self.at < len(self.text):
                self._pair(path)
                self._space()
                self._next(",")
        else:
            found = _STRING.match(self.text, self.at) or _SCALAR.match(self.text, self.at)
            self.at = found.end() if found else self.at + 1
