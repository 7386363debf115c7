"""`iommu map` and `iommu tlb`: everything that a device reaches, and what the IOMMU keeps of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from introspect.commands.context import CommandError, Context
from introspect.commands.devices import CachedEntry, CachedPage, IoCaches, barrier_of, iommus_of
from introspect.commands.iommu_choice import BDF, CHOICE, NO_IOMMU, choose, choose_one
from introspect.commands.mappers import reverse_map
from introspect.commands.parameters import Candidate, Flag, Misfit, Number, Parameter, Requester, parse_number
from introspect.commands.registry import Arguments, Command
from introspect.commands.render import amount_text, columns, members, size_text
from introspect.commands.tables import going_on
from introspect.expression import Space
from introspect.iommu.devices import entries
from introspect.iommu.pasids import Process, processes
from introspect.iommu.registers import CONTROL
from introspect.iommu.space import IoRange, IoSpace
from introspect.iommu.state import Iommu
from introspect.iommu.structures import DTE, GUEST_IRTE_UNCACHED, IRTE128, gcr3_root
from introspect.iommu.verdicts import DmaAccess, IoTranslation
from introspect.iommu.walk import read_dte, translate
from introspect.paging import ENTRY
from introspect.pci import RequesterId
from introspect.reverse_map import Mapper
from introspect.runs import Runs, Spans, column, overlaps
from introspect.sources import Unreadable

__all__ = ["COMMANDS"]

_MARKS = ENTRY.A | ENTRY.D
"""What hardware itself changes in page table entries, the host's and a guest's."""
_PIECES = 1 << 16
"""Of guests' RAM, as many as are counted."""


@dataclass(frozen=True)
class _DeviceOrDomain:
    """A device, or the number of a domain."""

    noun: str = "a device as 00:03.0, or the number of a domain"

    def take(self, context: Context, words: list[str]) -> RequesterId | int:
        number = parse_number(words[0])
        found = RequesterId.parse(words[0]) if number is None else number
        if found is None or not 0 <= found <= 0xFFFF:
            raise Misfit(f"it must be {self.noun}", "write 00:03.0, or 0x5 for domain 5")
        words.pop(0)
        return found

    def complete(self, context: Context, prefix: str) -> Iterable[Candidate]:
        return Requester().complete(context, prefix)


@dataclass(frozen=True, slots=True)
class Reached:
    """A range, and in whose RAM it ends."""

    range: IoRange
    guests: tuple[tuple[str, int, int, int], ...]
    """(guest, lowest gpa, bytes, pieces) of each."""

    def row(self) -> tuple[str, ...]:
        one = self.range
        sizes = " ".join(map(size_text, one.page_sizes)) or "-"
        more = "" if one.linear else " ... (scattered)"
        where = "; ".join(
            f"{amount_text(size)} of {who} from gpa {gpa:#x}{f' in {count} pieces' if count > 1 else ''}"
            for who, gpa, size, count in self.guests
        )
        return (f"{one.start:#x}", f"{one.last:#x}", amount_text(one.last - one.start + 1), one.rights, sizes,
                f"spa {one.target:#x}{more}", where)  # fmt: skip

    def json(self) -> dict[str, object]:
        guests = [{"guest": who, "gpa": gpa, "bytes": size, "pieces": count} for who, gpa, size, count in self.guests]
        return {**self.range._asdict(), "page_sizes": list(self.range.page_sizes), "guests": guests}


@dataclass(frozen=True, slots=True)
class Picture:
    """What devices with the same entry reach."""

    devices: tuple[str, ...]
    dte: int
    pasid: int | None
    ranges: tuple[Reached, ...]
    left_out: int
    bytes: int
    tables: int
    complete: bool
    guard: str
    """What else confines them; empty if nothing does."""
    denied: int
    """Bytes that are mapped, and yet out of reach because of that, or of SKINIT's protection."""

    def lines(self) -> Iterator[str]:
        pasid = f", PASID {self.pasid:#x}" if self.pasid is not None else ""
        domain = f", domain {DTE.get(self.dte, 'DomainID'):#x}" if self.dte & DTE.V else ", not translated"
        tables = f"{self.tables} table{'s' * (self.tables != 1)}"
        guard = f", {self.guard}" if self.guard else ""
        yield f"{', '.join(self.devices)}{domain}{pasid}{guard}: {amount_text(self.bytes)} mapped, {tables}"
        head = ("start", "end", "size", "rights", "pages", "leads to", "of")
        yield from columns([head, *(one.row() for one in self.ranges)], "  ") if self.ranges else ("  nothing is mapped",)
        if self.left_out:
            yield f"  ... ({self.left_out} more ranges; --limit 0 lists all)"
        if self.denied:
            yield f"  {amount_text(self.denied)} more are mapped and out of reach: `dev` says why"
        if not self.complete:
            yield "  ? not all was looked at: the tables describe too much, or it took too long"

    def json(self) -> dict[str, object]:
        return {**members(self), "ranges": [one.json() for one in self.ranges]}


@dataclass(frozen=True, slots=True)
class Map:
    pictures: tuple[Picture, ...]

    def text(self) -> str:
        return "\n".join(line for one in self.pictures for line in one.lines())

    def json(self) -> object:
        return {"maps": [one.json() for one in self.pictures]}


def _map(context: Context, arguments: Arguments) -> Map:
    who = arguments[_WHO]
    found: dict[tuple[int, int, int], list[str]] = {}
    barrier = barrier_of(context)
    units: dict[int, Iommu] = {}
    if isinstance(who, RequesterId):
        iommu = choose_one(context, arguments, who)
        dte = read_dte(context.memory, iommu, who) if iommu.enabled else 0
        if not isinstance(dte, int):
            raise CommandError(str(who), dte.value, "`iommu` says where the device table is, and how long")
        domain = barrier.domain_of(who) if barrier is not None else 0
        found[iommu.index, dte, domain], units[iommu.index] = [str(who)], iommu
    else:
        for iommu in choose(context, arguments):
            units[iommu.index] = iommu
            for entry in entries(context.memory, iommu, barrier.apart if barrier is not None else frozenset()):
                if entry.dte & DTE.V and DTE.get(entry.dte, "DomainID") == who:
                    domain = barrier.domain_of(entry.first) if barrier is not None else 0
                    found.setdefault((iommu.index, entry.dte & (1 << 128) - 1, domain), []).append(entry.text())
        if not found:
            raise CommandError(f"{who:#x}", "no device table entry has this domain", "`iommu devices` lists them")
    guests = reverse_map(context, "nested page tables").mappers if context.guests else []
    limit, linear = arguments[_LIMIT] or 1 << 32, arguments.given(_LINEAR)
    pictures = []
    for (index, dte, domain), devices in found.items():
        space = IoSpace(
            context.memory, units[index], dte, pasid=arguments.get(_PASID), progress=going_on(context, "I/O tables"),
            left=barrier.left(domain) if barrier is not None else None,
        )  # fmt: skip
        ranges = space.ranges(linear=linear or bool(guests))
        found_ranges = (Reached(one, tuple(_landing(one, guests))) for one in ranges)
        every = list(found_ranges if linear or not guests else _going_on(found_ranges))
        shown = tuple(every[:limit])
        tables = len(space.tables().spa)
        pictures.append(Picture(
            tuple(devices), dte, space.pasid, shown, len(every) - len(shown), space.bytes_mapped, tables, space.complete,
            barrier.words(domain) if barrier is not None else "", space.bytes_denied,
        ))  # fmt: skip
    return Map(tuple(pictures))


def _going_on(ranges: Iterable[Reached]) -> Iterator[Reached]:
    """Neighbours that go on in the same guest's RAM are one, wherever that lies: its pages need not be in order."""
    waiting: Reached | None = None
    for one in ranges:
        if waiting is not None and _follows(waiting, one):
            (who, gpa, size, _), = waiting.guests
            first, second = waiting.range, one.range
            sizes = tuple(sorted({*first.page_sizes, *second.page_sizes}))
            joined = first._replace(last=second.last, page_sizes=sizes, linear=False)
            waiting = Reached(joined, ((who, gpa, size + one.guests[0][2], 1),))
            continue
        if waiting is not None:
            yield waiting
        waiting = one
    if waiting is not None:
        yield waiting


def _follows(before: Reached, one: Reached) -> bool:
    if len(before.guests) != 1 or len(one.guests) != 1 or before.range.rights != one.range.rights:
        return False
    (who, gpa, size, _), = before.guests
    (other, next_gpa, more, pieces), = one.guests
    whole = size == before.range.last - before.range.start + 1 and more == one.range.last - one.range.start + 1
    return whole and pieces == 1 and who == other and one.range.start == before.range.last + 1 and next_gpa == gpa + size


def _landing(one: IoRange, guests: Iterable[Mapper]) -> Iterator[tuple[str, int, int, int]]:
    """The guests whose RAM is in a linear range."""
    if not one.linear:
        return
    window = Spans(column(one.target), column(one.target + one.last - one.start + 1))
    for mapper in guests:
        if mapper.space != Space.GPA:
            continue
        runs: Runs = mapper.runs
        mine, _, start, end, _ = overlaps(runs.target, runs.target + runs.length, window, _PIECES)
        if len(start):
            gpa = runs.start[mine] + (start - runs.target[mine])
            yield mapper.party, int(gpa.min()), sum((end - start).tolist()), len(start)


# iommu pasids


@dataclass(frozen=True, slots=True)
class Pasids:
    """Of one device. `whole`: there are no more of them."""

    device: str
    processes: tuple[Process, ...]
    whole: bool
    state: str
    """Why there are none, if there are not."""

    def text(self) -> str:
        if not self.processes:
            return f"{self.device}: {self.state}"
        rows = [(f"{one.pasid:#x}", f"gpa {one.root:#x}", f"spa {one.spa:#x}") for one in self.processes]
        lines = [f"{self.device}: {self.state}", *columns([("PASID", "tables at", "GCR3 entry at"), *rows], "  ")]
        return "\n".join([*lines, *([] if self.whole else ["  ... (more; --limit N lists more)"])])

    def json(self) -> object:
        return {**members(self), "processes": [one._asdict() for one in self.processes]}


def _pasids(context: Context, arguments: Arguments) -> Pasids:
    device = arguments[BDF]
    iommu = choose_one(context, arguments, device)
    dte = read_dte(context.memory, iommu, device) if iommu.enabled else 0
    if not isinstance(dte, int):
        raise CommandError(str(device), dte.value, "`iommu` says where the device table is, and how long")
    found, whole = processes(context.memory, iommu, dte, arguments[_LIMIT] or 1 << 20)
    missing = [name for name in ("V", "TV", "GV") if not DTE.get(dte, name)]
    if not iommu.control & CONTROL.GTEn:
        missing.append("GTEn of the control register")
    if not iommu.enabled:
        state = "the IOMMU is off"
    elif missing:
        state = f"no PASIDs: {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} 0"
    else:
        levels = 5 if DTE.get(dte, "GuestPagingMode") else 4
        default = ", requests without one have PASID 0 (GIoV)" if dte & DTE.GIoV else ""
        count = f"{len(found)}{'' if whole else ' and more'} in use" if found else "no PASID is in use"
        state = f"{count}, {DTE.get(dte, 'GLX') + 1}-level GCR3 at {gcr3_root(dte):#x}, {levels}-level tables{default}"
    return Pasids(str(device), tuple(found), whole, state)


# iommu tlb


@dataclass(frozen=True, slots=True)
class Cached:
    page: CachedPage
    stale: str
    """How the tables differ by now; empty if they do not."""

    def row(self) -> tuple[str, ...]:
        one = self.page
        who = "" if one.device is None else str(RequesterId(one.device))
        pasid = "" if one.pasid is None else f"{one.pasid:#x}"
        rights = f"{'r' if one.readable else '-'}{'w' if one.writable else '-'}"
        mark = f"! stale: {self.stale}" if self.stale else ""
        kept, domain = ("device", "") if one.own else (f"IOMMU {one.iommu}", f"{one.domain:#x}")
        return (kept, domain, who, pasid, f"{one.iova:#x}", size_text(one.size), rights,
                f"spa {one.spa:#x}", mark)  # fmt: skip


@dataclass(frozen=True, slots=True)
class CachedWord:
    entry: CachedEntry
    now: bytes | None
    """What memory has there by now; None where it is as it was, but for accessed and dirty bits."""

    def row(self) -> tuple[str, ...]:
        one = self.entry
        value = int.from_bytes(one.data, "little")
        mark = f"! stale: {int.from_bytes(self.now, 'little'):#x} by now" if self.now is not None else ""
        return (str(one.iommu), one.kind, one.of, f"spa {one.spa:#x}", f"{value:#x}", mark)

    def json(self) -> dict[str, object]:
        one, now = self.entry, self.now
        return {
            "iommu": one.iommu, "kind": one.kind, "of": one.of, "spa": one.spa,
            "value": f"{int.from_bytes(one.data, 'little'):#x}",
            "now": None if now is None else f"{int.from_bytes(now, 'little'):#x}",
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Tlb:
    pages: tuple[Cached, ...]
    entries: tuple[CachedWord, ...]
    left_out: int
    known: bool = field(repr=False, default=True)

    def text(self) -> str:
        if not self.known:
            return NO_IOMMU
        head = ("kept by", "domain", "device", "PASID", "iova", "size", "rights", "leads to", "")
        lines = columns([head, *(one.row() for one in self.pages)]) if self.pages else ["the IOTLB is empty"]
        if self.entries:
            lines += columns([("IOMMU", "entry of a", "of", "at", "value", ""), *(one.row() for one in self.entries)])
        if self.left_out:
            lines.append(f"... ({self.left_out} more)")
        return "\n".join(lines)

    def json(self) -> object:
        return {"pages": [{**members(one.page), "stale": one.stale} for one in self.pages],
                "entries": [one.json() for one in self.entries], "left_out": self.left_out}  # fmt: skip


def _tlb(context: Context, arguments: Arguments) -> Tlb:
    units = {one.index: one for one in iommus_of(context)}
    if not units:
        return Tlb((), (), 0, known=False)
    if not isinstance(context, IoCaches):
        raise CommandError("iommu tlb", "what an IOMMU keeps is known on a live machine alone", "`iommu walk` reads the tables")
    pages, limit = context.iotlb(), arguments[_LIMIT] or 1 << 32
    shown = tuple(Cached(one, _stale(context, units[one.iommu], one)) for one in pages[:limit] if one.iommu in units)
    entries = context.cached_entries()
    words = tuple(CachedWord(one, _now(context, one)) for one in entries[:limit])
    return Tlb(shown, words, max(0, len(pages) - limit) + max(0, len(entries) - limit))


def _now(context: Context, one: CachedEntry) -> bytes | None:
    try:
        now = context.memory.read(one.spa, len(one.data))
    except Unreadable:
        return b""
    marks = _MARKS if one.kind == "page directory" else 0
    if len(one.data) == 16 and int.from_bytes(one.data, "little") & IRTE128.GuestMode:
        marks = GUEST_IRTE_UNCACHED
    changed = (int.from_bytes(now, "little") ^ int.from_bytes(one.data, "little")) & ~marks
    return now if changed else None


def _stale(context: Context, iommu: Iommu, one: CachedPage) -> str:
    device, writes = one.device, [True, False] if one.writable else [False]
    if device is None:  # kept for a domain: any device of it will do
        found = (entry for entry in entries(context.memory, iommu) if entry.dte & DTE.V)
        device = next((entry.first for entry in found if DTE.get(entry.dte, "DomainID") == one.domain), None)
    if device is None:
        return "no device has this domain"
    for write in writes:
        access = DmaAccess(write, one.pasid, translation=one.own)
        now = translate(context.memory, iommu, device, one.iova, access, set_ad=False)
        if not isinstance(now, IoTranslation):
            return f"{'a write' if write else 'a read'} is refused by now: {now.cause.value}"
        if now.spa != one.spa:
            return f"it leads to spa {now.spa:#x} by now"
    return ""


_WHO = Parameter("BDF|DOMAIN", _DeviceOrDomain())
_PASID = Parameter("PASID", Number(0, (1 << 20) - 1), option="--pasid", only_option=True, help="the addresses of this PASID")
_LINEAR = Parameter("--linear", Flag(), optional=True, option="--linear",
                    help="a new range also where it does not lead on linearly")  # fmt: skip
_LIMIT = Parameter("N", Number(0, 1 << 32), option="--limit", only_option=True, default=256,
                   help="so many lines at most (256); 0 for all")  # fmt: skip

COMMANDS = (
    Command(
        "iommu map", _map, "List everything that a device or a domain reaches, with the guests' RAM that it ends in.",
        (_WHO, _PASID, _LINEAR, _LIMIT, *CHOICE),
        "Neighbours with the same rights are one range, whatever their page sizes; where there are guests, only those that lead\n"
        "on linearly, or go on in a guest's RAM (scattered). Left out are the interrupt range, special addresses that the entry\n"
        "does not have translated, what a DEV denies the device, and a block that SKINIT protects.",
        ("iommu map 00:03.0", "iommu map 00:03.0 --limit 4"),
    ),
    Command(
        "iommu pasids", _pasids, "List the PASIDs of a device that have tables, and where these are.", (BDF, _LIMIT, *CHOICE),
        "`iommu map BDF --pasid N` lists what one of them reaches, `iommu walk BDF IOVA --pasid N` shows the way of an address.",
        ("iommu pasids 00:03.0", "iommu pasids 00:03.0 --limit 8"),
    ),
    Command(
        "iommu tlb", _tlb, "List what the IOMMUs keep of their tables, and what of it is stale.", (_LIMIT,),
        "Translations, and with `--iommu-cache strict` entries of device tables, interrupt tables and page directories. Without\n"
        "that an IOMMU keeps nothing that its tables do not say any more; devices with ATS do. What is stale is an invalidation\n"
        "that is still due, or was forgotten; `stop-on stale` stops where it is used.",
        ("iommu tlb", "iommu tlb --limit 8"),
    ),
)  # fmt: skip
