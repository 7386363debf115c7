"""Virtio over PCI (virtio 1.2, 4.1): the modern transport, of which a device is a subclass."""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum
from functools import partial
from struct import pack
from typing import ClassVar

from introspect.layout import Bits, Field, Structure, bit
from introspect.pci import CapabilityId
from vmdbg.platform.bus import State
from vmdbg.platform.clock import TICKS_PER_SECOND, Clock
from vmdbg.platform.pci.capability import Capability, Express, MsiX, Power
from vmdbg.platform.pci.config import Rule
from vmdbg.platform.pci.dma import DmaError
from vmdbg.platform.pci.function import Bar, Function
from vmdbg.platform.virtio.queue import NO_VECTOR, BrokenQueue, Chain, Queue

VENDOR, FIRST_DEVICE = 0x1AF4, 0x1040
COMMON, ISR, DEVICE, NOTIFY = 0x0000, 0x1000, 0x2000, 0x3000
"""Offsets of the parts in BAR 0, a page each."""
MULTIPLIER = 4
QUEUE_SIZE = 256
SERVICE_TICKS = TICKS_PER_SECOND // 500_000
"""From a notification to the device's work: 2 us."""
INDIRECT_DESCRIPTORS, EVENT_INDEX, VERSION_1, ACCESS_PLATFORM = 1 << 28, 1 << 29, 1 << 32, 1 << 33
BUDGET, REQUEST_COST = 4 << 20, 4096
"""Bytes that a device moves in a piece, and what a request counts besides its own."""
QUEUE_INTERRUPT, CONFIG_INTERRUPT = 1, 2
"""Bits of the ISR."""


class STATUS(Bits):
    ACKNOWLEDGE = bit(0)
    DRIVER = bit(1)
    DRIVER_OK = bit(2)
    FEATURES_OK = bit(3)
    NEEDS_RESET = bit(6)
    FAILED = bit(7)


class Part(IntEnum):
    """Structures that the capabilities point to."""

    COMMON = 1
    NOTIFY = 2
    ISR = 3
    DEVICE = 4
    WINDOW = 5


COMMON_CFG = Structure(
    "common configuration", 56,
    (
        Field("device_feature_select", 0, 4), Field("device_feature", 4, 4), Field("driver_feature_select", 8, 4),
        Field("driver_feature", 12, 4), Field("config_msix_vector", 16, 2), Field("num_queues", 18, 2),
        Field("device_status", 20, 1, STATUS), Field("config_generation", 21, 1), Field("queue_select", 22, 2),
        Field("queue_size", 24, 2), Field("queue_msix_vector", 26, 2), Field("queue_enable", 28, 2),
        Field("queue_notify_off", 30, 2), Field("queue_desc", 32, 8), Field("queue_driver", 40, 8), Field("queue_device", 48, 8),
    ),
)  # fmt: skip
_RINGS = {"queue_desc": "descriptors", "queue_driver": "driver", "queue_device": "device"}


class PartCapability(Capability):
    """A vendor-specific capability that says where a structure is."""

    id, size = CapabilityId.VENDOR, 20

    def __init__(self, part: Part, offset: int, length: int, more: int = 0) -> None:
        self.part, self.at, self.length, self.more = part, offset, length, more

    def attach(self, function: Function, offset: int) -> None:
        super().attach(function, offset)
        for at, size, rule in (
            (2, 1, Rule(20)), (3, 1, Rule(self.part)), (4, 1, Rule(0)), (8, 4, Rule(self.at)), (12, 4, Rule(self.length)),
            (16, 4, Rule(self.more)),
        ):  # fmt: skip
            function.config.define_at(offset + at, size, rule)


class WindowCapability(PartCapability):
    """Access to the structures through configuration space (4.1.4.9): a read or write of the data word is one there."""

    def __init__(self) -> None:
        super().__init__(Part.WINDOW, 0, 0)

    def attach(self, function: Function, offset: int) -> None:
        super().attach(function, offset)
        for at, size in ((4, 1), (8, 4), (12, 4), (16, 4)):
            function.config.define_at(offset + at, size, Rule(0, (1 << 8 * size) - 1))

    def _target(self) -> tuple[Bar, int, int] | None:
        config = self.function.config
        index, at, size = config.get(self.offset + 4, 1), config.get(self.offset + 8, 4), config.get(self.offset + 12, 4)
        found = next((bar for bar in self.function.bars if bar.index == index), None)
        return (found, at, size) if found is not None and size in (1, 2, 4) and at + size <= found.size else None

    def reading(self, offset: int, size: int) -> None:
        target = self._target()
        if offset < 20 and offset + size > 16 and target is not None:
            bar, at, width = target
            value = self.function.access(bar, at, width, None) & (1 << 8 * width) - 1
            self.function.config.put(self.offset + 16, 4, value)

    def written_at(self, offset: int, size: int) -> None:
        target = self._target()
        if offset < 20 and offset + size > 16 and target is not None:
            bar, at, width = target
            value = self.function.config.get(self.offset + 16, 4) & (1 << 8 * width) - 1
            self.function.access(bar, at, width, value)


class VirtioDevice(Function):
    """A device of its `number` of queues, with `features` of its own besides those of every device."""

    vendor_id, revision = VENDOR, 1
    subsystem = (VENDOR, 0x1100)
    bars = (Bar(0, 0x4000, wide=True, prefetchable=True, width=8), Bar(2, 0x1000, width=8))
    interrupt_pin = 1
    type: ClassVar[int]
    """Of device, by which the PCI device ID goes."""
    queue_count: ClassVar[int]
    config_size: ClassVar[int] = 0
    """Of the device's own configuration structure."""

    def __init_subclass__(cls) -> None:
        cls.device_id = FIRST_DEVICE + cls.type

    def __init__(self, clock: Clock) -> None:
        super().__init__(clock)
        self.queues = [Queue(QUEUE_SIZE, self.dma_read, self.dma_write) for _ in range(self.queue_count)]
        self._generation, self._config_vector = 0, NO_VECTOR
        self._budget = BUDGET
        self._reset_transport()

    def make_capabilities(self) -> Iterable[Capability]:
        yield MsiX(self.queue_count + 1, bar=2)
        yield PartCapability(Part.COMMON, COMMON, COMMON_CFG.size)
        yield PartCapability(Part.ISR, ISR, 1)
        if self.config_size:
            yield PartCapability(Part.DEVICE, DEVICE, self.config_size)
        yield PartCapability(Part.NOTIFY, NOTIFY, MULTIPLIER * self.queue_count, MULTIPLIER)
        yield WindowCapability()
        yield Power()
        yield Express()

    # The device's own part

    def device_features(self) -> int:
        return 0

    def device_config(self) -> bytes:
        """The structure of the device's type."""
        return bytes(self.config_size)

    def write_device_config(self, offset: int, size: int, value: int) -> None:
        """Software writes to it."""

    def serve(self, number: int) -> None:
        """Deal with what is in a queue, by `take` and `give_back`."""

    def started(self) -> None:
        """The driver is ready."""

    def device_state_reset(self) -> None:
        """Forget what the driver asked for."""

    def take(self, number: int) -> Chain | None:
        """A request from a queue; after much work none, and the queue is served again a moment later."""
        queue = self.queues[number]
        if not queue.enabled or not self._running:
            return None
        if self._budget <= 0:
            self.wake(number)
            return None
        chain = queue.pop()
        if chain is not None:
            self._budget -= chain.size + REQUEST_COST
        return chain

    def give_back(self, number: int, chain: Chain) -> None:
        if self.queues[number].push(chain):
            self._interrupt(self.queues[number].vector, QUEUE_INTERRUPT)

    def config_changed(self) -> None:
        self._generation = self._generation + 1 & 0xFF
        self._interrupt(self._config_vector, CONFIG_INTERRUPT)

    def wake(self, number: int) -> None:
        """Serve a queue, a moment later."""
        if not self._due[number]:
            self._due[number] = True
            self.later(SERVICE_TICKS, partial(self._serve, number))

    # The transport

    @property
    def features(self) -> int:
        return INDIRECT_DESCRIPTORS | EVENT_INDEX | VERSION_1 | ACCESS_PLATFORM | self.device_features()

    @property
    def _running(self) -> bool:
        return self.status & (STATUS.DRIVER_OK | STATUS.NEEDS_RESET) == STATUS.DRIVER_OK

    def device_reset(self) -> None:
        self._reset_transport()
        self.device_state_reset()

    def _reset_transport(self) -> None:
        self.status = self.isr = 0
        self.accepted = 0
        """Features that the driver has taken."""
        self._device_select = self._driver_select = self._queue_select = self._generation = 0
        self._config_vector = NO_VECTOR
        self._due = [False] * self.queue_count
        self.trouble = ""
        """In words, why the device needs a reset."""
        for queue in self.queues:
            queue.reset()

    def state(self) -> State:
        queues = {
            f"queue {number}": f"{queue.size} entries, {'on' if queue.enabled else 'off'}, descriptors at {queue.descriptors:#x}"
            for number, queue in enumerate(self.queues)
        }
        trouble = {"trouble": self.trouble} if self.trouble else {}
        status = STATUS.describe(self.status) or "reset"
        return {"status": status, "accepted": self.accepted, "isr": self.isr, **queues, **trouble}

    def _serve(self, number: int) -> None:
        self._due[number] = False
        if not self._running:
            return
        self._budget = BUDGET
        try:
            self.serve(number)
        except (BrokenQueue, DmaError) as error:
            self.trouble = str(error)
            self.status |= STATUS.NEEDS_RESET
            self.config_changed()

    def _interrupt(self, vector: int, why: int) -> None:
        if self.messages_on:
            if vector != NO_VECTOR:
                self.signal(vector)
            return
        self.isr |= why
        self.set_intx(True)

    @property
    def _queue(self) -> Queue | None:
        return self.queues[self._queue_select] if self._queue_select < self.queue_count else None

    def read_bar(self, bar: int, offset: int, size: int) -> int:
        part, at = offset & ~0xFFF, offset & 0xFFF
        if bar != 0:
            return 0
        if part == COMMON:
            return self._common() >> 8 * at & (1 << 8 * size) - 1 if at < COMMON_CFG.size else 0
        if part == ISR and at == 0:
            isr, self.isr = self.isr, 0
            self.set_intx(False)
            return isr
        if part == DEVICE:
            return int.from_bytes(self.device_config()[at : at + size], "little")
        return 0

    def _common(self) -> int:
        """The whole structure as software reads it now."""
        queue = self._queue
        offered = self.features >> 32 * self._device_select & 0xFFFFFFFF if self._device_select < 2 else 0
        taken = self.accepted >> 32 * self._driver_select & 0xFFFFFFFF if self._driver_select < 2 else 0
        data = pack(
            "<IIIIHHBBH", self._device_select, offered, self._driver_select, taken, self._config_vector, self.queue_count,
            self.status, self._generation, self._queue_select,
        )  # fmt: skip
        if queue is None:
            data += pack("<HHHHQQQ", 0, NO_VECTOR, 0, 0, 0, 0, 0)
        else:
            data += pack("<HHHHQQQ", queue.size, queue.vector, queue.enabled, self._queue_select, queue.descriptors, queue.driver,
                         queue.device)  # fmt: skip
        return int.from_bytes(data, "little")

    def write_bar(self, bar: int, offset: int, size: int, value: int) -> None:
        part, at = offset & ~0xFFF, offset & 0xFFF
        if bar != 0:
            return
        if part == COMMON:
            self._write_common(at, size, value)
        elif part == DEVICE and at < self.config_size:
            self.write_device_config(at, size, value)
        elif part == NOTIFY and at // MULTIPLIER < self.queue_count:
            self.wake(at // MULTIPLIER)

    def _write_common(self, at: int, size: int, value: int) -> None:
        """A field at a time, as drivers must (4.1.3.1); those of 64 bits also in halves."""
        if size == 8:
            self._write_common(at, 4, value & 0xFFFFFFFF)
            self._write_common(at + 4, 4, value >> 32)
            return
        field = next((one for one in COMMON_CFG if one.offset <= at < one.offset + one.size), None)
        if field is None or size != min(field.size, 4) or (at - field.offset) % 4:
            return
        match field.name:
            case "device_feature_select":
                self._device_select = value
            case "driver_feature_select":
                self._driver_select = value
            case "driver_feature":
                if self._driver_select < 2 and not self.status & STATUS.FEATURES_OK:
                    shift = 32 * self._driver_select
                    self.accepted = self.accepted & ~(0xFFFFFFFF << shift) | value << shift
            case "config_msix_vector":
                self._config_vector = self._vector(value)
            case "device_status":
                self._write_status(value)
            case "queue_select":
                self._queue_select = value
            case _ if self._queue is not None:
                self._write_queue(self._queue, field, at, value)

    def _vector(self, value: int) -> int:
        return value if value <= self.queue_count else NO_VECTOR

    def _write_queue(self, queue: Queue, field: Field, at: int, value: int) -> None:
        if field.name == "queue_msix_vector":
            queue.vector = self._vector(value)
        elif queue.enabled:
            return  # its size and place are fixed now (4.1.4.3.2)
        elif field.name == "queue_size":
            if value and not value & value - 1 and value <= queue.most:
                queue.size = value
        elif field.name == "queue_enable":
            queue.enabled = value == 1
        elif field.name in _RINGS:
            shift = 8 * (at - field.offset)
            old = getattr(queue, _RINGS[field.name])
            setattr(queue, _RINGS[field.name], old & ~(0xFFFFFFFF << shift) | value << shift)

    def _write_status(self, value: int) -> None:
        if value == 0:
            self._cancel()
            self.device_reset()
            self.set_intx(False)
            return
        new = value & ~self.status
        if new & STATUS.FEATURES_OK and (self.accepted & ~self.features or not self.accepted & VERSION_1):
            value &= ~STATUS.FEATURES_OK
        self.status |= value & ~STATUS.NEEDS_RESET
        for queue in self.queues:
            queue.events = bool(self.status & STATUS.FEATURES_OK and self.accepted & EVENT_INDEX)
        if new & STATUS.DRIVER_OK:
            self.started()
