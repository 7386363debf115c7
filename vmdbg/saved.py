# SPDX-License-Identifier: GPL-2.0-or-later
"""Snapshots on the command line: `--snapshot`, `--save-at`, and what may be said beside them."""

from __future__ import annotations

import argparse
import errno
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from introspect.commands.render import size_text
from vmdbg.boot.images import File, Module, read
from vmdbg.machine import Config, Machine
from vmdbg.options import UsageError, number
from vmdbg.timetravel.file import SnapshotFile, is_snapshot, save
from vmdbg.timetravel.making import digest_of
from vmdbg.timetravel.tree import SnapshotError

END = -1


class SaveAt(NamedTuple):
    """A file to save to at a tick, or at the run's end (`END`)."""

    tick: int
    path: str


def save_at(text: str) -> SaveAt:
    """ "17000000,FILE" or "end,FILE"."""
    when, comma, path = text.partition(",")
    if not comma or not path:
        raise argparse.ArgumentTypeError(f"{text!r} is not TICK,FILE; write 17000000,machine.snapshot or end,machine.snapshot")
    return SaveAt(END if when == "end" else number(when), path)


class _Noting(argparse.Action):
    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        super().__call__(parser, namespace, values, option_string)
        if option_string is not None:
            namespace.given = {**namespace.given, self.dest: self.option_strings[-1]}


class _Store(_Noting, argparse._StoreAction):
    pass


class _StoreTrue(_Noting, argparse._StoreTrueAction):
    pass


class _Append(_Noting, argparse._AppendAction):
    pass


def remember_given(parser: argparse.ArgumentParser) -> None:
    """Have a parser note in `given` which options there were: what each sets, to its name."""
    for name, action in ((None, _Store), ("store", _Store), ("store_true", _StoreTrue), ("append", _Append)):
        parser.register("action", name, action)
    parser.set_defaults(given={})


def settle(options: argparse.Namespace) -> None:
    """Find out whether an image or a snapshot is meant.  `image` is the name of what there is then.  Raises `UsageError`."""
    if "given_image" in options:
        return
    if options.image is not None and options.snapshot is None and is_snapshot(options.image):
        options.image, options.snapshot = None, options.image
    if options.image is None and options.snapshot is None:
        raise UsageError("there is nothing to run; name an image, or --snapshot FILE")
    options.given_image = options.image
    if options.image is None:
        options.image = options.snapshot


# What may differ from the machine that was saved, and what not

_STRICT = {False: "coherent", True: "strict"}


_DESCRIBED: Mapping[str, Any] = {
    "memory": lambda c: size_text(c.memory), "cpus": lambda c: c.cpus, "append": lambda c: repr(c.command_line),
    "flat": lambda c: c.flat_address, "mode": lambda c: c.mode, "maxphyaddr": lambda c: c.physical_bits,
    "initrd": lambda c: ", ".join(_named(module) for module in c.modules) or "none",
    "dev": lambda c: c.dev, "tpm": lambda c: c.tpm, "hpet": lambda c: c.hpet, "reboot": lambda c: c.reboot,
    "iommu": lambda c: 0 if c.iommu is None else c.iommu.units,
    "iommu_cache": lambda c: _STRICT[c.iommu is not None and c.iommu.strict],
    "iommu_memory": lambda c: () if c.iommu is None else c.iommu.reserved,
    "exit_ring": lambda c: c.exit_ring, "vmcb_cache": lambda c: _STRICT[c.vmcb_cache], "tlb": lambda c: _STRICT[c.strict_tlb],
}  # fmt: skip
"""Options that say what the machine is, to what each says of a `Config`."""


def _named(module: Module) -> str:
    """Its file's name, and what tells its contents apart."""
    file = read(module.source)
    return f"{Path(file.name).name} ({len(file.data)} bytes, {digest_of(file.data)[:8]})"


def restored(options: argparse.Namespace, described: Config, arguments: Iterable[str]) -> Machine:
    """The machine of `--snapshot`; `described` is what the other options say.  Raises `UsageError`."""
    if list(arguments):
        raise UsageError("a machine from a snapshot has been given its command line already; `run` without arguments")
    try:
        file = SnapshotFile(options.snapshot)
        try:
            _refuse_others(options, described, file)
            given = described.devices if "device" in options.given else None
            return file.restore(described, given)
        finally:
            file.close()
    except SnapshotError as error:
        raise UsageError(str(error)) from None


def _refuse_others(options: argparse.Namespace, described: Config, file: SnapshotFile) -> None:
    name = options.snapshot
    for key, option in options.given.items():
        say = _DESCRIBED.get(key)
        if say is not None and say(described) != say(file.config):
            raise UsageError(
                f"{option} {say(described)} contradicts {name}, whose machine has {say(file.config)}; leave {option} out"
            )
    image = options.given_image
    if image is not None and read(image).data != file.image.data:
        raise UsageError(
            f"{image} contradicts {name}, whose machine was started with other contents of {file.image.path or 'its image'}; "
            "leave the image out: it is in the snapshot"
        )


def is_current(file: File) -> bool:
    """Whether it is still on disk as it was read: then what lies beside it belongs to it."""
    path = Path(file.path)
    try:
        # A snapshot may name anything: a pipe would be waited for, and a device never end.
        return bool(file.path) and path.is_file() and path.stat().st_size == len(file.data) and path.read_bytes() == file.data
    except (OSError, ValueError):
        return False


def image_file(options: argparse.Namespace) -> str:
    """Where the image is that the machine was made of; empty if it is no longer there as it was.  Raises `UsageError`."""
    if options.snapshot is None:
        return str(options.image)
    try:
        file = SnapshotFile(options.snapshot)
    except SnapshotError as error:
        raise UsageError(str(error)) from None
    file.close()
    return file.image.path if is_current(file.image) else ""


def _try(one: SaveAt) -> None:
    path, partial = Path(one.path), Path(f"{one.path}.part")
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        partial.open("wb").close()  # where it is written, before it is moved
        partial.unlink()
    except (OSError, ValueError) as error:  # a NUL in the name
        reason = error.strerror if isinstance(error, OSError) else error
        tick = "end" if one.tick == END else one.tick
        raise UsageError(f"--save-at {tick},{one.path}: {reason}; name a file that can be written") from None


class Saves:
    """`--save-at`: what is still to be saved."""

    def __init__(self, wanted: Iterable[SaveAt]) -> None:
        """UsageError for a file that cannot be written: a long run would end in vain."""
        self._wanted = sorted(wanted)
        for one in self._wanted:
            _try(one)

    def ticks(self, machine: Machine, most: int) -> int:
        """How far the machine may run before it is time."""
        due = [one.tick - machine.clock.now for one in self._wanted if one.tick != END]
        return min([most, *due])

    def look(self, machine: Machine, *, ended: bool = False) -> None:
        """Save where it is time.  Raises `UsageError`."""
        for one in [*self._wanted]:
            if (ended and one.tick == END) or (one.tick != END and one.tick <= machine.clock.now):
                self._wanted.remove(one)
                try:
                    save(machine, one.path)
                except SnapshotError as error:
                    raise UsageError(str(error)) from None
        if ended and self._wanted:
            raise UsageError(f"--save-at {self._wanted[0].tick},{self._wanted[0].path}: the run ended before that tick")
