# SPDX-License-Identifier: GPL-2.0-or-later
"""Snapshots in files: written at once or not at all, read without trust.

Sections (sections.py): HEAD (JSON: versions, configuration, files outside), IMAG and one MODU for each module (the files that the
machine was made from), STAT (JSON: the tree of restoring.py, bytes by offset and length in BLOB), BLOB, RAM (address,
length, contents, repeated).
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, BinaryIO

from vmdbg.boot.image import ImageError
from vmdbg.boot.images import File, Module
from vmdbg.engine.errors import EngineError
from vmdbg.engine.memory import PAGE, Ram
from vmdbg.engine.translations import LACKED
from vmdbg.machine import Config, Machine
from vmdbg.platform.pci.catalogue import DeviceError, DeviceSpec

from . import memory
from .making import OUTSIDE, check_files, config_from, config_json, devices, digest_of, outside_files
from .restoring import restore
from .sections import MAGIC, MOST, Reader, Writer
from .shapes import printable, shown
from .snapshot import Snapshot, take
from .tree import MOST_CONTAINERS, MOST_VALUES, Malformed, SnapshotError, Tree, parsed

FORMAT = 1
_HEAD, _IMAGE, _MODULE, _STATE, _BLOB, _RAM = b"HEAD", b"IMAG", b"MODU", b"STAT", b"BLOB", b"RAM "
_RUN = struct.Struct("<QI")
_RAM_SECTION = 4 << 20
MOST_BLOBS = 4 << 30
_SHARE = 64
"""What part of what a state may have a header may have."""

IMPOSSIBLE = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, AssertionError, RecursionError)
"""What comes of a state that somebody has invented: Python's own errors, since nobody can check all of it beforehand."""


def impossible(path: str | Path, error: Exception) -> str:
    """In words, that one of these came of a file while its machine ran."""
    what = f"{type(error).__name__}: {printable(str(error))}"
    return (
        f"{path}: its machine came to what none comes to by itself ({what}); unless the file was tampered with, report it, with "
        "what -v says"
    )


def _release() -> str:
    try:
        return version("vmdbg")
    except PackageNotFoundError:
        return "unknown"


# Writing


def save(machine: Machine, path: str | Path, snapshot: Snapshot | None = None) -> int:
    """Write the machine, or a snapshot of it, to a file; returns the file's size.  SnapshotError with the reason if not.

    What was at `path` stays until all is written.
    """
    snapshot = snapshot or take(machine)
    partial = Path(f"{path}.part")
    try:
        header = _header(machine, snapshot)
        with partial.open("wb") as file:
            _write(file, header, snapshot, machine.files)
            size = file.tell()
        os.replace(partial, path)
    except (OSError, ValueError) as error:
        with suppress(OSError, ValueError):
            partial.unlink(missing_ok=True)
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise SnapshotError(f"snapshot {path}: {reason}; name a file that can be written") from None
    return size


def _header(machine: Machine, snapshot: Snapshot) -> dict[str, Any]:
    image, *modules = ({"path": os.path.abspath(file.path) if file.path else ""} for file in machine.files)
    strings = [
        file.name if module.string is None else module.string
        for module, file in zip(machine.config.modules, machine.files[1:], strict=True)
    ]
    return {
        "format": FORMAT, "vmdbg": _release(), "time": snapshot.time, "lacks": machine.engine.lacks,
        "config": config_json(machine.config), "files": outside_files(machine.config),
        "image": image | {"digest": digest_of(machine.files[0].data)},
        "modules": [module | {"string": string} for module, string in zip(modules, strings, strict=True)],
    }  # fmt: skip


def _write(file: BinaryIO, header: dict[str, Any], snapshot: Snapshot, files: list[File]) -> None:
    writer = Writer(file)
    writer.write(_HEAD, json.dumps(header).encode())
    for tag, source in zip([_IMAGE, *[_MODULE] * (len(files) - 1)], files, strict=True):
        for piece in _cut(source.data):
            writer.write(tag, piece)
        writer.write(tag, b"")
    blobs = bytearray()
    state = json.dumps(_to_json(snapshot.state, blobs), separators=(",", ":"))
    if len(state) > MOST or (state.count("[") + state.count("{") > MOST_CONTAINERS) or state.count(",") > MOST_VALUES:
        raise ValueError("the machine holds more translations than a file may; save it where its TLBs hold less")
    writer.write(_STATE, state.encode())
    for piece in _cut(blobs):
        writer.write(_BLOB, piece)
    section = bytearray()
    for address, data in memory.runs(snapshot.ram):
        section += _RUN.pack(address, len(data)) + data
        if len(section) >= _RAM_SECTION:
            writer.write(_RAM, bytes(section))
            section = bytearray()
    if section:
        writer.write(_RAM, bytes(section))
    writer.end()


def _cut(data: bytes | bytearray) -> Iterator[bytes]:
    return (bytes(data[at : at + MOST // 2]) for at in range(0, len(data), MOST // 2))


def _to_json(tree: Tree, blobs: bytearray) -> Any:
    """Lists are lists; bytes are their place in the blobs."""
    if isinstance(tree, list):
        return [_to_json(one, blobs) for one in tree]
    if isinstance(tree, bytes):
        blobs += tree
        return {"at": len(blobs) - len(tree), "length": len(tree)}
    return tree


# Reading


def is_snapshot(path: str | Path) -> bool:
    """Whether a file begins as one."""
    try:
        if not Path(path).is_file():
            return False  # a pipe, say, whose reader would wait
        with open(path, "rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except (OSError, ValueError):
        return False


class SnapshotFile:
    """A file that was opened, of which the beginning has been read: what its machine is made of.

    Every error is a `SnapshotError`.
    """

    def __init__(self, path: str | Path) -> None:
        self.name = str(path)
        try:
            if Path(path).exists() and not Path(path).is_file():
                raise ValueError("not a regular file")
            self._file = open(path, "rb")  # noqa: SIM115 - closed by close()
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise SnapshotError(f"snapshot {path}: {reason}; name a file that vmdbg has saved") from None
        try:
            self._reader = Reader(self._file, self.name)
            self._begin()
        except BaseException:
            self._file.close()
            raise

    def _begin(self) -> None:
        reader = self._reader
        try:
            header = parsed(reader.read(_HEAD).decode(), _SHARE)
            form, made_by = header["format"], str(header["vmdbg"])
            if form != FORMAT:
                raise SnapshotError(
                    f"{self.name} has format {form!r} of vmdbg {made_by}; this is vmdbg {_release()}, which reads format "
                    f"{FORMAT}. Restore it with that version"
                )
            self.release = made_by
            self.time = int(header["time"])
            self.image = File(_word(header["image"]["path"]), self._source(_IMAGE))
            modules = tuple(
                Module(File(_word(one["path"]), self._source(_MODULE)), _word(one["string"])) for one in header["modules"]
            )
            self.config = config_from(header["config"], modules)
            self._files, self._lacks = list(header["files"]), list(header["lacks"])
        except (KeyError, TypeError, ValueError, RecursionError, OverflowError, Malformed) as error:
            raise reader.broken(f"its header says what no machine is: {error}") from None
        except MemoryError:
            raise SnapshotError(f"{self.name} has an image or modules that this host has no memory for") from None

    def _source(self, tag: bytes) -> bytes:
        """The contents of a file: pieces up to an empty one."""
        pieces, size = [], 0
        while piece := self._reader.read(tag):
            pieces.append(piece)
            size += len(piece)
            if size > MOST_BLOBS:
                raise self._reader.broken(f"a file that its machine was made of has more than {MOST_BLOBS} bytes")
        return b"".join(pieces)

    def restore(self, outside: Config | None = None, given: tuple[DeviceSpec, ...] | None = None) -> Machine:
        """The machine, as it was, in the surroundings that `outside` describes (the fields that `making.OUTSIDE` names).

        `given`: its devices again, which may name other files.  Without them, nothing outside is written that a file names.
        """
        try:
            config = replace(
                self.config if outside is None else with_outside(self.config, outside),
                devices=devices(self.config.devices, given, self.name),
            )
            try:
                check_files(self._files, config, self.name)
            except (KeyError, TypeError, ValueError) as error:
                raise self._reader.broken(f"what it says of files beside it is none: {error}") from None
            return self._restore(config)
        finally:
            self.close()

    def _restore(self, config: Config) -> Machine:
        reader = self._reader
        try:
            machine = Machine(self.image, config)
        except (ImageError, EngineError, DeviceError) as error:
            raise SnapshotError(f"{self.name}: its machine cannot be made here: {error}") from None
        try:
            if ({*machine.engine.lacks} ^ {*self._lacks}) - {LACKED}:  # which a debugger at home may have to do without
                raise SnapshotError(
                    f"{self.name} comes from a build of Unicorn that lacks {', '.join(self._lacks) or 'nothing'}, this one lacks "
                    f"{', '.join(machine.engine.lacks) or 'nothing'}: restore it with the wheel of unicorn it was saved with"
                )
            memory.put_back(machine.ram, {})
            tree = parsed(reader.read(_STATE).decode())
            blobs = self._rest(machine.ram)
            restore(machine, _from_json(tree, memoryview(blobs)))
            if machine.clock.now != self.time:
                raise Malformed("its time is not that of its header")
        except (Malformed, *IMPOSSIBLE) as error:
            machine.close()
            hint = "" if self.release == _release() else f" (it is of vmdbg {self.release}, this is {_release()})"
            raise SnapshotError(
                f"{self.name} does not fit this version of vmdbg{hint}, or was tampered with: {error}. Restore it with the "
                "version that saved it"
            ) from None
        except MemoryError:
            machine.close()
            raise SnapshotError(f"{self.name} has a machine that this host has no memory for") from None
        except BaseException:
            machine.close()
            raise
        return machine

    def _rest(self, ram: Ram) -> bytes:
        """RAM is filled; returns the blobs."""
        blobs, following = bytearray(), 0
        for tag, data in self._reader.rest():
            if tag == _BLOB:
                blobs += data
                if len(blobs) > MOST_BLOBS:
                    raise self._reader.broken("it has more state than any machine")
            elif tag == _RAM:
                following = self._fill(ram, data, following)
            else:
                raise self._reader.broken(f"section {tag!r} is unknown")
        return bytes(blobs)

    def _fill(self, ram: Ram, data: bytes, following: int) -> int:
        at = 0
        while at < len(data):
            if at + _RUN.size > len(data):
                raise self._reader.broken("a stretch of memory without its head")
            address, length = _RUN.unpack_from(data, at)
            at += _RUN.size
            inside = at + length <= len(data) and ram.contains(address, length)
            if address % PAGE or not length or address < following or not inside:
                raise self._reader.broken(f"memory at {address:#x}, {length:#x} bytes, is none of the machine's")
            ram.view[address : address + length] = data[at : at + length]
            at += length
            following = address + length
        return following

    def close(self) -> None:
        self._file.close()


def _word(value: object) -> str:
    if type(value) is not str:
        raise ValueError(f"{shown(value)} is no text")
    return value


def _from_json(found: Any, blobs: memoryview) -> Tree:
    if isinstance(found, list):
        return [_from_json(one, blobs) for one in found]
    if isinstance(found, dict):
        at, length = found["at"], found["length"]
        if type(at) is not int or type(length) is not int or not 0 <= at <= at + length <= len(blobs):
            raise Malformed("bytes that are not there")
        return bytes(blobs[at : at + length])
    if found is None or isinstance(found, bool | int | str):
        return found
    raise Malformed(f"{shown(found)} is no value")


def with_outside(config: Config, outside: Config) -> Config:
    """The first with what the second says of the outside."""
    return replace(config, **{name: getattr(outside, name) for name in OUTSIDE})
