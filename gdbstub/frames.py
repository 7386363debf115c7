"""Trace frames: what was collected at a hit, and the bounded buffer that keeps them.

A frame is a header and blocks: `R` the register block, `r` one register outside it, `M` a stretch of memory, `V` a trace
state variable.  Whoever collects in a way of its own makes the same bytes.
"""

import struct
from collections.abc import Iterator
from typing import NamedTuple

from gdbstub.description import Description

__all__ = ["HEADER", "LONGEST_BLOCK", "MEMORY", "REGISTERS", "SIZE", "VARIABLE", "Buffer", "Frame", "Writer"]

SIZE = 4 << 20
"""Bytes of a buffer unless the client asks for another size."""
LONGEST_BLOCK = 0xFFFF

HEADER = struct.Struct("<IHHI")
"""Bytes of the blocks, number of the tracepoint, step behind the hit (0 for the hit itself), pid."""
REGISTERS = struct.Struct("<cH")
"""R and its length."""
REGISTER = struct.Struct("<cHH")
"""r, number and length."""
MEMORY = struct.Struct("<cQH")
"""M, address and length."""
VARIABLE = struct.Struct("<cIq")
"""V, number and value."""


class Frame(NamedTuple):
    """A frame that is looked at."""

    number: int
    """In the buffer."""
    tracepoint: int
    step: int
    pid: int
    registers: bytes | None
    """The register block."""
    others: dict[int, bytes]
    """Registers outside the block, by number."""
    blocks: tuple[tuple[int, bytes], ...]
    """Memory: address and bytes."""
    variables: dict[int, int]

    def memory(self, address: int, length: int) -> bytes:
        """The collected prefix of a range."""
        found = b""
        while len(found) < length:
            here = address + len(found)
            piece = next((data[here - at :] for at, data in self.blocks if at <= here < at + len(data)), b"")
            if not piece:
                break
            found += piece
        return found[:length]

    def register(self, description: Description, number: int) -> bytes | None:
        """None if it was not collected."""
        if number >= description.block_count or self.registers is None:
            return self.others.get(number)
        start = description.offsets[number]
        return self.registers[start : start + description.size(number)]


class Writer:
    """Makes one frame."""

    def __init__(self, tracepoint: int, step: int, pid: int) -> None:
        self._who = tracepoint & 0xFFFF, step & 0xFFFF, pid
        self._parts: list[bytes] = []
        self.size = HEADER.size

    def _add(self, *parts: bytes) -> None:
        self._parts += parts
        self.size += sum(map(len, parts))

    def registers(self, block: bytes) -> None:
        self._add(REGISTERS.pack(b"R", len(block)), block)

    def register(self, number: int, value: bytes) -> None:
        """One outside the block."""
        self._add(REGISTER.pack(b"r", number, len(value)), value)

    def memory(self, address: int, data: bytes) -> None:
        """At most `LONGEST_BLOCK` bytes."""
        self._add(MEMORY.pack(b"M", address, len(data)), data)

    def variable(self, number: int, value: int) -> None:
        self._add(VARIABLE.pack(b"V", number, value - (1 << 64) if value >> 63 else value))

    def done(self) -> bytes:
        """The frame."""
        return HEADER.pack(self.size - HEADER.size, *self._who) + b"".join(self._parts)


class Buffer:
    """Frames one behind the other, at most `size` bytes.  A circular one lets go of the oldest, any other refuses the next."""

    def __init__(self, size: int = SIZE) -> None:
        self.size = size
        self.circular = False
        self.clear()

    def clear(self) -> None:
        """Forget all frames."""
        self._data = bytearray()
        self._starts: list[int] | None = []
        self.created = 0
        """Frames ever added."""
        self.count = 0
        """Frames in it."""

    @property
    def free(self) -> int:
        """Bytes left."""
        return self.size - len(self._data)

    def add(self, frame: bytes) -> bool:
        """Add a frame; False if there is no room for it."""
        if len(frame) > (self.size if self.circular else self.free):
            return False
        self.extend(frame, 1)
        return True

    def extend(self, frames: bytes | memoryview, count: int) -> None:
        """Add `count` frames at once; a buffer that is not circular must have room for them."""
        self._data += frames
        self.created += count
        self.count += count
        self._starts = None
        start = 0
        while len(self._data) - start > self.size:
            start += HEADER.size + HEADER.unpack_from(self._data, start)[0]
            self.count -= 1
        del self._data[:start]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Frame:
        if self._starts is None:
            self._starts = list(self._walk())
        start = self._starts[index]
        size, tracepoint, step, pid = HEADER.unpack_from(self._data, start)
        registers: bytes | None = None
        others, blocks, variables = {}, [], {}
        for kind, number, data in self._blocks(start + HEADER.size, size):
            if kind == b"R":
                registers = data
            elif kind == b"r":
                others[number] = data
            elif kind == b"M":
                blocks.append((number, data))
            else:
                variables[number] = int.from_bytes(data, "little")
        return Frame(index, tracepoint, step, pid, registers, others, tuple(blocks), variables)

    def __iter__(self) -> Iterator[Frame]:
        return (self[index] for index in range(self.count))

    def _walk(self) -> Iterator[int]:
        at = 0
        while at < len(self._data):
            yield at
            at += HEADER.size + HEADER.unpack_from(self._data, at)[0]

    def _blocks(self, at: int, size: int) -> Iterator[tuple[bytes, int, bytes]]:
        """Kind, number or address, and data."""
        data, end = self._data, at + size
        while at < end:
            kind = bytes(data[at : at + 1])
            number = 0
            if kind == b"V":
                number, length, header = VARIABLE.unpack_from(data, at)[1], 8, VARIABLE.size - 8
            elif kind == b"R":
                (_, length), header = REGISTERS.unpack_from(data, at), REGISTERS.size
            else:
                form = REGISTER if kind == b"r" else MEMORY
                (_, number, length), header = form.unpack_from(data, at), form.size
            yield kind, number, bytes(data[at + header : at + header + length])
            at += header + length
