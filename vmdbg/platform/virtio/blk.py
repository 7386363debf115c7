"""virtio-blk (virtio 1.2, 5.2): a disk."""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from struct import Struct, pack

from vmdbg.platform.bus import State
from vmdbg.platform.clock import Clock
from vmdbg.platform.virtio.disk import SECTOR, Disk, contents
from vmdbg.platform.virtio.queue import BrokenQueue, Chain
from vmdbg.platform.virtio.transport import QUEUE_SIZE, VirtioDevice

SEGMENT_MAX, READ_ONLY, BLOCK_SIZE, FLUSH = 1 << 2, 1 << 5, 1 << 6, 1 << 9
"""Features."""
_REQUEST = Struct("<IIQ")
ID_LENGTH = 20


class Request(IntEnum):
    IN = 0
    OUT = 1
    FLUSH = 4
    GET_ID = 8


class Outcome(IntEnum):
    """The byte behind a request's data."""

    OK = 0
    IO_ERROR = 1
    UNSUPPORTED = 2


class Blk(VirtioDevice):
    kind, title = "virtio-blk", "a disk"
    class_code = 0x010000
    type, queue_count, config_size = 2, 1, 60

    def __init__(self, clock: Clock, disk: Disk, *, read_only: bool = False, serial: str = "vmdbg") -> None:
        super().__init__(clock)
        self.disk, self.read_only, self.serial = disk, read_only, serial
        self.served = dict.fromkeys(Request, 0)

    def device_features(self) -> int:
        return SEGMENT_MAX | BLOCK_SIZE | FLUSH | READ_ONLY * self.read_only

    def device_config(self) -> bytes:
        return pack("<QIIHBBI", self.disk.size // SECTOR, 0, QUEUE_SIZE - 2, 0, 0, 0, SECTOR).ljust(self.config_size, b"\0")

    def state(self) -> State:
        counts = {f"{request.name.lower()} requests": count for request, count in self.served.items()}
        return {"sectors": self.disk.size // SECTOR, **counts, **super().state()}

    def identity(self) -> Mapping[str, str | int | bool]:
        return {"disk": contents(self.disk), "readonly": self.read_only, "serial": self.serial}

    def close(self) -> None:
        self.disk.close()

    def serve(self, number: int) -> None:
        queue = self.queues[number]
        while (chain := self.take(number)) is not None:
            if not chain.room:
                raise BrokenQueue("a request without a place for its status")
            outcome, data = self._carry_out(chain, queue.data(chain))
            if data:
                queue.put(chain, data)
            skipped = chain.room - 1  # what was not read stays, the status is the last byte
            self._put_status(chain, outcome, skipped)
            self.give_back(number, chain)

    def _put_status(self, chain: Chain, outcome: Outcome, skipped: int) -> None:
        done, chain.written = chain.written, chain.written + skipped
        self.queues[0].put(chain, bytes([outcome]))
        chain.written = done + 1

    def _carry_out(self, chain: Chain, data: bytes) -> tuple[Outcome, bytes]:
        if len(data) < _REQUEST.size:
            raise BrokenQueue(f"a request of {len(data)} bytes")
        kind, _, sector = _REQUEST.unpack_from(data)
        payload, room = data[_REQUEST.size :], chain.room - 1
        if kind in self.served:
            self.served[Request(kind)] += 1
        try:
            if kind == Request.GET_ID:
                return Outcome.OK, self.serial.encode().ljust(ID_LENGTH, b"\0")[: min(ID_LENGTH, room)]
            if kind == Request.FLUSH:
                self.disk.flush()
                return Outcome.OK, b""
            if kind not in (Request.IN, Request.OUT):
                return Outcome.UNSUPPORTED, b""
            length = len(payload) if kind == Request.OUT else room
            if length % SECTOR or sector * SECTOR + length > self.disk.size or (kind == Request.OUT and self.read_only):
                return Outcome.IO_ERROR, b""
            if kind == Request.IN:
                return Outcome.OK, self.disk.read(sector * SECTOR, length)
            self.disk.write(sector * SECTOR, payload)
        except OSError:
            return Outcome.IO_ERROR, b""
        return Outcome.OK, b""
