"""`pci` and `dma`: the functions on PCI with their registers, and transactions in the name of any of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from introspect.commands import Arguments, Command, CommandError, Context
from introspect.commands.devices import iommu_of
from introspect.commands.iommu import WalkedIo, try_access
from introspect.commands.iommu_interrupts import Tried, try_message
from introspect.commands.parameters import Address, Candidate, Choice, Flag, Number, Parameter, Requester, Text
from introspect.commands.render import columns, jsonable, members, size_text
from introspect.expression import Space
from introspect.iommu.walk import in_interrupt_range
from introspect.pci import (
    CAPABILITIES,
    COMMAND,
    EXTENDED_CAPABILITIES,
    RequesterId,
    bars,
    capabilities,
    class_name,
    describe_capability,
    describe_extended,
    extended_capabilities,
    header_of,
    windows,
)
from vmdbg.platform.pci.bus import Bridge
from vmdbg.platform.pci.capability import MsiX
from vmdbg.platform.pci.dma import PLAIN, Attributes, DmaError
from vmdbg.platform.pci.function import Function

if TYPE_CHECKING:
    from vmdbg.debugger import Debugger

MOST_SHOWN = 1 << 16
_LINE = 16
_SHORT = {
    "power management": "PM", "PCI Express": "PCIe", "vendor-specific": "vendor", "secure device": "secure",
    "page requests": "PRI", "access control": "ACS",
}  # fmt: skip
"""Capabilities in a table of many functions."""


@dataclass(frozen=True, slots=True)
class BarView:
    """A BAR: where it is, how large, and whether it answers now."""

    index: int
    kind: str
    address: int
    size: int
    answers: bool

    def __str__(self) -> str:
        return f"BAR {self.index}: {self.kind} at {self.address:#x}, {size_text(self.size)}{'' if self.answers else ' (off)'}"


@dataclass(frozen=True, slots=True)
class CapabilityView:
    offset: int
    id: int
    name: str
    text: str


@dataclass(frozen=True, slots=True)
class FunctionView:
    """One function of PCI."""

    address: str
    depth: int
    kind: str
    vendor_id: int
    device_id: int
    class_code: int
    class_name: str
    command: int
    requester: str
    """Under which number its transactions arrive."""
    buses: tuple[int, int] | None
    """Of a bridge: the numbers of the buses behind it."""
    bars: tuple[BarView, ...]
    windows: dict[str, tuple[int, int]]
    capabilities: tuple[CapabilityView, ...]

    @classmethod
    def of(cls, function: Function, depth: int) -> FunctionView:
        config = bytes(function.config.bytes)
        answering = {region.bar.index for region in function.regions()}
        sizes = {bar.index: bar.size for bar in function.bars}
        bridge = isinstance(function, Bridge)
        found = tuple(
            BarView(bar.index, bar.words, bar.address, sizes.get(bar.index, 0), bar.index in answering)
            for bar in bars(config)
        )  # fmt: skip
        chain = [
            CapabilityView(at, number, CAPABILITIES.get(number, f"capability {number:#04x}"), describe_capability(config, at))
            for at, number in capabilities(config)
        ]
        for at, number in extended_capabilities(config):
            what = EXTENDED_CAPABILITIES.get(number, f"extended capability {number:#06x}")
            chain.append(CapabilityView(at, number, what, describe_extended(config, at)))
        code = function.header_field("class_code")
        return cls(
            str(function.address), depth, function.kind, function.vendor_id, function.device_id, code, class_name(code),
            function.header_field("command"), str(function.requester),
            (function.header_field("secondary_bus"), function.header_field("subordinate_bus")) if bridge else None,
            found, windows(config) if bridge else {}, tuple(chain),
        )  # fmt: skip

    @property
    def row(self) -> tuple[str, ...]:
        master = "master" if self.command & COMMAND.BUS_MASTER else ""
        where = f"buses {self.buses[0]:02x}-{self.buses[1]:02x}" if self.buses else ""
        found = [f"{bar.index}:{bar.address:#x}+{size_text(bar.size)}{'' if bar.answers else ' (off)'}" for bar in self.bars]
        counts = Counter(_SHORT.get(one.name, one.name) for one in self.capabilities)
        chain = " ".join(f"{name}{f'*{count}' if count > 1 else ''}" for name, count in counts.items())
        return (
            "  " * self.depth + self.address, self.kind, f"{self.vendor_id:04x}:{self.device_id:04x}", self.class_name, master,
            " ".join([*([where] if where else []), *found]), chain,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Tree:
    """Every function, those behind a bridge below it."""

    functions: tuple[FunctionView, ...]

    def text(self) -> str:
        head = ("address", "kind", "ID", "class", "DMA", "buses and BARs", "capabilities")
        return "\n".join(columns([head, *(one.row for one in self.functions)]))

    def json(self) -> object:
        return jsonable(self)


@dataclass(frozen=True, slots=True)
class Decoded:
    """One function in full. `fields`: the header's registers that are not zero, with their bits in words."""

    function: FunctionView
    fields: dict[str, int]
    words: dict[str, str]
    vectors: tuple[tuple[int, int, int, bool], ...]
    """Of an MSI-X table: address, data and mask bits, and whether the vector is pending."""
    config: str

    def text(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        one = self.function
        yield f"{one.address} {one.kind}: {one.vendor_id:04x}:{one.device_id:04x}, {one.class_name}"
        if one.requester != one.address:
            yield f"  its transactions come from {one.requester}, a bridge to conventional PCI"
        yield from columns(((name, f"{self.fields[name]:#x}", self.words[name]) for name in self.fields), "  ")
        yield from (f"  {bar}" for bar in one.bars)
        yield from (f"  {name} window {first:#x}-{last:#x}" for name, (first, last) in one.windows.items())
        yield from (f"  [{cap.offset:02x}] {cap.name}: {cap.text}" for cap in one.capabilities)
        for number, (address, data, mask, pending) in enumerate(self.vectors):
            if address or data or pending:
                state = " masked" * (mask & 1) + " pending" * pending
                yield f"    vector {number}: address {address:#x}, data {data:#x}{state}"

    def json(self) -> object:
        return jsonable(self)


@dataclass(frozen=True, slots=True)
class Transaction:
    """A transaction in a device's name, made or only asked about."""

    requester: str
    address: int
    length: int
    write: bool
    made: bool
    spans: tuple[tuple[int, int], ...]
    """System-physical address and length of each piece of memory."""
    data: str
    """In hexadecimal; of a read that was made."""
    refused: str
    exit_status: int = 0
    walk: WalkedIo | None = field(default=None, repr=False)
    """By the IOMMU's tables as they are in memory."""

    def text(self) -> str:
        return "\n".join([*self._lines(), *(self.walk.explanation() if self.walk is not None else [])])

    def _lines(self) -> Iterator[str]:
        what = f"{'write' if self.write else 'read'} of {self.length:#x} bytes at {self.address:#x} by {self.requester}"
        if self.refused:
            yield f"{what}: refused: {self.refused}"
            return
        where = ", ".join(f"spa {spa:#x}+{length:#x}" for spa, length in self.spans) or "an interrupt message"
        yield f"{what}: {'' if self.made else 'would lead to '}{where}"
        data = bytes.fromhex(self.data)
        for at in range(0, len(data), _LINE):
            piece = data[at : at + _LINE]
            shown = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in piece)
            yield f"  {self.address + at:#x}  {piece.hex(' '):{3 * _LINE - 1}}  {shown}"

    def json(self) -> object:
        return {**members(self), "walk": self.walk and self.walk.json()}


@dataclass(frozen=True, slots=True)
class Delivered:
    """An interrupt that a message becomes. `cpus`: who has the destination."""

    vector: int
    mode: str
    destination: int
    logical: bool
    level: bool
    cpus: tuple[int, ...]

    def __str__(self) -> str:
        trigger = "level" if self.level else "edge"
        kind = "logical" if self.logical else "physical"
        whom = f"CPU {', '.join(map(str, self.cpus))}" if self.cpus else "nobody"
        return f"{self.mode} vector {self.vector:#x}, {trigger}, to {kind} {self.destination:#x}: {whom}"


@dataclass(frozen=True, slots=True)
class Interrupt:
    """What an interrupt message would be."""

    requester: str
    address: int
    data: int
    messages: tuple[Delivered, ...]
    refused: str
    walk: Tried | None = field(default=None, repr=False)
    """By the IOMMU's tables as they are in memory."""

    def text(self) -> str:
        return "\n".join([*self._lines(), *(self.walk.explanation() if self.walk is not None else [])])

    def _lines(self) -> list[str]:
        what = f"message {self.data:#x} to {self.address:#x} by {self.requester}"
        if self.refused:
            return [f"{what}: refused: {self.refused}"]
        return [f"{what}: {message}" for message in self.messages] or [f"{what}: no interrupt"]

    def json(self) -> object:
        return {**members(self), "walk": self.walk and self.walk.json()}


@dataclass(frozen=True)
class _Listed(Requester):
    """A function that is there, or any other requester."""

    functions: Callable[[], Iterable[Function]] = list

    def complete(self, context: Context, prefix: str) -> Iterable[Candidate]:
        return [Candidate(str(function.address), function.title) for function in self.functions()]


class PciCommands:
    """Those of one debugger's machine."""

    def __init__(self, debugger: Debugger) -> None:
        self.debugger = debugger
        who = _Listed(functions=lambda: self.debugger.machine.chipset.root.functions)
        self._function = Parameter("BDF", who, optional=True, help="this function in full: bus:device.function, as 00:03.0")
        self._who = Parameter("BDF", who, help="who: any bus:device.function, a device there or not")
        self._address = Parameter("ADDRESS", Address(Space.IOVA), help="as the device has it: an IOMMU would translate it")
        self._length = Parameter("LENGTH", Number(1, MOST_SHOWN), help="bytes")
        self._way = Parameter("r|w", Choice(("r", "w"), ("read", "write")))
        self._word = Parameter("DATA", Number(0, (1 << 32) - 1), help="what is written")
        data = Text("bytes in hexadecimal")
        self._data = Parameter("DATA", data, optional=True, help="for w: bytes in hexadecimal, repeated to LENGTH")
        pasid, supervisor = Number(0, (1 << 20) - 1), "--supervisor"
        self._pasid = Parameter("PASID", pasid, option="--pasid", only_option=True, help="the request has one")
        self._supervisor = Parameter(supervisor, Flag(), optional=True, option=supervisor, help="with a PASID: as supervisor")
        self._translated = Parameter("--translated", Flag(), optional=True, option="--translated",
                                     help="as if it had translated the address itself (ATS)")  # fmt: skip
        says = (self._pasid, self._supervisor, self._translated)
        self.commands = (
            Command("pci", self._pci, "Show the functions on PCI, or one with its registers and capabilities.", (self._function,),
                    "BARs in parentheses do not answer: the command register or the power state keeps them off.",
                    ("pci", "pci 00:00.0")),
            Command("dma try", self._try, "Say where a device's access would lead, without a side effect.",
                    (self._who, self._address, self._length, self._way, *says),
                    "Whether a device may master the bus does not matter. Behind an IOMMU, the entries that decide are shown.",
                    ("dma try 00:03.0 0x1000 4 w", "dma try 05:00.1 0xfee00000 8 r", "dma try 00:03.0 0x1000 4 w --translated")),
            Command("irq try", self._irq_try, "Say which interrupt a device's message would be, without a side effect.",
                    (self._who, self._address, self._word),
                    "A message is a write of four bytes to 0xfeexxxxx; an IOMMU may make another of it.",
                    ("irq try 00:03.0 0xfee00000 0", "irq try 00:03.0 0xfee00000 0x400")),
            Command("dma", self._dma, "Read or write as a device would: any requester, any address.",
                    (self._who, self._address, self._length, self._way, self._data, *says),
                    "It happens now, with all that follows from it: a write of four bytes to 0xfeexxxxx is an interrupt\n"
                    "message, watchpoints see it. Whether a device may master the bus does not matter.",
                    ("dma 00:03.0 0xe0000 16 r", "dma 05:00.1 0x5000 4 w cafe")),
        )  # fmt: skip

    def _pci(self, context: Context, arguments: Arguments) -> Decoded | Tree:
        root = self.debugger.machine.chipset.root
        address = arguments.get(self._function)
        if address is None:
            return Tree(tuple(FunctionView.of(function, _depth(function)) for function in root.functions))
        function = root.find(address)
        if function is None:
            known = ", ".join(str(one.address) for one in root.functions)
            raise CommandError(str(address), "no function is there", f"there are {known}")
        config = bytes(function.config.bytes)
        structure = header_of(config)
        fields = {field.name: structure.read(config, field.name) for field in structure}
        fields = {name: value for name, value in fields.items() if value and not name.startswith("bar")}
        words = {name: bits.describe(fields[name]) if (bits := structure[name].bits) is not None else "" for name in fields}
        table = function.capability(MsiX)
        vectors = () if table is None else tuple(
            (high << 32 | low, data, mask, bool(table.waiting >> number & 1))
            for number, (low, high, data, mask) in enumerate(table.entries)
        )  # fmt: skip
        shown = config if function.extended else config[:256]
        return Decoded(FunctionView.of(function, 0), fields, words, vectors, shown.hex())

    def _asked(self, context: Context, arguments: Arguments) -> tuple[RequesterId, int, int, bool]:
        where = arguments[self._address].locate(context, context.host)
        if where.space not in (Space.IOVA, Space.SPA):
            raise CommandError(str(where), "a device knows no linear or guest-physical addresses", "write iova:0x1000")
        return arguments[self._who], where.offset, arguments[self._length], arguments[self._way] == "w"

    def _says(self, arguments: Arguments) -> Attributes:
        """What else the request has."""
        pasid, translated = arguments.get(self._pasid), arguments.given(self._translated)
        if pasid is not None and translated:
            raise arguments.error("--translated", "a request with a PASID has an untranslated address (AMD 48882, 2.2.7.7)",
                                  "leave one of them out")  # fmt: skip
        if pasid is None and arguments.given(self._supervisor):
            raise arguments.error("--supervisor", "only requests with a PASID have privilege", "give --pasid, too")
        return Attributes(pasid, arguments.given(self._supervisor), False, translated)

    def _try(self, context: Context, arguments: Arguments) -> Transaction:
        who, address, length, write = self._asked(context, arguments)
        iommu, attributes = iommu_of(context, who), self._says(arguments)
        walk = None
        if iommu is not None and iommu.enabled:
            walk = try_access(context, iommu, who, address, length, attributes.access(write))
        try:
            spans = self.debugger.machine.chipset.dma.locate(who, address, length, write, attributes=attributes)
        except DmaError as error:
            return Transaction(str(who), address, length, write, False, (), "", error.reason, walk=walk)
        pieces = tuple((int(spa), size) for spa, size in spans)
        return Transaction(str(who), address, length, write, False, pieces, "", "", walk=walk)

    def _irq_try(self, context: Context, arguments: Arguments) -> Interrupt:
        who, where, data = arguments[self._who], arguments[self._address].locate(context, context.host), arguments[self._word]
        machine, iommu = self.debugger.machine, iommu_of(context, who)
        walk = None
        if iommu is not None and iommu.enabled and in_interrupt_range(where.offset):
            walk = try_message(context, iommu, who, where.offset, data)
        try:
            found = machine.chipset.dma.messages(who, where.offset, data)
        except DmaError as error:
            return Interrupt(str(who), where.offset, data, (), error.reason, walk)
        return Interrupt(str(who), where.offset, data, tuple(
            Delivered(message.vector, message.mode.name, message.dest, message.logical, message.level, tuple(
                cpu.index for cpu in machine.cpus if cpu.lapic.matches(message.dest, message.logical, message.wide)))
            for message in found), "", walk)  # fmt: skip

    def _dma(self, context: Context, arguments: Arguments) -> Transaction:
        who, address, length, write = self._asked(context, arguments)
        data = _bytes(arguments, self._data, length) if write else b""
        if not write and arguments.given(self._data):
            raise arguments.error(str(arguments.get(self._data)), "a read takes no data", "leave it out, or write w")
        dma, attributes = self.debugger.machine.chipset.dma, self._says(arguments)
        said = "" if attributes == PLAIN else f"{attributes} "
        self.debugger.machine.outside("debugger", f"dma {who} {address:#x} {length} {said}".encode() + data)
        try:
            if write:
                dma.write(who, address, data, attributes)
            else:
                data = dma.read(who, address, length, attributes)
        except DmaError as error:
            return Transaction(str(who), address, length, write, True, (), "", error.reason)
        try:
            spans = dma.locate(who, address, length, write, attributes=attributes)
        except DmaError:
            spans = ()  # an interrupt message
        pieces = tuple((int(spa), size) for spa, size in spans)
        return Transaction(str(who), address, length, write, True, pieces, "" if write else data.hex(), "")


def _depth(function: Function) -> int:
    depth, bus = 0, function.attached
    while bus.bridge is not None:
        depth, bus = depth + 1, bus.bridge.attached
    return depth


def _bytes(arguments: Arguments, parameter: Parameter[str], length: int) -> bytes:
    word = arguments.get(parameter)
    if word is None:
        raise arguments.error("DATA", "a write needs data", "give bytes in hexadecimal, such as 00ff")
    try:
        pattern = bytes.fromhex(word.removeprefix("0x"))
    except ValueError:
        pattern = b""
    if not pattern or len(pattern) > length:
        raise arguments.error(word, f"DATA: it must be 1 to {length} bytes in hexadecimal, two digits each", "write 00ff")
    return (pattern * -(-length // len(pattern)))[:length]
