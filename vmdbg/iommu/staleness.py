# SPDX-License-Identifier: GPL-2.0-or-later
"""Strict caches: whether what was used is still in the tables, and else which INVALIDATE command was forgotten."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from introspect.iommu.remapping import Remapped, remap
from introspect.iommu.structures import DTE_SIZE
from introspect.iommu.verdicts import Cause, DmaAccess, IoFault, IoTranslation
from introspect.iommu.walk import translate
from introspect.paging import ENTRY
from introspect.pci import RequesterId
from introspect.sources import Unreadable

if TYPE_CHECKING:
    from vmdbg.iommu.unit import IommuUnit

_MARKS = ENTRY.A | ENTRY.D
"""What hardware itself changes in entries: in the same place in the host's tables and in a guest's."""
_TRANSLATION, _INTERRUPTS = slice(0, 16), slice(16, DTE_SIZE)
"""The parts of a device table entry."""


def reason(fault: IoFault) -> str:
    """For people: the event, and why."""
    detail = f" ({fault.detail})" if fault.detail else ""
    kept = f", not logged because of {fault.suppressed}" if fault.suppressed else ""
    return f"{fault.event.code.name}: {fault.cause.value}{detail}{kept}"


class Staleness:
    """Of one IOMMU. What follows from the tables as they are is compared with what was done: only if that differs it is told."""

    def __init__(self, iommu: IommuUnit) -> None:
        self.iommu = iommu

    def translation(
        self, requester: RequesterId, iova: int, access: DmaAccess, used: int | IoFault,
        rests_on: Iterable[tuple[int, bytes]], directories: Iterable[int],
    ) -> None:  # fmt: skip
        """`used`: where the address was found to lead; `directories`: which of the words that this rests on lead to tables."""
        fresh = translate(self.iommu.memory, self.iommu.view, requester, iova, access, set_ad=False)
        now = int(fresh.spa) if isinstance(fresh, IoTranslation) else fresh
        if now == used or (isinstance(now, IoFault) and isinstance(used, IoFault)):
            return
        what, command = "a translation", "INVALIDATE_IOMMU_PAGES"
        changed = [spa for spa, data in rests_on if spa in set(directories) and self._changed(spa, data)]
        if self._entry_changed(requester, _TRANSLATION):
            what, command = "a device table entry", "INVALIDATE_DEVTAB_ENTRY"
        elif changed:
            what, command = f"the page directory entry at {changed[0]:#x}", "INVALIDATE_IOMMU_PAGES with PDE"
        done = f"is refused ({reason(used)})" if isinstance(used, IoFault) else f"reaches {used:#x}"
        then = f"they refuse it: {reason(now)}" if isinstance(now, IoFault) else f"they lead to {now:#x}"
        self._tell(what, f"{requester} at {iova:#x} {done}", then, command)

    def interrupt(self, requester: RequesterId, address: int, data: int, used: Remapped | IoFault) -> None:
        fresh = remap(self.iommu.memory, self.iommu.view, requester, address, data)
        now, before = _becomes(fresh), _becomes(used)
        if now == before:
            return
        what, command = "an interrupt table entry", "INVALIDATE_INTERRUPT_TABLE"
        if self._entry_changed(requester, _INTERRUPTS):
            what, command = "a device table entry", "INVALIDATE_DEVTAB_ENTRY"
        self._tell(what, f"the message {data:#x} of {requester} {before}", f"by them it {now}", command)

    def device(self, requester: RequesterId, iova: int, used: int, access: DmaAccess) -> None:
        """A device's own cache, which is there whatever those of the IOMMU are; `access` is its translation request."""
        if not self.iommu.view.enabled:
            return
        fresh = translate(self.iommu.memory, self.iommu.view, requester, iova, access, set_ad=False)
        now = int(fresh.spa) if isinstance(fresh, IoTranslation) else fresh
        if now != used:
            then = f"they refuse it: {now.cause.value}" if isinstance(now, IoFault) else f"they lead to {now:#x}"
            who, done = self.iommu.dma.names(requester), f"at {iova:#x} it reaches {used:#x}"
            text = f"{who} uses a translation of its own that its tables no longer have: {done}, {then}"
            off = isinstance(now, IoFault) and now.cause == Cause.NO_TRANSLATION_SERVICE
            self._say(f"{text}; {'ATS was left on in the device' if off else 'INVALIDATE_IOTLB_PAGES was forgotten'}")

    def _tell(self, what: str, done: str, then: str, command: str) -> None:
        self._say(f"{self.iommu.name} uses {what} that its tables no longer have: {done}, {then}; {command} was forgotten")

    def _say(self, text: str) -> None:
        for listener in self.iommu.stale_listeners:
            listener(text)

    def _changed(self, spa: int, data: bytes) -> bool:
        try:
            now = self.iommu.memory.read(spa, len(data))
        except Unreadable:
            return True
        return bool((int.from_bytes(now, "little") ^ int.from_bytes(data, "little")) & ~_MARKS)

    def _entry_changed(self, requester: RequesterId, part: slice) -> bool:
        kept, spa = self.iommu.caches.devices.get(requester), self.iommu.view.entry_address(requester)
        if kept is None or spa is None:
            return False
        try:
            return self.iommu.memory.read(spa, DTE_SIZE)[part] != kept[part]
        except Unreadable:
            return True


def _becomes(verdict: Remapped | IoFault) -> str:
    if isinstance(verdict, IoFault):
        return "is refused"
    if verdict.guest is not None:
        to = verdict.guest
        where = f", on APIC {to.destination:#x}" if to.running else ", with a record in the log" if to.log else ""
        return f"becomes vector {verdict.vector:#x} of the guest with the backing page {to.vapic:#x}{where}"
    destination = f"{'logical ' if verdict.logical else ''}APIC {verdict.destination:#x}"
    return f"becomes vector {verdict.vector:#x} ({verdict.mode_name}) of {destination}"
