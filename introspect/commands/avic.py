"""`avic`: a virtual APIC in words, and the tables by which it reaches others."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from introspect.avic import (
    APIC_ADDRESS,
    DFR,
    IRR,
    ISR,
    LOGICAL_ENTRIES,
    LOGICAL_ENTRY,
    PHYSICAL_ENTRY,
    REGISTERS,
    TMR,
    dword,
    logical_name,
    vectors,
)
from introspect.commands.context import Context
from introspect.commands.registry import Arguments, Command
from introspect.commands.render import columns, jsonable
from introspect.commands.which import WHICH, find_vmcb
from introspect.layout import Buffer
from introspect.sources import Memory, Unreadable
from introspect.vmcb import AVIC_PHYSICAL, V_INTR, VMCB

__all__ = ["COMMANDS"]

_BANKS = {offset + 16 * n for offset in (ISR, TMR, IRR) for n in range(8)}


@dataclass(frozen=True, slots=True)
class Requests:
    """The vectors of a backing page."""

    requested: tuple[int, ...]
    in_service: tuple[int, ...]
    level: tuple[int, ...]
    """Those of either that are level-triggered."""

    def words(self) -> tuple[str, str]:
        return _vectors(self.requested, self.level), _vectors(self.in_service, self.level)


@dataclass(frozen=True, slots=True)
class Physical:
    """A valid entry of the physical table. `requests` is None where the pointer leads to no memory."""

    apic_id: int
    backing_page: int
    host_apic_id: int | None
    """None while it is not running."""
    requests: Requests | None

    @property
    def row(self) -> tuple[str, ...]:
        where = "-" if self.host_apic_id is None else f"APIC {self.host_apic_id}"
        words = ("! no memory",) if self.requests is None else self.requests.words()
        return str(self.apic_id), f"{self.backing_page:#x}", where, *words


@dataclass(frozen=True, slots=True)
class Logical:
    """A valid entry of the logical table."""

    index: int
    logical_id: int
    apic_id: int

    @property
    def row(self) -> tuple[str, ...]:
        return f"{self.logical_id:#04x}", str(self.apic_id)


@dataclass(frozen=True, slots=True)
class Avic:
    """The virtual APIC of a VMCB. `registers` and `requests` are None where the backing page is no memory."""

    owner: str
    vmcb: int
    active: bool
    apic_bar: int
    backing_page: int
    v_tpr: int
    registers: dict[str, int] | None
    requests: Requests | None
    physical_table: int
    last_id: int
    physical: tuple[Physical, ...] | None
    """None, as `logical`, where the table is no memory."""
    logical_table: int
    logical: tuple[Logical, ...] | None

    def text(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        off = "" if self.active else " (off: AVIC needs V_INTR bit 31 without bit 30, and nested paging)"
        yield f"AVIC of {self.owner}, VMCB at {self.vmcb:#x}{off}"
        yield f"APIC page at gpa {self.apic_bar:#x}, backing page at {self.backing_page:#x}, V_TPR {self.v_tpr:#x}"
        if self.registers is None or self.requests is None:
            yield "  ! no memory there"
        else:
            yield from columns(((name, f"{value:#x}") for name, value in self.registers.items()), "  ")
            requested, in_service = self.requests.words()
            yield from columns((("requested", requested or "none"), ("in service", in_service or "none")), "  ")
        yield f"physical APIC ID table at {self.physical_table:#x}, IDs to {self.last_id:#x}:"
        yield from _table(("ID", "backing page", "runs on", "requested", "in service"), self.physical)
        yield f"logical APIC ID table at {self.logical_table:#x}:"
        yield from _table(("logical ID", "ID"), self.logical)

    def json(self) -> object:
        return jsonable(self)


def _vectors(found: tuple[int, ...], level: tuple[int, ...]) -> str:
    return " ".join(f"{vector:#x}{'(level)' if vector in level else ''}" for vector in found)


def _table(head: tuple[str, ...], entries: Sequence[Physical | Logical] | None) -> list[str]:
    if entries is None:
        return ["  ! no memory there"]
    return columns([head, *(entry.row for entry in entries)], "  ") if entries else ["  empty"]


def _read(memory: Memory, spa: int, size: int) -> bytes | None:
    try:
        return memory.read(spa, size)
    except Unreadable:
        return None


def _requests(page: Buffer) -> Requests:
    def listed(bits: int) -> tuple[int, ...]:
        return tuple(vector for vector in range(256) if bits >> vector & 1)

    irr, isr, tmr = (vectors(page, bank) for bank in (IRR, ISR, TMR))
    return Requests(listed(irr), listed(isr), listed((irr | isr) & tmr))


def _physical(memory: Memory, table: int, last: int) -> tuple[Physical, ...] | None:
    data = _read(memory, table, 8 * (last + 1))
    if data is None:
        return None
    found = []
    for apic_id in range(last + 1):
        entry = int.from_bytes(data[8 * apic_id : 8 * apic_id + 8], "little")
        if entry & PHYSICAL_ENTRY.valid:
            page = _read(memory, entry & APIC_ADDRESS, 0x1000)
            host = PHYSICAL_ENTRY.get(entry, "host_apic_id") if entry & PHYSICAL_ENTRY.is_running else None
            found.append(Physical(apic_id, entry & APIC_ADDRESS, host, _requests(page) if page is not None else None))
    return tuple(found)


def _logical(memory: Memory, table: int, dfr: int) -> tuple[Logical, ...] | None:
    data = _read(memory, table, 4 * LOGICAL_ENTRIES)
    if data is None:
        return None
    entries = ((index, dword(data, 4 * index)) for index in range(8 if dfr >> 28 == 0xF else LOGICAL_ENTRIES))
    return tuple(
        Logical(index, logical_name(index, dfr), entry & LOGICAL_ENTRY.guest_apic_id)
        for index, entry in entries if entry & LOGICAL_ENTRY.valid
    )  # fmt: skip


def _avic(context: Context, arguments: Arguments) -> Avic:
    spa, owner, vmcb = find_vmcb(context, arguments)
    values = VMCB.decode(vmcb)
    backing, logical, physical = (
        values[name] & APIC_ADDRESS for name in ("avic_backing_page", "avic_logical_table", "avic_physical_table")
    )
    last = min(AVIC_PHYSICAL.get(values["avic_physical_table"], "max_index"), 0x1FF)
    mode = values["v_intr"] & (V_INTR.avic_enable | V_INTR.x2avic_enable)
    page = _read(context.memory, backing, 0x1000)
    registers = None
    if page is not None:
        shown = ((register.name, dword(page, offset)) for offset, register in REGISTERS.items() if offset not in _BANKS)
        registers = {name: value for name, value in shown if value}
    return Avic(
        owner, spa, mode == V_INTR.avic_enable and bool(values["misc_ctl"] & 1), values["avic_apic_bar"] & APIC_ADDRESS,
        backing, values["v_intr"] & 0xFF, registers, _requests(page) if page is not None else None,
        physical, last, _physical(context.memory, physical, last),
        logical, _logical(context.memory, logical, dword(page, DFR) if page is not None else 0xFFFFFFFF),
    )  # fmt: skip


COMMANDS = (
    Command(
        "avic", _avic, "Show a virtual APIC: its registers, what is requested and in service, and AVIC's two tables.", (WHICH,),
        "PA is the address of a VMCB: a guest with several has one APIC for each, and `guests` lists them. Registers that\n"
        "are zero are left out.",
        ("avic 2", "avic 2 --json"),
    ),
)  # fmt: skip
