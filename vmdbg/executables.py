"""The files that clients load symbols from: which one goes with an inferior, and the names they are offered under."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from gdbstub.target import Library
from vmdbg.boot.elf import LoadSegment, is_elf64, linked_at, segments
from vmdbg.boot.image import ImageError
from vmdbg.history import HOST

WIDE = "i386:x86-64"

_NO_CODE = b"S0030000FC\r\nS9030000FC\r\n"
"""A file of Motorola S-records without data.  Every gdb takes it for an executable: one of no architecture, which so goes
with the registers of any mode."""


@cache
def _resolved(path: Path) -> str:
    return str(path.resolve())


@cache
def _segments(path: Path) -> tuple[LoadSegment, ...]:
    try:
        return segments(path.read_bytes())
    except (OSError, ImageError):
        return ()


class Executables:
    """Symbol files by pid, and what was offered of them."""

    def __init__(self) -> None:
        self.symbols: dict[int, Path] = {}
        """Files assigned to inferiors, by pid."""
        self.offsets: dict[int, int] = {}
        """How far from where they were linked these are, by pid."""
        self.image: Path | None = None
        """The one that came with the machine's image: the hypervisor's, if it was assigned none."""
        self._offered: dict[str, Path | None] = {}
        """What clients may read: every name that `offer` gave, since gdb opens it later again, and what is there."""

    def assign(self, pid: int, path: Path, offset: int = 0) -> None:
        """Give an inferior a symbol file, whose addresses are all `offset` further up.  ImageError if it cannot have one."""
        if offset:
            linked_at(path)
        self.symbols[pid] = path
        self.offsets[pid] = offset % (1 << 64)

    def of(self, pid: int) -> Path | None:
        return self.symbols.get(pid) or (self.image if pid == HOST else None)

    def holds(self, pid: int, address: int) -> bool | None:
        """Whether an inferior's file has something at a linear address; None if there is no file to tell."""
        path = self.of(pid)
        found = _segments(path) if path is not None else ()
        return any(0 <= address - segment.virtual < segment.memory_size for segment in found) if found else None

    def offer(self, pid: int, title: str, architecture: str) -> str:
        """The inferior by name, for gdb's `info inferiors` shows no other text of ours: a guest is a folder, called as
        `title` says, with the file of its symbols, or an empty file."""
        path = self._executable(pid, architecture)
        name = f"/{title}"
        if path is not None:
            name = _resolved(path) if pid == HOST else f"{name}/{path.name}"
        self._offered[name] = path
        return name

    def _executable(self, pid: int, architecture: str) -> Path | None:
        """A symbol file that goes with the registers: gdb takes the architecture of an executable for that of the thread,
        and refuses a description that contradicts it.  16-bit code goes with none, and a relocated file is a library."""
        path = self.of(pid) if not self.offsets.get(pid) else None
        fits = path is not None and architecture != "i8086" and is_elf64(path) == (architecture == WIDE)
        return path if fits else None

    def libraries(self, pid: int, title: str) -> list[Library]:
        """The symbol file, if it is relocated: clients have no other way to be told where it is."""
        path, offset = self.of(pid), self.offsets.get(pid, 0)
        if path is None or not offset:
            return []
        try:
            first = linked_at(path).segment
        except ImageError:  # it has changed since
            return []
        name = f"/{title}/{path.name}"
        self._offered[name] = path
        return [Library(name, (first + offset) % (1 << 64))]

    def read(self, name: str) -> bytes | None:
        """What was offered under a name; None if nothing was, or it is no longer there."""
        if name not in self._offered:
            return None
        path = self._offered[name]
        try:
            return _NO_CODE if path is None else path.read_bytes()
        except OSError:
            return None
