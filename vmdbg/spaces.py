"""The address spaces of an inferior, for its debugger: guest-virtual, guest-physical and system-physical addresses.

For the hypervisor the last two are the same. Breakpoints are at guest-virtual addresses whatever is chosen here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple

from gdbstub.target import Space, TargetError, ThreadId
from vmdbg.contexts import Context, locate, locate_gpa
from vmdbg.engine.memory import Ram
from vmdbg.machine import Machine

PAGE = 4096
_END = 1 << 64


def _locate_spa(ram: Ram, context: Context, address: int) -> int | None:
    return address if ram.contains(address) else None


class Kind(NamedTuple):
    """A space: how it is offered, what it is in words, and what system-physical address one of its addresses has."""

    space: Space
    words: str
    locate: Callable[[Ram, Context, int], int | None]


KINDS = (
    # Threads of one inferior may have page tables of their own.
    Kind(Space("gva", thread=True), "linear addresses, through the thread's own page tables", locate),
    Kind(Space("gpa", physical=True), "the inferior's physical addresses: a guest's through its nested table", locate_gpa),
    Kind(Space("spa"), "physical addresses of the machine", _locate_spa),
)
NAMES = tuple(kind.space.name for kind in KINDS)


class Spaces(ABC):
    """The part of a `Debugger` that implements `gdbstub.target.Spaces`."""

    machine: Machine
    chosen_spaces: dict[int, int]
    """Indexes in `KINDS`, by pid; what is missing is 0."""

    @abstractmethod
    def context(self, thread: ThreadId) -> Context:
        """Where the thread's registers and memory are now."""

    def spaces(self, pid: int) -> Sequence[Space]:
        return [kind.space for kind in KINDS]

    def chosen_space(self, pid: int) -> int:
        return self.chosen_spaces.get(pid, 0)

    def choose_space(self, pid: int, index: int) -> None:
        self.chosen_spaces[pid] = index

    def read_space(self, thread: ThreadId, index: int, address: int, length: int) -> bytes:
        ram, context, data = self.machine.ram, self.context(thread), bytearray()
        while length > 0:
            size = min(length, PAGE - address % PAGE)
            spa = KINDS[index].locate(ram, context, address) if address < _END else None
            if spa is None or not ram.contains(spa, size):
                break
            data += ram.view[spa : spa + size]
            address += size
            length -= size
        return bytes(data)

    def write_space(self, thread: ThreadId, index: int, address: int, data: bytes) -> None:
        ram, context = self.machine.ram, self.context(thread)
        pieces, done = [], 0
        while done < len(data):
            at = address + done
            size = min(len(data) - done, PAGE - at % PAGE)
            spa = KINDS[index].locate(ram, context, at)
            if spa is None or not ram.contains(spa, size):
                raise TargetError(f"{NAMES[index]} {at:#x} leads to no memory for process {thread.pid}, so nothing was written")
            pieces.append((spa, data[done : done + size]))
            done += size
        for spa, piece in pieces:
            if ram.view[spa : spa + len(piece)] != piece:
                ram.write(spa, piece)
                self.machine.outside("debugger", f"memory {spa:#x} ".encode() + piece)
