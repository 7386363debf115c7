"""One function of a PCI device: what every device is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar, NamedTuple, TypeVar

from introspect.layout import Structure
from introspect.pci import COMMAND, HEADER0, STATUS, RequesterId
from vmdbg.platform.bus import State
from vmdbg.platform.clock import TICKS_PER_SECOND, Clock, Timer
from vmdbg.platform.pci.ats import Ats, NotMappedError, PageRequests, Pasid, Piece
from vmdbg.platform.pci.capability import Acs, Capability, Express, ExtendedCapability, MessageInterrupts, MsiX, Power
from vmdbg.platform.pci.config import CONVENTIONAL, ConfigSpace, Rule
from vmdbg.platform.pci.dma import MOST, PLAIN, Attributes, DmaError

if TYPE_CHECKING:
    from vmdbg.platform.pci.bus import PciBus

C = TypeVar("C", bound=Capability)

STATUS_ERRORS = (
    STATUS.MASTER_PARITY | STATUS.SIGNALLED_TARGET_ABORT | STATUS.RECEIVED_TARGET_ABORT | STATUS.RECEIVED_MASTER_ABORT
    | STATUS.SIGNALLED_ERROR | STATUS.PARITY_ERROR
)  # fmt: skip
FIRST_CAPABILITY, FIRST_EXTENDED = 0x40, 0x100
INVALIDATE_TICKS = TICKS_PER_SECOND // 500_000
"""Guest time until a function says that it has forgotten what it was told to: 2 us."""


@dataclass(frozen=True, slots=True)
class Bar:
    """A base address register: a range of `size` bytes, a power of two, of memory or I/O ports.

    `width`: the widest access that the device takes in a piece.
    """

    index: int
    size: int
    io: bool = False
    wide: bool = False
    """64 bits: it takes the next register as well."""
    prefetchable: bool = False
    width: int = 4

    def __post_init__(self) -> None:
        least = 4 if self.io else 16
        if self.size < least or self.size & self.size - 1 or (self.size >= 1 << 32 and not self.wide):
            raise ValueError(f"BAR {self.index}: {self.size:#x} bytes is no power of two of at least {least}")

    @property
    def flags(self) -> int:
        return 1 if self.io else self.wide << 2 | self.prefetchable << 3

    @property
    def rules(self) -> Iterator[tuple[str, Rule]]:
        mask = ~(self.size - 1)
        yield f"bar{self.index}", Rule(self.flags, mask & 0xFFFFFFFF)
        if self.wide:
            yield f"bar{self.index + 1}", Rule(0, mask >> 32 & 0xFFFFFFFF)


class Region(NamedTuple):
    """Where a BAR answers: first to last address, of ports if `io`; `base` is what it is programmed to."""

    first: int
    last: int
    io: bool
    function: Function
    bar: Bar
    base: int


class Function:
    """A device is a subclass: it names itself in class attributes, and answers in its BARs.

    What it does to memory it does from a timer of the clock, never amid an instruction's access to it: `later`.
    """

    kind: ClassVar[str]
    """As `--device` names it."""
    title: ClassVar[str]
    """What it is, in words."""
    vendor_id: ClassVar[int]
    device_id: ClassVar[int]
    class_code: ClassVar[int]
    revision: ClassVar[int] = 0
    subsystem: ClassVar[tuple[int, int]] = (0, 0)
    """Vendor, device."""
    bars: ClassVar[tuple[Bar, ...]] = ()
    interrupt_pin: ClassVar[int] = 0
    """1 to 4 for INTA to INTD."""
    header: ClassVar[Structure] = HEADER0
    header_type: ClassVar[int] = 0
    first_capability: ClassVar[int] = FIRST_CAPABILITY
    ats = False
    """Whether it has address translation services; chosen before it is attached."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.bus: PciBus | None = None
        self.devfn = 0
        self.config = ConfigSpace()
        self.capabilities: list[Capability] = []
        self.on_input: Callable[[str, bytes], None] = lambda name, data: None
        """Told what `poll` takes from outside."""
        self._msix: MsiX | None = None
        self._ats: Ats | None = None
        self._pasids: Pasid | None = None
        self._intx = False
        self._timers: list[Timer] = []

    # What a device says of itself

    def make_capabilities(self) -> Iterable[Capability]:
        """In the order of the chain."""
        return ()

    def make_extended(self) -> Iterable[ExtendedCapability]:
        """Likewise of the chain that PCI Express adds."""
        return (Ats(),) if self.ats else ()

    def page_response(self, tag: int, response: int) -> None:
        """What it has asked for by PRI was answered."""

    def read_bar(self, bar: int, offset: int, size: int) -> int:
        """Software reads; `size` is at most the BAR's width."""
        return 0

    def write_bar(self, bar: int, offset: int, size: int, value: int) -> None:
        """Software writes."""

    def device_reset(self) -> None:
        """All state but configuration space, as after power-on."""

    def poll(self) -> bool:
        """Take input from outside the machine; whether there was some."""
        return False

    def identity(self) -> Mapping[str, str | int | bool]:
        """What software can see of how the device was made, besides its kind and its place."""
        return {}

    @property
    def hears(self) -> bool:
        """Whether `poll` may find something, some time."""
        return False

    def close(self) -> None:
        """The machine is no longer needed."""

    def state(self) -> State:
        """For people: nothing changes."""
        return {}

    @property
    def name(self) -> str:
        """A short word that no other function has."""
        return f"{self.kind}-{self.address}"

    # What it may do

    def dma_read(self, address: int, length: int, attributes: Attributes = PLAIN) -> bytes:
        """Raises `DmaError`, and notes the abort in the status register; with ATS `NotMappedError`, which is none."""
        data = bytearray()
        for piece in self._pieces(address, length, False, attributes):
            data += self._read(piece)
        return bytes(data)

    def dma_write(self, address: int, data: bytes, attributes: Attributes = PLAIN) -> None:
        """As `dma_read`."""
        done = 0
        for piece in self._pieces(address, len(data), True, attributes):
            self._write(piece, data[done : done + piece.length])
            done += piece.length

    def _pieces(self, address: int, length: int, write: bool, attributes: Attributes) -> list[Piece]:
        self._may_master(address, write)
        ats = self._ats
        attributes = self._pasids.allowed(attributes) if self._pasids is not None else PLAIN
        if ats is None or not ats.enabled or length > MOST:
            return [Piece(address, length, attributes, None)]
        try:
            self._may_translate(address, write)
            return ats.pieces(address, length, write, attributes)
        except NotMappedError:
            raise
        except DmaError:
            self._aborted()
            raise

    def _read(self, piece: Piece) -> bytes:
        try:
            return self.attached.root.dma.read(self.requester, piece.address, piece.length, piece.attributes, piece.iova)
        except DmaError:
            self._aborted()
            raise

    def _write(self, piece: Piece, data: bytes) -> None:
        try:
            self.attached.root.dma.write(self.requester, piece.address, data, piece.attributes, piece.iova)
        except DmaError:
            self._aborted()
            raise

    def message(self, address: int, data: int) -> None:
        """Send an interrupt message: a write of four bytes that is never translated, and lost where it may not be made."""
        try:
            self._may_master(address, True)
            self._write(Piece(address, 4, PLAIN, None), data.to_bytes(4, "little"))
        except DmaError:
            return

    # Implements `vmdbg.platform.pci.dma.Endpoint`

    def invalidate(self, first: int, end: int, pasid: int | None, tag: int) -> None:
        """Who has no cache, or sleeps, does not answer."""
        if self._ats is not None and self.awake:
            self._ats.forget(first, end, pasid)
            self.later(INVALIDATE_TICKS, partial(self.invalidated, tag))

    def invalidated(self, tag: int) -> None:
        translator = self.attached.root.dma.translator
        if translator is not None:
            translator.invalidated(self.requester, tag)

    def page_answered(self, tag: int, response: int) -> None:
        requests = self.capability(PageRequests)
        if requests is not None:
            requests.answered(tag, response)

    def signal(self, vector: int = 0) -> None:
        """Send the message of a vector, if software has turned on MSI or MSI-X; of both, MSI-X."""
        enabled = [capability for capability in self._message_interrupts() if capability.enabled]
        if enabled:
            max(enabled, key=lambda capability: capability.id).signal(vector)

    def set_intx(self, level: bool) -> None:
        """Drive the interrupt pin; no signal leaves while messages are on or the command register forbids it."""
        self._intx = level
        self._update_intx()

    def later(self, ticks: int, callback: Callable[[], None]) -> None:
        """Call back after guest time, unless the function is reset before."""
        self._timers = [timer for timer in self._timers if timer.active]
        self._timers.append(self.clock.at(self.clock.now + max(ticks, 1), callback))

    # Its place

    @property
    def attached(self) -> PciBus:
        assert self.bus is not None, f"{self.kind} is on no bus"
        return self.bus

    @property
    def on_root_bus(self) -> bool:
        return self.bus is None or self.bus.bridge is None

    @property
    def _on_express(self) -> bool:
        """No bridge to conventional PCI is on the way."""
        bus = self.attached
        while bus.bridge is not None:
            if not bus.bridge.express:
                return False
            bus = bus.bridge.attached
        return True

    @property
    def address(self) -> RequesterId:
        """Where configuration accesses reach it, by the bus numbers that software gave."""
        return RequesterId(self.attached.number << 8 | self.devfn)

    @property
    def requester(self) -> RequesterId:
        """Who its transactions come from: itself, or the first bridge to conventional PCI on the way."""
        bus, found = self.attached, self.address
        while bus.bridge is not None:
            if not bus.bridge.express:
                found = bus.bridge.address
            bus = bus.bridge.attached
        return found

    def attach(self, bus: PciBus, devfn: int) -> None:
        self.bus, self.devfn = bus, devfn
        self._define()
        self._chain()
        self.config.reset()

    def _define(self) -> None:
        rules = {
            "vendor_id": Rule(self.vendor_id), "device_id": Rule(self.device_id), "revision": Rule(self.revision),
            "class_code": Rule(self.class_code), "header_type": Rule(self.header_type), "cache_line_size": Rule(0, 0xFF),
            "command": Rule(0, COMMAND.IO | COMMAND.MEMORY | COMMAND.BUS_MASTER | COMMAND.PARITY | COMMAND.SERR
                            | COMMAND.INTX_DISABLE),
            "status": Rule(0, 0, STATUS_ERRORS),
            "interrupt_pin": Rule(self.interrupt_pin), "interrupt_line": Rule(0, 0xFF if self.interrupt_pin else 0),
        }  # fmt: skip
        for bar in self.bars:
            rules.update(bar.rules)
        if self.header is HEADER0:
            rules |= {"subsystem_vendor_id": Rule(self.subsystem[0]), "subsystem_id": Rule(self.subsystem[1])}
        self.config.define(self.header, rules)

    def _chain(self) -> None:
        at, link = self.first_capability, self.header.offset_of("capabilities")
        chain = [one for one in self.make_capabilities() if self._on_express or not isinstance(one, Express)]
        self.capabilities = list(chain)
        self._msix = self.capability(MsiX)
        for capability in chain:
            assert at + capability.size <= CONVENTIONAL
            self.config.define_at(link, 1, Rule(at))
            self.config.define_at(at, 1, Rule(capability.id))
            self.config.define_at(at + 1, 1, Rule(0))
            capability.attach(self, at)
            link, at = at + 1, at + capability.size + 3 & ~3
        if chain:
            self.config.define_at(self.header.offset_of("status"), 2, Rule(STATUS.CAPABILITIES, 0, STATUS_ERRORS))
        extended = list(self.make_extended()) if self.extended else []
        at = FIRST_EXTENDED
        for number, one in enumerate(extended, 1):
            following = at + one.size if number < len(extended) else 0
            self.config.define_at(at, 4, Rule(one.id | one.version << 16 | following << 20))
            one.attach(self, at)
            at = following
        self.capabilities += extended
        self._ats, self._pasids = self.capability(Ats), self.capability(Pasid)

    def mark_multifunction(self) -> None:
        """Another function of the same device is there."""
        self.config.define_at(self.header.offset_of("header_type"), 1, Rule(self.header_type | 0x80))

    def capability(self, kind: type[C]) -> C | None:
        return next((found for found in self.capabilities if isinstance(found, kind)), None)

    # Configuration space

    @property
    def extended(self) -> bool:
        return self.capability(Express) is not None

    def read_config(self, offset: int, size: int) -> int:
        """Zeros beyond the space that it has."""
        if offset + size > CONVENTIONAL and not self.extended:
            return 0
        for capability in self._touched(offset, size):
            capability.reading(offset - capability.offset, size)
        return self.config.get(offset, size)

    def write_config(self, offset: int, size: int, value: int) -> None:
        if offset + size > CONVENTIONAL and not self.extended:
            return
        self.config.write(offset, size, value)
        for capability in self._touched(offset, size):
            capability.written()
            capability.written_at(offset - capability.offset, size)
        self.config_written(offset, size)
        self.attached.root.changed()
        self._update_intx()

    def _touched(self, offset: int, size: int) -> list[Capability]:
        return [one for one in self.capabilities if offset < one.offset + one.size and one.offset < offset + size]

    def config_written(self, offset: int, size: int) -> None:
        """For devices with registers of their own there."""

    def header_field(self, name: str) -> int:
        return self.header.read(self.config.bytes, name)

    def put_header(self, name: str, value: int) -> None:
        self.header.write(self.config.bytes, name, value)

    @property
    def awake(self) -> bool:
        power = self.capability(Power)
        return power is None or power.awake

    def reset(self) -> None:
        """Power-on, a reset of its bus, or its own."""
        self._cancel()
        self.config.reset()
        for capability in self.capabilities:
            capability.reset()
        self._intx = False
        self.device_reset()
        self._update_intx()
        if self.bus is not None:
            self.bus.root.changed()

    def _cancel(self) -> None:
        """Nothing that `later` was asked for happens."""
        for timer in self._timers:
            timer.cancel()
        self._timers = []

    def function_level_reset(self) -> None:
        """PCI Express 6.6.2: as a reset of the function alone."""
        self.reset()

    # Decoding

    def regions(self) -> Iterator[Region]:
        """Where it answers now."""
        command = self.header_field("command")
        if not self.awake:
            return
        for bar in self.bars:
            if not command & (COMMAND.IO if bar.io else COMMAND.MEMORY):
                continue
            base = self.header_field(f"bar{bar.index}") & (~3 if bar.io else ~0xF) & 0xFFFFFFFF
            if bar.wide:
                base |= self.header_field(f"bar{bar.index + 1}") << 32
            if not bar.io or base + bar.size <= 0x10000:
                yield Region(base, base + bar.size - 1, bar.io, self, bar, base)

    def access(self, bar: Bar, offset: int, size: int, value: int | None) -> int:
        """Software reads (`value` is None) or writes in a BAR; a table of MSI-X in it is not the device's own."""
        messages = self._msix
        if messages is not None and messages.claims(bar.index, offset):
            if value is None:
                return messages.read(offset, size)
            messages.write(offset, size, value)
            return 0
        if value is None:
            return self.read_bar(bar.index, offset, size)
        self.write_bar(bar.index, offset, size, value)
        return 0

    # Interrupts, and the right to master the bus

    @property
    def messages_on(self) -> bool:
        return any(capability.enabled for capability in self._message_interrupts())

    def _message_interrupts(self) -> Iterator[MessageInterrupts]:
        return (capability for capability in self.capabilities if isinstance(capability, MessageInterrupts))

    def _update_intx(self) -> None:
        if not self.interrupt_pin or self.bus is None:
            return
        status, command = self.header_field("status"), self.header_field("command")
        self.put_header("status", status | STATUS.INTERRUPT if self._intx else status & ~STATUS.INTERRUPT)
        driven = self._intx and self.awake and not command & COMMAND.INTX_DISABLE and not self.messages_on
        self.bus.set_intx(self, driven)

    def _may_master(self, address: int, write: bool) -> None:
        if not self.awake:
            raise DmaError(self.requester, address, write, "it sleeps: its power state is not D0")
        function: Function | None = self
        while function is not None:
            if not function.header_field("command") & COMMAND.BUS_MASTER:
                whose = "its command register" if function is self else f"the command register of the bridge {function.address}"
                raise DmaError(self.requester, address, write, f"bus mastering is off in {whose}")
            function = function.attached.bridge

    def _may_translate(self, address: int, write: bool) -> None:
        bridge = self.attached.bridge
        while bridge is not None:
            acs = bridge.capability(Acs)
            if acs is not None and acs.blocks_translated:
                reason = f"the bridge {bridge.address} blocks translation requests and translated addresses (ACS)"
                raise DmaError(self.requester, address, write, reason)
            bridge = bridge.attached.bridge

    def _aborted(self) -> None:
        self.put_header("status", self.header_field("status") | STATUS.RECEIVED_MASTER_ABORT)
