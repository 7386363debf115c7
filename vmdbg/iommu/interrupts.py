"""Interrupt messages through the interrupt tables, to processors or to a guest's virtual APIC (AMD 48882, 2.2.5)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from introspect.avic import IRR
from introspect.iommu.records import GA_RECORD
from introspect.iommu.registers import CONTROL
from introspect.iommu.remapping import GuestInterrupt, InterruptRoute, Remapped, remap
from introspect.iommu.verdicts import IoFault
from introspect.pci import RequesterId
from introspect.sources import Unreadable, Unwritable
from vmdbg.iommu.caches import Recorder
from vmdbg.iommu.staleness import reason
from vmdbg.platform.apicbus import DeliveryMode
from vmdbg.platform.pci.dma import DmaError, Message

if TYPE_CHECKING:
    from vmdbg.iommu.unit import IommuUnit

GUEST_NR = 1
"""Code of a guest virtual APIC log entry."""
SOON = 1
"""Ticks.  An interrupt may be asked for amid an instruction: what is written to memory for it is written behind that."""


class Interrupts:
    """Of one IOMMU."""

    def __init__(self, iommu: IommuUnit) -> None:
        self.iommu = iommu

    def remap(self, requester: RequesterId, address: int, data: int, quiet: bool) -> Sequence[Message]:
        """What a message becomes: nothing for the processors, if it went to a guest.  Raises `DmaError`."""
        iommu, view = self.iommu, self.iommu.view
        kept = iommu.caches.kept_interrupts(requester)
        recorder = Recorder(iommu.memory, iommu.name, iommu.translation.kept_entry(requester), kept)
        verdict = remap(recorder, view, requester, address, data)
        if not quiet:
            self._keep(requester, recorder)
            if recorder.old:
                iommu.translation.staleness.interrupt(requester, address, data, verdict)
        if isinstance(verdict, IoFault):
            if not quiet:
                iommu.later(SOON, partial(iommu.translation.refused, verdict, requester))
            raise DmaError(requester, address, True, reason(verdict))
        if verdict.guest is not None:
            if not quiet:
                iommu.later(SOON, partial(self._post, requester, verdict.guest, verdict.vector))
            return []
        if verdict.route in (InterruptRoute.OFF, InterruptRoute.UNMANAGED, InterruptRoute.FORWARDED, InterruptRoute.PASSED):
            return [Message.decode(address, data)]
        return [_message(verdict)]

    def _keep(self, requester: RequesterId, recorder: Recorder) -> None:
        """IRTCacheDis ends that more is kept, not what is (3.4.1)."""
        iommu = self.iommu
        spa = iommu.view.entry_address(requester)
        for at, entry in recorder.seen:
            if at == spa:
                iommu.caches.keep_device(requester, entry)
            elif not iommu.registers.control & CONTROL.IRTCacheDis:
                iommu.caches.keep_interrupt(requester, at, entry)

    def _post(self, requester: RequesterId, guest: GuestInterrupt, vector: int) -> None:
        """Set the vector's bit in IRR of the guest's backing page; then ring the processor, or tell the host."""
        iommu, at = self.iommu, guest.vapic + IRR + (vector >> 5) * 16
        try:
            old = iommu.memory.read_u32(at)
            iommu.memory.dma(iommu.name, at, (old | 1 << (vector & 31)).to_bytes(4, "little"))
        except (Unreadable, Unwritable):
            return  # the page is no memory: nobody is told
        if guest.running:
            iommu.dma.apics.doorbell(guest.destination)
        elif guest.log:
            iommu.ga_log.append(GA_RECORD.make(GATag=guest.tag, DeviceID=requester, code=GUEST_NR))


def _message(verdict: Remapped) -> Message:
    mode = DeliveryMode.LOWEST if verdict.mode == DeliveryMode.LOWEST else DeliveryMode.FIXED
    return Message(verdict.vector, mode, verdict.destination, verdict.logical, verdict.level, verdict.wide)
