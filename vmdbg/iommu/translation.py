"""Device addresses through the tables or what is kept of them, and what follows from a refusal (AMD 48882, 2.2)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from introspect.address import Spa
from introspect.iommu.records import Event, EventCode
from introspect.iommu.structures import DTE, DTE_SIZE, decode_dte
from introspect.iommu.verdicts import DmaAccess, IoFault, IoStep, IoTranslation, StepKind
from introspect.iommu.walk import translate
from introspect.pci import RequesterId
from introspect.sources import Unreadable
from vmdbg.iommu.caches import Page, Recorder
from vmdbg.iommu.staleness import Staleness, reason
from vmdbg.platform.pci.dma import DmaError, Span

if TYPE_CHECKING:
    from vmdbg.iommu.unit import IommuUnit

GRAIN = 0x1000
"""What leads on linearly at least."""
ALL = 1 << 64


class _Walked(NamedTuple):
    """What the tables, or what is kept of them, say of an address."""

    verdict: IoTranslation | IoFault
    page: Page
    recorder: Recorder
    dte: int
    directories: frozenset[int]
    """Strict: where the entries are that led to tables."""


class Translation:
    """Of one IOMMU."""

    def __init__(self, iommu: IommuUnit) -> None:
        self.iommu = iommu
        self.staleness = Staleness(iommu)
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

    def prefetch(self, requester: RequesterId, addresses: Iterable[int]) -> Event | None:
        """Keep what the host's tables say before it is needed; whatever is refused is left, but a table that cannot be read is
        told of (2.4.6.1)."""
        for at in addresses:
            if (self.entry(requester) or 0) & DTE.GIoV:
                return None  # its addresses are a guest's
            verdict = (walked := self._walk(requester, at % ALL, DmaAccess(), True)).verdict
            if isinstance(verdict, IoTranslation):
                self._keep(requester, verdict, None, walked)
            elif verdict.event.code in (EventCode.DEV_TAB_HARDWARE_ERROR, EventCode.PAGE_TAB_HARDWARE_ERROR):
                return verdict.event
        return None

    def _page(self, requester: RequesterId, iova: int, access: DmaAccess, quiet: bool) -> Page:
        caches, view = self.iommu.caches, self.iommu.view
        dte = self.entry(requester)
        if dte is not None and dte & DTE.V and dte & DTE.TV and view.exclusion is None:
            key = caches.key(DTE.get(dte, "DomainID"), self._pasid(dte, access.pasid), requester)
            found = caches.find_page(key, iova)
            if found is not None and self._allows(found.page, dte, access.write):
                page = found.page
                if caches.strict and not quiet:
                    spa = page.spa + iova - page.first
                    self.staleness.translation(requester, iova, access, spa, found.rests_on, found.directories)
                return page
        walked = self._walk(requester, iova, access, quiet)
        verdict = walked.verdict
        if walked.recorder.old and not quiet:
            used = verdict if isinstance(verdict, IoFault) else int(verdict.spa)
            self.staleness.translation(requester, iova, access, used, walked.recorder.seen, walked.directories)
        if isinstance(verdict, IoFault):
            if not quiet:
                self.refused(verdict, requester)
            raise DmaError(requester, iova, access.write, reason(verdict))
        if not quiet:
            self._keep(requester, verdict, access.pasid, walked)
        return walked.page

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

    def _walk(self, requester: RequesterId, iova: int, access: DmaAccess, quiet: bool) -> _Walked:
        iommu, caches = self.iommu, self.iommu.caches
        trace: list[IoStep] | None = [] if caches.strict else None
        recorder, verdict = self._ask(requester, iova, access, quiet, trace, self._kept_directories(requester, access.pasid))
        spa = iommu.view.entry_address(requester)
        if isinstance(verdict, IoFault) and any(at != spa for at in recorder.old):
            # What is missing in a directory that is kept is looked for in the tables, as with pages.
            trace = []
            recorder, verdict = self._ask(requester, iova, access, quiet, trace, ())
        entry = next((data for at, data in recorder.seen if at == spa), b"")
        dte = decode_dte(entry)
        if entry and not quiet:
            caches.keep_device(requester, entry)
            if trace:
                caches.keep_directories(DTE.get(dte, "DomainID"), self._pasid(dte, access.pasid), trace)
        directories = frozenset(int(step.spa) for step in trace or () if not step.leaf and step.kind != StepKind.DTE)
        if isinstance(verdict, IoFault):
            return _Walked(verdict, Page(iova, 0, 0, False, False, False), recorder, dte, directories)
        size = verdict.page_size or GRAIN
        settled = access.write or (not dte & DTE.HAD and verdict.gpa is None)
        first = iova & -size
        page = Page(first, size, verdict.spa - (iova - first), verdict.readable, verdict.writable, settled)
        return _Walked(verdict, page, recorder, dte, directories)

    def _ask(
        self, requester: RequesterId, iova: int, access: DmaAccess, quiet: bool, trace: list[IoStep] | None,
        directories: Sequence[Mapping[int, bytes]],
    ) -> tuple[Recorder, IoTranslation | IoFault]:  # fmt: skip
        iommu = self.iommu
        recorder = Recorder(iommu.memory, iommu.name, self.kept_entry(requester), *directories)
        return recorder, translate(recorder, iommu.view, requester, iova, access, set_ad=not quiet, trace=trace)

    def _kept_directories(self, requester: RequesterId, pasid: int | None) -> Sequence[Mapping[int, bytes]]:
        caches = self.iommu.caches
        dte = self.entry(requester) if caches.directories else None
        return () if dte is None else caches.kept_directories(DTE.get(dte, "DomainID"), self._pasid(dte, pasid))

    def kept_entry(self, device: int) -> dict[int, bytes]:
        """What memory shall answer instead of what is there, as `Recorder` takes it."""
        kept, spa = self.iommu.caches.devices.get(device), self.iommu.view.entry_address(device)
        return {} if kept is None or spa is None else {spa: kept}

    def _keep(self, requester: RequesterId, verdict: IoTranslation, pasid: int | None, walked: _Walked) -> None:
        """Only what tables say is kept; of a nested translation that page which both dimensions share.

        Where accessed and dirty bits were set, entries are no longer as they were read: coherent, the next walk finds them so.
        """
        caches, recorder = self.iommu.caches, walked.recorder
        if verdict.page_size and (caches.strict or not recorder.wrote):
            key = caches.key(verdict.domain, self._pasid(walked.dte, pasid), requester)
            caches.keep_page(key, walked.page, recorder.seen, walked.directories)

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
