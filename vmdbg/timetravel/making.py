# SPDX-License-Identifier: GPL-2.0-or-later
"""Of what a machine in a snapshot file is made: its configuration, its image, the files that its devices read."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

from introspect.pci import RequesterId
from vmdbg.boot.images import Module
from vmdbg.iommu.config import IommuConfig, Reserved
from vmdbg.machine import Config
from vmdbg.options import MAX_CPUS, MAX_PHYSICAL_BITS, MIN_PHYSICAL_BITS, MOST_MEMORY
from vmdbg.platform.pci.catalogue import DeviceSpec
from vmdbg.svm.images import MOST_TRIPS
from vmdbg.svm.ring import MOST_EXITS

from .tree import SnapshotError

OUTSIDE = ("serial", "trace", "fingerprint", "max_time", "stop_on", "python_runtime", "native_switch")
"""Of a `Config`: where a machine runs and who looks on.  Whoever restores it chooses anew."""
_CONTENTS = ("modules", "devices", "iommu")
_CHUNK = 1 << 20
_RANGES = {
    "memory": (1 << 20, MOST_MEMORY), "cpus": (1, MAX_CPUS), "physical_bits": (MIN_PHYSICAL_BITS, MAX_PHYSICAL_BITS),
    "exit_ring": (0, MOST_EXITS), "vmcb_images": (0, MOST_TRIPS),
}  # fmt: skip
_CHOICES = {"dev": ("", "coherent", "strict"), "mode": (None, "real", "protected", "long")}


def digest_of(data: bytes) -> str:
    return blake2b(data, digest_size=16).hexdigest()


def config_json(config: Config) -> dict[str, Any]:
    """Without what `OUTSIDE` names and without the modules' contents."""
    plain = {
        field.name: getattr(config, field.name) for field in fields(config) if field.name not in (*OUTSIDE, *_CONTENTS)
    }
    iommu = config.iommu
    return plain | {
        "devices": [spec_text(absolute(spec)) for spec in config.devices],
        "iommu": None if iommu is None else {
            "units": iommu.units, "strict": iommu.strict,
            "reserved": [[r.start, r.end, r.first, r.last, r.read, r.write, r.exclusion] for r in iommu.reserved],
        },
    }  # fmt: skip


def spec_text(spec: DeviceSpec) -> str:
    """As --device has it."""
    words = [spec.kind]
    if spec.slot is not None:
        words.append(f"slot={str(RequesterId(spec.slot)).partition(':')[2]}")
    words += [f"{key}={value}" for key, value in (("bus", spec.bus), ("id", spec.id)) if value]
    return ",".join([*words, *(f"{key}={value}" for key, value in spec.options.items())])


def config_from(saved: Mapping[str, Any], modules: tuple[Module, ...]) -> Config:
    """The reverse.  KeyError, TypeError or ValueError if it is none."""
    template = Config()
    values: dict[str, Any] = {}
    for field in fields(Config):
        if field.name in (*OUTSIDE, *_CONTENTS):
            continue
        value, like = saved[field.name], getattr(template, field.name)
        optional = {"flat_address": int, "mode": str}.get(field.name)
        if type(value) is not type(like) and not (optional is not None and type(value) is optional):
            raise ValueError(f"option {field.name} is no {type(like).__name__}")
        low, high = _RANGES.get(field.name, (None, None))
        if low is not None and not low <= value <= high:
            raise ValueError(f"option {field.name} is {value}, not {low} to {high}")
        if value not in _CHOICES.get(field.name, (value,)):
            raise ValueError(f"option {field.name} is {value!r}")
        values[field.name] = value
    unknown = saved.keys() - values.keys() - set(_CONTENTS)
    if unknown:
        raise ValueError(f"option {min(unknown)} is unknown")
    iommu = saved["iommu"]
    return Config(
        **values, modules=modules, devices=tuple(DeviceSpec.parse(str(text)) for text in saved["devices"]),
        iommu=None if iommu is None else IommuConfig(
            int(iommu["units"]), bool(iommu["strict"]), tuple(map(_reserved, iommu["reserved"]))
        ),
    )  # fmt: skip


def _reserved(saved: list[Any]) -> Reserved:
    start, end, first, last, read, write, exclusion = saved
    return Reserved(int(start), int(end), int(first), int(last), bool(read), bool(write), bool(exclusion))


# Files that devices read while the machine runs: named, not held


def outside_files(config: Config) -> list[dict[str, Any]]:
    """Path, size and digest of each."""
    measured = ((path, *_measure(path)) for path in _paths(config))
    return [{"path": os.path.abspath(path), "size": size, "digest": digest} for path, size, digest in measured]


def _paths(config: Config) -> Iterator[str]:
    for spec in config.devices:
        for key in ("file", "replay"):
            if key in spec.options:
                yield spec.options[key]


def _measure(path: str) -> tuple[int, str]:
    digest, size = blake2b(digest_size=16), 0
    if not Path(path).is_file() and not Path(path).is_block_device() and Path(path).exists():
        raise ValueError("neither a regular file nor a disk")  # a pipe would be waited for, and a device never end
    with open(path, "rb", buffering=0) as file:
        while data := file.read(_CHUNK):
            digest.update(data)
            size += len(data)
    return size, digest.hexdigest()


def check_files(found: list[Any], config: Config, name: str) -> None:
    """SnapshotError if one of those that the devices of `config` read is not what it was."""
    for path, one in zip(_paths(config), found, strict=True):
        size, digest = int(one["size"]), str(one["digest"])
        try:
            now = _measure(path)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise SnapshotError(
                f"{name} needs {path}, which a device of its machine reads: {reason}. Put the file there, as it was"
            ) from None
        if now != (size, digest):
            raise SnapshotError(
                f"{name} needs {path} as it was, {size} bytes with digest {digest}; now it has {now[0]} bytes, digest {now[1]}. "
                "Put the old file there: a disk is not in a snapshot, only what was written over it in memory"
            )


OUTSIDE_KEYS = ("file", "replay", "pcap", "chardev")
"""Options of devices that name something outside the machine."""


def absolute(spec: DeviceSpec) -> DeviceSpec:
    """With paths that mean the same from anywhere."""
    return replace(spec, options={
        key: os.path.abspath(value) if key in ("file", "replay", "pcap") else value for key, value in spec.options.items()
    })  # fmt: skip


def writes(spec: DeviceSpec) -> bool:
    """Whether it changes something outside the machine, or lets the outside in."""
    options = spec.options
    return options.get("write") == "on" or "pcap" in options or options.get("chardev", "null") != "null"


def _inside(spec: DeviceSpec) -> DeviceSpec:
    return replace(spec, options={key: value for key, value in spec.options.items() if key not in OUTSIDE_KEYS})


def devices(saved: tuple[DeviceSpec, ...], given: tuple[DeviceSpec, ...] | None, name: str) -> tuple[DeviceSpec, ...]:
    """Those of a snapshot, or if they are `given` again, these: they may name other files.  SnapshotError if they differ else,
    or if they were not given and would write: a file that came from somewhere must not choose what is overwritten."""
    if given is None:
        outward = next(filter(writes, saved), None)
        if outward is not None:
            options = " ".join(f"--device {spec_text(one)}" for one in saved)
            raise SnapshotError(
                f"{name} has a machine with --device {spec_text(outward)}, which reaches outside of it. To let it, give its "
                f"devices again: {options}"
            )
        return saved
    if [*map(_inside, given)] != [*map(_inside, saved)]:
        asked, there = (" ".join(f"--device {spec_text(one)}" for one in some) or "no --device" for some in (given, saved))
        raise SnapshotError(
            f"{asked} contradicts {name}, whose machine has {there}. Leave --device out, or change no more than the files' names"
        )
    return given
