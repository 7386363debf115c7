"""`who-maps` and `audit isolation`: what leads to a page, whose it is, and whether guests are kept apart."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from introspect.audit import RULES, Finding, Severity, audit_isolation
from introspect.commands.context import CommandError, Context
from introspect.commands.devices import barrier_of, device_names, iommus_of
from introspect.commands.parameters import Choice, Number, Parameter, Physical
from introspect.commands.registry import Arguments, Command
from introspect.commands.render import amount_text, columns, members, size_text
from introspect.commands.tables import going_on, rights_text
from introspect.expression import Space
from introspect.iommu.devices import device_findings, io_areas, io_mappers
from introspect.iommu.space import UNREADABLE
from introspect.paging import ENTRY
from introspect.reverse_map import Mapping, Owner, ReverseMap, reverse_map_of
from introspect.scope import locate_space

__all__ = ["COMMANDS", "reverse_map"]

_UNSEEN = "the tables of {} are not known, or describe too much to be looked at wholly"
_RANGES = 4
"""Of a finding, as many as one line has room for."""


def reverse_map(context: Context, what: str) -> ReverseMap:
    """The reverse map of the context's memory, up to date. CommandError if nobody wanted to wait for it.

    What devices reach comes in by `with_devices`.
    """
    found = reverse_map_of(context.memory)
    if not found.update(context.host, context.guests, going_on(context, what)):
        raise CommandError(what, "stopped before all tables were read", "ask again: what was read so far is kept")
    return found


def with_devices(context: Context, found: ReverseMap) -> list[str]:
    """Take in what devices reach, and the tables of IOMMUs. Says what there was no room for."""
    iommus = iommus_of(context)
    mappers, left_out = io_mappers(context.memory, iommus, device_names(context), found.mappers, barrier_of(context))
    found.mappers += mappers
    found.areas += io_areas(context.memory, iommus)
    return left_out


def _rights(one: Mapping) -> str:
    if one.space == Space.IOVA:
        return f"{'-' if one.attributes & UNREADABLE else 'r'}{'w' if one.attributes & ENTRY.W else '-'}"
    return rights_text(one.attributes, one.space == Space.GPA)


@dataclass(frozen=True, slots=True)
class WhoMaps:
    """What leads to an address, and whose it is. `symbols`: names for linear addresses, by place in `mappings`."""

    spa: int
    owners: tuple[Owner, ...]
    mappings: tuple[Mapping, ...]
    symbols: tuple[str, ...]
    limit: int
    incomplete: tuple[str, ...]
    """Whose tables describe more than was looked at."""

    def text(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield f"spa {self.spa:#x}"
        for owner in self.owners:
            yield f"  {owner.text()}"
        if not self.owners:
            yield "  no structure, page table or RAM of a guest that is known"
        yield "mapped by:" if self.mappings else "mapped by nobody"
        rows = []
        for mapping, symbol in zip(self.mappings, self.symbols, strict=True):
            known = range(12, 53) if mapping.space == Space.IOVA else (12, 21, 22, 30)
            sizes = " ".join(size_text(1 << n) for n in known if mapping.attributes & 1 << n)
            who = mapping.party + (f" ({mapping.label})" if mapping.label else "")
            where = f"{mapping.space} {mapping.address:#x}{f' <{symbol}>' if symbol else ''}"
            rows.append((who, where, _rights(mapping), sizes or "-"))
        yield from columns(rows, "  ")
        if any(sum(one.party == other.party for one in self.mappings) >= self.limit for other in self.mappings):
            yield f"  at most {self.limit} of each set of tables are listed; --limit lists more"
        for name in self.incomplete:
            yield f"  ? {_UNSEEN.format(name)}"

    def json(self) -> object:
        return {
            "spa": self.spa, "owners": [members(owner) for owner in self.owners],
            "mappings": [
                {**members(one), "symbol": symbol or None, "rights": _rights(one)}
                for one, symbol in zip(self.mappings, self.symbols, strict=True)
            ],
            "incomplete": list(self.incomplete),
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Audit:
    """Findings, the worst first. A caller that fails on them asks for `exit_status`."""

    findings: tuple[Finding, ...]
    threshold: Severity
    mappers: int
    incomplete: tuple[str, ...]

    @property
    def exit_status(self) -> int:
        """1 if any finding is at least as bad as the threshold, or tables could not be looked at wholly; else 0."""
        return int(any(finding.severity >= self.threshold for finding in self.findings) or bool(self.incomplete))

    def text(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        for rule in dict.fromkeys(finding.rule for finding in self.findings):
            mine = [finding for finding in self.findings if finding.rule == rule]
            yield f"{rule}: {RULES[rule].says}; {RULES[rule].remedy}"
            rows = []
            for finding in mine:
                shown = " ".join(f"{start:#x}-{end - 1:#x}" for start, end in finding.ranges[:_RANGES])
                more = " ..." if len(finding.ranges) > _RANGES else ""
                where = (amount_text(finding.bytes), f"spa {shown}{more}") if finding.ranges else ()
                rows.append((finding.severity.word, finding.who, finding.what, *where))
            yield from columns(rows, "  ")
        for name in self.incomplete:
            yield f"  ? {_UNSEEN.format(name)}: nothing is proved of them"
        count = len(self.findings)
        worst = f", the worst {self.findings[0].severity.word}" if self.findings else ""
        yield f"{count or 'no'} finding{'s' * (count != 1)}{worst}, in {self.mappers} set{'s' * (self.mappers != 1)} of tables"

    def json(self) -> object:
        return {
            "findings": [
                {**members(finding), "severity": finding.severity.word, "says": RULES[finding.rule].says,
                 "remedy": RULES[finding.rule].remedy}
                for finding in self.findings
            ],
            "tables": self.mappers, "incomplete": list(self.incomplete), "exit_status": self.exit_status,
        }  # fmt: skip


def _incomplete(context: Context, found: ReverseMap) -> tuple[str, ...]:
    parties = [mapper.party for mapper in found.mappers if not mapper.complete]
    return tuple(dict.fromkeys(parties if found.host_known else [str(context.host), *parties]))


def _who_maps(context: Context, arguments: Arguments) -> WhoMaps:
    word = arguments[_WHERE]
    if ":" in word.text:  # with an owner and no space it is that one's linear address, as everywhere
        word = replace(word, space=Space.GVA)
    where = word.locate(context)
    spa = locate_space(context.memory, where.owner, where.space, where.offset)
    if spa is None:
        raise CommandError(str(where), "it is not mapped", "`walk` shows why; name a system-physical address")
    found = reverse_map(context, "page tables")
    left_out = with_devices(context, found)
    limit = arguments[_LIMIT]
    mappings = tuple(found.mappings(spa, limit))
    symbols = tuple(_symbol(context, one) for one in mappings)
    return WhoMaps(spa, tuple(found.owners(spa)), mappings, symbols, limit, (*_incomplete(context, found), *left_out))


def _symbol(context: Context, mapping: Mapping) -> str:
    if mapping.space != Space.GVA or mapping.number is None:
        return ""
    symbols = context.symbols(mapping.number)
    return symbols.name(mapping.address) if symbols is not None else ""


def _isolation(context: Context, arguments: Arguments) -> Audit:
    found = reverse_map(context, "page tables")
    left_out = with_devices(context, found)
    parents = {guest.number: guest.parent for guest in context.guests}
    unseen: set[str] = set()
    findings = audit_isolation(found, parents, unseen=unseen)
    findings += device_findings(context.memory, iommus_of(context), found.mappers)
    findings.sort(key=lambda one: -one.severity)
    threshold = Severity[arguments[_AT].upper()]
    incomplete = dict.fromkeys((*_incomplete(context, found), *left_out, *sorted(unseen)))
    return Audit(tuple(findings), threshold, len(found.mappers), tuple(incomplete))


_WHERE = Parameter("ADDRESS", Physical(), help="system-physical, unless it says another space, or whose it is")
_LIMIT = Parameter("N", Number(1, 1 << 20), option="--limit", only_option=True, default=16,
                   help="addresses that are listed of each set of tables (16)")  # fmt: skip
_AT = Parameter("SEVERITY", Choice(tuple(one.word for one in Severity)), option="--fail-at", only_option=True, default="medium",
                help="the exit status is 1 from such findings on (medium)")  # fmt: skip

COMMANDS = (
    Command(
        "who-maps", _who_maps, "Say what leads to a page, and whose it is: the reverse of all page tables there are.",
        (_WHERE, _LIMIT),
        "Looked through are the host's tables, those of each guest (through its nested ones), each nested table, and what\n"
        "devices reach: what IOMMU, DEV and SKINIT's protection all let pass. Whose it is: VMCB, HSAVE, IOPM, MSRPM,\n"
        "AVIC page, page table of which level of whom, table or ring of an IOMMU, the hypervisor's image, RAM of a guest. Of\n"
        "guests' tables those are known that their VMCBs name: not of each process.",
        ("who-maps 0x801000", "who-maps 2:tick"),
    ),
    Command(
        "audit isolation", _isolation, "Find where guests are not kept apart, or reach what confines them.", (_AT,),
        "Critical: an agent writes a VMCB, permission map, save area, nested table, table of an IOMMU or the hypervisor's\n"
        "image, or a guest's user code reaches them. High: it reads them; two agents write the same page; the host's user code\n"
        "reaches them; a guest's device sends interrupts that no table decides. Medium: one agent reads what another writes;\n"
        "pages of the host are writable and executable. Low: the same in a guest. Agents are guests and devices. A device\n"
        "reaches what IOMMU, DEV and SKINIT's protection all let pass, and belongs to the guest whose RAM the IOMMU's tables\n"
        "map most of. A guest that runs within another shares that one's memory by design. The exit status of `vmdbg inspect`\n"
        "is 1 if there are findings.",
        ("audit isolation", "audit isolation --fail-at critical --json"),
    ),
)  # fmt: skip
