"""`context` and `here`: an inferior at a glance, and in one line. What the console shows at each stop and below its prompt."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from introspect.commands.context import Context, ExitRecord, GuestView, HostView
from introspect.commands.disassemble import Predictions
from introspect.commands.inferior_state import InferiorState, Remembers
from introspect.commands.parameters import Choice, Number, Owner, Parameter
from introspect.commands.registry import Arguments, Command
from introspect.commands.render import columns, jsonable
from introspect.disassembly import MAX_INSTRUCTION, Instruction, instructions
from introspect.execution import execution_mode, linear_pc, linear_sp
from introspect.exits import EVENT, describe_event, describe_exit, exit_name
from introspect.expression import Space
from introspect.layout import Bits
from introspect.registers import CR0, CR4, EFER, RFLAGS
from introspect.scope import read_space
from introspect.source_lines import Place, SourceLines, read_lines
from introspect.sources import Unreadable
from introspect.vmcb import VMCB, VMCB_SIZE

__all__ = ["COMMANDS", "SECTIONS", "Moment", "Situation", "Where", "situation", "where"]

SECTIONS = ("regs", "code", "source", "stack", "vmcb", "exit")
_MEANINGS = (
    "registers, changed ones marked by *",
    "instructions around the current one",
    "the lines of the source around it, where that is here",
    "the words on top of the stack",
    "what stands out in the guest's VMCB",
    "the last #VMEXITs",
)
GENERAL = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp", *(f"r{n}" for n in range(8, 16)))
_SEGMENTS = ("cs", "ss", "ds", "es", "fs", "gs")
_SECTIONS_HELP = "of regs, code, source, stack, vmcb, exit; else all of them"
_ROWS = {"code": 9, "source": 7, "stack": 8, "exit": 3}
"""Lines of a section, unless the caller has a place of another size for it."""
_MASK = (1 << 64) - 1
_FUNCTION = 4096
"""Bytes of a function that are decoded at most to get from its beginning to the current instruction."""
_CELL = 24
_SPOKEN = ("guest_asid", "n_cr3", "v_intr", "int_state", "eventinj", "exitintinfo", "tlb_control", "vmcb_clean")
"""Fields of a VMCB that say what is going on, where they are not 0."""


@runtime_checkable
class Moment(Protocol):
    """A context of something that runs: it knows the time."""

    @property
    def now(self) -> int:
        """Guest time in ticks."""


@dataclass(frozen=True, slots=True)
class Where:
    """An inferior in one line. What is not known is None, or empty."""

    number: int
    name: str
    mode: str
    """As `introspect.execution` names it; empty where that is not known."""
    paging: str
    """How it pages, and over what."""
    cpl: int | None
    asid: int | None
    cr3: int | None
    ncr3: int | None
    pc: int | None
    """Linear."""
    symbol: str
    line: str
    """Of the source: "guest64.c:50"."""
    last_exit: str
    time: int | None

    def text(self) -> str:
        parts = [self.name, self.mode, self.paging] if self.mode else [self.name, self.paging]
        parts += [f"CPL {self.cpl}"] if self.cpl is not None else []
        parts += [f"ASID {self.asid}"] if self.asid is not None else []
        parts += [f"CR3 {self.cr3:#x}"] if self.cr3 is not None else []
        parts += [f"nCR3 {self.ncr3:#x}"] if self.ncr3 is not None else []
        parts += [f"RIP {self.pc:#x}" + (f" <{self.symbol}>" if self.symbol else "")] if self.pc is not None else []
        parts += [self.line] if self.line else []
        parts += [f"last exit {self.last_exit}"] if self.last_exit else []
        parts += [f"{self.time} ticks"] if self.time is not None else []
        return ", ".join(parts)

    def short(self) -> str:
        """Where it is and in which mode, no more."""
        at = f"{self.pc:#x}{f' <{self.symbol}>' if self.symbol else ''}" if self.pc is not None else "nowhere"
        at += f", {self.line}" if self.line else ""
        return f"{self.name} at {at}, {self.mode or self.paging}" + (f", CPL {self.cpl}" if self.cpl is not None else "")

    def json(self) -> object:
        return jsonable(self)


def where(context: Context, owner: GuestView | HostView) -> Where:
    registers = context.registers(owner.number)
    pc, symbols = linear_pc(registers), context.symbols(owner.number)
    guest = owner if isinstance(owner, GuestView) else None
    exits = context.exits(guest.number if guest else None, 1)
    paged = owner.paging.mode if owner.paging.cr0 & CR0.PG else "no paging"
    mode = execution_mode(registers).name.replace("64-bit mode", "64-bit") if registers else ""
    place = SourceLines.of(symbols).at(pc) if symbols is not None and pc is not None else None
    named = guest is not None and guest.name != f"guest {guest.number}"
    return Where(
        owner.number,
        str(owner) if guest is None or named else guest.name,
        mode,
        paged + (f" over {owner.nested.format.name}" if owner.nested else ""),
        registers.get("cpl", owner.paging.cpl if registers else None),
        guest.asid if guest else None,
        owner.paging.cr3 if owner.paging.cr0 & CR0.PG else None,
        guest.ncr3 if guest else None,
        pc,
        symbols.name(pc) if symbols is not None and pc is not None else "",
        str(place) if place is not None else "",
        exit_name(exits[-1].code) if exits else "",
        context.now if isinstance(context, Moment) else None,
    )


@dataclass(frozen=True, slots=True)
class Word:
    """One on the stack."""

    address: int
    value: int
    symbol: str


@dataclass(frozen=True, slots=True)
class Highlights:
    """What stands out in a VMCB: the exit in words, and fields that are not 0."""

    spa: int
    exit: str
    fields: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Situation:
    """What was asked for of an inferior; sections that were not asked for are empty."""

    where: Where
    sections: tuple[str, ...]
    registers: Mapping[str, int]
    changed: tuple[str, ...]
    code: tuple[Instruction, ...]
    place: Place | None
    """The line of the source that is executed, if that is known and asked for."""
    marks: Mapping[int, str]
    """By address: by which #VMEXIT an instruction would leave the guest."""
    stack: tuple[Word, ...]
    word: int
    """Bytes of a word on the stack."""
    vmcb: Highlights | None
    exits: tuple[ExitRecord, ...]
    rows: int = field(default=7, repr=False)
    """Lines of the source."""
    width: int = field(default=100, repr=False)
    symbol: Callable[[int], str] = field(default=lambda address: "", repr=False)

    def lines(self, section: str) -> list[str]:
        """One section, without its title."""
        makers = {
            "regs": self._registers, "code": self._code, "source": self._source, "stack": self._stack, "vmcb": self._vmcb,
            "exit": self._exits,
        }  # fmt: skip
        return [line if len(line) <= self.width else line[: self.width - 3] + "..." for line in makers[section]()]

    def title(self, section: str) -> str:
        w = self.where
        return {
            "regs": f"{w.name}: {w.mode}, {w.paging}" + (f", CPL {w.cpl}" if w.cpl is not None else ""),
            "code": "code" + (f" at {w.symbol}" if w.symbol else ""),
            "source": str(self.place) if self.place is not None else "source",
            "stack": "stack",
            "vmcb": f"VMCB at {self.vmcb.spa:#x}" if self.vmcb else "VMCB",
            "exit": "last exits",
        }[section]

    def text(self) -> str:
        lines: list[str] = []
        for section in self.sections:
            shown = self.lines(section)
            if shown:
                lines += [f"-- {self.title(section)} ".ljust(self.width, "-"), *shown]
        return "\n".join(lines) or f"Nothing of {self.where.name} is known here."

    def json(self) -> object:
        code = [
            {"address": one.address, "code": one.code.hex(), "text": one.text, "target": one.target,
             "symbol": self.symbol(one.address), "exit": self.marks.get(one.address)} for one in self.code
        ]  # fmt: skip
        exits = [
            {"number": r.number, "guest": r.guest, "time": r.time, "rip": r.rip, "code": r.code, "name": exit_name(r.code),
             "info1": r.info1, "info2": r.info2, "intinfo": r.intinfo} for r in self.exits
        ]  # fmt: skip
        return {
            "where": self.where.json(), "source": {"file": str(self.place.path), "line": self.place.line} if self.place else None,
            "registers": dict(self.registers), "changed": list(self.changed), "code": code,
            "stack": jsonable(self.stack), "vmcb": jsonable(self.vmcb), "exits": exits,
        }  # fmt: skip

    def _registers(self) -> list[str]:
        if not self.registers:
            return []
        bits = execution_mode(self.registers).code_bits
        names = [name for name in GENERAL if name in self.registers and (bits == 64 or not name[1:].isdigit())]
        wide = {name: name if bits == 64 else "e" + name[1:] for name in names}
        mask = (1 << max(bits, 32)) - 1
        cells = [f"{'*' if name in self.changed else ' '}{wide[name]:4}{self.registers[name] & mask:#x}" for name in names]
        across = next(count for count in (8, 4, 2, 1) if count * _CELL <= max(self.width, _CELL))
        rows = [cells[at : at + across] for at in range(0, len(cells), across)]
        lines = ["".join(cell.ljust(_CELL) for cell in row).rstrip() for row in rows]
        return lines + self._special()

    def _special(self) -> list[str]:
        def mark(name: str) -> str:
            return "*" if name in self.changed else " "

        r, lines = self.registers, []
        if "rip" in r:
            symbol = f" <{self.where.symbol}>" if self.where.symbol else ""
            flags = f"  {mark('rflags')}flags {r['rflags']:#x}{_set(RFLAGS, r['rflags'])}" if "rflags" in r else ""
            line = f"{mark('rip')}rip {r['rip']:#x}{symbol}"
            lines += [line + flags] if len(line + flags) <= self.width else [line, flags[2:]]
        present = [(name, f"{name}.selector") for name in _SEGMENTS if f"{name}.selector" in r]
        selectors = [f"{mark(field)}{name} {r[field]:#x}" for name, field in present]
        bases = [f"{mark(name)}{name} {r[name]:#x}" for name in ("fs.base", "gs.base") if r.get(name)]
        tables = {"cr0": CR0, "cr4": CR4, "efer": EFER}
        control = [
            f"{mark(n)}{n} {r[n]:#x}" + (_set(tables[n], r[n]) if n in tables else "")
            for n in ("cr0", "cr2", "cr3", "cr4", "efer")
            if n in r and (n != "cr2" or r[n])
        ]
        return [*lines, *_flowing(selectors + bases, self.width), *_flowing(control, self.width)]

    def _code(self) -> list[str]:
        rows = []
        for one in self.code:
            name = self.symbol(one.address)
            mark = "=>" if one.address == self.where.pc else "  "
            rows.append((mark, f"{one.address:#x}", f"<{name}>" if name else "", self._noted(one)))
        return columns(rows)

    def _noted(self, one: Instruction) -> str:
        leads = one.target if one.target is not None else one.memory
        target = self.symbol(leads) if leads is not None else ""
        exits = self.marks.get(one.address)
        return one.text + (f"  <{target}>" if target else "") + (f"  ! {exits}" if exits else "")

    def _source(self) -> list[str]:
        if self.place is None:
            return []
        first = max(1, self.place.line - self.rows // 2)
        lines = read_lines(self.place.path, first, self.rows)
        numbered = enumerate(lines, first)
        return [f"{'=>' if number == self.place.line else '  '} {number:5}  {line}".rstrip() for number, line in numbered]

    def _stack(self) -> list[str]:
        rows = []
        for one in self.stack:
            rows.append((f"{one.address:#x}", f"{one.value:#0{2 + 2 * self.word}x}", f"<{one.symbol}>" if one.symbol else ""))
        return columns(rows)

    def _vmcb(self) -> list[str]:
        if self.vmcb is None:
            return []
        parts = []
        for name, value in self.vmcb.fields.items():
            if name in ("eventinj", "exitintinfo"):
                parts.append(f"{name} {describe_event(value)}")
            else:
                table = VMCB[name].bits if name in ("v_intr", "int_state") else None
                parts.append(f"{name} {value:#x}" + (_set(table, value) if table is not None else ""))
        return [self.vmcb.exit, *_flowing(parts, self.width)]

    def _exits(self) -> list[str]:
        rows = []
        for record in self.exits:
            during = f" (while delivering {describe_event(record.intinfo)})" if record.intinfo & EVENT.v else ""
            what = describe_exit(record.code, record.info1, record.info2) + during
            whose = (f"guest {record.guest}",) if len({each.guest for each in self.exits}) > 1 else ()
            rows.append((str(record.time), *whose, f"{record.rip:#x}", what))
        return columns(rows)


def situation(
    context: Context, owner: GuestView | HostView, sections: tuple[str, ...] = SECTIONS, width: int = 100, rows: int | None = None
) -> Situation:
    """An inferior now. `rows`: how many lines of code, stack and exits, if not the usual ones."""
    lines = {section: rows or usual for section, usual in _ROWS.items()}
    registers, symbols = dict(context.registers(owner.number)), context.symbols(owner.number)
    before = (context.registers_before(owner.number) if isinstance(context, Remembers) and registers else None) or {}
    changed = tuple(name for name, value in registers.items() if name in before and before[name] != value)
    here, mode = where(context, owner), execution_mode(registers)
    word, base = mode.stack_bits // 8, registers.get("cs.base", 0)

    def symbol(address: int) -> str:
        return symbols.name(address) if symbols is not None else ""

    def read(address: int, size: int) -> bytes:
        return read_space(context.memory, owner, Space.GVA, address, size)

    stack = linear_sp(registers) if registers else None
    guest = owner if isinstance(owner, GuestView) else _last_guest(context)
    code: tuple[Instruction, ...] = ()
    if "code" in sections and here.pc is not None:
        code = tuple(_around(read, here.pc, mode.code_bits, base, symbol, lines["code"]))
    predictions = Predictions(InferiorState(context, owner))
    marks = {one.address: mark for one in code if (mark := predictions.mark(one, one.address == here.pc))}
    exits = context.exits(owner.number if isinstance(owner, GuestView) else None, lines["exit"]) if "exit" in sections else ()
    return Situation(
        where=here, sections=sections, registers=registers, changed=changed, code=code,
        place=SourceLines.of(symbols).at(here.pc) if "source" in sections and symbols and here.pc is not None else None,
        marks=marks,
        stack=tuple(_words(read, stack, word, symbol, lines["stack"])) if "stack" in sections and stack is not None else (),
        word=word, vmcb=_highlights(context, guest) if "vmcb" in sections and guest is not None else None, exits=tuple(exits),
        rows=lines["source"], width=width, symbol=symbol,
    )  # fmt: skip


def _flowing(parts: list[str], width: int) -> list[str]:
    """As many beside each other as a line holds."""
    lines: list[str] = []
    for part in parts:
        if lines and len(lines[-1]) + len(part) + 2 <= width:
            lines[-1] += f"  {part}"
        else:
            lines.append(part)
    return lines


def _set(table: type[Bits], value: int) -> str:
    """ " [PE PG]"; empty where nothing is set."""
    words = table.describe(value)
    return f" [{words}]" if words else ""


def _last_guest(context: Context) -> GuestView | None:
    """The one that has left last."""
    last = context.exits(None, 1)
    return next((guest for guest in context.guests if last and guest.number == last[-1].guest), None)


def _around(
    read: Callable[[int, int], bytes], pc: int, bits: int, base: int, symbol: Callable[[int], str], count: int
) -> Iterator[Instruction]:
    """A few before, where a symbol says where they begin, and those that follow."""
    name, _, offset = symbol(pc).partition("+")
    behind = int(offset, 16) if offset else 0
    before: list[Instruction] = []
    if name and 0 < behind <= _FUNCTION:
        decoded = list(instructions(read(pc - behind, behind), pc - behind, bits, behind, base))
        if decoded and decoded[-1].address + len(decoded[-1].code) == pc:
            before = decoded[max(0, len(decoded) - count // 3) :]
    yield from before
    left = count - len(before)
    yield from instructions(read(pc, MAX_INSTRUCTION * left), pc, bits, left, base)


def _words(read: Callable[[int, int], bytes], top: int, size: int, symbol: Callable[[int], str], count: int) -> Iterator[Word]:
    data = read(top, count * size)
    for at in range(0, len(data) - size + 1, size):
        value = int.from_bytes(data[at : at + size], "little")
        yield Word(top + at & _MASK, value, symbol(value))


def _highlights(context: Context, guest: GuestView) -> Highlights | None:
    if not guest.vmcbs:
        return None
    spa = guest.vmcbs[0]
    try:
        contents = context.memory.read(spa, VMCB_SIZE)
    except Unreadable:
        return None
    values = {name: VMCB.read(contents, name) for name in (*_SPOKEN, "exitcode", "exitinfo1", "exitinfo2")}
    code, info1, info2 = (values.pop(name) for name in ("exitcode", "exitinfo1", "exitinfo2"))
    said = f"#VMEXIT {describe_exit(code, info1, info2)}"
    return Highlights(spa, said, {name: value for name, value in values.items() if value})


_OWNER = Parameter("GUEST|host", Owner(), optional=True, option="--guest", help="whose; else the selected one's")
_SECTIONS = tuple(Parameter("SECTION", Choice(SECTIONS, _MEANINGS), optional=True, help=_SECTIONS_HELP) for _ in SECTIONS)
_WIDTH = Parameter("COLUMNS", Number(30, 1000), option="--width", only_option=True, default=100, help="of the screen (100)")
_LINES = Parameter("ROWS", Number(1, 1000), option="--rows", only_option=True, help="lines of code, source, stack, exits")


def _context(context: Context, arguments: Arguments) -> Situation:
    owner = arguments.owner_or_selected(_OWNER)
    chosen = tuple(name for parameter in _SECTIONS if (name := arguments.get(parameter)))
    return situation(context, owner, tuple(dict.fromkeys(chosen)) or SECTIONS, arguments[_WIDTH], arguments.get(_LINES))


def _where(context: Context, arguments: Arguments) -> Where:
    return where(context, arguments.owner_or_selected(_OWNER))


COMMANDS = (
    Command(
        "context",
        _context,
        "Show an inferior at a glance: registers, code, stack, VMCB, last exits.",
        (_OWNER, *_SECTIONS, _WIDTH, _LINES),
        "Of a hypervisor the VMCB and the exits are those of the guest that left last. Registers that have changed since\n"
        "they were shown at an earlier time are marked by *.",
        ("context 2", "context host code stack"),
        "context [GUEST|host] [regs|code|source|stack|vmcb|exit ...] [--width COLUMNS] [--rows ROWS]",
    ),
    Command(
        "here",
        _where,
        "Say in one line where an inferior is: mode, CPL, ASID, CR3, nCR3, RIP, last exit.",
        (_OWNER,),
        "",
        ("here 2", "here host"),
    ),
)
