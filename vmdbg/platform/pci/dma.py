"""The one way of devices to memory and to the local APICs: here an IOMMU translates, and here is known who it was."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from introspect import sources
from introspect.address import Iova, Spa
from introspect.pci import RequesterId
from vmdbg.platform.apicbus import ApicBus, DeliveryMode

MSI_FIRST, MSI_LAST = 0xFEE00000, 0xFEEFFFFF
"""Writes of four bytes to this range are interrupt messages (APM2 16.11.1), and never reach memory; nothing is read there."""
MOST = 1 << 24
"""Bytes that one transaction moves at most: what a device asks for in a piece is bounded work."""


class DmaError(Exception):
    """A transaction that is not carried out: `reason` in words."""

    def __init__(self, requester: RequesterId, address: int, write: bool, reason: str) -> None:
        super().__init__(f"{'write' if write else 'read'} by {requester} at {address:#x}: {reason}")
        self.requester, self.address, self.write, self.reason = requester, address, write, reason


class Span(NamedTuple):
    """A piece of system-physical memory that a transaction leads to."""

    spa: Spa
    length: int


class Translator(Protocol):
    """An IOMMU, or the device exclusion vector."""

    def translate(
        self, requester: RequesterId, address: Iova, length: int, write: bool, *, quiet: bool = False, pasid: int | None = None
    ) -> Sequence[Span]:
        """Where a transaction leads, in order.  `DmaError` if it is refused; `quiet` logs nothing and caches nothing."""

    def remap(self, requester: RequesterId, address: Iova, data: int, *, quiet: bool = False) -> Sequence[Message]:
        """The interrupts that a message becomes.  `DmaError` if it is refused."""


class Guard(Protocol):
    """What keeps devices from system-physical memory whatever a translator says: the DEV, SKINIT's protection of its block."""

    @property
    def on(self) -> bool:
        """Whether it may refuse anything at all: asked for every access, and `refuse` only if so."""

    def refuse(self, requester: RequesterId, span: Span, write: bool, *, quiet: bool) -> str:
        """Why not, in words; empty if the guard has nothing against it.  `quiet` logs nothing and caches nothing."""


class Memory(sources.Memory, Protocol):
    """RAM as devices reach it; `engine.memory.Ram` is one."""

    def extent(self, spa: int, length: int) -> int: ...

    def dma(self, device: str, spa: int, data: bytes) -> None: ...


@dataclass(frozen=True, slots=True)
class Message:
    """An interrupt message as the local APICs take it."""

    vector: int
    mode: DeliveryMode
    dest: int
    logical: bool
    level: bool
    wide: bool = False

    @classmethod
    def decode(cls, address: int, data: int) -> Message:
        """Of an MSI's address and data (APM2 16.11.1); bits that it does not name are ignored."""
        return cls(
            data & 0xFF, DeliveryMode(data >> 8 & 7), address >> 12 & 0xFF, bool(address & 4), bool(data & 0x8000)
        )


class Record(NamedTuple):
    """A transaction that was asked for, for whoever listens: told before it happens."""

    requester: RequesterId
    name: str
    address: int
    length: int
    write: bool
    refused: str
    data: bytes
    """What is written; empty for a read."""


class Dma:
    """Transactions of devices."""

    def __init__(self, memory: Memory, apics: ApicBus) -> None:
        self.memory = memory
        self.apics = apics
        self.translator: Translator | None = None
        self.guards: list[Guard] = []
        """Asked in order about each piece, behind the translator."""
        self.listeners: list[Callable[[Record], None]] = []
        self.names: Callable[[RequesterId], str] = str
        """What debuggers call a requester."""

    def locate(
        self, requester: RequesterId, address: int, length: int, write: bool, *, quiet: bool = True, pasid: int | None = None
    ) -> Sequence[Span]:
        """Where a transaction would lead, without a side effect if it is `quiet`.  Raises `DmaError`."""
        if length > MOST:
            raise DmaError(requester, address, write, f"{length:#x} bytes are more than {MOST:#x} at once")
        if address < 0 or address + length > 1 << 64:
            raise DmaError(requester, address, write, "the address has more than 64 bits")
        if self.translator is not None:
            spans = self.translator.translate(requester, Iova(address), length, write, quiet=quiet, pasid=pasid)
        else:
            spans = [Span(Spa(address), length)]
        if address <= MSI_LAST and address + length > MSI_FIRST:
            raise DmaError(requester, address, write, "this range is for interrupt messages of four bytes, which are written")
        for span in spans:
            refused = self.refusal(requester, span, write, quiet=quiet)
            if refused:
                raise DmaError(requester, address, write, refused)
            if self.memory.extent(span.spa, span.length) != span.length:
                where = span.spa + self.memory.extent(span.spa, span.length)
                raise DmaError(requester, address, write, f"no memory at {where:#x}")
        return spans

    def refusal(self, requester: RequesterId, span: Span, write: bool, *, quiet: bool = True) -> str:
        """Why a guard refuses a piece; empty if none does.  Also for what an IOMMU reads and writes on its own behalf."""
        for guard in self.guards:
            if guard.on and (reason := guard.refuse(requester, span, write, quiet=quiet)):
                return reason
        return ""

    @property
    def guarded(self) -> bool:
        """Whether any guard may refuse something."""
        return any(guard.on for guard in self.guards)

    def read(self, requester: RequesterId, address: int, length: int, pasid: int | None = None) -> bytes:
        """Raises `DmaError`."""
        try:
            spans = self.locate(requester, address, length, False, quiet=False, pasid=pasid)
        except DmaError as error:
            self._tell(requester, address, length, refused=error.reason)
            raise
        self._tell(requester, address, length)
        return b"".join(self.memory.read(span.spa, span.length) for span in spans)

    def write(self, requester: RequesterId, address: int, data: bytes, pasid: int | None = None) -> None:
        """Memory, or an interrupt message.  Raises `DmaError`."""
        try:
            if len(data) == 4 and pasid is None and MSI_FIRST <= address <= MSI_LAST - 3:
                messages = self.messages(requester, address, int.from_bytes(data, "little"), quiet=False)
                self._tell(requester, address, 4, data)
                for message in messages:
                    self.deliver(message)
                return
            spans = self.locate(requester, address, len(data), True, quiet=False, pasid=pasid)
        except DmaError as error:
            self._tell(requester, address, len(data), data, error.reason)
            raise
        self._tell(requester, address, len(data), data)
        name, done = self.names(requester), 0
        for span in spans:
            self.memory.dma(name, span.spa, data[done : done + span.length])
            done += span.length

    def messages(self, requester: RequesterId, address: int, data: int, *, quiet: bool = True) -> Sequence[Message]:
        """What a write of four bytes to the interrupt range becomes; `quiet` as for `locate`.  Raises `DmaError`."""
        if not MSI_FIRST <= address <= MSI_LAST - 3:
            raise DmaError(requester, address, True, f"interrupt messages go to {MSI_FIRST:#x} to {MSI_LAST:#x}")
        if self.translator is not None:
            return self.translator.remap(requester, Iova(address), data, quiet=quiet)
        return [Message.decode(address, data)]

    def interrupt(self, requester: RequesterId, address: int, data: int) -> None:
        """An interrupt message.  Raises `DmaError` where a translator refuses it."""
        for message in self.messages(requester, address, data, quiet=False):
            self.deliver(message)

    def deliver(self, message: Message) -> None:
        self.apics.deliver(message.vector, message.mode, message.dest, message.logical, message.level, message.wide)

    def _tell(
        self, requester: RequesterId, address: int, length: int, data: bytes | None = None, refused: str = ""
    ) -> None:
        """`data`: None for a read."""
        if self.listeners:
            record = Record(requester, self.names(requester), address, length, data is not None, refused, data or b"")
            for listener in self.listeners:
                listener(record)
