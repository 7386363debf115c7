"""Device addresses through the tables or what is kept of them, and what follows from a refusal (AMD 48882, 2.2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from introspect.address import Spa
from introspect.iommu.structures import DTE, DTE_SIZE, decode_dte
from introspect.iommu.verdicts import DmaAccess, IoFault, IoTranslation
from introspect.iommu.walk import translate
from introspect.pci import RequesterId
from introspect.sources import Unreadable
from vmdbg.iommu.caches import Page, Recorder
from vmdbg.platform.pci.dma import DmaError, Span

if TYPE_CHECKING:
    from vmdbg.iommu.unit import IommuUnit

GRAIN = 0x1000
"""What leads on linearly at least."""
ALL = 1 << 64


def reason(fault: IoFault) -> str:
    """For people: the event, and why."""
    detail = f" ({fault.detail})" if fault.detail else ""
    kept = f", not logged because of {fault.suppressed}" if fault.suppressed else ""
    return f"{fault.event.code.name}: {fault.cause.value}{detail}{kept}"


class Translation:
    """Of one IOMMU."""

    def __init__(self, iommu: IommuUnit) -> None:
        self.iommu = iommu
        self.reset()

    def reset(self) -> None:
        self._faulted: set[int] = set()
        """Devices with SE in their entries whose first fault has been logged."""

    def registers_changed(self) -> None:
        """Coherent caches do not show."""
        if not self.iommu.caches.strict:
            self.iommu.caches.forget_all()

    def device_forgotten(self, device: int | None) -> None:
        """Its entry is read anew, and with it what SE means; None for all."""
        if device is None:
            self._faulted.clear()
        else:
            self._faulted.discard(device)

    def entry(self, device: int) -> int | None:
        """A device's entry, kept or from the table; None where it cannot be read."""
        kept = self.iommu.caches.devices.get(device)
        if kept is not None:
            return decode_dte(kept)
        spa = self.iommu.view.entry_address(device)
        try:
            return None if spa is None else decode_dte(self.iommu.memory.read(spa, DTE_SIZE))
        except Unreadable:
            return None

    def translate(
        self, requester: RequesterId, address: int, length: int, write: bool, quiet: bool, pasid: int | None
    ) -> Sequence[Span]:
        """Raises `DmaError`."""
        if not self.iommu.view.enabled:
            return [Span(Spa(address), length)]
        spans: list[Span] = []
        access, at, end = DmaAccess(write, pasid), address, address + length
        while at < end or not spans:
            page = self._page(requester, at, access, quiet)
            count = min(end, page.first + page.size) - at
            spa = page.spa + at - page.first
            if spans and spans[-1].spa + spans[-1].length == spa:
                spans[-1] = Span(spans[-1].spa, spans[-1].length + count)
            else:
                spans.append(Span(Spa(spa), count))
            at += count
            if not length:
                break
        return spans

    def prefetch(self, requester: RequesterId, address: int, pages: int, pasid: int | None) -> None:
        """Keep translations before they are needed; whatever is refused is left."""
        if not self.iommu.view.enabled:
            return
        for at in range(address, address + pages * GRAIN, GRAIN):
            verdict, page, recorder, dte = self._walk(requester, at % ALL, DmaAccess(False, pasid), True)
            if isinstance(verdict, IoTranslation):
                self._keep(requester, verdict, page, pasid, recorder, dte)

    def _page(self, requester: RequesterId, iova: int, access: DmaAccess, quiet: bool) -> Page:
        caches, view = self.iommu.caches, self.iommu.view
        dte = self.entry(requester)
        if dte is not None and dte & DTE.V and dte & DTE.TV and view.exclusion is None:
            key = caches.key(DTE.get(dte, "DomainID"), self._pasid(dte, access.pasid), requester)
            found = caches.find_page(key, iova)
            if found is not None and self._allows(found, dte, access.write):
                if caches.strict and not quiet:
                    self._look_whether_stale(requester, iova, access, found)
                return found
        verdict, page, recorder, dte = self._walk(requester, iova, access, quiet)
        if isinstance(verdict, IoFault):
            if not quiet:
                self.refused(verdict, requester)
            raise DmaError(requester, iova, access.write, reason(verdict))
        if not quiet:
            self._keep(requester, verdict, page, access.pasid, recorder, dte)
        return page

    def _look_whether_stale(self, requester: RequesterId, iova: int, access: DmaAccess, page: Page) -> None:
        """Whether tables would lead elsewhere by now: then an invalidation was forgotten."""
        fresh = translate(self.iommu.memory, self.iommu.view, requester, iova, access, set_ad=False)
        if isinstance(fresh, IoTranslation) and fresh.spa == page.spa + iova - page.first:
            return
        now = f"they refuse it: {reason(fresh)}" if isinstance(fresh, IoFault) else f"they lead to {fresh.spa:#x}"
        text = (
            f"{self.iommu.name} uses a translation that its tables no longer have: {requester} at {iova:#x} reaches "
            f"{page.spa + iova - page.first:#x}, {now}; an INVALIDATE command was forgotten"
        )
        for listener in self.iommu.stale_listeners:
            listener(text)

    @staticmethod
    def _pasid(dte: int, pasid: int | None) -> int | None:
        """Without one, GIoV makes it 0."""
        return 0 if pasid is None and dte & DTE.GV and dte & DTE.GIoV else pasid

    @staticmethod
    def _allows(page: Page, dte: int, write: bool) -> bool:
        """A right that is missing in what is kept is looked for in the tables."""
        if write:
            return page.write and page.settled and bool(dte & DTE.IW)
        return page.read and bool(dte & DTE.IR)

    def _walk(
        self, requester: RequesterId, iova: int, access: DmaAccess, quiet: bool
    ) -> tuple[IoTranslation | IoFault, Page, Recorder, int]:
        """The verdict, the page around the address, what was read for it, and the device's entry."""
        iommu = self.iommu
        recorder = Recorder(iommu.memory, iommu.name, self.kept_entry(requester))
        verdict = translate(recorder, iommu.view, requester, iova, access, set_ad=not quiet)
        spa = iommu.view.entry_address(requester)
        entry = next((data for at, data in recorder.seen if at == spa), b"")
        if entry and not quiet:
            iommu.caches.keep_device(requester, entry)
        dte = decode_dte(entry)
        if isinstance(verdict, IoFault):
            return verdict, Page(iova, 0, 0, False, False, False), recorder, dte
        size = verdict.page_size or GRAIN
        settled = access.write or (not dte & DTE.HAD and verdict.gpa is None)
        first = iova & -size
        page = Page(first, size, verdict.spa - (iova - first), verdict.readable, verdict.writable, settled)
        return verdict, page, recorder, dte

    def kept_entry(self, device: int) -> dict[int, bytes]:
        """What memory shall answer instead of what is there, as `Recorder` takes it."""
        kept, spa = self.iommu.caches.devices.get(device), self.iommu.view.entry_address(device)
        return {} if kept is None or spa is None else {spa: kept}

    def _keep(
        self, requester: RequesterId, verdict: IoTranslation, page: Page, pasid: int | None, recorder: Recorder, dte: int
    ) -> None:
        """Only what tables say is kept; of a nested translation that page which both dimensions share.

        Where accessed and dirty bits were set, entries are no longer as they were read: coherent, the next walk finds them so.
        """
        caches = self.iommu.caches
        if verdict.page_size and (caches.strict or not recorder.wrote):
            caches.keep_page(caches.key(verdict.domain, self._pasid(dte, pasid), requester), page, recorder.seen)

    def refused(self, fault: IoFault, requester: RequesterId) -> None:
        """Log it, unless the tables say not to."""
        iommu, log = self.iommu, not fault.suppressed
        if fault.suppressed == "SE" and requester not in self._faulted:
            self._faulted.add(requester)
            log = True
        if log:
            iommu.log(fault.event)
        for listener in iommu.fault_listeners:
            listener(fault, requester)
