"""Peripheral page requests (AMD 48882, 2.6): devices ask for pages, software answers by a command."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from introspect.iommu.records import PPR_RECORD, Event, EventCode
from introspect.iommu.registers import CONTROL
from introspect.iommu.structures import DTE
from introspect.pci import RequesterId
from vmdbg.iommu.registers import RegisterFile
from vmdbg.iommu.rings import Log

PAGE_SERVICE_REQUEST = 1
SUCCESS, INVALID, FAILURE = 0, 1, 15
"""Responses."""
MOST_REMEMBERED = 256


class Response(NamedTuple):
    """What a device is told of a request."""

    device: RequesterId
    pasid: int | None
    tag: int
    response: int


class PageRequests:
    """`responses`: the latest answers; `listeners` are devices that wait for theirs."""

    def __init__(
        self, log: Log, registers: RegisterFile, dte: Callable[[int], int | None], event: Callable[[Event, int], None]
    ) -> None:
        self.log, self.registers, self.dte, self.event = log, registers, dte, event
        self.listeners: list[Callable[[Response], None]] = []
        self.reset()

    def reset(self) -> None:
        self.responses: deque[Response] = deque(maxlen=MOST_REMEMBERED)

    def request(
        self, device: RequesterId, address: int, tag: int, *, pasid: int | None = None, read: bool = True, write: bool = False,
        execute: bool = False, user: bool = False,
    ) -> None:  # fmt: skip
        """What cannot be logged is answered at once."""
        tag &= 0x3FF
        number = pasid or 0
        asked = PPR_RECORD.make(
            PASID_15_0=number & 0xFFFF, PPRTag=tag, PASID_19_16=number >> 16, X=execute, R=read, W=write, US=user,
            GN=pasid is not None,
        )  # fmt: skip
        dte = self.dte(device)
        if dte is None or not dte & DTE.V or not dte & DTE.PPR or not self.registers.control & CONTROL.PprEn:
            self.event(Event(EventCode.INVALID_PPR_REQUEST, device, address & -0x1000), asked)
            self._answer(Response(device, pasid, tag, INVALID))
            return
        record = asked | PPR_RECORD.make(DeviceID=device, code=PAGE_SERVICE_REQUEST, Address=address & -0x1000)
        if not self.log.append(record):
            self._answer(Response(device, pasid, tag, FAILURE))

    def complete(self, device: int, pasid: int | None, tag: int, response: int) -> None:
        """By COMPLETE_PPR_REQUEST."""
        self._answer(Response(RequesterId(device), pasid, tag, response))

    def _answer(self, response: Response) -> None:
        self.responses.append(response)
        for listener in self.listeners:
            listener(response)
