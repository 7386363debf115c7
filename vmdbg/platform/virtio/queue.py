"""Split virtqueues (virtio 1.2, 2.7) on the device's side: everything in them is the driver's, and may be hostile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from struct import Struct

_DESCRIPTOR = Struct("<QIHH")
_USED = Struct("<II")
NEXT, WRITE, INDIRECT = 1, 2, 4
"""Flags of a descriptor."""
NO_INTERRUPT = 1
"""Flag of the available ring, which counts without event indices."""
MOST_BYTES = 1 << 24
"""Of one chain: more is refused."""
NO_VECTOR = 0xFFFF


class BrokenQueue(Exception):
    """The driver broke a rule: the device needs a reset."""


@dataclass(frozen=True, slots=True)
class Buffer:
    address: int
    length: int


@dataclass
class Chain:
    """One request: what the device reads, and what it writes to.  `write` fills the latter in order."""

    head: int
    readable: list[Buffer] = field(default_factory=list)
    writable: list[Buffer] = field(default_factory=list)
    written: int = 0

    @property
    def size(self) -> int:
        """Bytes of all buffers."""
        return sum(buffer.length for buffer in (*self.readable, *self.writable))

    @property
    def room(self) -> int:
        """Bytes that may still be written."""
        return sum(buffer.length for buffer in self.writable) - self.written


class Queue:
    """One virtqueue.  `read` and `write` are the device's DMA, and may raise `DmaError`."""

    def __init__(self, most: int, read: Callable[[int, int], bytes], write: Callable[[int, bytes], None]) -> None:
        self.most = most
        self._read, self._write = read, write
        self.reset()

    def reset(self) -> None:
        self.size = self.most
        self.enabled = self.events = False
        """`events`: each side says up to which entry it need not be told (VIRTIO_F_EVENT_IDX, 2.7.7 and 2.7.10)."""
        self.vector = NO_VECTOR
        self.descriptors = self.driver = self.device = 0
        self._taken = self._used = 0
        self._awaited = 0
        """The entry that the driver shall tell of."""

    def _read_u16(self, address: int) -> int:
        return int.from_bytes(self._read(address, 2), "little")

    def pop(self) -> Chain | None:
        """The next request, if there is one.  Raises `BrokenQueue`."""
        waiting = (self._read_u16(self.driver + 2) - self._taken) & 0xFFFF
        if not waiting:
            self._await()
            return None
        if waiting > self.size:
            raise BrokenQueue(f"the available ring of {self.size} entries holds {waiting}")
        head = self._read_u16(self.driver + 4 + 2 * (self._taken % self.size))
        self._taken = self._taken + 1 & 0xFFFF
        return self._chain(head)

    def _await(self) -> None:
        """Want to be told of the next entry; while there are some, nobody need say of more."""
        if self.events and self._awaited != self._taken:
            self._awaited = self._taken
            self._write(self.device + 4 + 8 * self.size, self._awaited.to_bytes(2, "little"))

    def _chain(self, head: int) -> Chain:
        chain, table, count, index, left = Chain(head), self.descriptors, self.size, head, self.size
        total, indirect = 0, False
        while True:
            if index >= count:
                raise BrokenQueue(f"descriptor {index} of a table of {count}")
            if not left:
                raise BrokenQueue(f"a chain of more than {self.size} descriptors")
            left -= 1
            address, length, flags, index = _DESCRIPTOR.unpack(self._read(table + 16 * index, 16))
            if flags & INDIRECT:
                if indirect or flags & NEXT or not length or length % 16:
                    raise BrokenQueue("an indirect descriptor within a table, with a next one, or of a length that is no table's")
                table, count, index, indirect, left = address, length // 16, 0, True, min(length // 16, self.size)
                continue
            total += length
            if total > MOST_BYTES:
                raise BrokenQueue(f"a request of more than {MOST_BYTES:#x} bytes")
            if flags & WRITE:
                chain.writable.append(Buffer(address, length))
            elif chain.writable:
                raise BrokenQueue("a buffer to read behind one to write")
            else:
                chain.readable.append(Buffer(address, length))
            if not flags & NEXT:
                return chain

    def data(self, chain: Chain) -> bytes:
        """All that the driver wrote into a request."""
        return b"".join(self._read(buffer.address, buffer.length) for buffer in chain.readable)

    def put(self, chain: Chain, data: bytes) -> None:
        """Write on where the last one ended.  ValueError if there is no room."""
        if len(data) > chain.room:
            raise ValueError(f"{len(data)} bytes, and room for {chain.room}")
        skip = chain.written
        chain.written += len(data)
        for buffer in chain.writable:
            if skip >= buffer.length:
                skip -= buffer.length
                continue
            piece = data[: buffer.length - skip]
            if piece:
                self._write(buffer.address + skip, piece)
            data, skip = data[len(piece) :], 0

    def push(self, chain: Chain) -> bool:
        """Give a request back; whether the driver wants an interrupt for it."""
        number = self._used
        self._write(self.device + 4 + 8 * (self._used % self.size), _USED.pack(chain.head, chain.written))
        self._used = self._used + 1 & 0xFFFF
        self._write(self.device + 2, self._used.to_bytes(2, "little"))
        if self.events:
            return self._read_u16(self.driver + 4 + 2 * self.size) == number
        return not self._read_u16(self.driver) & NO_INTERRUPT
