"""`regs`: the registers of an inferior by groups, flags by name, what has changed marked."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from introspect.commands.context import CommandError, Context
from introspect.commands.inferior_state import OWNER, InferiorState, Remembers, find_inferior
from introspect.commands.parameters import Choice, Parameter
from introspect.commands.registry import Arguments, Command
from introspect.commands.render import columns
from introspect.exits import describe_event, exit_name
from introspect.layout import Bits, Field
from introspect.registers import CR0, CR4, EFER, RFLAGS, describe_segment, memory_types
from introspect.scope import GENERAL
from introspect.sources import Unreadable
from introspect.vmcb import CONTROL, SEGMENTS, VMCB, VMCB_SIZE

__all__ = ["COMMANDS"]

_GROUPS = ("general", "system", "svm", "all")
_TABLES = ("gdtr", "idtr")
_PARTS = ("selector", "base", "limit", "attrib")
_KINDS: dict[str, type[Bits]] = {"rflags": RFLAGS, "cr0": CR0, "cr4": CR4, "efer": EFER}
_CONTROL_REGISTERS = ("cr0", "cr2", "cr3", "cr4", "cr8", "efer")
_SYSTEM = (
    *_CONTROL_REGISTERS, *(f"dr{n}" for n in (0, 1, 2, 3, 6, 7)), "xcr0",
    *(field.name for field in VMCB if field.group in ("msrs", "lbr") or field.name in ("g_pat", "s_cet", "ssp", "isst_addr")),
    "tsc", "tsc_aux", "apic_base", "vm_cr", "vm_hsave_pa",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class RegisterView:
    """`before` is its value at the last resume, if that was another."""

    name: str
    group: str
    value: int
    meaning: str
    before: int | None = None


@dataclass(frozen=True, slots=True)
class Registers:
    """Those of an inferior that are known, by groups."""

    who: str
    mode: str
    cpl: int
    registers: tuple[RegisterView, ...]
    missing: tuple[str, ...]
    """Groups of which nothing is known, with why."""

    def text(self) -> str:
        lines = [f"{self.who}: {self.mode}, CPL {self.cpl}"]
        for group in dict.fromkeys(view.group for view in self.registers):
            views = [view for view in self.registers if view.group == group]
            lines.append(f"{group}:")
            if group == "segments":
                lines += columns(_segment_rows(views), "  ")
            elif group == "general":
                lines += _general_lines(views)
            else:
                lines += columns([_row(view) for view in views], "  ")
        return "\n".join([*lines, *self.missing])

    def json(self) -> object:
        values = {view.name: _json(view) for view in self.registers}
        return {"who": self.who, "mode": self.mode, "cpl": self.cpl, "registers": values, "missing": list(self.missing)}


def _json(view: RegisterView) -> dict[str, object]:
    known = {"group": view.group, "value": view.value, "meaning": view.meaning}
    return known if view.before is None else {**known, "before": view.before}


def _mark(view: RegisterView) -> str:
    return "*" if view.before is not None else ""


def _row(view: RegisterView) -> tuple[str, ...]:
    was = f"was {view.before:#x}" if view.before is not None else ""
    return f"{view.name}{_mark(view)}", f"{view.value:#x}", "  ".join(filter(None, (view.meaning, was)))


def _general_lines(views: list[RegisterView]) -> Iterator[str]:
    """Three of the sixteen a line, then those with a meaning."""
    plain = [view for view in views if view.name in GENERAL]
    cells = [(f"{view.name}{_mark(view)}", f"{view.value:#018x}") for view in plain]
    rows = [tuple(text for cell in cells[at : at + 3] for text in cell) for at in range(0, len(cells), 3)]
    yield from columns(rows, "  ")
    yield from columns([_row(view) for view in views if view.name not in GENERAL], "  ")
    yield from columns(
        [(f"{view.name}*", f"was {view.before:#x}") for view in plain if view.before is not None], "  "
    )


def _segment_rows(views: list[RegisterView]) -> Iterator[tuple[str, ...]]:
    by_name = {view.name: view for view in views}
    yield ("", *_PARTS, "")
    for name in SEGMENTS:
        parts = [by_name.get(f"{name}.{part}") for part in _PARTS]
        if not any(parts):
            continue
        attrib = parts[3]
        mark = "*" if any(part is not None and part.before is not None for part in parts) else ""
        yield (
            f"{name}{mark}", *("" if part is None else f"{part.value:#x}" for part in parts),
            describe_segment(attrib.value) if attrib is not None and name not in _TABLES else "",
        )  # fmt: skip


def _meaning(subject: InferiorState, name: str, value: int) -> str:
    kind = _KINDS.get(name) or (VMCB.fields[name].bits if name in VMCB.fields else None)
    if name == "rip":
        return _pc_text(subject)
    if name in ("lstar", "cstar", "sysenter_eip", "br_from", "br_to", "last_excp_from", "last_excp_to"):
        return subject.symbol(value)
    if name == "g_pat":
        return " ".join(found or "reserved" for found in memory_types(value))
    return kind.describe(value & kind.defined) if kind is not None else subject.symbol(value) if name in GENERAL else ""


def _pc_text(subject: InferiorState) -> str:
    pc = subject.pc
    at = "" if pc == subject.registers["rip"] else f"linear {pc:#x}"
    return " ".join(filter(None, (subject.symbol(pc), at)))


def _svm_meaning(field: Field, value: int) -> str:
    if field.name == "exitcode":
        return exit_name(value)
    if field.name in ("exitintinfo", "eventinj"):
        return describe_event(value)
    return field.bits.describe(value & field.bits.defined) if field.bits else ""


def _svm(subject: InferiorState, known: Mapping[str, int]) -> Iterator[RegisterView]:
    """The control area of its VMCB, as it is in memory; of the hypervisor, of the VMCB that its CPU ran last."""
    spa = known.get("vmcb_pa", next(iter(getattr(subject.owner, "vmcbs", ())), None))
    if "gif" in known:
        yield RegisterView("gif", "svm", known["gif"], "GIF" if known["gif"] else "")
    if spa is None:
        return
    try:
        contents = subject.context.memory.read(spa, VMCB_SIZE)
    except Unreadable:
        return
    yield RegisterView("vmcb_pa", "svm", spa, "")
    for field in CONTROL:
        value = VMCB.read(contents, field.name)
        yield RegisterView(field.short or field.name, "svm", value, _svm_meaning(field, value))


def _views(subject: InferiorState, group: str) -> Iterator[RegisterView]:
    known, context = subject.registers, subject.context
    before = context.registers_before(subject.owner.number) if isinstance(context, Remembers) else None

    def view(name: str, group: str) -> RegisterView:
        value = known[name]
        old = before.get(name, value) if before is not None else value
        return RegisterView(name, group, value, _meaning(subject, name, value), None if old == value else old)

    if group in ("general", "all"):
        yield from (view(name, "general") for name in (*GENERAL, "rip", "rflags") if name in known)
    if group in ("general", "system", "all"):
        segments = SEGMENTS if group != "general" else SEGMENTS[:6]
        yield from (view(f"{name}.{part}", "segments") for name in segments for part in _PARTS if f"{name}.{part}" in known)
    if group == "general":
        yield from (view(name, "control") for name in _CONTROL_REGISTERS if name in known)
    if group in ("system", "all"):
        yield from (view(name, "system") for name in _SYSTEM if name in known)
    if group in ("svm", "all"):
        yield from _svm(subject, known)


_GROUP = Parameter("GROUP", Choice(_GROUPS, ("general, segment and control registers", "segments, CR, DR, MSRs",
                                             "the control area of the VMCB", "all of them")),
                   optional=True, default="general", help="general (the default), system, svm or all")  # fmt: skip


def _regs(context: Context, arguments: Arguments) -> Registers:
    subject, group = find_inferior(context, arguments), arguments[_GROUP]
    views = tuple(_views(subject, group))
    missing = []
    if group != "svm" and "rip" not in subject.registers:
        missing.append("rip and the general registers are not known from this source; open it with registers")
    if group == "svm" and not views:
        raise CommandError(subject.title, "no VMCB is known for it", "name a guest that VMRUN has entered")
    return Registers(subject.title, subject.mode.name, subject.mode.cpl, views, tuple(missing))


COMMANDS = (
    Command(
        "regs", _regs, "Show the registers of the hypervisor or a guest by groups, flags by name.", (_GROUP, OWNER),
        "general: the general registers, segments and control registers; system: segments, CR, DR and MSRs; svm: the control\n"
        "area of the VMCB as it is in memory, and GIF (of the hypervisor, of the VMCB that its CPU ran last).\n"
        "* marks what has another value than at the last resume; from the second `regs` on.\n"
        "gdb has them all as $exitcode, $asid, $star ...; lldb shows them by group (register read --all).",
        ("regs 2", "regs svm 3"), aliases=("registers",),
    ),
)  # fmt: skip
