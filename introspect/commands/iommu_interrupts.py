"""`iommu irt` and `irq try`: the interrupt table of a device, and what a message of it becomes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from introspect.avic import APIC_ADDRESS
from introspect.commands.context import CommandError, Context
from introspect.commands.iommu import fault_json, fault_lines
from introspect.commands.iommu_choice import BDF, CHOICE, choose_one
from introspect.commands.parameters import Flag, Number, Parameter
from introspect.commands.registry import Arguments, Command
from introspect.commands.render import columns, members
from introspect.iommu.checks import interrupt_problem
from introspect.iommu.remapping import IrqWalk, Remapped, entry_size, interrupt_entries, irte_type, remap_walk
from introspect.iommu.state import Iommu
from introspect.iommu.structures import DTE, GUEST_IRTE, IRTE, interrupt_root
from introspect.iommu.verdicts import StepKind
from introspect.iommu.walk import in_interrupt_range, read_dte
from introspect.pci import RequesterId
from introspect.sources import Unreadable
from introspect.vmcb import VMCB, VMCB_SIZE

__all__ = ["COMMANDS", "Tried", "try_message"]


@dataclass(frozen=True, slots=True)
class Slot:
    """An entry of an interrupt table."""

    index: int
    spa: int
    value: int
    words: str
    guest: str

    def json(self) -> dict[str, object]:
        return members(self)


@dataclass(frozen=True, slots=True)
class InterruptTable:
    """Of one device. `state`: what its entry has the IOMMU do with interrupts."""

    device: str
    state: str
    entry_size: int
    count: int
    slots: tuple[Slot, ...]
    left_out: int
    unreadable: str

    def text(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield f"{self.device}: {self.state}"
        if self.slots:
            rows = [(f"{one.index:#x}", f"{one.spa:#x}", one.words, one.guest) for one in self.slots]
            yield from columns([("index", "at spa", "entry", ""), *rows], "  ")
        elif self.count and not self.unreadable:
            yield "  every entry is 0"
        if self.left_out:
            yield f"  ... ({self.left_out} more; --limit 0 lists all)"
        if self.unreadable:
            yield f"  ? {self.unreadable}"

    def json(self) -> object:
        return {**members(self), "slots": [one.json() for one in self.slots]}


def _irt(context: Context, arguments: Arguments) -> InterruptTable:
    device = arguments[BDF]
    iommu = choose_one(context, arguments, device)
    if not iommu.enabled:
        return InterruptTable(str(device), "no IOMMU that is on is before it: its interrupts are not remapped", 0, 0, (), 0, "")
    dte = read_dte(context.memory, iommu, device)
    if not isinstance(dte, int):
        raise CommandError(str(device), dte.value, "`iommu` says where the device table is, and how long")
    size, count = entry_size(iommu), interrupt_entries(dte)
    names = DTE.IntTabLen | DTE.IG | DTE.IntCtl | DTE.InitPass | DTE.EIntPass | DTE.NMIPass | DTE.Lint0Pass | DTE.Lint1Pass
    words = DTE.describe(dte & names)
    if not dte & DTE.IV:
        return InterruptTable(str(device), "IV is 0: its interrupts are not remapped", size, 0, (), 0, "")
    problem = interrupt_problem(dte, iommu.features)
    if problem is not None:
        return InterruptTable(str(device), f"{words}: the entry is refused ({problem})", size, 0, (), 0, "")
    if DTE.get(dte, "IntCtl") != 2:
        return InterruptTable(str(device), f"{words}: no table is looked at", size, 0, (), 0, "")
    root, unreadable = interrupt_root(dte), ""
    try:
        data = context.memory.read(root, count * size)
    except Unreadable as error:
        data, unreadable = error.readable_prefix, f"no memory at {error.address:#x}"
    vapics = _vapics(context)
    slots = []
    for index in range(len(data) // size):
        value = int.from_bytes(data[index * size : (index + 1) * size], "little")
        if value and (value & IRTE.RemapEn or arguments.given(_ALL)):
            guest = vapics.get(GUEST_IRTE.get(value, "VAPICRoot") << 12, "") if size == 16 and value & IRTE.GuestMode else ""
            slots.append(Slot(index, root + index * size, value, irte_type(value, size).describe(value), guest))
    limit = arguments[_LIMIT] or len(slots)
    state = f"{words}: {count} {'entry' if count == 1 else 'entries'} of {size} bytes at spa {root:#x}, {len(slots)} in use"
    return InterruptTable(str(device), state, size, count, tuple(slots[:limit]), max(0, len(slots) - limit), unreadable)


def _vapics(context: Context) -> dict[int, str]:
    """Whose each AVIC backing page is."""
    found = {}
    for guest in context.guests:
        for spa in guest.vmcbs:
            try:
                page = VMCB.read(context.memory.read(spa, VMCB_SIZE), "avic_backing_page") & APIC_ADDRESS
            except Unreadable:
                continue
            if page:
                found[page] = str(guest)
    return found


# irq try


@dataclass(frozen=True, slots=True)
class Tried:
    """What a message of a device would become."""

    walk: IrqWalk
    guest: str

    def text(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        found = self.walk
        yield f"message {found.data:#x} to {found.address:#x} by {RequesterId(found.device)}"
        yield from self.explanation()

    def explanation(self) -> Iterator[str]:
        """The entries, and what comes of them."""
        found = self.walk
        for step in found.steps:
            words = irte_type(step.value, found.entry_size).describe(step.value) if step.kind == StepKind.IRTE else ""
            if step.kind == StepKind.DTE:
                words = DTE.describe(step.value & ((1 << 192) - (1 << 128)) & DTE.defined)
            index = f" {step.address:#x}" if step.kind == StepKind.IRTE else ""
            yield f"  {step.name}{index} at spa {step.spa:#x}: {words or '0'}"
        if isinstance(found.verdict, Remapped):
            yield f"-> {_delivered(found.verdict, self.guest)}: {found.verdict.route.value}"
        else:
            yield from fault_lines(found.verdict)

    def json(self) -> object:
        found, verdict = self.walk, self.walk.verdict
        common = {
            "device": str(RequesterId(found.device)), "address": found.address, "data": found.data,
            "steps": [{"name": step.name, "spa": step.spa, "value": step.value} for step in found.steps],
        }  # fmt: skip
        if isinstance(verdict, Remapped):
            guest = verdict.guest and verdict.guest._asdict()
            return {**common, "outcome": "delivered", **verdict._asdict(), "route": verdict.route.name, "guest": guest,
                    "whose": self.guest}  # fmt: skip
        return {**common, "outcome": "fault", **fault_json(verdict)}


def _delivered(one: Remapped, guest: str) -> str:
    if one.guest is not None:
        whose = f" ({guest})" if guest else ""
        how = f"doorbell to APIC {one.guest.destination:#x}" if one.guest.running else "it is not running"
        log = f", GA log tag {one.guest.tag:#x}" if one.guest.log and not one.guest.running else ""
        return f"vector {one.vector:#x} in the virtual APIC at spa {one.guest.vapic:#x}{whose}, {how}{log}"
    logical = "logical " if one.logical else ""
    return f"{one.mode_name} interrupt, vector {one.vector:#x}, {logical}destination {one.destination:#x}"


def _try(context: Context, arguments: Arguments) -> Tried:
    device, address = arguments[BDF], arguments[_ADDRESS]
    if not in_interrupt_range(address):
        raise CommandError(f"{address:#x}", "an interrupt message is a write to 0xfee00000-0xfeefffff", "`dma try` is for others")
    return try_message(context, choose_one(context, arguments, device), device, address, arguments[_DATA])


def try_message(context: Context, iommu: Iommu, device: RequesterId, address: int, data: int) -> Tried:
    """What a message becomes by the tables as they are in memory."""
    found = remap_walk(context.memory, iommu, device, address, data)
    verdict = found.verdict
    vapic = verdict.guest.vapic if isinstance(verdict, Remapped) and verdict.guest is not None else None
    return Tried(found, "" if vapic is None else _vapics(context).get(vapic, ""))


_ALL = Parameter("--all", Flag(), optional=True, option="--all", help="entries without RemapEn, too, unless they are 0")
_LIMIT = Parameter("N", Number(0, 1 << 11), option="--limit", only_option=True, default=64,
                   help="so many entries at most (64); 0 for all")  # fmt: skip
_ADDRESS = Parameter("ADDRESS", Number(), help="the message's address, 0xfeexxxxx")
_DATA = Parameter("DATA", Number(0, 0xFFFFFFFF), help="the message's data")

COMMANDS = (
    Command(
        "iommu irt", _irt, "List the interrupt remapping table of a device.", (BDF, _ALL, _LIMIT, *CHOICE),
        "An entry with GuestMode leads to the virtual APIC of a guest, which is named where it is known.",
        ("iommu irt 00:03.0", "iommu irt 00:03.0 --all"),
    ),
    Command(
        "irq try", _try, "Say what an interrupt message of a device would become, without a side effect.",
        (BDF, _ADDRESS, _DATA, *CHOICE),
        "The message is a write of DATA to ADDRESS, as MSI and MSI-X registers have them.",
        ("irq try 00:03.0 0xfee00000 0", "irq try 00:03.0 0xfee01000 0x400"),
    ),
)  # fmt: skip
