"""`iommu events`, `iommu requests` and `iommu commands`: the rings, decoded, events replayed to the entry that refused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from introspect.commands.context import CommandError, Context
from introspect.commands.iommu import fault_json, walk_lines
from introspect.commands.iommu_choice import BASE, CHOICE, NO_IOMMU, choose
from introspect.commands.parameters import Flag, Number, Parameter, Physical
from introspect.commands.registry import Arguments, Command
from introspect.commands.render import members
from introspect.iommu.records import (
    GUEST_INTERRUPT,
    PAGE_REQUEST,
    Event,
    EventCode,
    RecordType,
    command_of,
    event_of,
    invalidated_range,
)
from introspect.iommu.registers import CONTROL
from introspect.iommu.state import RINGS, Iommu, Ring
from introspect.iommu.structures import DTE
from introspect.iommu.verdicts import DmaAccess, IoFault, IoTranslation
from introspect.iommu.walk import IoWalk, read_dte, walk
from introspect.pci import RequesterId
from introspect.scope import locate_space
from introspect.sources import Unreadable

__all__ = ["COMMANDS"]

_CODE = 15 << 60
_REPLAYED = (EventCode.IO_PAGE_FAULT, EventCode.ILLEGAL_DEV_TABLE_ENTRY, EventCode.PAGE_TAB_HARDWARE_ERROR,
             EventCode.INVALID_DEVICE_REQUEST, EventCode.DEV_TAB_HARDWARE_ERROR)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Record:
    """One record of a ring. `state`: "new" between head and tail, "old" before."""

    iommu: int
    offset: int
    state: str
    record: int
    name: str
    fields: dict[str, int]
    words: str

    @property
    def line(self) -> str:
        return f"{self.offset:#6x} {self.state:4} {self.name} {self.words}".rstrip()

    def json(self) -> dict[str, object]:
        return {**members(self), "record": f"{self.record:032x}"}


def _record(iommu: int, offset: int, state: str, value: int, kind: RecordType | None) -> Record:
    if kind is None:
        return Record(iommu, offset, state, value, f"unknown code {value >> 60 & 15:#x}", {}, f"{value:#034x}")
    fields = {name: kind.bits.get(value, name) for name in kind.bits.fields if name != "code"}
    return Record(iommu, offset, state, value, kind.name, fields, _words(value, kind))


def _words(value: int, kind: RecordType) -> str:
    """The fields, the device as bus:device.function."""
    device = kind.bits.fields.get("DeviceID", 0)
    words = kind.bits.describe(value & ~_CODE & ~device)
    return f"{RequesterId(kind.bits.get(value, 'DeviceID'))} {words}".strip() if device else words


def _places(ring: Ring, count: int) -> Iterator[tuple[int, str]]:
    """Offsets of records, oldest first: the new ones, and before them old ones up to `count` in all."""
    if not ring.entries:
        return
    new = ring.pending
    total = min(max(count, new), ring.entries)
    for number in range(total):
        offset = (ring.tail - (total - number) * ring.entry_size) % ring.size
        yield offset, "new" if total - number <= new else "old"


def _read(context: Context, iommu: Iommu, ring: Ring, count: int) -> Iterator[tuple[int, str, int]]:
    for offset, state in _places(ring, count):
        try:
            data = context.memory.read(ring.base + offset, ring.entry_size)
        except Unreadable as error:
            rule = f"the {ring.name} ring is where no memory is ({error})"
            raise CommandError(f"{ring.base + offset:#x}", rule, "the base register names it: `iommu`") from None
        value = int.from_bytes(data, "little")
        if value or state == "new":
            yield offset, state, value


def _rings(context: Context, arguments: Arguments, name: str) -> Iterator[tuple[Iommu, Ring]]:
    """Of the IOMMUs; or with --ring one at an address, all of it to be looked at."""
    word = arguments.get(_RING)
    chosen = choose(context, arguments)
    if word is None:
        if arguments.get(BASE) is not None:
            raise CommandError("--base", f"nothing says where the {name} ring is", "say so: --ring SPA")
        for iommu in chosen:
            yield iommu, iommu.ring(name)
        return
    where = word.locate(context, context.host)
    spa = locate_space(context.memory, where.owner, where.space, where.offset)
    if spa is None:
        raise CommandError(str(where), "it is not mapped", "name a system-physical address")
    length = 1 << (arguments[_COUNT] - 1).bit_length()
    size = RINGS[name].entry_size
    yield chosen[0] if chosen else Iommu({}), Ring(name, spa & -size, length, size, 0, arguments[_COUNT] % length * size)


# Events


@dataclass(frozen=True, slots=True)
class Explained:
    """An event, and what the tables say of the same request now."""

    record: Record
    walk: IoWalk | None
    words: tuple[str, ...]
    same: bool | None = None
    """Whether it would be logged in the same way."""

    def lines(self) -> Iterator[str]:
        yield self.record.line
        if self.walk is not None:
            yield from (f"    {line}" for line in walk_lines(self.walk))
        yield from (f"    {line}" for line in self.words)

    def json(self) -> dict[str, object]:
        found = self.walk
        fault = fault_json(found.verdict) if found is not None and isinstance(found.verdict, IoFault) else None
        steps = None if found is None else [{"name": step.name, "spa": step.spa, "value": step.value} for step in found.steps]
        blame = None if found is None or found.blame is None else found.steps.index(found.blame)
        return {**self.record.json(), "explained": list(self.words), "same": self.same, "fault": fault, "steps": steps,
                "blame": blame}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Events:
    events: tuple[Explained, ...]
    known: bool

    def text(self) -> str:
        if not self.known:
            return NO_IOMMU
        return "\n".join(line for one in self.events for line in one.lines()) or "no event is in the log"

    def json(self) -> object:
        return {"events": [one.json() for one in self.events]}


def _events(context: Context, arguments: Arguments) -> Events:
    found, known = [], False
    for iommu, ring in _rings(context, arguments, "event"):
        known = True
        for offset, state, value in _read(context, iommu, ring, arguments[_COUNT]):
            record = _record(iommu.index, offset, state, value, event_of(value))
            found.append(_explained(context, iommu, record) if arguments.given(_EXPLAIN) else Explained(record, None, ()))
    return Events(tuple(found), known)


def _explained(context: Context, iommu: Iommu, record: Record) -> Explained:
    event = Event.decode(record.record)
    if event is None:
        return Explained(record, None, ("no event has this code",))
    if event.code in (EventCode.ILLEGAL_COMMAND_ERROR, EventCode.COMMAND_HARDWARE_ERROR):
        return Explained(record, None, (_command_at(context, event.address),))
    if event.code == EventCode.IOTLB_INV_TIMEOUT:
        why = "the device has not answered in InvTimeOut: it has no ATS, sleeps, or was reset meanwhile"
        return Explained(record, None, (_command_at(context, event.address), why))
    if event.code == EventCode.INVALID_PPR_REQUEST:
        return Explained(record, None, _page_request_words(context, iommu, record))
    if event.code not in _REPLAYED:
        return Explained(record, None, ())
    if event.interrupt:
        return Explained(record, None, _interrupt_words(context, iommu, event))
    if event.code in (EventCode.PAGE_TAB_HARDWARE_ERROR, EventCode.DEV_TAB_HARDWARE_ERROR):
        what = "entry" if event.code == EventCode.PAGE_TAB_HARDWARE_ERROR else "device table entry"
        return Explained(record, None, (f"the {what} at spa {event.address:#x} could not be read: {_memory_at(context, event)}",))
    return _replayed(context, iommu, record, event)


def _memory_at(context: Context, event: Event) -> str:
    try:
        context.memory.read(event.address, 8)
    except Unreadable:
        return "no memory is there"
    return "memory is there by now"


def _replayed(context: Context, iommu: Iommu, record: Record, event: Event) -> Explained:
    access = DmaAccess(
        event.write, event.pasid, "NX" in event.flags, event.pasid is not None and "US" not in event.flags, "TR" in event.flags,
        event.pretranslated,
    )  # fmt: skip
    found = walk(context.memory, iommu, event.device, event.address, access)
    if isinstance(found.verdict, IoTranslation):
        words = (f"by now it is let through: {found.verdict.route.value}; the tables have changed since",)
        return Explained(record, found, words, False)
    fault = found.verdict
    same = fault.event.encode() == record.record
    detail = f" ({fault.detail})" if fault.detail else ""
    blame = f"{found.blame.name} at spa {found.blame.spa:#x}: " if found.blame is not None else ""
    changed = "" if same else "; the tables have changed since, or registers: the event would be another"
    return Explained(record, found, (f"refused by {blame}{fault.cause.value}{detail}{changed}",), same)


def _interrupt_words(context: Context, iommu: Iommu, event: Event) -> tuple[str, ...]:
    """The data of a message is not in its event, so that the entry of the interrupt table is not known."""
    dte = read_dte(context.memory, iommu, event.device)
    if not isinstance(dte, int):
        return (f"an interrupt: {dte.value}",)
    names = DTE.IV | DTE.IntTabLen | DTE.IG | DTE.IntTabRoot | DTE.IntCtl | DTE.InitPass | DTE.EIntPass | DTE.NMIPass
    why = "an entry with a reserved bit or type" if "RZ" in event.flags else "denied, index too large, or RemapEn is 0"
    if event.code == EventCode.INVALID_DEVICE_REQUEST:
        why = "IntCtl is 0"
    return (
        f"an interrupt: {why}; entry of the device: {DTE.describe(dte & names)}",
        f"its data is not in the event: `iommu irt {RequesterId(event.device)}` lists the table, `irq try` replays a message",
    )


def _page_request_words(context: Context, iommu: Iommu, record: Record) -> tuple[str, ...]:
    """What there is to be for a page request, and is not by now."""
    dte = read_dte(context.memory, iommu, record.fields["DeviceID"])
    entry = dte if isinstance(dte, int) else 0
    if record.fields["RX"]:
        needed = {"GTEn of the control register": iommu.control & CONTROL.GTEn, "V": entry & DTE.V, "GV": entry & DTE.GV}
        who, remedy = _command_at(context, record.fields["Address"]), "an answer with a PASID needs the device's guest tables"
    else:
        needed = {
            "PprEn of the control register": iommu.control & CONTROL.PprEn, "PprLogEn": iommu.control & CONTROL.PprLogEn,
            "V": entry & DTE.V, "PPR of the device table entry": entry & DTE.PPR,
        }  # fmt: skip
        who, remedy = "a page request of the device, which waits for an answer all the same", "COMPLETE_PPR_REQUEST answers it"
    missing = [name for name, value in needed.items() if not value]
    if not isinstance(dte, int):
        why = dte.value
    elif missing:
        why = f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} 0"
    else:
        why = "by now nothing is missing"
    return who, f"{why}; {remedy}"


def _command_at(context: Context, spa: int) -> str:
    try:
        value = int.from_bytes(context.memory.read(spa, 16), "little")
    except Unreadable:
        return f"the command at spa {spa:#x} is where no memory is"
    kind = command_of(value)
    if kind is None:
        return f"the command at spa {spa:#x} has the unknown code {value >> 60 & 15:#x}: {value:#034x}"
    stray = value & ~kind.bits.defined
    reserved = f", reserved bits set: {stray:#x}" if stray else ""
    return f"the command at spa {spa:#x}: {kind.name} {_words(value, kind)}{reserved}"


# Page requests


@dataclass(frozen=True, slots=True)
class Requests:
    requests: tuple[Explained, ...]
    known: bool

    def text(self) -> str:
        if not self.known:
            return NO_IOMMU
        return "\n".join(line for one in self.requests for line in one.lines()) or "no page request is in the log"

    def json(self) -> object:
        return {"requests": [one.json() for one in self.requests]}


def _requests(context: Context, arguments: Arguments) -> Requests:
    found, known = [], False
    for iommu, ring in _rings(context, arguments, "ppr"):
        known = True
        for offset, state, value in _read(context, iommu, ring, arguments[_COUNT]):
            record = _record(iommu.index, offset, state, value, PAGE_REQUEST if value >> 60 & 15 == PAGE_REQUEST.code else None)
            wanted = arguments.given(_EXPLAIN) and record.name == PAGE_REQUEST.name
            found.append(_asked(context, iommu, record) if wanted else Explained(record, None, ()))
    return Requests(tuple(found), known)


def _asked(context: Context, iommu: Iommu, record: Record) -> Explained:
    """What the device would be answered if it asked again."""
    get = record.fields.__getitem__
    pasid = get("PASID_19_16") << 16 | get("PASID_15_0") if get("GN") else None
    access = DmaAccess(bool(get("WP")), pasid, bool(get("NX")), pasid is not None and not get("US"), True)
    found = walk(context.memory, iommu, get("DeviceID"), get("Address"), access)
    if isinstance(found.verdict, IoTranslation):
        return Explained(record, found, ("by now the page is there: the device may be answered success",), False)
    blame = f"{found.blame.name} at spa {found.blame.spa:#x}: " if found.blame is not None else ""
    return Explained(record, found, (f"still not: {blame}{found.verdict.cause.value}",), True)


# Guest virtual APIC log


@dataclass(frozen=True, slots=True)
class GuestInterrupts:
    records: tuple[Record, ...]
    known: bool

    def text(self) -> str:
        if not self.known:
            return NO_IOMMU
        return "\n".join(one.line for one in self.records) or "no interrupt of a guest is in the log"

    def json(self) -> object:
        return {"interrupts": [one.json() for one in self.records]}


def _guest_interrupts(context: Context, arguments: Arguments) -> GuestInterrupts:
    found, known = [], False
    for iommu, ring in _rings(context, arguments, "ga"):
        known = True
        for offset, state, value in _read(context, iommu, ring, arguments[_COUNT]):
            kind = GUEST_INTERRUPT if value >> 60 & 15 == GUEST_INTERRUPT.code else None
            found.append(_record(iommu.index, offset, state, value, kind))
    return GuestInterrupts(tuple(found), known)


# Commands


@dataclass(frozen=True, slots=True)
class CommandsList:
    records: tuple[Record, ...]
    known: bool

    def text(self) -> str:
        if not self.known:
            return NO_IOMMU
        return "\n".join(one.line + _range_words(one) for one in self.records) or "no command is in the buffer"

    def json(self) -> object:
        return {"commands": [one.json() for one in self.records]}


def _range_words(record: Record) -> str:
    """What an invalidation covers."""
    if not record.name.startswith("INVALIDATE_IO") or "Address" not in record.fields:
        return ""
    first, end = invalidated_range(record.fields["Address"] << 12, bool(record.fields["S"]))
    return "  (all pages)" if end - first == 1 << 64 else f"  ({first:#x}-{end - 1:#x})"


def _commands(context: Context, arguments: Arguments) -> CommandsList:
    found, known = [], False
    for iommu, ring in _rings(context, arguments, "command"):
        known = True
        for offset, state, value in _read(context, iommu, ring, arguments[_COUNT]):
            found.append(_record(iommu.index, offset, state, value, command_of(value)))
    return CommandsList(tuple(found), known)


_EXPLAIN = Parameter("--explain", Flag(), optional=True, option="--explain", help="replay each to the entry that refused")
_COUNT = Parameter("N", Number(1, 1 << 15), optional=True, option="--count", default=16, help="so many of the last (16)")
_RING = Parameter("RING", Physical(), option="--ring", only_option=True,
                  help="where the ring is, if no register says so, as in a dump: its first N records")  # fmt: skip

COMMANDS = (
    Command(
        "iommu events", _events, "List the event log, decoded; replayed to the entry that refused.",
        (_COUNT, _EXPLAIN, _RING, *CHOICE),
        "`new` are those that software has not read yet (from head to tail); `old` ones are those before, as far as they are\n"
        "still there. A replay reads the tables as they are now, and says so where they have changed.",
        ("iommu events --explain", "iommu events 4"),
    ),
    Command(
        "iommu requests", _requests, "List the log of devices' page requests, decoded; with what the tables have there now.",
        (_COUNT, _EXPLAIN, _RING, *CHOICE),
        "`new` and `old` as for `iommu events`. PPRTag is the group, which COMPLETE_PPR_REQUEST answers, and in bit 9 whether\n"
        "this is the last of it. `devices edu-00:03.0` says which of them a device still waits for.",
        ("iommu requests", "iommu requests --explain"),
    ),
    Command(
        "iommu ga-log", _guest_interrupts, "List the guest virtual APIC log, decoded: interrupts of guests that did not run.",
        (_COUNT, _RING, *CHOICE),
        "`new` and `old` as for `iommu events`. GATag is what the hypervisor has in the entry of the interrupt table, and finds\n"
        "its vCPU by.",
        ("iommu ga-log", "iommu ga-log 4"),
    ),
    Command(
        "iommu commands", _commands, "List the command buffer, decoded: what is waiting, and what was done last.",
        (_COUNT, _RING, *CHOICE),
        "`new` are those from head to tail, which the IOMMU has still to carry out; `old` ones it has.",
        ("iommu commands", "iommu commands 4"),
    ),
)  # fmt: skip
