"""The one way of devices to memory and to the local APICs: here an IOMMU translates, and here is known who it was."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from introspect import sources
from introspect.address import Iova, Spa
from introspect.iommu.verdicts import DmaAccess
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


class Attributes(NamedTuple):
    """What a request says of its address besides: the PASID prefix, and the AT field (PCI Express)."""

    pasid: int | None = None
    privileged: bool = False
    execute: bool = False
    translated: bool = False
    """The address is system-physical already, says the device."""

    def access(self, write: bool, *, request: bool = False) -> DmaAccess:
        """As the IOMMU's tables are asked; `request`: for the translation alone."""
        return DmaAccess(write, self.pasid, self.execute, self.privileged, request, self.translated)


PLAIN = Attributes()


class Answer(NamedTuple):
    """Of a translation request: `size` bytes from `first` on lead to `spa`, with these rights; or none of them."""

    first: int
    size: int
    spa: int
    read: bool
    write: bool
    execute: bool = False
    untranslated: bool = False
    """What is there must be accessed by untranslated addresses (U)."""


class PageRequest(NamedTuple):
    """What a device lacks: a page. `tag` is the group, of 9 bits, and this may be the `last` of it."""

    address: int
    tag: int
    last: bool
    read: bool
    write: bool
    attributes: Attributes = PLAIN


class Translator(Protocol):
    """An IOMMU, or the device exclusion vector."""

    def translate(
        self, requester: RequesterId, address: Iova, length: int, write: bool, *, quiet: bool = False,
        attributes: Attributes = PLAIN,
    ) -> Sequence[Span]:  # fmt: skip
        """Where a transaction leads, in order.  `DmaError` if it is refused; `quiet` logs nothing and caches nothing."""

    def answer(
        self, requester: RequesterId, address: Iova, write: bool, *, quiet: bool = False, attributes: Attributes = PLAIN
    ) -> Answer:
        """Of a translation request (ATS).  `DmaError` if it is aborted."""

    def ask(self, requester: RequesterId, request: PageRequest) -> None:
        """A page request (PRI); software answers some time, or never."""

    def invalidated(self, requester: RequesterId, tag: int) -> None:
        """A device has forgotten what it was told to."""

    def used(self, requester: RequesterId, address: int, spa: int, write: bool, attributes: Attributes = PLAIN) -> None:
        """A device goes by what it was answered once: told before it does.  Nothing changes but what debuggers are told."""

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


class Endpoint(Protocol):
    """A function as an IOMMU speaks to it."""

    def invalidate(self, first: int, end: int, pasid: int | None, tag: int) -> None:
        """Forget translations from `first` to before `end`, and say `Translator.invalidated` then."""

    def page_answered(self, tag: int, response: int) -> None:
        """To a page request: 0 success, 1 invalid, 15 failure."""


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
    """As the device has it, also where it sends what it has translated."""
    length: int
    write: bool
    refused: str
    data: bytes
    """What is written; empty for a read."""
    attributes: Attributes = PLAIN


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
        self.endpoint: Callable[[RequesterId], Endpoint | None] = lambda requester: None
        """Who is spoken to by a requester's number."""

    def locate(
        self, requester: RequesterId, address: int, length: int, write: bool, *, quiet: bool = True,
        attributes: Attributes = PLAIN,
    ) -> Sequence[Span]:  # fmt: skip
        """Where a transaction would lead, without a side effect if it is `quiet`.  Raises `DmaError`."""
        if length > MOST:
            raise DmaError(requester, address, write, f"{length:#x} bytes are more than {MOST:#x} at once")
        if address < 0 or address + length > 1 << 64:
            raise DmaError(requester, address, write, "the address has more than 64 bits")
        if self.translator is not None:
            spans = self.translator.translate(requester, Iova(address), length, write, quiet=quiet, attributes=attributes)
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

    def read(
        self, requester: RequesterId, address: int, length: int, attributes: Attributes = PLAIN, iova: int | None = None
    ) -> bytes:
        """`iova`: of what a translated address is the translation.  Raises `DmaError`."""
        shown = address if iova is None else iova
        try:
            spans = self.locate(requester, address, length, False, quiet=False, attributes=attributes)
        except DmaError as error:
            self._tell(requester, shown, length, refused=error.reason, attributes=attributes)
            raise
        self._tell(requester, shown, length, attributes=attributes)
        return b"".join(self.memory.read(span.spa, span.length) for span in spans)

    def write(
        self, requester: RequesterId, address: int, data: bytes, attributes: Attributes = PLAIN, iova: int | None = None
    ) -> None:
        """Memory, or an interrupt message; `iova` as for `read`.  Raises `DmaError`."""
        shown = address if iova is None else iova
        try:
            if len(data) == 4 and attributes.pasid is None and MSI_FIRST <= address <= MSI_LAST - 3:
                messages = self.messages(requester, address, int.from_bytes(data, "little"), quiet=False)
                self._tell(requester, shown, 4, data, attributes=attributes)
                for message in messages:
                    self.deliver(message)
                return
            spans = self.locate(requester, address, len(data), True, quiet=False, attributes=attributes)
        except DmaError as error:
            self._tell(requester, shown, len(data), data, error.reason, attributes)
            raise
        self._tell(requester, shown, len(data), data, attributes=attributes)
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
        self, requester: RequesterId, address: int, length: int, data: bytes | None = None, refused: str = "",
        attributes: Attributes = PLAIN,
    ) -> None:  # fmt: skip
        """`data`: None for a read."""
        if self.listeners:
            name = self.names(requester)
            record = Record(requester, name, address, length, data is not None, refused, data or b"", attributes)
            for listener in self.listeners:
                listener(record)
