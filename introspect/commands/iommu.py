"""`iommu`, `iommu devices` and `iommu walk`: the registers of IOMMUs, their device tables, the way of one address."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from textwrap import wrap

from introspect.commands.context import Context
from introspect.commands.devices import device_names
from introspect.commands.iommu_choice import BASE, BDF, CHOICE, NO_IOMMU, choose, choose_one
from introspect.commands.mappers import reverse_map
from introspect.commands.parameters import Address, Choice, Flag, Number, Parameter
from introspect.commands.registry import Arguments, Command
from introspect.commands.render import columns, members, size_text
from introspect.expression import Space
from introspect.iommu.checks import dte_problems
from introspect.iommu.devices import Entry, entries, owner_of
from introspect.iommu.records import EVENTS
from introspect.iommu.registers import CONTROL, FEATURES, STATUS, X2APIC_CONTROL
from introspect.iommu.remapping import interrupt_entries
from introspect.iommu.space import IoSpace
from introspect.iommu.state import RINGS, Iommu, Ring
from introspect.iommu.structures import DTE, gcr3_root, host_root, interrupt_root
from introspect.iommu.verdicts import DmaAccess, IoFault, IoStep, IoTranslation, Route, StepKind
from introspect.iommu.walk import IoWalk, walk
from introspect.pci import RequesterId

__all__ = ["COMMANDS", "WalkedIo", "fault_json", "fault_lines", "try_access", "walk_lines"]

_ENTRIES_TOLD = 512


# iommu


@dataclass(frozen=True, slots=True)
class UnitState:
    """One IOMMU. `used`: entries of its device table with V or IV."""

    iommu: Iommu
    used: int
    rings: tuple[Ring, ...]

    def lines(self) -> Iterator[str]:
        one, get = self.iommu, self.iommu.registers.get
        where = f" at {RequesterId(one.device)}" if one.device is not None else ""
        window = f", registers at spa {one.window:#x}" if one.window is not None else ""
        yield f"IOMMU {one.index}{where}{window}: {'on' if one.enabled else 'off, devices are not translated'}"
        rows = [
            *_wrapped("control", CONTROL.describe(one.control)), *_wrapped("status", STATUS.describe(get("status", 0))),
            *_wrapped("features", FEATURES.describe(one.features)),
        ]
        for number, (base, count) in enumerate(one.tables):
            name = "device table" if len(one.tables) == 1 else f"segment {number}"
            rows.append((name, f"spa {base:#x}, {count} entries{f', {self.used} with V or IV' if not number else ''}"))
        if one.exclusion is not None:
            first, last, everybody = one.exclusion
            rows.append(("exclusion", f"{first:#x}-{last:#x}, {'all devices' if everybody else 'devices with EX'}"))
        rows += [(f"{ring.name} ring", _ring_text(one, ring)) for ring in self.rings if ring.entries]
        for name in ("general", "ppr", "ga"):
            if value := get(f"x2apic_{name}", 0):
                rows.append((f"interrupt {name}", X2APIC_CONTROL.describe(value)))
        spans = ", ".join(f"{RequesterId(a)}-{RequesterId(b)}" for a, b in one.manages)
        rows.append(("translates for", spans or "no device"))
        yield from columns(rows, "  ")

    def json(self) -> dict[str, object]:
        one = self.iommu
        return {
            "index": one.index, "device": one.device, "window": one.window, "enabled": one.enabled,
            "control": CONTROL.names(one.control), "status": STATUS.names(one.registers.get("status", 0)),
            "features": FEATURES.names(one.features), "tables": [list(table) for table in one.tables], "used": self.used,
            "exclusion": list(one.exclusion) if one.exclusion else None,
            "rings": [ring._asdict() for ring in self.rings if ring.entries],
            "manages": [list(span) for span in one.manages], "registers": dict(one.registers),
        }  # fmt: skip


_RINGS = {
    "command": (CONTROL.CmdBufEn, STATUS.CmdBufRun, 0), "event": (CONTROL.EventLogEn, STATUS.EventLogRun, STATUS.EventOverflow),
    "ppr": (CONTROL.PprLogEn, STATUS.PprLogRun, STATUS.PprOverflow),
    "ga": (CONTROL.GALogEn, STATUS.GALogRun, STATUS.GALogOverflow),
}  # fmt: skip
"""What turns a ring on, whether it runs, and whether it has overflowed."""
_WIDTH = 60
"""Of a row's words, so that lines have about 80 columns."""


def _wrapped(name: str, words: str) -> list[tuple[str, str]]:
    """A row, and more of them below it."""
    return [(name if not number else "", line) for number, line in enumerate(wrap(words, _WIDTH) or ["-"])]


def _ring_text(iommu: Iommu, ring: Ring) -> str:
    enable, run, overflow = _RINGS[ring.name]
    status = iommu.registers.get("status", 0)
    if not iommu.control & enable:
        return f"off, spa {ring.base:#x}, {ring.entries} entries" if ring.base else "off"
    waiting = f"{ring.pending} in it" if ring.pending else "empty"
    state = ", overflowed" if status & overflow else "" if status & run or not iommu.enabled else ", stopped"
    return f"spa {ring.base:#x}, {ring.entries} entries, head {ring.head:#x}, tail {ring.tail:#x}: {waiting}{state}"


@dataclass(frozen=True, slots=True)
class State:
    units: tuple[UnitState, ...]
    given: bool
    """By where its device table is, and nothing else is known."""

    def text(self) -> str:
        if self.given:
            (base, count), used = self.units[0].iommu.tables[0], self.units[0].used
            return f"device table at spa {base:#x}, {count} entries, {used} with V or IV; of the IOMMU nothing else is known"
        return "\n".join(line for unit in self.units for line in unit.lines()) or NO_IOMMU

    def json(self) -> object:
        return {"iommus": [unit.json() for unit in self.units]}


def _state(context: Context, arguments: Arguments) -> State:
    units = []
    for one in choose(context, arguments):
        used = sum(entry.last - entry.first + 1 for entry in entries(context.memory, one))
        units.append(UnitState(one, used, tuple(one.ring(name) for name in RINGS)))
    return State(tuple(units), arguments.get(BASE) is not None)


# iommu devices


@dataclass(frozen=True, slots=True)
class DeviceRow:
    """Devices with the same entry. `owner`: the guest whose RAM their tables map, if any."""

    iommu: int
    first: str
    last: str
    name: str
    dte: int
    problems: tuple[str, ...]
    owner: str

    def row(self) -> tuple[str, ...]:
        who = self.first if self.first == self.last else f"{self.first}-{self.last}"
        wrong = f"! {'; '.join(self.problems)}" if self.problems else ""
        return who, self.name, *_translation_words(self.dte), _interrupt_words(self.dte), self.owner, wrong

    def json(self) -> dict[str, object]:
        fields = {name: DTE.get(self.dte, name) for name, mask in DTE.fields.items() if self.dte & mask}
        return {**members(self), "fields": fields}


def _translation_words(dte: int) -> tuple[str, str, str]:
    """Domain, translation and rights."""
    if not dte & DTE.V:
        return "", "not translated", ""
    domain, rights = f"{DTE.get(dte, 'DomainID'):#x}", f"{'r' if dte & DTE.IR else '-'}{'w' if dte & DTE.IW else '-'}"
    rights += " ATS" * bool(dte & DTE.I) + " PRI" * bool(dte & DTE.PPR)
    if not dte & DTE.TV:
        return domain, "blocked (TV is 0)", ""
    mode = DTE.get(dte, "Mode")
    words = f"{mode}-level at {host_root(dte):#x}" if mode else "identity"
    if dte & DTE.GV:
        levels = 5 if DTE.get(dte, "GuestPagingMode") else 4
        default = ", default PASID 0" if dte & DTE.GIoV else ""
        words += f", PASIDs of {DTE.get(dte, 'GLX') + 1}-level GCR3 at {gcr3_root(dte):#x} ({levels}-level{default})"
    return domain, words, rights


def _interrupt_words(dte: int) -> str:
    if not dte & DTE.IV:
        return "any"
    control = DTE.get(dte, "IntCtl")
    words = ("none", "any fixed", f"{interrupt_entries(dte)} at {interrupt_root(dte):#x}", "reserved")[control]
    passes = [name.removesuffix("Pass") for name in ("InitPass", "EIntPass", "NMIPass", "Lint0Pass", "Lint1Pass")
              if dte & DTE.fields[name]]  # fmt: skip
    return words + (f" + {' '.join(passes)}" if passes else "")


@dataclass(frozen=True, slots=True)
class DeviceList:
    rows: tuple[DeviceRow, ...]
    left_out: int
    known: bool

    def text(self) -> str:
        if not self.known:
            return NO_IOMMU
        if not self.rows:
            return "no device table entry has V or IV"
        head = ("device", "what", "domain", "addresses", "rights", "interrupts", "owner", "")
        lines = columns([head, *(row.row() for row in self.rows)])
        return "\n".join([*lines, *([f"... ({self.left_out} more)"] if self.left_out else [])])

    def json(self) -> object:
        return {"devices": [row.json() for row in self.rows], "left_out": self.left_out}


def _devices(context: Context, arguments: Arguments) -> DeviceList:
    chosen, names = choose(context, arguments), device_names(context)
    guests = reverse_map(context, "nested page tables").mappers if chosen and context.guests else []
    rows: list[DeviceRow] = []
    left_out, owners = 0, dict[int, str]()
    limit = arguments[_LIMIT] or 1 << 17
    for iommu in chosen:
        for number, entry in enumerate(entries(context.memory, iommu, frozenset(names))):
            context.progress(min(1.0, entry.first / 0x10000), "device table")
            if number >= limit:
                left_out += 1
                continue
            dte = entry.dte
            key = dte & (1 << 128) - 1
            if guests and key not in owners and len(owners) < _ENTRIES_TOLD:
                tables = dte & DTE.V and dte & DTE.TV and dte & (DTE.Mode | DTE.GV)
                found = owner_of(IoSpace(context.memory, iommu, dte).runs, guests) if tables else None
                owners[key] = found.party if found is not None else ""
            rows.append(_row(entry, iommu, names.get(entry.first, ""), owners.get(key, "")))
    return DeviceList(tuple(rows), left_out, bool(chosen))


def _row(entry: Entry, iommu: Iommu, name: str, owner: str) -> DeviceRow:
    problems = tuple(map(str, dte_problems(entry.dte, iommu.features)))
    return DeviceRow(iommu.index, str(entry.first), str(entry.last), name, entry.dte, problems, owner)


# iommu walk


@dataclass(frozen=True, slots=True)
class WalkedIo:
    """The way of one address of a device."""

    walk: IoWalk

    def text(self) -> str:
        return "\n".join((self._title(), *self.explanation()))

    def _title(self) -> str:
        found = self.walk
        pasid = f", PASID {found.access.pasid:#x}" if found.access.pasid is not None else ""
        what = "execute" if found.access.execute else "write" if found.access.write else "read"
        who = " as supervisor" if found.access.privileged else ""
        return f"iova {found.iova:#x} of {RequesterId(found.device)}{pasid}, {what}{who}"

    def explanation(self) -> list[str]:
        """The entries, and what comes of them."""
        verdict = self.walk.verdict
        lines = fault_lines(verdict) if isinstance(verdict, IoFault) else _translation_lines(verdict)
        return [*walk_lines(self.walk), *lines]

    def json(self) -> object:
        found, verdict = self.walk, self.walk.verdict
        steps = [_step_json(step) for step in found.steps]
        common = {
            "device": str(RequesterId(found.device)), "iova": found.iova, "access": found.access._asdict(), "steps": steps,
            "blame": None if found.blame is None else found.steps.index(found.blame),
        }  # fmt: skip
        if isinstance(verdict, IoTranslation):
            return {**common, "outcome": "translation", **verdict._asdict(), "route": verdict.route.name}
        return {**common, "outcome": "fault", **fault_json(verdict)}


def _step_json(step: IoStep) -> dict[str, object]:
    return {**step._asdict(), "kind": step.kind.value, "name": step.name, "flags": step.flags.split(), "skipped": step.skipped}


def fault_json(fault: IoFault) -> dict[str, object]:
    event = fault.event
    return {
        "cause": fault.cause.name, "why": fault.cause.value, "detail": fault.detail, "suppressed": fault.suppressed,
        "event": {
            "name": event.code.name, "device": str(RequesterId(event.device)), "address": event.address,
            "flags": sorted(event.flags), "domain": event.domain, "pasid": event.pasid, "record": f"{event.encode():032x}",
        },
    }  # fmt: skip


def walk_lines(found: IoWalk) -> list[str]:
    """The entries, those of the host's tables below a guest's indented."""
    if not found.steps:
        return []
    nested = any(step.kind in (StepKind.GCR3, StepKind.GUEST) for step in found.steps)
    heading = ("entry", *(("gpa",) if nested else ()), "at spa", "value", "flags")
    return columns([heading, *(_step_row(step, nested, step == found.blame) for step in found.steps)], "  ")


def _step_row(step: IoStep, nested: bool, blamed: bool) -> tuple[str, ...]:
    mapped = step.leaf and step.value & 1 and step.kind in (StepKind.HOST, StepKind.GUEST)
    large = f" ({size_text(step.page_size)} page)" if mapped else ""
    skips = f" (skips {step.skipped})" if step.skipped else ""
    mark = "  <-- refuses this" if blamed else ""
    name = f"  {step.name}" if nested and step.kind == StepKind.HOST else step.name
    gpa = step.gpa if step.gpa is not None else step.address if step.kind == StepKind.HOST else None
    value = f"{step.value & (1 << 64) - 1:#018x}"
    cells = (name, "" if gpa is None else f"{gpa:#x}", f"{step.spa:#x}", value, f"{step.flags}{large}{skips}{mark}")
    return cells if nested else (cells[0], *cells[2:])


def _translation_lines(found: IoTranslation) -> Iterator[str]:
    gpa = f"gpa {found.gpa:#x} -> " if found.gpa is not None else ""
    size = f", in a {size_text(found.page_size)} page" if found.page_size else ""
    domain = f", domain {found.domain:#x}" if found.route not in (Route.OFF, Route.UNMANAGED) else ""
    why = "" if found.route == Route.TABLES else f": {found.route.value}"
    yield f"-> {gpa}spa {found.spa:#x}{size}{domain}{why}"
    execute = ["execute"] if found.gpa is not None and found.executable else []
    words = [*(["read"] if found.readable else []), *(["write"] if found.writable else []), *execute]
    more = ", coherent (FC)" * found.coherent + ", for untranslated requests only (U)" * found.untranslated_only
    yield f"rights: {', '.join(words)}{more}"


_SUPPRESSED = {
    "SA": "SA of the entry keeps it from the event log", "SE": "SE of the entry: only the first one is logged",
    "IG": "IG of the entry keeps it from the event log", "SupIOPF": "SupIOPF keeps it from the event log",
    "ATS": "told to the device, not logged",
}  # fmt: skip


def fault_lines(fault: IoFault) -> Iterator[str]:
    """Why, and the event as it is logged."""
    event = fault.event
    detail = f" ({fault.detail})" if fault.detail else ""
    yield f"-> refused: {fault.cause.value}{detail}"
    record = event.encode()
    yield f"   {event.code.name}: {EVENTS[event.code].bits.describe(record & ~(15 << 60))}"
    words = _SUPPRESSED.get(fault.suppressed, "")
    yield f"   event {record & (1 << 64) - 1:#018x} {record >> 64:#018x}{f': {words}' if words else ''}"


def _walk(context: Context, arguments: Arguments) -> WalkedIo:
    device = arguments[BDF]
    where = arguments[_IOVA].locate(context, context.host)
    access = arguments.get(_ACCESS) or "r"
    asked = DmaAccess(access == "w", arguments.get(_PASID), access == "x", arguments.given(_PRIVILEGED))
    return WalkedIo(walk(context.memory, choose_one(context, arguments, device), device, where.offset, asked))


def try_access(context: Context, iommu: Iommu, device: RequesterId, address: int, length: int, access: DmaAccess) -> WalkedIo:
    """The first page of an access that is refused; else the first one. By the tables as they are in memory."""
    found = [
        walk(context.memory, iommu, device, at, access)
        for at in (address, *range((address | 0xFFF) + 1, address + length, 0x1000))
    ]
    return WalkedIo(next((one for one in found if isinstance(one.verdict, IoFault)), found[0]))


_LIMIT = Parameter("N", Number(0, 1 << 17), option="--limit", only_option=True, default=256,
                   help="so many lines at most (256); 0 for all")  # fmt: skip
_IOVA = Parameter("IOVA", Address(Space.IOVA), help="as the device has it")
_PASID = Parameter("PASID", Number(0, (1 << 20) - 1), option="--pasid", only_option=True, help="of a request that has one")
_ACCESS = Parameter("ACCESS", Choice(("r", "w", "x")), option="--access", only_option=True, optional=True,
                    help="read, write, or with a PASID execute (r)")  # fmt: skip
_PRIVILEGED = Parameter("--supervisor", Flag(), optional=True, option="--supervisor", help="with a PASID: as supervisor")

COMMANDS = (
    Command(
        "iommu", _state, "Show the IOMMUs: what is on, features, device table, rings.", CHOICE,
        "Head and tail are in bytes. Without an IOMMU, as in most dumps, name where a device table is: --base.",
        ("iommu", "iommu --json"),
    ),
    Command(
        "iommu devices", _devices, "List the device table: domain, tables, interrupts and owner of each device.",
        (*CHOICE, _LIMIT),
        "Every entry with V or IV, neighbours that are the same as one line. Interrupts: `any` (IV is 0), `none`, `any fixed`,\n"
        "or how many entries its table has and where, with the types that pass besides. Rights: ATS (I) and PRI (PPR) are what\n"
        "the device may ask for. The owner is the guest whose RAM the tables map most of. Lines with ! have entries that the\n"
        "IOMMU refuses.",
        ("iommu devices", "iommu devices --limit 8"),
    ),
    Command(
        "iommu walk", _walk, "Translate an address of a device: every entry, skipped levels, rights, verdict or event.",
        (BDF, _IOVA, _PASID, _ACCESS, _PRIVILEGED, *CHOICE),
        "Nothing changes, neither accessed and dirty bits nor the log. Entries L1 to L6 are of the host's tables; GCR3 and\n"
        "PML4E ... PTE those of a PASID, whose own addresses the host's tables translate in turn.",
        ("iommu walk 00:03.0 0x1000 --access w", "iommu walk 00:03.0 0x1000 --pasid 1"),
    ),
)  # fmt: skip
