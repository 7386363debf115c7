# SPDX-License-Identifier: GPL-2.0-or-later
"""Address translation services of PCI Express (Base 5.0, chapter 10): a function that asks for translations and keeps them (ATS),
that asks for pages (PRI), and whose requests have PASIDs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from introspect.address import Iova
from introspect.layout import Field, Structure
from introspect.pci import (
    ATS_CAPABILITY,
    ATS_CONTROL,
    PASID_CAPABILITY,
    PASID_CONTROL,
    PRI_CONTROL,
    PRI_STATUS,
    ExtendedId,
    PageResponse,
    RequesterId,
)
from vmdbg.platform.pci.capability import ExtendedCapability
from vmdbg.platform.pci.config import Rule
from vmdbg.platform.pci.dma import PLAIN, Answer, Attributes, DmaError, PageRequest, Translator

if TYPE_CHECKING:
    from vmdbg.platform.pci.function import Function

ATS = Structure("ATS capability", 8, (Field("capability", 4, 2, ATS_CAPABILITY), Field("control", 6, 2, ATS_CONTROL)))
PRI = Structure(
    "page request capability", 16,
    (Field("control", 4, 2, PRI_CONTROL), Field("status", 6, 2, PRI_STATUS), Field("capacity", 8, 4), Field("allocation", 12, 4)),
)  # fmt: skip
PASID = Structure(
    "PASID capability", 8, (Field("capability", 4, 2, PASID_CAPABILITY), Field("control", 6, 2, PASID_CONTROL))
)
MOST_KEPT = 256
"""Translations: when there are more, all make room."""
MOST_REQUESTS = 32
"""Page requests that may wait at once."""
GROUPS = 1 << 9
"""Page request groups."""
PAGE = 0x1000


class NotMappedError(DmaError):
    """The answer to a translation request has not the right that is needed: nothing is sent, and nothing is aborted.

    `pages` are all that the transaction lacks.
    """

    def __init__(self, requester: RequesterId, write: bool, pages: tuple[int, ...]) -> None:
        super().__init__(requester, pages[0], write, "its translation request was answered without the right that it needs")
        self.pages = pages


class Piece(NamedTuple):
    """A part of a transaction, as it is sent; `iova`: of what a translated address is the translation."""

    address: int
    length: int
    attributes: Attributes
    iova: int | None


class Ats(ExtendedCapability):
    """Translations are kept until they are invalidated, or ATS is turned off, whatever the tables say meanwhile."""

    id, size = ExtendedId.ATS, ATS.size

    def attach(self, function: Function, offset: int) -> None:
        super().attach(function, offset)
        capability, control = Rule(ATS_CAPABILITY.PAGE_ALIGNED), Rule(0, ATS_CONTROL.ENABLE | ATS_CONTROL.STU)
        function.config.define(ATS, {"capability": capability, "control": control}, offset)
        self.reset()

    def reset(self) -> None:
        self.kept: dict[tuple[int | None, bool], dict[int, dict[int, Answer]]] = {}
        """By PASID and privilege, size and first address."""
        self.requests = self.hits = 0

    def written(self) -> None:
        if not self.enabled:
            self.kept.clear()

    @property
    def enabled(self) -> bool:
        return bool(self.get(ATS, "control") & ATS_CONTROL.ENABLE)

    def pieces(self, address: int, length: int, write: bool, attributes: Attributes) -> list[Piece]:
        """How a transaction is sent, all of which is translated before any is.  Raises `NotMappedError`, and `DmaError` where the
        translation request is aborted."""
        found: list[Piece] = []
        lacking: list[int] = []
        at, end = address, address + length
        while at < end:
            answer = self._find(at, write, attributes)
            count = min(end, answer.first + answer.size) - at
            if not (answer.write if write else answer.read):
                lacking.append(at & -PAGE)
            elif answer.untranslated:
                found.append(Piece(at, count, attributes, None))
            else:
                found.append(Piece(answer.spa + at - answer.first, count, Attributes(translated=True), at))
            at += count
        if lacking:
            raise NotMappedError(self.function.requester, write, tuple(lacking))
        return found

    def _find(self, address: int, write: bool, attributes: Attributes) -> Answer:
        translator, requester = self.function.attached.root.dma.translator, self.function.requester
        if translator is None:
            raise DmaError(requester, address, write, "no IOMMU is there to translate for it")
        kept = self.kept.setdefault((attributes.pasid, attributes.privileged), {})
        for size, held in kept.items():
            answer = held.get(address & -size)
            if answer is None:
                continue
            if (answer.write if write else answer.read) and answer.execute >= attributes.execute:
                self.hits += 1
                translator.used(requester, address, answer.spa + address - answer.first, write, attributes)
                return answer
            del held[address & -size]  # what is too little is asked for anew (AMD 48882, 2.1.4.8)
            break
        return self._ask(translator, kept, address, write, attributes)

    def _ask(
        self, translator: Translator, kept: dict[int, dict[int, Answer]], address: int, write: bool, attributes: Attributes
    ) -> Answer:
        self.requests += 1
        answer = translator.answer(self.function.requester, Iova(address), write, attributes=attributes)
        if (answer.read or answer.write) and not answer.untranslated:
            if sum(len(held) for sizes in self.kept.values() for held in sizes.values()) >= MOST_KEPT:
                for sizes in self.kept.values():
                    sizes.clear()
            kept.setdefault(answer.size, {})[answer.first] = answer
        return answer

    def forget(self, first: int, end: int, pasid: int | None) -> None:
        """Without a PASID also all that has one: it may rest on any page (AMD 48882, 2.4.4)."""
        for (of, _), sizes in self.kept.items():
            if pasid is None and of is not None:
                sizes.clear()
            elif of == pasid:
                for size, held in sizes.items():
                    for at in [at for at in held if at < end and first < at + size]:
                        del held[at]


class PageRequests(ExtendedCapability):
    """PRI.  What is asked for at once is a group, which has one answer."""

    id, size = ExtendedId.PRI, PRI.size

    def attach(self, function: Function, offset: int) -> None:
        super().attach(function, offset)
        function.config.define(
            PRI,
            {
                "control": Rule(0, PRI_CONTROL.ENABLE | PRI_CONTROL.RESET),
                "status": Rule(PRI_STATUS.STOPPED, 0, PRI_STATUS.FAILURE | PRI_STATUS.UNEXPECTED),
                "capacity": Rule(MOST_REQUESTS), "allocation": Rule(0, 0xFFFFFFFF),
            },
            offset,
        )  # fmt: skip
        self.reset()

    def reset(self) -> None:
        self.waiting: dict[int, tuple[PageRequest, ...]] = {}
        """By group, those that are not answered."""
        self._next = 0
        self._enabled = False

    @property
    def enabled(self) -> bool:
        return bool(self.get(PRI, "control") & PRI_CONTROL.ENABLE)

    def written(self) -> None:
        """The reset bit reads as 0; while requests are off, nothing that waits for an answer does so behind it."""
        control = self.get(PRI, "control")
        if control & PRI_CONTROL.RESET:
            self.put(PRI, "control", control & ~PRI_CONTROL.RESET)
            waiting, self.waiting = ({}, self.waiting) if self.enabled else (self.waiting, {})
            for tag in waiting:
                self.function.page_response(tag, PageResponse.FAILURE)
        if self.enabled and not self._enabled:
            self.put(PRI, "status", 0)
        self._enabled = self.enabled
        self._update()

    def _update(self) -> None:
        status = self.get(PRI, "status") & ~PRI_STATUS.STOPPED
        self.put(PRI, "status", status | (0 if self.enabled or self.waiting else PRI_STATUS.STOPPED))

    def ask(self, pages: Sequence[int], read: bool, write: bool, attributes: Attributes = PLAIN) -> int | None:
        """For as many of these pages as software allows to wait at once.  The group; None if there can be none now."""
        translator = self.function.attached.root.dma.translator
        room = min(self.get(PRI, "allocation"), MOST_REQUESTS) - sum(map(len, self.waiting.values()))
        may = self.enabled and not self.get(PRI, "status") & PRI_STATUS.FAILURE
        if translator is None or not may or room <= 0:
            return None
        tag, pages = self._next, pages[:room]
        self._next = (tag + 1) % GROUPS
        group = self.waiting[tag] = tuple(
            PageRequest(page & -PAGE, tag, number == len(pages), read, write, attributes) for number, page in enumerate(pages, 1)
        )
        for request in group:
            translator.ask(self.function.requester, request)
        return tag

    def answered(self, tag: int, response: int) -> None:
        """All but success and invalid are failures, behind which no more is asked for until software has seen to it."""
        if self.waiting.pop(tag, None) is None:
            self.put(PRI, "status", self.get(PRI, "status") | PRI_STATUS.UNEXPECTED)
            return
        if response not in (PageResponse.SUCCESS, PageResponse.INVALID):
            response = PageResponse.FAILURE
            self.put(PRI, "status", self.get(PRI, "status") | PRI_STATUS.FAILURE)
        self._update()
        self.function.page_response(tag, response)


class Pasid(ExtendedCapability):
    """PASIDs of 20 bits, with requests of supervisors and for execution."""

    id, size = ExtendedId.PASID, PASID.size

    def attach(self, function: Function, offset: int) -> None:
        super().attach(function, offset)
        capability = PASID_CAPABILITY.make(EXECUTE=1, PRIVILEGED=1, WIDTH=20)
        function.config.define(PASID, {"capability": Rule(capability), "control": Rule(0, PASID_CONTROL.defined)}, offset)

    def allowed(self, attributes: Attributes) -> Attributes:
        """What of it may be sent."""
        control = self.get(PASID, "control")
        if not control & PASID_CONTROL.ENABLE:
            return PLAIN
        return attributes._replace(
            privileged=attributes.privileged and bool(control & PASID_CONTROL.PRIVILEGED),
            execute=attributes.execute and bool(control & PASID_CONTROL.EXECUTE),
        )
