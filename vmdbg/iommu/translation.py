"""Device addresses through the tables or what is kept of them, and what follows from a refusal (AMD 48882, 2.2)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from introspect.address import Spa
from introspect.iommu.records import Event, EventCode
from introspect.iommu.registers import CONTROL
from introspect.iommu.structures import DTE, DTE_SIZE, PTE, decode_dte
from introspect.iommu.verdicts import DmaAccess, IoFault, IoStep, IoTranslation, StepKind
from introspect.iommu.walk import is_special, judged_alike, translate, withheld
from introspect.pci import RequesterId
from introspect.sources import Unreadable
from vmdbg.iommu.caches import Page, Recorder
from vmdbg.iommu.staleness import Staleness, reason
from vmdbg.platform.pci.dma import Answer, DmaError, Span

if TYPE_CHECKING:
    from vmdbg.iommu.unit import IommuUnit

GRAIN = 0x1000
"""What leads on linearly at least."""
ALL = 1 << 64


class RefusedError(DmaError):
    """By the tables."""

    def __init__(self, requester: RequesterId, address: int, write: bool, fault: IoFault) -> None:
        super().__init__(requester, address, write, reason(fault))
        self.fault = fault


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
        self, requester: RequesterId, address: int, length: int, access: DmaAccess, quiet: bool
    ) -> Sequence[Span]:
        """Raises `DmaError`."""
        if not self.iommu.view.enabled:
            return [Span(Spa(address), length)]
        spans: list[Span] = []
        at, end = address, address + length
        while at < end or not spans:
            page = self._page(requester, at, access, quiet)
            count = min(end, page.first + page.size, judged_alike(self.iommu.view, at)) - at
            spa = page.spa + at - page.first
            if spans and spans[-1].spa + spans[-1].length == spa:
                spans[-1] = Span(spans[-1].spa, spans[-1].length + count)
            else:
                spans.append(Span(Spa(spa), count))
            at += count
            if not length:
                break
        return spans

    def answer(self, requester: RequesterId, iova: int, access: DmaAccess, quiet: bool) -> Answer:
        """Of a translation request: with the rights that the tables give, of which W only where a write is asked for (table 32).
        `DmaError` where it is aborted, as it always is while the IOMMU is off (2.1.3.1)."""
        if not self.iommu.view.enabled:
            raise DmaError(requester, iova, access.write, "the IOMMU is off, and translates for nobody")
        for write in (True, False) if access.write else (False,):
            try:
                page = self._page(requester, iova, access._replace(write=write), quiet)
            except RefusedError as error:
                if error.fault.suppressed != "ATS":
                    raise
                continue
            dte = self.entry(requester) or 0
            size = page.size
            if judged_alike(self.iommu.view, page.first) < page.first + size or is_special(page.first):
                size = GRAIN  # what is special of the page has rules of its own
            first = iova & -size
            may_read, may_write = page.read and bool(dte & DTE.IR), write and page.write and bool(dte & DTE.IW)
            spa = page.spa + first - page.first
            return Answer(first, size, spa, may_read, may_write, access.execute, page.untranslated)
        return Answer(iova & -GRAIN, GRAIN, 0, False, False)

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
        if dte is not None and self._may_be_kept(dte, access) and view.exclusion is None and not is_special(iova):
            key = caches.key(DTE.get(dte, "DomainID"), self._pasid(dte, access.pasid), requester)
            found = caches.find_page(key, iova)
            final = caches.strict and key.pasid is None and found is not None and not self._grants(found.page, access.write)
            if found is not None and (final or self._allows(found.page, dte, access.write)):
                page = found.page
                refusal = withheld(self.iommu.memory, view, requester, iova, access, dte) if final else None
                if caches.strict and not quiet:
                    used = refusal or page.spa + iova - page.first
                    self.staleness.translation(requester, iova, access, used, found.rests_on, found.directories)
                if refusal is not None:
                    self._raise(refusal, requester, iova, access, quiet)
                return page
        walked = self._walk(requester, iova, access, quiet)
        verdict = walked.verdict
        if walked.recorder.old and not quiet:
            used = verdict if isinstance(verdict, IoFault) else int(verdict.spa)
            self.staleness.translation(requester, iova, access, used, walked.recorder.seen, walked.directories)
        if isinstance(verdict, IoFault):
            self._raise(verdict, requester, iova, access, quiet)
        if not quiet and self._may_be_kept(walked.dte, access):
            self._keep(requester, verdict, access.pasid, walked)
        return walked.page

    @staticmethod
    def _may_be_kept(dte: int, access: DmaAccess) -> bool:
        """What a page grants to supervisors, to be executed, or to reads of no bytes is looked up each time; so is what no table
        translates."""
        if access.execute or access.privileged or access.pretranslated or access.empty:
            return False
        if access.translation and not dte & DTE.I:
            return False
        return bool(dte & DTE.V and dte & DTE.TV)

    def _raise(self, fault: IoFault, requester: RequesterId, iova: int, access: DmaAccess, quiet: bool) -> NoReturn:
        if not quiet and fault.suppressed != "ATS":
            self.refused(fault, requester)
        raise RefusedError(requester, iova, access.write, fault)

    def _pasid(self, dte: int, pasid: int | None) -> int | None:
        """Without one, GIoV makes it 0 where guests' tables are used (2.2.9)."""
        guest = dte & DTE.GV and dte & DTE.GIoV and self.iommu.view.control & CONTROL.GTEn
        return 0 if pasid is None and guest else pasid

    @staticmethod
    def _grants(page: Page, write: bool) -> bool:
        """Whether the tables do. If what is kept of host tables does not, they are not walked again (1.3.2); a guest's are."""
        return page.write if write else page.read

    def _allows(self, page: Page, dte: int, write: bool) -> bool:
        right = DTE.IW if write else DTE.IR
        return self._grants(page, write) and (page.settled or not write) and bool(dte & right)

    def _walk(self, requester: RequesterId, iova: int, access: DmaAccess, quiet: bool) -> _Walked:
        iommu, caches = self.iommu, self.iommu.caches
        trace: list[IoStep] | None = [] if caches.strict else None
        recorder, verdict = self._ask(requester, iova, access, quiet, trace, self._kept_directories(requester, access.pasid))
        spa = iommu.view.entry_address(requester)
        dte = self.entry(requester)
        guest = dte is not None and self._pasid(dte, access.pasid) is not None
        if isinstance(verdict, IoFault) and guest and any(at != spa for at in recorder.old):
            # What is missing in a directory that is kept is looked for in the tables, as with a guest's pages (2.2.7.3).
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
        first, rights = iova & -size, PTE.IR | PTE.IW
        for step in trace or ():  # without those of the device's entry, which others of the domain need not have
            if step.kind == StepKind.HOST:
                rights &= step.value
        host = trace is not None and verdict.gpa is None
        read, write = (bool(rights & PTE.IR), bool(rights & PTE.IW)) if host else (verdict.readable, verdict.writable)
        page = Page(first, size, verdict.spa - (iova - first), read, write, settled, verdict.untranslated_only)
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
