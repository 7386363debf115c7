"""`pt` and `npt`: everything that page tables map, as ranges."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from introspect.commands.context import Cancelled, CommandError, Context, GuestView, HostView
from introspect.commands.memory_picture import picture
from introspect.commands.parameters import File, Flag, Guest, Number, Owner, Parameter
from introspect.commands.registry import Arguments, Command
from introspect.commands.render import amount_text, columns, size_text
from introspect.dimension import Problem
from introspect.memtypes import COMBINED_PAT, Caching
from introspect.paging import ENTRY
from introspect.registers import memory_types
from introspect.tables import Listing, Range, as_ranges, list_nested, list_space

__all__ = ["COMMANDS", "Space", "going_on", "rights_text"]

_TABLES = {5: "PML5", 4: "PML4", 3: "page-directory-pointer", 2: "page-directory", 1: "page"}
_ENTRIES = {5: "PML5E", 4: "PML4E", 3: "PDPE", 2: "PDE", 1: "PTE"}


def going_on(context: Context, what: str) -> Callable[[float], bool]:
    """Tells the context of progress; False as soon as nobody wants to wait any longer."""

    def goes_on(part: float) -> bool:
        try:
            context.progress(part, what)
        except Cancelled:
            return False
        return True

    return goes_on


def rights_text(attributes: int, nested: bool = False) -> str:
    """Attributes of a range in words: "rwx user global". Nested tables have no supervisors: without U there is no access."""
    if nested and not attributes & ENTRY.U:
        return "none (U is clear)"
    word = f"r{'w' if attributes & ENTRY.W else '-'}{'-' if attributes & ENTRY.NX else 'x'}"
    if nested:
        return word
    return f"{word} {'user' if attributes & ENTRY.U else 'supervisor'}{' global' if attributes & ENTRY.G else ''}"


@dataclass(frozen=True, slots=True)
class Space:
    """What an address space maps. At most `limit` ranges are told, unless it is 0."""

    who: str
    kind: str
    """"linear" or "guest-physical"."""
    listing: Listing
    ranges: tuple[Range, ...]
    left_out: int
    caching: Caching | None
    gmet: bool = False

    def text(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        found = self.listing
        mode = "paging off" if found.mode == "off" else f"{found.mode} paging"
        over = f" over {found.nested_mode} nested paging" if found.nested_mode else ""
        tables = sum(found.tables)
        yield (
            f"{self.kind} addresses of {self.who}, {mode}{over}: {amount_text(found.bytes_mapped)} mapped, "
            f"{tables} table{'s' * (tables != 1)}"
        )
        head = ("start", "end", "size", "rights", "pages", "type", "leads to")
        yield from columns([head, *map(self._row, self.ranges)], "  ") if self.ranges else ("  nothing is mapped",)
        if self.left_out:
            yield f"  ... ({self.left_out} more ranges; --limit 0 lists all)"
        yield from self._refused()
        for problem in found.problems:
            yield f"  ! {_problem_text(problem, self.listing.shown)}"
        for problem in found.nested_problems:
            yield f"  ! nested tables: {_problem_text(problem, lambda address: address)}"
        if found.problems_left_out:
            yield f"  ! {found.problems_left_out} more like these"
        for start, end in found.unknown.rows():
            yield f"  ? {self._span(start, end)}: not looked at, for the tables describe too much, or it took too long"
        for start, end in found.nested_unknown.rows():
            yield f"  ? gpa {start:#x}-{end - 1:#x}: not looked at in the nested tables"

    def _refused(self) -> Iterator[str]:
        rows = list(self.listing.refused.rows())
        if rows:
            yield "  the guest's tables map these, but the nested ones do not (#NPF):"
            shown = rows[: len(self.ranges) + 16]
            cells = [(self._span(at, at + size), amount_text(size), f"gpa {gpa:#x}") for at, size, gpa, _ in shown]
            yield from columns(cells, "    ")
            if len(rows) > len(shown):
                yield f"    ... ({len(rows) - len(shown)} more)"

    def _span(self, start: int, end: int) -> str:
        return f"{self.listing.shown(start):#x}-{self.listing.shown(end - 1):#x}"

    def _row(self, one: Range) -> tuple[str, ...]:
        nested = self.kind != "linear"
        rights = rights_text(one.attributes, nested and not self.gmet)
        if self.gmet:
            user = one.user if nested else one.nested_user
            rights = f"{rights_text(one.attributes, False).partition(' ')[0]} x by {'user' if user else 'supervisor'} (GMET)"
        pages = " ".join(map(size_text, one.page_sizes)) or "-"
        if one.nested_page_sizes:
            pages += f" over {' '.join(map(size_text, one.nested_page_sizes))}"
        target = f"spa {one.target:#x}{'' if one.linear else ' ... (scattered)'}"
        start, end = self.listing.shown(one.start), self.listing.shown(one.end - 1)
        return f"{start:#x}", f"{end:#x}", amount_text(one.end - one.start), rights, pages, self._type(one), target

    def _type(self, one: Range) -> str:
        """The memory type that the PATs give; MTRRs are not asked."""
        if self.caching is None:
            index = f"PA{one.pat_index}"
            return f"{index} over PA{one.nested_pat_index}" if one.nested_page_sizes else index
        host_pat = self.caching.pat if self.caching.host_pat is None else self.caching.host_pat
        if self.kind != "linear":
            return memory_types(host_pat)[one.pat_index] or "undefined"
        name = memory_types(self.caching.pat)[one.pat_index] if one.page_sizes else "WB"
        if one.nested_page_sizes and name is not None:
            inner = memory_types(host_pat)[one.nested_pat_index]
            name = None if inner is None else COMBINED_PAT[name][inner]
        return name or "undefined"

    def json(self) -> object:
        found = self.listing
        return {
            "who": self.who, "space": "gva" if self.kind == "linear" else "gpa", "mode": found.mode,
            "nested_mode": found.nested_mode, "bytes": found.bytes_mapped, "tables": list(found.tables),
            "ranges": [self._range_json(one) for one in self.ranges], "left_out": self.left_out,
            "refused": [
                {"start": found.shown(start), "last": found.shown(start + length - 1), "gpa": gpa}
                for start, length, gpa, _ in list(found.refused.rows())[: len(self.ranges) + 16]
            ],
            "problems": [{"nested": False, **one._asdict()} for one in found.problems]
            + [{"nested": True, **one._asdict()} for one in found.nested_problems],
            "problems_left_out": found.problems_left_out,
            "unknown": [{"start": found.shown(start), "last": found.shown(end - 1)} for start, end in found.unknown.rows()],
            "nested_unknown": [{"start": start, "last": end - 1} for start, end in found.nested_unknown.rows()],
        }  # fmt: skip

    def _range_json(self, one: Range) -> dict[str, object]:
        return {
            "start": self.listing.shown(one.start), "last": self.listing.shown(one.end - 1), "spa": one.target,
            "linear": one.linear, "writable": one.writable, "executable": one.executable, "user": one.user,
            "global": one.shared, "page_sizes": list(one.page_sizes), "nested_page_sizes": list(one.nested_page_sizes),
            "type": self._type(one),
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Written:
    """A picture that was made."""

    file: str
    what: str
    ranges: int

    def text(self) -> str:
        return f"{self.what}: {self.ranges} range{'s' * (self.ranges != 1)}, drawn in {self.file}"

    def json(self) -> object:
        return {"file": self.file, "what": self.what, "ranges": self.ranges}


def _problem_text(problem: Problem, shown: Callable[[int], int]) -> str:
    where = f"{shown(problem.start):#x}-{shown(problem.end - 1):#x}"
    table = f"the {_TABLES[problem.level]} table at {problem.where:#x}"
    match problem.kind:
        case "reserved":
            name = _ENTRIES[problem.level]
            return f"{where}: {name} at spa {problem.where:#x} is {problem.value:#x}, which has reserved bits set: it faults"
        case "no memory":
            return f"{where}: {table} is (partly) where there is no memory: the processor reads ones there"
        case "refused":
            return f"{where}: {table} is at a guest-physical address that the nested tables do not let it read and write"
        case _:
            return f"{where}: {table} is one of those above it: its entries count as those of several levels"


_OWNER = Parameter("GUEST|host", Owner(), optional=True, option="--guest", help="whose; else who is selected")
_GUEST = Parameter("GUEST", Guest(), optional=True, option="--guest", help="whose; else the selected guest's")
_LINEAR = Parameter("--linear", Flag(), optional=True, option="--linear",
                    help="a new range also where it does not lead on linearly")  # fmt: skip
_LIMIT = Parameter("N", Number(0, 1 << 32), option="--limit", only_option=True, default=256,
                   help="so many ranges at most (256); 0 for all")  # fmt: skip
_MAP = Parameter("FILE", File(), option="--map", only_option=True,
                 help="draw it instead: a picture (SVG, or HTML by the file's name) of what maps where")  # fmt: skip


def _space(
    context: Context, arguments: Arguments, who: GuestView | HostView, kind: str, listing: Listing, gmet: bool
) -> Space:
    table = listing.table(linear=arguments.given(_LINEAR))
    count = len(table.start)
    limit = arguments[_LIMIT] or count
    return Space(
        str(who), kind, listing, tuple(as_ranges(table.take(slice(0, limit)))), max(0, count - limit), who.caching, gmet
    )  # fmt: skip


def _pt(context: Context, arguments: Arguments) -> Space:
    who = arguments.owner_or_selected(_OWNER)
    goes_on, targets = going_on(context, "page tables"), arguments.given(_LINEAR)
    listing = list_space(context.memory, who.paging, who.nested, targets=targets, progress=goes_on)
    return _space(context, arguments, who, "linear", listing, who.nested is not None and who.nested.gmet)


def _npt(context: Context, arguments: Arguments) -> Space | Written:
    guest = arguments.guest_or_selected(_GUEST)
    if guest.nested is None:
        raise CommandError(str(guest), "it runs without nested paging", f"its page tables: pt {guest.number}")
    file = arguments.get(_MAP)
    goes_on, targets = going_on(context, "nested page tables"), arguments.given(_LINEAR) or file is not None
    listing = list_nested(context.memory, guest.nested, targets=targets, progress=goes_on)
    if file is None:
        return _space(context, arguments, guest, "guest-physical", listing, guest.nested.gmet)
    title = f"Guest-physical memory of {guest}"
    try:
        Path(file).write_text(picture(listing, title, html=file.lower().endswith((".html", ".htm"))), encoding="utf-8")
    except OSError as error:
        raise CommandError(file, f"it cannot be written: {error.strerror}", "name a file in a directory that is yours") from None
    return Written(file, title, len(listing.table().start))


COMMANDS = (
    Command(
        "npt", _npt, "List everything that a guest's nested page tables map, as ranges; or draw it.",
        (_GUEST, _LINEAR, _LIMIT, _MAP),
        "Neighbours with the same rights and memory type are one range, whatever their page sizes. The type is the one of the\n"
        "host's PAT; `walk` takes the MTRRs in, too. Lines with ! tell of tables that are not in order, those with ? of what\n"
        "could not be looked at.",
        ("npt 2", "npt 5 --linear --limit 4"),
    ),
    Command(
        "pt", _pt, "List everything that page tables map, as ranges; a guest's combined with its nested ones.",
        (_OWNER, _LINEAR, _LIMIT),
        "The rights are those that both dimensions grant together. What the guest's tables map and the nested ones do not is\n"
        "listed apart. The type is what the PATs make of it; `walk` takes the MTRRs in, too.",
        ("pt 2", "pt host --limit 8"),
    ),
)  # fmt: skip
