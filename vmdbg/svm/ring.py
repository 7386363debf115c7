"""The exits that are remembered of a guest: a ring of records, which the world switch fills, in Python or in C (switch.c)."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterator
from typing import NamedTuple

DEFAULT_EXITS = 4096
MOST_EXITS = 1 << 20
"""Of one guest: 128 MiB."""


class Record(NamedTuple):
    """One #VMEXIT, as it is in memory.  `number` counts all exits of the machine; times are guest time.

    `insn` is the instruction at RIP, where the exit is about it: as far as its page goes.  `form` is its length, and in bits 5:4
    the mode it is of, as in `BITS`.
    """

    number: int = 0
    cpu: int = 0
    vmcb: int = 0
    time: int = 0
    rip: int = 0
    code: int = 0
    info1: int = 0
    info2: int = 0
    intinfo: int = 0
    host_rip: int = 0
    """Of the VMRUN."""
    entered: int = 0
    """Behind that VMRUN."""
    resumed: int = 0
    """Behind the CPU's next VMRUN, of whomever; 0 until then."""
    rax: int = 0
    rcx: int = 0
    insn: bytes = b""
    form: int = 0


_RECORD = struct.Struct("<14Q15sB")
RECORD_SIZE = _RECORD.size
_RESUMED = 8 * Record._fields.index("resumed")
BITS = (16, 32, 64)


class Head(ctypes.Structure):
    """What C is given of a ring: where it is, how many there ever were, which slot is next, and at which count it is full."""

    _fields_ = (
        ("count", ctypes.c_uint64), ("next", ctypes.c_uint64), ("capacity", ctypes.c_uint64), ("records", ctypes.c_void_p),
        ("limit", ctypes.c_uint64),
    )  # fmt: skip


NO_LIMIT = (1 << 64) - 1


class Slots:
    """A ring of `capacity` slots of `size` bytes, at an address that C may be given."""

    def __init__(self, size: int, capacity: int) -> None:
        """Capacity 0: nothing is kept, only counted."""
        self.size, self.capacity = size, capacity
        self._memory = (ctypes.c_char * (size * capacity))()
        self.view = memoryview(self._memory).cast("B")
        self.start = ctypes.addressof(self._memory)
        self._head = Head(0, 0, capacity, self.start if capacity else None, NO_LIMIT)
        self._q = memoryview(self._head).cast("B").cast("Q")
        self.address = ctypes.addressof(self._head)

    @property
    def count(self) -> int:
        """How many there ever were."""
        return self._q[0]

    def __len__(self) -> int:
        return min(self.count, self.capacity)

    def take(self) -> int | None:
        """Where the next one goes in `view`; None if it is not kept."""
        q = self._q
        q[0] += 1
        slot = q[1]
        if not self.capacity:
            return None
        q[1] = slot + 1 if slot + 1 < self.capacity else 0
        return self.size * slot

    def oldest_first(self) -> Iterator[int]:
        """Where those that are kept are in `view`."""
        first = self._q[1] - len(self)
        return (self.size * ((first + n) % self.capacity) for n in range(len(self)))

    def newest_first(self) -> Iterator[int]:
        last = self._q[1] - 1
        return (self.size * ((last - n) % self.capacity) for n in range(len(self)))


class Ring(Slots):
    """The last exits of one guest."""

    def __init__(self, capacity: int = DEFAULT_EXITS) -> None:
        super().__init__(RECORD_SIZE, capacity)

    @property
    def untaken(self) -> int:
        """How many somebody has not taken yet who wants them all; 0 where nobody does."""
        return self.count + self.capacity - self._q[4] if self._q[4] != NO_LIMIT else 0

    @property
    def full(self) -> bool:
        """Whether the next one would take the place of one that is untaken: C leaves it to Python."""
        return self.count >= self._q[4]

    def taken(self, count: int | None) -> None:
        """Somebody has the first `count` that there ever were, and wants all that come; None: nobody does any more."""
        self._q[4] = NO_LIMIT if count is None else count + self.capacity

    def add(self, *values: int | bytes) -> int:
        """The fields of a `Record`.  Returns its address, 0 if it is not kept."""
        at = self.take()
        if at is None:
            return 0
        _RECORD.pack_into(self.view, at, *values)
        return self.start + at

    def record(self, at: int) -> Record:
        """That at an offset in `view`."""
        return Record._make(_RECORD.unpack_from(self.view, at))

    def records(self) -> Iterator[Record]:
        """The oldest first."""
        return map(self.record, self.oldest_first())

    def latest(self) -> Iterator[Record]:
        """The newest first."""
        return map(self.record, self.newest_first())


class Crossing(ctypes.Structure):
    """A CPU's last VMRUN, and the record of its last #VMEXIT, of which the next VMRUN tells how long the host took."""

    _fields_ = (
        ("host_rip", ctypes.c_uint64), ("entered", ctypes.c_uint64), ("last", ctypes.c_uint64), ("last_number", ctypes.c_uint64),
    )  # fmt: skip

    def enter(self, rip: int, now: int) -> None:
        """A VMRUN at `rip` has been executed."""
        self.host_rip, self.entered = rip, now
        if self.last and ctypes.c_uint64.from_address(self.last).value == self.last_number:  # else its place has been taken
            ctypes.c_uint64.from_address(self.last + _RESUMED).value = now

    def leave(self, address: int, number: int) -> None:
        """A #VMEXIT has the record at `address`."""
        self.last, self.last_number = address, number


INSTRUCTIONS = frozenset((*range(0x40), *range(0x65, 0x7D), *range(0x80, 0x8F)))
"""Exits that come before an instruction which is intercepted: the one at RIP."""
FORM = {16: 0, 32: 1 << 4, 64: 2 << 4}
"""`Record.form` by mode, without the length."""
