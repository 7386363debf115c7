# SPDX-License-Identifier: GPL-2.0-or-later
"""What a run is given: the image, the options that its software can see or that end it, and what comes in from outside.

Runs of one identity are one run: what they execute, and when, is the same to the last byte (docs/determinism.md).  So nothing is
in it that depends on where files are, in which order options were given, who looks on, or what host it is.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, fields, is_dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, NamedTuple

from vmdbg.boot.image import BootImage

if TYPE_CHECKING:
    from vmdbg.machine import Machine

UNSEEN = frozenset((
    "serial", "python_runtime", "native_switch", "exit_ring", "vmcb_images", "trace", "fingerprint",
))  # fmt: skip
"""Members of `Config` that change nothing of what a machine does."""
ELSEWHERE = frozenset(("command_line", "modules", "flat_address", "mode", "devices"))
"""Members of `Config` that are in what the image and the devices come to."""
KEPT_INPUTS = 10_000
"""Of so many inputs, the last ones, it is known which they were."""
DIGITS = 32
"""Hexadecimal digits of a hash as people see it: 128 bits."""


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:DIGITS]


@cache
def machine_version() -> str:
    """Of vmdbg: another one may emulate something better, and so make another run of the same image."""
    try:
        return version("vmdbg")
    except PackageNotFoundError:
        return "unknown"


def _plain(value: object) -> object:
    """As JSON has it, and always the same for what is the same."""
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(str(one) for one in value)
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def image_digest(image: BootImage) -> str:
    """Of what an image, its modules and its command line become in memory, and of the state that the first processor has then."""
    whole = hashlib.sha256()
    for segment in sorted(image.segments, key=lambda one: one.address):
        whole.update(f"{segment.address:x} {segment.size:x} {len(segment.data):x}\n".encode())
        whole.update(segment.data)
    whole.update(json.dumps(_plain(image.state), sort_keys=True).encode())
    return whole.hexdigest()[:DIGITS]


class Input(NamedTuple):
    """Something that came from outside at a tick; `what` says from where, `data` is it, or words for it."""

    tick: int
    what: str
    data: bytes


class Inputs:
    """All that came in so far, in order: a chain of hashes, and the last ones themselves."""

    def __init__(self) -> None:
        self.chain = ""
        self.count = 0
        self.kinds: Counter[str] = Counter()
        self.last: deque[Input] = deque(maxlen=KEPT_INPUTS)

    def add(self, tick: int, what: str, data: bytes) -> None:
        self.chain = digest(f"{self.chain} {tick} {what} ".encode() + data)
        self.count += 1
        self.kinds[what] += 1
        self.last.append(Input(tick, what, data))

    def state(self) -> dict[str, object]:
        """For a snapshot, of JSON's types; `restore` takes it."""
        return {"chain": self.chain, "kinds": dict(self.kinds), "last": [[i.tick, i.what, i.data.hex()] for i in self.last]}

    def restore(self, chain: str, kinds: Mapping[str, int], last: Iterable[tuple[int, str, str]]) -> None:
        """TypeError or ValueError for what `state` did not give."""
        self.chain = str(chain)
        self.kinds = Counter({str(what): int(count) for what, count in dict(kinds).items()})
        self.count = self.kinds.total()
        self.last.clear()
        self.last.extend(Input(int(tick), str(what), bytes.fromhex(data)) for tick, what, data in last)


class Identity:
    """Of one machine's run."""

    def __init__(self, given: Callable[[], Mapping[str, object]]) -> None:
        """`given` is asked once, when somebody wants to know: it may have to read a disk."""
        self.inputs = Inputs()
        self._ask = given
        self._given: Mapping[str, object] | None = None

    @property
    def given(self) -> Mapping[str, object]:
        """What the run began with, of JSON's types."""
        if self._given is None:
            self._given = self._ask()
        return self._given

    def __str__(self) -> str:
        """32 hexadecimal digits, of all that the run was given so far."""
        return digest(json.dumps([self.given, self.inputs.chain], sort_keys=True).encode())


def given(machine: Machine) -> Mapping[str, object]:
    """What a machine was made of, as far as its software can see it or its end depends on it."""
    config, engine = machine.config, machine.engine
    options = {
        field.name: _plain(getattr(config, field.name)) for field in fields(config) if field.name not in UNSEEN | ELSEWHERE
    }
    functions = machine.chipset.root.functions
    devices = {
        str(one.address): {"kind": one.kind, **_plain_members(one.identity()), **({"ats": True} if one.ats else {})}
        for one in functions
    }  # fmt: skip
    return {
        "vmdbg": machine_version(), "lacks": sorted(engine.lacks), "image": image_digest(machine.image), **options,
        "devices": devices,
    }  # fmt: skip


def _plain_members(members: Mapping[str, object]) -> dict[str, object]:
    return {key: _plain(value) for key, value in members.items()}
