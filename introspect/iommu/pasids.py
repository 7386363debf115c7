# SPDX-License-Identifier: GPL-2.0-or-later
"""The PASIDs of a device that have tables of their own: its GCR3 tables as a whole (AMD 48882, 2.2.6.3)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from introspect.iommu.checks import dma_problem
from introspect.iommu.registers import CONTROL, FEATURES, FEATURES2
from introspect.iommu.state import Iommu
from introspect.iommu.structures import DTE, GCR3, GCR3_RESERVED, gcr3_root
from introspect.iommu.walk import host_translate
from introspect.sources import Memory, Unreadable

__all__ = ["Process", "processes"]

_PAGE = 0x1000
_MOST_TABLES = 1024


class Process(NamedTuple):
    """A PASID. `spa`: where its GCR3 entry is; `root`: guest-physical address of its topmost table."""

    pasid: int
    spa: int
    root: int


def processes(memory: Memory, iommu: Iommu, dte: int, most: int) -> tuple[list[Process], bool]:
    """Those with V, ascending, and whether there are no more: `most` of them, and 1,024 tables, are looked at."""
    if not dte & DTE.V or not dte & DTE.TV or not dte & DTE.GV or not iommu.enabled or not iommu.control & CONTROL.GTEn:
        return [], True
    if dma_problem(dte, iommu.features) is not None:
        return [], True
    scan = _Scan(memory, iommu, dte)
    found: list[Process] = []
    for one in scan.below(DTE.get(dte, "GLX") + 1, gcr3_root(dte), 0, scan.nested):
        if len(found) == most:
            return found, False
        found.append(one)
    return found, scan.left > 0


class _Scan:
    def __init__(self, memory: Memory, iommu: Iommu, dte: int) -> None:
        self.memory, self.iommu, self.dte = memory, iommu, dte
        self.nested = bool(iommu.features2 & FEATURES2.GCR3TRPModeSup and iommu.control & CONTROL.GCR3TRPMode)
        self.end = 1 << FEATURES.get(iommu.features, "PASMax") + 1
        self.left = _MOST_TABLES

    def below(self, level: int, table: int, first: int, nested: bool) -> Iterator[Process]:
        """`table`: guest-physical, if `nested`; PASIDs from `first` on are below it."""
        spa = host_translate(self.memory, self.iommu, self.dte, table) if nested else table
        if spa is None or self.left <= 0:
            return
        self.left -= 1
        try:
            entries = np.frombuffer(self.memory.read(spa, _PAGE), "<u8")
        except Unreadable:
            return
        for index in np.flatnonzero(entries & np.uint64(GCR3.V)).tolist():
            pasid, entry = first + (index << 9 * (level - 1)), int(entries[index])
            if pasid >= self.end or entry & GCR3_RESERVED:
                continue
            if level == 1:
                yield Process(pasid, spa + 8 * index, entry & GCR3.Address)
            else:
                yield from self.below(level - 1, entry & GCR3.Address, pasid, True)
