"""One emulated AMD IOMMU: its registers put together with what they control."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from introspect.address import Iova
from introspect.iommu.records import Event, EventCode
from introspect.iommu.registers import CONTROL, REGISTERS, STATUS, X2APIC_CONTROL
from introspect.iommu.state import Iommu
from introspect.iommu.verdicts import IoFault
from introspect.pci import RequesterId
from vmdbg.iommu.caches import Caches
from vmdbg.iommu.commands import CommandProcessor
from vmdbg.iommu.function import IommuFunction
from vmdbg.iommu.interrupts import Interrupts
from vmdbg.iommu.own_memory import OwnMemory
from vmdbg.iommu.pagerequests import PageRequests
from vmdbg.iommu.registers import RegisterFile
from vmdbg.iommu.rings import EVENT_LOG, GA_LOG, PPR_LOG, Log
from vmdbg.iommu.translation import Translation
from vmdbg.platform.apicbus import DeliveryMode
from vmdbg.platform.bus import State
from vmdbg.platform.clock import Clock, Timer
from vmdbg.platform.pci.dma import Dma, Endpoint, Message

_C, _S = CONTROL, STATUS
INTERRUPTS = (
    ("x2apic_general", _C.EventIntEn, _S.EventLogInt | _S.EventOverflow, False),
    ("x2apic_general", _C.ComWaitIntEn, _S.ComWaitInt, False),
    ("x2apic_ppr", _C.PprIntEn, _S.PprInt | _S.PprOverflow, False), ("x2apic_ga", _C.GAIntEn, _S.GALogInt, True),
)  # fmt: skip
"""Where an interrupt goes with IntCapXTEn, what enables it, what asks for it, and whether it asks only at the moment when it is
set: by the text of each status and enable bit (3.4.1, 3.4.16), which has the overflow of the GA log ask for none."""
_HARDWARE_ERRORS = (
    EventCode.DEV_TAB_HARDWARE_ERROR, EventCode.PAGE_TAB_HARDWARE_ERROR, EventCode.COMMAND_HARDWARE_ERROR,
)  # fmt: skip
_MSI_MIRROR = {"msi_capability": 0, "msi_address_low": 4, "msi_address_high": 8, "msi_data": 12}
"""Registers that are parts of the MSI capability, each at this offset of it; the pointer to the next one is no part (3.4.8)."""
_STATE_UNSEEN = frozenset((
    "command_head", "command_tail", "event_head", "event_tail", "ppr_head", "ppr_tail", "ga_head", "ga_tail", "status",
))  # fmt: skip
"""Registers that translation does not depend on."""


class IommuUnit:
    title = "an AMD IOMMU"

    def __init__(self, number: int, function: IommuFunction, dma: Dma, clock: Clock, strict: bool) -> None:
        self.number, self.function, self.dma, self.clock = number, function, dma, clock
        self.memory = OwnMemory(dma, function.address)
        self.name = f"iommu {function.address}"
        self.manages: tuple[tuple[int, int], ...] = ()
        self.fault_listeners: list[Callable[[IoFault, RequesterId], None]] = []
        """Told of each refusal, logged or not."""
        self.stale_listeners: list[Callable[[str], None]] = []
        """Strict: told when something is used that software forgot to invalidate."""
        self.registers = RegisterFile(self._written)
        self.caches = Caches(self.memory, strict)
        self.event_log = Log("event", EVENT_LOG, self.registers, self.memory, self.name, self.status_changed)
        self.ppr_log = Log("ppr", PPR_LOG, self.registers, self.memory, self.name, self.status_changed)
        self.ga_log = Log("ga", GA_LOG, self.registers, self.memory, self.name, self.status_changed)
        self.commands = CommandProcessor(self)
        self.translation = Translation(self)
        self.interrupts = Interrupts(self)
        self.page_requests = PageRequests(self.ppr_log, self.registers, self.translation.entry, self.log, self._endpoint)
        self._timers: list[Timer] = []
        self._view: Iommu | None = None
        self._asking = 0
        function.owner = self

    def reset(self) -> None:
        """With the PCI function's."""
        self.registers.reset()
        self.caches.forget_all()
        self.commands.reset()
        self.translation.reset()
        self.page_requests.reset()
        for timer in self._timers:
            timer.cancel()
        self._timers, self._view, self._asking = [], None, 0
        self.mirror_msi()

    @property
    def view(self) -> Iommu:
        """The registers as tables are read with them."""
        if self._view is None:
            self._view = Iommu(
                self.registers.snapshot(), self.number, self.manages, int(self.function.address), self.function.secure_device.base
            )
        return self._view

    def forget_view(self) -> None:
        """Registers have changed by no write."""
        self._view = None

    def later(self, ticks: int, callback: Callable[[], None]) -> None:
        """Unless it is reset before."""
        self._timers = [timer for timer in self._timers if timer.active]
        self._timers.append(self.clock.at(self.clock.now + ticks, callback))

    # Registers

    def read_mmio(self, offset: int, size: int) -> int:
        return self.registers.read(offset, size)

    def write_mmio(self, offset: int, size: int, value: int) -> None:
        self.registers.write(offset, size, value)

    def _written(self, name: str, old: int) -> None:
        if name not in _STATE_UNSEEN:
            self._view = None
            self.translation.registers_changed()
        if name == "control":
            self._control(old)
        elif name == "status":
            self.status_changed()
        elif name in ("command_tail", "command_head", "command_base"):
            self.commands.kick()
        elif name in _MSI_MIRROR:
            self.function.write_config(self.function.msi.offset + _MSI_MIRROR[name], 4, self.registers[name])

    def mirror_msi(self) -> None:
        """Configuration space is what counts."""
        for name, at in _MSI_MIRROR.items():
            table = REGISTERS[name].bits
            seen = table.defined if table is not None else 0xFFFFFFFF
            self.registers.values[name] = self.function.config.get(self.function.msi.offset + at, 4) & seen

    def _control(self, old: int) -> None:
        """A ring runs while it and the IOMMU are on.  One that has stopped runs again once its enable goes from 0 to 1; for
        commands and page requests to write a 1 is enough.  The overflow of two of the logs ends so (3.4.1)."""
        new = self.registers.control
        for ring, enables, restarts, overflow in (
            (self.event_log, _C.EventLogEn, False, _S.EventOverflow), (self.commands, _C.CmdBufEn, True, 0),
            (self.ppr_log, _C.PprLogEn | _C.PprEn, True, _S.PprOverflow), (self.ga_log, _C.GALogEn, False, 0),
        ):  # fmt: skip
            needed = enables | _C.IommuEn
            if new & needed != needed:
                ring.running = False
            elif not ring.running and (restarts or old & needed != needed):
                self.registers.status &= ~overflow
                ring.running = True
        if not self.commands.running:
            self.commands.stopped()
        self.commands.kick()
        self.status_changed()

    # Events and interrupts of its own

    def log(self, event: Event, more: int = 0) -> None:
        """`more`: bits of the record that `Event` has no name for."""
        record = event.encode() | more
        if event.code in _HARDWARE_ERRORS:
            self._hardware_error(record)
            if not self.event_log.running and self.registers.control & _C.EventIntEn:
                self._interrupt("x2apic_general")  # these are told without a log, too (2.5.16.2)
        self.event_log.append(record)

    def _hardware_error(self, record: int) -> None:
        """The first one stays until software has cleared HEV (3.4.2); the upper register has the event code."""
        status = self.registers["hardware_event_status"]
        if status & 1:
            self.registers["hardware_event_status"] = status | 2
            return
        self.registers["hardware_event_high"], self.registers["hardware_event_low"] = record & (1 << 64) - 1, record >> 64
        self.registers["hardware_event_status"] = status | 1

    def status_changed(self) -> None:
        """An interrupt is sent when a cause appears, not while it stays."""
        control, status = self.registers.control, self.registers.status
        asking, registers = 0, set()
        for number, (register, enable, causes, once) in enumerate(INTERRUPTS):
            if status & causes and (once or control & enable):
                asking |= 1 << number
                if control & enable and not self._asking >> number & 1:
                    registers.add(register)
        self._asking = asking
        for register in sorted(registers):
            self._interrupt(register)

    def _interrupt(self, register: str) -> None:
        if not self.registers.control & _C.IntCapXTEn:
            self.function.signal()
            return
        value = self.registers[register]
        get = partial(X2APIC_CONTROL.get, value)
        mode = DeliveryMode.LOWEST if get("DeliveryMode") else DeliveryMode.FIXED
        dest = get("Destination_31_24") << 24 | get("Destination_23_0")
        self.dma.deliver(Message(get("Vector"), mode, dest, bool(get("DestMode")), False, wide=True))

    # Devices' side

    def _endpoint(self, device: RequesterId) -> Endpoint | None:
        return self.dma.endpoint(device)

    def remap(self, requester: RequesterId, address: Iova, data: int, quiet: bool) -> Sequence[Message]:
        return self.interrupts.remap(requester, address, data, quiet)

    # For people

    def state(self) -> State:
        counters = self.caches.counters
        return {
            "control": _C.describe(self.registers.control), "status": _S.describe(self.registers.status),
            "commands": self.commands.done, "hits": counters.hits, "misses": counters.misses,
        }  # fmt: skip
