"""The command buffer (AMD 48882, 2.4): read in portions by guest time, and stopped by the first command that is wrong."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from introspect.iommu.records import (
    COMMANDS,
    INVALID_PPR_REQUEST,
    CommandCode,
    Event,
    EventCode,
    command_of,
    invalidated_range,
)
from introspect.iommu.registers import CONTROL, STATUS
from introspect.iommu.state import RINGS
from introspect.iommu.structures import DTE
from introspect.pci import RequesterId
from introspect.sources import Unreadable, Unwritable
from vmdbg.iommu.rings import Pointers
from vmdbg.platform.clock import TICKS_PER_SECOND, Timer

if TYPE_CHECKING:
    from vmdbg.iommu.unit import IommuUnit

PORTION, PORTION_TICKS = 64, 2000
"""Commands that are carried out at once, and the guest time between two portions: 0.5 us."""
MASTER_ABORT = 1
"""Type of a hardware error: nobody answers at the address."""
TIMEOUTS = {n: TICKS_PER_SECOND * 10 ** (n - 1) // 1000 for n in range(1, 7)}
"""InvTimeOut of the control register: 1 ms to 100 s; 0 is no timeout, 7 reserved."""


_NOT_BUILT: dict[int, int] = {
    CommandCode.INVALIDATE_IOTLB_PAGES: COMMANDS[CommandCode.INVALIDATE_IOTLB_PAGES].bits.fields["Type"],
}
"""Fields of features that are not advertised: InvIotlbTypeSup (2.4.4)."""


class CommandError(Exception):
    """The command processor stops with this event, which has the address of the command."""

    def __init__(self, event: EventCode, kind: int = 0) -> None:
        super().__init__(event.name)
        self.event, self.kind = event, kind


class WalkError(Exception):
    """It stops because tables cannot be read: another event, which it is told of."""

    def __init__(self, event: Event) -> None:
        super().__init__(event.code.name)
        self.event = event


class NotYetError(Exception):
    """The command waits for what earlier ones began."""


class CommandProcessor(Pointers):
    def __init__(self, iommu: IommuUnit) -> None:
        super().__init__(RINGS["command"], STATUS.CmdBufRun, iommu.registers)
        self.iommu = iommu
        self._timer: Timer | None = None
        self._extra = 0
        """What the current command costs besides."""
        self._unanswered: dict[int, Event] = {}
        """Of invalidations that devices have been asked for, by tag, what their time-outs will be."""
        self._last_tag = 0
        self.done = 0
        """Commands carried out since reset."""
        self._handlers: dict[int, Callable[[int], None]] = {
            CommandCode.COMPLETION_WAIT: self._completion_wait,
            CommandCode.INVALIDATE_DEVTAB_ENTRY: self._devtab_entry,
            CommandCode.INVALIDATE_IOMMU_PAGES: self._iommu_pages,
            CommandCode.INVALIDATE_IOTLB_PAGES: self._iotlb_pages,
            CommandCode.INVALIDATE_INTERRUPT_TABLE: self._interrupt_table,
            CommandCode.PREFETCH_IOMMU_PAGES: self._prefetch,
            CommandCode.COMPLETE_PPR_REQUEST: self._complete_ppr,
            CommandCode.INVALIDATE_IOMMU_ALL: self._all,
        }

    def reset(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None
        self.done = 0
        self.stopped()

    def stopped(self) -> None:
        """By software: nothing is waited for any more."""
        self._unanswered = {}

    def kick(self) -> None:
        """There may be work: the tail has moved, or the processor runs again."""
        if self.running and self.head != self.tail and self._timer is None:
            clock = self.iommu.clock
            self._timer = clock.at(clock.now + PORTION_TICKS, self._portion)

    def _portion(self) -> None:
        self._timer = None
        budget = PORTION
        while budget > 0:
            if not self.running or self.head == self.tail:
                return
            at = self.base + self.head
            try:
                try:
                    record = int.from_bytes(self.iommu.memory.read(at, self.ring.entry_size), "little")
                except (Unreadable, Unwritable):
                    raise CommandError(EventCode.COMMAND_HARDWARE_ERROR, MASTER_ABORT) from None
                self._carry_out(record)
            except NotYetError:
                return
            except CommandError as error:
                self.running = False  # the head stays where it was
                self.iommu.log(Event(error.event, 0, at, type=error.kind))
                return
            except WalkError as error:
                self.running = False
                self.iommu.log(error.event)
                return
            self.registers[self.ring.head] = self.after(self.head)
            self.done += 1
            budget -= 1 + self._extra
            self._extra = 0
        self.kick()

    def _carry_out(self, record: int) -> None:
        kind = command_of(record)
        if kind is None or record & (~kind.bits.defined | _NOT_BUILT.get(kind.code, 0)):
            raise CommandError(EventCode.ILLEGAL_COMMAND_ERROR)
        self._handlers[kind.code](record)

    # Commands

    def _completion_wait(self, record: int) -> None:
        """Older commands have to be done: those that devices answer may not be (2.4.1)."""
        if self._unanswered:
            raise NotYetError
        bits = COMMANDS[CommandCode.COMPLETION_WAIT].bits
        if bits.get(record, "Store"):
            data = bits.get(record, "StoreData").to_bytes(8, "little")
            try:
                self.iommu.memory.dma(self.iommu.name, bits.get(record, "StoreAddress") << 3, data)
            except (Unreadable, Unwritable):
                raise CommandError(EventCode.COMMAND_HARDWARE_ERROR, MASTER_ABORT) from None
        if bits.get(record, "Interrupt"):
            self.registers.status |= STATUS.ComWaitInt
            self.iommu.status_changed()

    def _devtab_entry(self, record: int) -> None:
        bits = COMMANDS[CommandCode.INVALIDATE_DEVTAB_ENTRY].bits
        self.iommu.caches.forget_device(bits.get(record, "DeviceID"))
        self.iommu.translation.device_forgotten(bits.get(record, "DeviceID"))

    def _iommu_pages(self, record: int) -> None:
        bits = COMMANDS[CommandCode.INVALIDATE_IOMMU_PAGES].bits
        first, end = invalidated_range(bits.get(record, "Address") << 12, bool(bits.get(record, "S")))
        pasid = bits.get(record, "PASID") if bits.get(record, "GN") else None
        self.iommu.caches.forget_pages(bits.get(record, "DomainID"), first, end, pasid)
        if bits.get(record, "PDE"):
            self.iommu.caches.forget_directories(bits.get(record, "DomainID"), first, end, pasid)

    def _iotlb_pages(self, record: int) -> None:
        """For a device's own cache: one that has none does not answer, and the wait for it ends by the timeout, or never."""
        get = partial(COMMANDS[CommandCode.INVALIDATE_IOTLB_PAGES].bits.get, record)
        device = RequesterId(get("DeviceID"))
        first, end = invalidated_range(get("Address") << 12, bool(get("S")))
        pasid = get("PASID_19_16") << 16 | get("PASID_15_8") << 8 | get("PASID_7_0") if get("GN") else None
        tag = self._last_tag = self._last_tag + 1
        self._unanswered[tag] = Event(EventCode.IOTLB_INV_TIMEOUT, device, self.base + self.head)
        endpoint = self.iommu.dma.endpoint(device)
        if endpoint is not None:
            endpoint.invalidate(first, end, pasid, tag)
        ticks = TIMEOUTS.get(CONTROL.get(self.registers["control"], "InvTimeOut"))
        if ticks is not None:
            self.iommu.later(ticks, partial(self.timed_out, tag))

    def answered(self, tag: int) -> None:
        """A device has forgotten what it was told to."""
        if self._unanswered.pop(tag, None) is not None:
            self.kick()

    def timed_out(self, tag: int) -> None:
        event = self._unanswered.pop(tag, None)
        if event is not None:
            self.iommu.log(event)
            self.kick()

    def _interrupt_table(self, record: int) -> None:
        bits = COMMANDS[CommandCode.INVALIDATE_INTERRUPT_TABLE].bits
        self.iommu.caches.forget_interrupts(bits.get(record, "DeviceID"))

    def _prefetch(self, record: int) -> None:
        """GN is ignored; PFCount 0 is 1.  Tables that cannot be read stop the processor, other faults do not (2.4.6)."""
        bits = COMMANDS[CommandCode.PREFETCH_IOMMU_PAGES].bits
        device, translation = RequesterId(bits.get(record, "DeviceID")), self.iommu.translation
        first, end = invalidated_range(bits.get(record, "Address") << 12, bool(bits.get(record, "S")))
        size, count = end - first, max(bits.get(record, "PFCount"), 1)
        dte = translation.entry(device)
        if bits.get(record, "Inval") and dte is not None:
            self.iommu.caches.forget_pages(DTE.get(dte, "DomainID"), first, first + size * count, None)
        self._extra = count
        event = translation.prefetch(device, range(first, first + size * count, size))
        if event is not None:
            raise WalkError(event)

    def _complete_ppr(self, record: int) -> None:
        """Illegal while page requests or their log are off; with GN without guests' tables only told of (2.5.10, table 52)."""
        needed, control = CONTROL.PprEn | CONTROL.PprLogEn, self.registers["control"]
        if control & needed != needed:
            raise CommandError(EventCode.ILLEGAL_COMMAND_ERROR)
        bits = COMMANDS[CommandCode.COMPLETE_PPR_REQUEST].bits
        tag, device = bits.get(record, "CompletionTag"), bits.get(record, "DeviceID")
        pasid = bits.get(record, "PASID") if bits.get(record, "GN") else None
        dte = self.iommu.translation.entry(device) or 0
        if pasid is not None and not (control & CONTROL.GTEn and dte & DTE.V and dte & DTE.GV):
            event = Event(EventCode.INVALID_PPR_REQUEST, device, self.base + self.head, pasid=pasid)
            self.iommu.log(event, INVALID_PPR_REQUEST.make(RX=1, PPRTag=tag & 0x3FF))
            return
        self.iommu.page_requests.complete(device, pasid, tag & 0x1FF, tag >> 12)

    def _all(self, record: int) -> None:
        self.iommu.caches.forget_all()
        self.iommu.translation.device_forgotten(None)
