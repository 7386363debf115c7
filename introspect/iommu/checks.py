"""What a device table entry must not say: reserved bits and encodings, by the features of the IOMMU (AMD 48882, 2.2.2)."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

from introspect.iommu.registers import FEATURES
from introspect.iommu.structures import DTE
from introspect.layout import bit, bits

__all__ = ["MOST_INTERRUPTS", "Problem", "dma_problem", "dte_problems", "interrupt_problem", "too_many_guest_levels"]

MOST_INTERRUPTS = 11
"""The largest IntTabLen: 2048 entries."""
_GUEST = DTE.GV | DTE.GLX | DTE.GCR3Root_14_12 | DTE.GCR3Root_30_15 | DTE.GCR3Root_51_31
_DMA_GATES = (
    (FEATURES.HASup, DTE.HAD), (FEATURES.EPHSup, DTE.PPR | DTE.GPRP), (FEATURES.GIoSup, DTE.GIoV), (FEATURES.GTSup, _GUEST),
    (FEATURES.SATSSup, DTE.SATS),
)  # fmt: skip
_INTERRUPT_GATES = (
    (FEATURES.GTSup, DTE.GuestPagingMode), (FEATURES.SATSSup, DTE.HPTMode),
    (FEATURES.vIommuSup, DTE.vImuEn | DTE.GDeviceID | DTE.GuestID),
    (FEATURES.AttrFWSup, DTE.AttrV | DTE.Mode0FC | DTE.SnoopAttribute),
)  # fmt: skip
"""Fields that are reserved unless the IOMMU has a feature (table 7)."""


class Problem(NamedTuple):
    """Why an entry is refused. `reserved`: a reserved bit is set (RZ in the event); else a value is reserved or not supported."""

    field: str
    rule: str
    reserved: bool

    def __str__(self) -> str:
        return f"{self.field}: {self.rule}"


@cache
def _dma_reserved(features: int) -> int:
    missing = (fields for needed, fields in _DMA_GATES if not features & needed)
    return bits(127, 0) & ~DTE.defined | sum(missing)


@cache
def _interrupt_reserved(features: int) -> int:
    missing = (fields for needed, fields in _INTERRUPT_GATES if not features & needed)
    unchecked = bit(245) if features & FEATURES.SNPSup else 0
    return bits(255, 128) & ~DTE.defined & ~unchecked | sum(missing)


def _stray(dte: int, reserved: int, half: str) -> Problem | None:
    stray = dte & reserved
    if not stray:
        return None
    names = [name for name, mask in DTE.fields.items() if stray & mask]
    positions = ", ".join(names) or ", ".join(str(n) for n in range(256) if stray >> n & 1)
    return Problem(f"bits {positions}", f"reserved in this IOMMU, and checked {half}", True)


def dma_problem(dte: int, features: int) -> Problem | None:
    """The first reason to refuse the entry of a device for DMA, if V is set; bits 127:0 count then.

    Without TV nothing of the tables counts (2.2.2.1, table 8). Mode and GuestPagingMode are no reasons: what they ask for
    beyond the IOMMU faults when an address is translated (table 44).
    """
    reserved = _dma_reserved(features) | (0 if dte & DTE.I else DTE.SATS)
    if dte & reserved:
        return _stray(dte, reserved, "with V")
    if dte & DTE.IoCtl == DTE.IoCtl:
        return Problem("IoCtl", "3 is reserved", False)
    if not dte & DTE.TV:
        return None
    had = DTE.get(dte, "HAD")
    if had == 2 or (had == 3 and not features & FEATURES.HDSup):
        return Problem("HAD", "2 is reserved" if had == 2 else "3 is reserved without HDSup of the IOMMU", False)
    if dte & DTE.GV:
        levels = DTE.get(dte, "GLX")
        if levels > min(FEATURES.get(features, "GLXSup"), 2):
            return Problem("GLX", f"{levels} is more than GLXSup of the IOMMU", False)
    return None


def too_many_guest_levels(dte: int, features: int) -> bool:
    """Whether GuestPagingMode, which is 0 or 1, asks for more than GATS has."""
    return DTE.get(dte, "GuestPagingMode") > min(FEATURES.get(features, "GATS"), 1)


def interrupt_problem(dte: int, features: int) -> Problem | None:
    """Likewise for interrupts, if IV is set; bits 255:128 count."""
    if dte & _interrupt_reserved(features):
        return _stray(dte, _interrupt_reserved(features), "with IV")
    control = DTE.get(dte, "IntCtl")
    if control == 3:
        return Problem("IntCtl", "3 is reserved", False)
    if control == 2 and DTE.get(dte, "IntTabLen") > MOST_INTERRUPTS:
        return Problem("IntTabLen", f"more than {MOST_INTERRUPTS} is reserved", False)
    return None


def dte_problems(dte: int, features: int) -> list[Problem]:
    """What is wrong with an entry, for each half that counts; tables of too many levels among it, which fault at DMA."""
    found = []
    if dte & DTE.V:
        found.append(dma_problem(dte, features))
        mode, hats = DTE.get(dte, "Mode"), FEATURES.get(features, "HATS")
        if dte & DTE.TV and mode > (0 if hats == 3 else 4 + hats):
            found.append(Problem("Mode", f"{mode} levels are more than the IOMMU walks", False))
        if dte & DTE.TV and dte & DTE.GV and too_many_guest_levels(dte, features):
            found.append(Problem("GuestPagingMode", "more levels than GATS of the IOMMU", False))
    if dte & DTE.IV:
        found.append(interrupt_problem(dte, features))
    return [one for one in found if one is not None]
