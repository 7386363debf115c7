"""How a VMCB changed from one world switch to the next, and who changed it: the processor, or software between two of them.

VMRUN reads it and writes nothing (APM2 15.5.1); #VMEXIT writes the fields of `EXIT_STORES` and no others (15.6).  So whatever
differs between a #VMEXIT and the next VMRUN was stored by software, and between a VMRUN and its #VMEXIT by the processor,
except in other fields, which only software on another processor, the guest itself or a device can have stored to meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise

from introspect.layout import Buffer
from introspect.vmcb import CLEAN, EXIT_WRITES, SEGMENTS, VMCB

__all__ = [
    "CONTROL_SIZE", "EXIT_STORES", "SAVE_AREA", "SAVE_SIZE", "By", "Change", "Forgotten", "Image", "changes", "forgotten",
    "forgotten_in", "net", "trips",
]  # fmt: skip

SAVE_AREA = 0x400
CONTROL_SIZE, SAVE_SIZE = 0x148, 0x2F0
"""Bytes of the two areas that have fields."""

_VMSAVE = frozenset((
    *(f"{name}.{part}" for name in ("fs", "gs", "ldtr", "tr") for part in ("selector", "attrib", "limit", "base")),
    "star", "lstar", "cstar", "sfmask", "kernel_gs_base", "sysenter_cs", "sysenter_esp", "sysenter_eip",
))  # fmt: skip
"""Fields that VMSAVE writes (APM2 15.5.2)."""
EXIT_STORES = EXIT_WRITES | {
    *(f"{name}.{part}" for name in SEGMENTS if name not in ("fs", "gs", "ldtr", "tr", "gdtr", "idtr")
      for part in ("selector", "attrib", "limit", "base")),
    *(f"{name}.{part}" for name in ("gdtr", "idtr") for part in ("limit", "base")),
    "cpl", "efer", "cr0", "cr2", "cr3", "cr4", "dr6", "dr7", "rflags", "rip", "rsp", "rax", "g_pat", "dbgctl", "br_from",
    "br_to", "last_excp_from", "last_excp_to", "s_cet", "ssp", "isst_addr", "spec_ctrl", "bus_lock_counter",
}  # fmt: skip
"""Fields that #VMEXIT may write (APM2 15.6, 15.23, 15.25.2)."""


class By(StrEnum):
    """Who changed a field."""

    HARDWARE = "hardware"
    SOFTWARE = "software"
    VMSAVE = "VMSAVE, or a store"
    INTRUDER = "a store while the guest ran"


@dataclass(frozen=True, slots=True)
class Image:
    """The bytes of a VMCB from its start, at #VMEXIT `number`, or at a VMRUN (`number` 0)."""

    vmcb: int
    time: int
    number: int
    rip: int
    """The guest's at #VMEXIT, the host's at VMRUN."""
    cpu: int
    contents: bytes

    @property
    def at_exit(self) -> bool:
        return self.number != 0


@dataclass(frozen=True, slots=True)
class Change:
    """One field between two images that follow each other."""

    field: str
    old: int
    new: int
    by: By
    time: int
    """Of the later image."""
    number: int
    """Of the #VMEXIT that made it, or that came before the VMRUN; 0 if there was none."""
    rip: int
    """Of the VMRUN, where software did it; of the guest at the #VMEXIT else."""


def _fields(contents: bytes) -> dict[str, int]:
    return {field.name: VMCB.read(contents, field.name) for field in VMCB if field.offset + field.size <= len(contents)}


def _by(name: str, at_exit: bool) -> By:
    if at_exit:
        return By.HARDWARE if name in EXIT_STORES else By.INTRUDER
    return By.VMSAVE if name in _VMSAVE else By.SOFTWARE


def changes(images: Iterable[Image], first: int = 0, last: int | None = None) -> tuple[Change, ...]:
    """What changed in one VMCB, step by step, from its #VMEXIT `first` (0: the oldest image) to its #VMEXIT `last`.

    The images are of one VMCB, oldest first.
    """
    found: list[Change] = []
    before: Image | None = None
    values: dict[str, int] = {}
    exit_number, begun = 0, first == 0
    for image in images:
        if begun and before is not None:
            now = _fields(image.contents)
            number = image.number or exit_number
            found += [
                Change(name, values[name], value, _by(name, image.at_exit), image.time, number, image.rip)
                for name, value in now.items() if values[name] != value
            ]  # fmt: skip
            values = now
        exit_number = image.number or exit_number
        begun = begun or image.number == first
        if begun and (before is None or not values):
            values = _fields(image.contents)
        before = image
        if last is not None and image.number == last:
            break
    return tuple(found)


def net(steps: Iterable[Change]) -> dict[str, tuple[Change, ...]]:
    """By field: the changes that it went through, if it is another in the end than it was at the beginning."""
    by_field: dict[str, list[Change]] = {}
    for step in steps:
        by_field.setdefault(step.field, []).append(step)
    return {name: tuple(found) for name, found in by_field.items() if found[0].old != found[-1].new}


def trips(images: Sequence[Image]) -> Iterator[tuple[Image, Image]]:
    """A #VMEXIT and the VMRUN behind it, of one VMCB: all of those."""
    for before, after in pairwise(images):
        if before.at_exit and not after.at_exit:
            yield before, after


# Clean bits


@dataclass(frozen=True, slots=True)
class Forgotten:
    """A field that was changed while its clean bit says that it was not: the processor may use `cached` instead."""

    field: str
    clean: int
    cached: int
    value: int

    @property
    def name(self) -> str:
        """Of the clean bit."""
        return next(name for name, mask in CLEAN.fields.items() if mask == 1 << self.clean)


def forgotten(cached: Buffer, vmcb: Buffer) -> tuple[Forgotten, ...]:
    """Fields that software changed without clearing the clean bit that covers them (APM2 15.15.1).

    `cached` is the VMCB as the processor saw and left it last, `vmcb` as VMRUN finds it now, with its own VMCB_CLEAN.
    """
    clean, end = VMCB.read(vmcb, "vmcb_clean"), min(len(cached), len(vmcb))
    found = []
    for field in VMCB:
        if field.clean is None or not clean >> field.clean & 1 or field.offset + field.size > end:
            continue
        before, now = VMCB.read(cached, field.name), VMCB.read(vmcb, field.name)
        if before != now:
            found.append(Forgotten(field.name, field.clean, before, now))
    return tuple(found)


def forgotten_in(images: Sequence[Image]) -> tuple[tuple[Image, Forgotten], ...]:
    """The same at each VMRUN of one VMCB that a #VMEXIT of it is known before: with that VMRUN.

    On another processor than it left, clean bits count for nothing (APM2 15.15).
    """
    return tuple(
        (after, one) for before, after in trips(images) if before.cpu == after.cpu
        for one in forgotten(before.contents, after.contents)
    )  # fmt: skip
