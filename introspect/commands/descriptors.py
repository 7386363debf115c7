"""`gdt`, `ldt`, `idt` and `tss`: an inferior's descriptor tables and task state segment, decoded in its mode."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from introspect.commands.context import CommandError, Context
from introspect.commands.inferior_state import OWNER, InferiorState, find_inferior, unreadable
from introspect.commands.parameters import Located, Number, Parameter
from introspect.commands.registry import Arguments, Command
from introspect.commands.render import columns, members
from introspect.descriptors import Descriptor, Vector, io_ports, table, task_state, vectors
from introspect.exits import exception_name
from introspect.expression import Space
from introspect.registers import ATTRIB, RFLAGS, describe_segment

__all__ = ["COMMANDS"]



@dataclass(frozen=True, slots=True)
class Entry:
    """One descriptor of a table, and which segment registers hold its selector. `target`: a gate's, by symbol."""

    selector: int
    address: int
    descriptor: Descriptor
    target: str
    used: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Table:
    """A GDT or LDT: all of it that is not null."""

    kind: str
    who: str
    base: int
    limit: int
    mode: str
    entries: tuple[Entry, ...]
    end: str

    def text(self) -> str:
        rows = [
            (f"{one.selector:#06x}", one.descriptor.name, f"DPL {one.descriptor.dpl}", _extent(one.descriptor, one.target),
             "" if one.descriptor.present else "! not present", " ".join(one.used))
            for one in self.entries
        ]  # fmt: skip
        head = f"{self.kind} of {self.who} at {self.base:#x}, limit {self.limit:#x} ({self.mode})"
        lines = columns(rows, "  ") or ["  no descriptor that is not null"]
        return "\n".join([head, *lines, *([self.end] if self.end else [])])

    def json(self) -> object:
        return members(self)


def _extent(one: Descriptor, target: str) -> str:
    if one.selector is not None:
        offset = "" if one.offset is None else f":{one.offset:#x}"
        extra = "" if one.ist is None or not one.ist else f", IST {one.ist}"
        extra += f", {one.parameters} parameters" if one.parameters else ""
        return f"-> {one.selector:#x}{offset}{f' <{target}>' if target else ''}{extra}"
    if one.base is None or one.limit is None:
        return ""
    return f"base {one.base:#x}, limit {one.limit:#x}"


@dataclass(frozen=True, slots=True)
class VectorView:
    number: int
    exception: str
    vector: Vector
    address: int | None
    """Linear, where its target's segment is known."""
    symbol: str
    oddity: str


@dataclass(frozen=True, slots=True)
class Vectors:
    """An IDT, or the interrupt vector table of real mode: all that is not zero."""

    kind: str
    who: str
    base: int
    limit: int
    mode: str
    vectors: tuple[VectorView, ...]
    end: str

    def text(self) -> str:
        rows = [_run_row(run) for run in _runs(self.vectors)]
        head = f"{self.kind} of {self.who} at {self.base:#x}, limit {self.limit:#x} ({self.mode})"
        lines = columns(rows, "  ") or ["  no vector that is not zero"]
        return "\n".join([head, *lines, *([self.end] if self.end else [])])

    def json(self) -> object:
        return members(self)


def _runs(views: Sequence[VectorView]) -> Iterator[list[VectorView]]:
    """Vectors one behind the other that differ in nothing but a handler at equal distances, behind those of exceptions."""
    run: list[VectorView] = []
    for view in views:
        if run and not (view.number > 32 and _follows(run, view)):
            yield run
            run = []
        run.append(view)
    if run:
        yield run


def _follows(run: list[VectorView], view: VectorView) -> bool:
    last = run[-1]
    if view.number != last.number + 1 or view.address is None or last.address is None or view.oddity != last.oddity:
        return False
    if len(run) > 1 and view.address - last.address != last.address - (run[-2].address or 0):
        return False
    return _gate(view) == _gate(last)


def _gate(view: VectorView) -> tuple[object, ...]:
    gate = view.vector.descriptor
    return view.vector.selector, gate and (gate.name, gate.present, gate.dpl, gate.ist)


def _run_row(run: list[VectorView]) -> tuple[str, ...]:
    """One vector, or several alike."""
    row = _vector_row(run[0])
    if len(run) == 1:
        return row
    step = (run[1].address or 0) - (run[0].address or 0)
    each = f"then {step:#x} on for each" if step else "all the same"
    return (f"{run[0].number:#04x}-{run[-1].number:#04x}", *row[1:6], each)


def _vector_row(view: VectorView) -> tuple[str, ...]:
    gate, vector = view.vector.descriptor, view.vector
    offset = "" if vector.offset is None else f":{vector.offset:#x}"
    ist = f"IST {gate.ist}" if gate is not None and gate.ist else ""
    symbol = f"<{view.symbol}>" if view.symbol else ""
    return (
        f"{view.number:#04x}", view.exception, gate.name if gate is not None else "",
        f"DPL {gate.dpl}" if gate is not None else "", f"{vector.selector:#x}{offset}", " ".join(filter(None, (symbol, ist))),
        view.oddity and f"! {view.oddity}",
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class TaskField:
    name: str
    group: str
    value: int
    meaning: str


@dataclass(frozen=True, slots=True)
class TaskState:
    """A TSS, and the ports that its I/O permission bitmap lets through to code that IOPL keeps from them."""

    who: str
    selector: int
    kind: str
    base: int
    limit: int
    fields: tuple[TaskField, ...]
    ports: tuple[tuple[int, int], ...]
    bitmap: str
    end: str

    def text(self) -> str:
        lines = [f"TSS of {self.who}, selector {self.selector:#x}, at {self.base:#x}, limit {self.limit:#x} ({self.kind})"]
        lines += columns([(one.name, f"{one.value:#x}", one.meaning) for one in self.fields], "  ")
        ports = ", ".join(f"{first:#x}" if first == last else f"{first:#x}-{last:#x}" for first, last in self.ports)
        lines.append(f"I/O permission bitmap: {self.bitmap or f'lets through {ports}' if ports else self.bitmap or 'no port'}")
        return "\n".join([*lines, *([self.end] if self.end else [])])

    def json(self) -> object:
        return members(self)


def _read(subject: InferiorState, base: int, size: int) -> tuple[bytes, str]:
    """A table, and where and why it ends before its limit."""
    data = subject.linear(base, size)
    if len(data) == size:
        return data, ""
    where = Located(subject.owner, Space.GVA, base + len(data) & (1 << 64) - 1)
    end = f"{where}: {unreadable(subject.context, where)}"
    if not data:
        raise CommandError(str(where), end.partition(": ")[2], "the table register may not be set up yet; `regs system` shows it")
    return data, end


def _used(subject: InferiorState, index: int, local: bool) -> tuple[str, ...]:
    """Segment registers that hold a selector of this index."""
    names = ("es", "cs", "ss", "ds", "fs", "gs", *(() if local else ("tr", "ldtr")))
    wanted = index | 4 * local
    return tuple(name for name in names if subject.registers.get(f"{name}.selector", 0) & ~3 == wanted)


def _segments(context: Context, arguments: Arguments, local: bool) -> Table:
    subject = find_inferior(context, arguments)
    register = "ldtr" if local else "gdtr"
    base, limit = subject.require(f"{register}.base", f"{register}.limit")
    long = subject.mode.long
    if local:
        selector, attrib = subject.require("ldtr.selector", "ldtr.attrib")
        if not selector & ~3 or not attrib & ATTRIB.P:
            return Table("LDT", subject.title, base, limit, subject.mode.name, (), "there is none: LDTR has a null selector")
    data, end = _read(subject, base, min(limit, 0xFFFF) + 1)
    entries = [
        Entry(at | 4 * local, base + at, found, "" if found.offset is None else subject.symbol(found.offset),
              _used(subject, at, local))
        for at, found in table(data, long)
    ]  # fmt: skip
    return Table("LDT" if local else "GDT", subject.title, base, limit, subject.mode.name, tuple(entries), end)


def _gdt(context: Context, arguments: Arguments) -> Table:
    return _segments(context, arguments, False)


def _ldt(context: Context, arguments: Arguments) -> Table:
    return _segments(context, arguments, True)


_VECTOR = Parameter("N", Number(0, 255), option="--vector", only_option=True, help="this one only")


def _idt(context: Context, arguments: Arguments) -> Vectors:
    subject, wanted = find_inferior(context, arguments), arguments.get(_VECTOR)
    base, limit = subject.require("idtr.base", "idtr.limit")
    real = subject.mode.real and not subject.registers.get("rflags", 0) & RFLAGS.VM
    long = subject.mode.long
    size = 4 if real else 16 if long else 8
    data, end = _read(subject, base, min(limit, 256 * size - 1) + 1)
    segments = {} if real else _segment_bases(subject)
    views = []
    for one in vectors(data, long, real):
        if wanted in (None, one.number):
            segment = one.selector << 4 if real else segments.get(one.selector & ~3, None if not long else 0)
            address = None if one.offset is None or segment is None else segment + one.offset & (1 << 64) - 1
            views.append(VectorView(
                one.number, exception_name(one.number) if one.number < 32 and exception_name(one.number)[0] == "#" else "",
                one, address, "" if address is None else subject.symbol(address), _oddity(one, long),
            ))  # fmt: skip
    if wanted is not None and not views:
        raise CommandError(f"{wanted:#x}", f"the table of {subject.title} has nothing there", "leave out --vector to see all")
    kind = "interrupt vector table" if real else "IDT"
    return Vectors(kind, subject.title, base, limit, subject.mode.name, tuple(views), end)


def _oddity(one: Vector, long: bool) -> str:
    gate = one.descriptor
    if gate is None:
        return ""
    if not gate.present:
        return "not present: #NP"
    if gate.selector is None or "call" in gate.name or gate.name.startswith("reserved"):
        return "not a gate that an IDT may have: #GP"
    if long and gate.offset is not None and gate.offset >> 47 not in (0, 0x1FFFF):
        return "the offset is not canonical"
    return ""


def _segment_bases(subject: InferiorState) -> dict[int, int]:
    """Bases of the GDT's segments, by selector: most gates lead to few."""
    registers = subject.registers
    if subject.mode.long or "gdtr.base" not in registers:
        return {}
    data = subject.linear(registers["gdtr.base"], min(registers.get("gdtr.limit", 0), 0xFFFF) + 1)
    return {at: found.base for at, found in table(data, False) if found.base is not None}


def _tss(context: Context, arguments: Arguments) -> TaskState:
    subject = find_inferior(context, arguments)
    selector, attrib, base, limit = subject.require("tr.selector", "tr.attrib", "tr.base", "tr.limit")
    layout = task_state(attrib, subject.mode.long)
    data, end = _read(subject, base, min(limit + 1, layout.size))
    fields = []
    for field in layout:
        if field.offset + field.size > len(data):
            end = end or f"the limit cuts it at {field.name}"
            break
        value = layout.read(data.ljust(layout.size, b"\0"), field.name)
        fields.append(TaskField(field.name, field.group, value, _task_meaning(subject, field.name, value)))
    known = {one.name: one.value for one in fields}
    ports, note = _bitmap(subject, base, limit, known)
    kind = f"64-bit, {describe_segment(attrib)}" if subject.mode.long else describe_segment(attrib)
    return TaskState(subject.title, selector, kind, base, limit, tuple(fields), ports, note, end)


def _task_meaning(subject: InferiorState, name: str, value: int) -> str:
    if name == "eflags":
        return RFLAGS.describe(value)
    return subject.symbol(value) if value and name not in ("iopb", "trap", "link") else ""


def _bitmap(subject: InferiorState, base: int, limit: int, known: dict[str, int]) -> tuple[tuple[tuple[int, int], ...], str]:
    """The ports it lets through, or why there is none."""
    if "iopb" not in known:
        return (), "none in this kind of TSS"
    start = known["iopb"]
    if start > limit:
        return (), f"none: it would begin at {start:#x}, behind the limit"
    data = subject.linear(base + start, min(limit + 1 - start, 0x2000))
    return tuple(io_ports(data)), ""


COMMANDS = (
    Command(
        "gdt", _gdt, "Show the global descriptor table: types, DPL, bases, limits, gates.", (OWNER,),
        "Null descriptors are left out. Behind each the segment registers that hold its selector.", ("gdt host", "gdt 3"),
    ),
    Command(
        "ldt", _ldt, "Show the local descriptor table, where there is one.", (OWNER,),
        "Selectors have bit 2 set: they name the LDT.", ("ldt", "ldt 3"),
    ),
    Command(
        "idt", _idt, "Show the interrupt descriptor table, or real mode's vectors: gates and where they lead.", (OWNER, _VECTOR),
        "Vectors that are zero are left out, and those that differ in nothing but a handler at equal distances are one line.",
        ("idt host --vector 14", "idt 2"),
    ),
    Command(
        "tss", _tss, "Show the task state segment: stacks, IST, the ports of its I/O permission bitmap.", (OWNER,),
        "The ports are those that code without the privilege of IOPL may access all the same.", ("tss host", "tss host --json"),
    ),
)  # fmt: skip
