"""Peripheral page requests (AMD 48882, 2.6): devices ask for pages, software answers by a command.

Nothing is answered without software: automatic responses are not built.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from introspect.iommu.records import INVALID_PPR_REQUEST, PPR_RECORD, Event, EventCode
from introspect.iommu.registers import CONTROL
from introspect.iommu.structures import DTE
from introspect.pci import RequesterId
from vmdbg.iommu.registers import RegisterFile
from vmdbg.iommu.rings import Log
from vmdbg.platform.pci.dma import Endpoint, PageRequest

PAGE_SERVICE_REQUEST = 1
LAST = 1 << 9
"""Of the tag: no more of the group follows."""
MOST_REMEMBERED = 256


class Response(NamedTuple):
    """What a device is told of a request."""

    device: RequesterId
    pasid: int | None
    tag: int
    response: int


class PageRequests:
    """`responses`: the latest answers."""

    def __init__(
        self, log: Log, registers: RegisterFile, dte: Callable[[int], int | None], event: Callable[[Event, int], None],
        endpoint: Callable[[RequesterId], Endpoint | None],
    ) -> None:  # fmt: skip
        self.log, self.registers, self.dte, self.event, self.endpoint = log, registers, dte, event, endpoint
        self.reset()

    def reset(self) -> None:
        self.responses: deque[Response] = deque(maxlen=MOST_REMEMBERED)

    def ask(self, device: RequesterId, request: PageRequest) -> None:
        """Of a device."""
        pasid, privileged, execute, _ = request.attributes
        tag, user = LAST * request.last | request.tag, pasid is not None and not privileged
        self.request(
            device, request.address, tag, pasid=pasid, read=request.read, write=request.write, execute=execute, user=user
        )

    def request(
        self, device: RequesterId, address: int, tag: int, *, pasid: int | None = None, read: bool = True, write: bool = False,
        execute: bool = False, user: bool = False,
    ) -> bool:  # fmt: skip
        """Whether it is in the log.  Page requests and their log have to be on, for all and for the device, or there is an event
        (2.5.10); a full log loses it.  `execute` has a meaning with a PASID alone, `user` is as the device says."""
        number = pasid or 0
        fields: dict[str, int] = {"RP": read, "WP": write, "NX": execute, "US": user, "GN": pasid is not None}
        fields |= {"PASID_15_0": number & 0xFFFF, "PASID_19_16": number >> 16, "PPRTag": tag & 0x3FF}
        dte, enabled = self.dte(device) or 0, CONTROL.PprEn | CONTROL.PprLogEn
        if self.registers.control & enabled != enabled or not dte & DTE.V or not dte & DTE.PPR:
            invalid = Event(EventCode.INVALID_PPR_REQUEST, device, address & -0x1000)
            self.event(invalid, INVALID_PPR_REQUEST.make(**fields))
            return False
        return self.log.append(PPR_RECORD.make(
            **fields, DeviceID=device, code=PAGE_SERVICE_REQUEST, Address=address & -0x1000
        ))  # fmt: skip

    def complete(self, device: int, pasid: int | None, tag: int, response: int) -> None:
        """By COMPLETE_PPR_REQUEST."""
        found = Response(RequesterId(device), pasid, tag, response)
        self.responses.append(found)
        endpoint = self.endpoint(found.device)
        if endpoint is not None:
            endpoint.page_answered(tag, response)
