"""A driver of virtio in Python, as bad as a test wants it to be."""

from __future__ import annotations

from collections.abc import Sequence
from struct import pack, unpack

from introspect.pci import COMMAND, MSIX_CONTROL, CapabilityId, capabilities
from tests.platform.pci.board import MSI_ADDRESS, Board
from vmdbg.platform.virtio.transport import (
    COMMON,
    COMMON_CFG,
    DEVICE,
    EVENT_INDEX,
    ISR,
    MULTIPLIER,
    NOTIFY,
    SERVICE_TICKS,
    STATUS,
    VERSION_1,
    VirtioDevice,
)

RINGS, BUFFERS = 0x100000, 0x200000
NEXT, WRITE, INDIRECT = 1, 2, 4
READY = STATUS.ACKNOWLEDGE | STATUS.DRIVER | STATUS.FEATURES_OK
WHERE = "00:03.0"


class Driver:
    """Of the device in slot 3 of a board."""

    def __init__(self, *devices: str, size: int = 8, board: Board | None = None) -> None:
        self.board = board or Board(*devices)
        self.device = next(one for one in self.board.root.functions if isinstance(one, VirtioDevice))
        self.size = size
        self.bar = self.device.header_field("bar0") & ~0xF | self.device.header_field("bar1") << 32
        self.next = [0] * self.device.queue_count
        self.seen = [0] * self.device.queue_count
        self.board.command(WHERE, COMMAND.BUS_MASTER | COMMAND.MEMORY)

    # Registers

    def read(self, name: str) -> int:
        field = COMMON_CFG[name]
        value = 0
        for at in range(0, field.size, 4):
            value |= self.board.bus.read_mmio(self.bar + COMMON + field.offset + at, min(field.size, 4)) << 8 * at
        return value

    def write(self, name: str, value: int) -> None:
        field = COMMON_CFG[name]
        for at in range(0, field.size, 4):
            size = min(field.size, 4)
            self.board.bus.write_mmio(self.bar + COMMON + field.offset + at, size, value >> 8 * at & (1 << 8 * size) - 1)

    def config(self, offset: int, size: int) -> int:
        return self.board.bus.read_mmio(self.bar + DEVICE + offset, size)

    def isr(self) -> int:
        return self.board.bus.read_mmio(self.bar + ISR, 1)

    @property
    def status(self) -> int:
        return self.read("device_status")

    @property
    def features(self) -> int:
        found = 0
        for half in range(2):
            self.write("device_feature_select", half)
            found |= self.read("device_feature") << 32 * half
        return found

    # Setting up

    def accept(self, features: int) -> None:
        for half in range(2):
            self.write("driver_feature_select", half)
            self.write("driver_feature", features >> 32 * half & 0xFFFFFFFF)

    def ring(self, queue: int) -> int:
        return RINGS + 0x10000 * queue

    def start(self, *, features: int | None = None, messages: bool = False) -> None:
        """As a driver does (3.1.1)."""
        self.write("device_status", 0)
        for step in (STATUS.ACKNOWLEDGE, STATUS.ACKNOWLEDGE | STATUS.DRIVER):
            self.write("device_status", step)
        self.accept(self.features & ~EVENT_INDEX if features is None else features)
        self.write("device_status", READY)
        assert self.status == READY
        if messages:
            self.messages()
        for queue in range(self.device.queue_count):
            self.write("queue_select", queue)
            self.write("queue_size", self.size)
            for name, at in (("queue_desc", 0), ("queue_driver", 0x4000), ("queue_device", 0x8000)):
                self.write(name, self.ring(queue) + at)
            if messages:
                self.write("queue_msix_vector", queue + 1)
            self.write("queue_enable", 1)
        self.write("device_status", READY | STATUS.DRIVER_OK)

    def messages(self) -> None:
        """MSI-X, vector 0x50 for the configuration and 0x51 on for the queues."""
        table = self.device.header_field("bar2")
        for vector in range(self.device.queue_count + 1):
            self.board.bus.write_mmio(table + 16 * vector, 8, MSI_ADDRESS)
            self.board.bus.write_mmio(table + 16 * vector + 8, 8, 0x50 + vector)
        at = self.board.capability(WHERE, CapabilityId.MSIX)
        self.board.write(WHERE, at + 2, MSIX_CONTROL.ENABLE, 2)
        self.write("config_msix_vector", 0)

    # Requests

    def describe(self, queue: int, index: int, address: int, length: int, flags: int, following: int = 0) -> None:
        self.board.ram.write(self.ring(queue) + 16 * index, pack("<QIHH", address, length, flags, following))

    def offer(self, queue: int, head: int) -> None:
        at = self.ring(queue) + 0x4000
        self.board.ram.write(at + 4 + 2 * (self.next[queue] % self.size), pack("<H", head))
        self.next[queue] = self.next[queue] + 1 & 0xFFFF
        self.board.ram.write(at + 2, pack("<H", self.next[queue]))

    def chain(self, queue: int, out: Sequence[bytes], into: Sequence[int], first: int = 0) -> list[int]:
        """Lay a request out from descriptor `first` on; the addresses of what the device writes."""
        at, places = BUFFERS + 0x1000 * first, list[int]()
        parts: list[bytes | int] = [*out, *into]
        for number, part in enumerate(parts):
            length = part if isinstance(part, int) else len(part)
            if isinstance(part, bytes):
                self.board.ram.write(at, part)
            else:
                places.append(at)
            flags = (WRITE if isinstance(part, int) else 0) | (NEXT if number + 1 < len(parts) else 0)
            self.describe(queue, first + number, at, length, flags, first + number + 1)
            at += length
        self.offer(queue, first)
        return places

    def kick(self, queue: int) -> None:
        self.board.bus.write_mmio(self.bar + NOTIFY + MULTIPLIER * queue, 2, queue)
        self.board.pass_time(2 * SERVICE_TICKS)

    def used(self, queue: int) -> list[tuple[int, int]]:
        """(head, bytes written) of what came back since the last time."""
        at = self.ring(queue) + 0x8000
        count = unpack("<H", self.board.ram.read(at + 2, 2))[0]
        found = []
        while self.seen[queue] != count:
            head, length = unpack("<II", self.board.ram.read(at + 4 + 8 * (self.seen[queue] % self.size), 8))
            found.append((head, length))
            self.seen[queue] = self.seen[queue] + 1 & 0xFFFF
        return found

    def request(self, queue: int, out: Sequence[bytes], into: Sequence[int] = ()) -> bytes:
        """One request, carried out; all bytes that it may have written."""
        places = self.chain(queue, out, into)
        self.kick(queue)
        assert [head for head, _ in self.used(queue)] == [0], self.device.trouble
        return b"".join(self.board.ram.read(at, length) for at, length in zip(places, into, strict=True))


def parts(driver: Driver) -> dict[int, tuple[int, int, int]]:
    """Of each kind of structure: BAR, offset, length, as the vendor-specific capabilities say."""
    config = bytes(driver.device.config.bytes)
    return {
        config[at + 3]: (config[at + 4], *unpack("<II", config[at + 8 : at + 16]))
        for at, number in capabilities(config) if number == CapabilityId.VENDOR
    }  # fmt: skip


__all__ = ["BUFFERS", "INDIRECT", "NEXT", "READY", "RINGS", "VERSION_1", "WHERE", "WRITE", "Driver", "parts"]
