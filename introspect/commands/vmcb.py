"""`vmcb`, `intercepts`, `rules` and `vmrun why`: what a VMCB says, and whether VMRUN takes it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from introspect.commands.context import Context
from introspect.commands.registry import Arguments, Command
from introspect.commands.render import columns, jsonable
from introspect.commands.which import INNER, WHICH, find_vmcb
from introspect.exits import describe_event, describe_exit, exit_name
from introspect.intercepts import list_intercepts
from introspect.layout import Field
from introspect.registers import CR0, CR4, EFER, describe_segment, memory_types
from introspect.rules import RULES, Rule, Violation, violations
from introspect.vmcb import SEGMENTS, VMCB

__all__ = ["COMMANDS", "FieldView", "VmcbView"]


@dataclass(frozen=True, slots=True)
class FieldView:
    """One field: its value, what it means in words, and what is odd about it (empty if nothing is)."""

    name: str
    group: str
    value: int
    meaning: str
    oddity: str


def _tsc(value: int, values: dict[str, int]) -> str:
    return str(value - (1 << 64)) if value >> 63 else ""


_MEANINGS: dict[str, Callable[[int, dict[str, int]], str]] = {
    "exitcode": lambda value, all_: describe_exit(value, all_["exitinfo1"], all_["exitinfo2"]),
    "exitintinfo": lambda value, all_: describe_event(value),
    "eventinj": lambda value, all_: describe_event(value),
    "g_pat": lambda value, all_: " ".join(kind or "reserved" for kind in memory_types(value)),
    "tsc_offset": _tsc,
    "insn_bytes": lambda value, all_: value.to_bytes(15, "little")[: min(all_["insn_len"], 15)].hex(" "),
}
"""How to put a field's value into words, where its flags are not all there is to say."""

_CANONICAL = ("rip", "rsp", "lstar", "cstar", "kernel_gs_base", "sysenter_esp", "sysenter_eip", "ssp", "isst_addr",
              *(f"{name}.base" for name in SEGMENTS))  # fmt: skip


def _oddity(field: Field, value: int, values: dict[str, int]) -> str:
    """What the rules do not forbid but a reader should notice."""
    if field.bits and field.group != "segments" and (stray := value & ~field.bits.defined):
        return f"reserved bits {stray:#x}"
    if field.name in ("iopm_base_pa", "msrpm_base_pa"):
        return "the low 12 bits do not count" if value & 0xFFF else ""
    if field.name == "insn_len" and value > 15:
        return "no instruction is longer than 15 bytes"
    long = values["efer"] & EFER.LME and values["cr0"] & CR0.PG
    if long and field.name in _CANONICAL and value >> 47 not in (0, 0x1FFFF) and not values["cr4"] & CR4.LA57:
        return "not canonical"
    return ""


@dataclass(frozen=True, slots=True)
class VmcbView:
    """A VMCB at a system-physical address, all fields decoded."""

    spa: int
    owner: str
    fields: tuple[FieldView, ...]
    violations: tuple[Violation, ...]

    def text(self) -> str:
        lines = [f"VMCB at {self.spa:#x}, {self.owner}"]
        for group in dict.fromkeys(view.group for view in self.fields):
            views = [view for view in self.fields if view.group == group]
            if not any(view.value for view in views):
                lines.append(f"{group}: all zero")
            else:
                lines.append(f"{group}:")
                rows = _segment_rows(views) if group == "segments" else _rows(views)
                lines += columns(rows, "  ")
        lines += [f"! {violation.text}" for violation in self.violations]
        return "\n".join(lines)

    def json(self) -> object:
        return {
            "spa": self.spa,
            "owner": self.owner,
            "fields": jsonable({view.name: view for view in self.fields}),
            "violations": [_violation_json(violation) for violation in self.violations],
        }


def _rows(views: list[FieldView]) -> list[tuple[str, ...]]:
    return [
        (view.name, f"{view.value:#x}", " ".join(filter(None, (view.meaning, view.oddity and f"! {view.oddity}"))))
        for view in views
    ]


def _segment_rows(views: list[FieldView]) -> Iterator[tuple[str, ...]]:
    """One line for each register; a descriptor table has no selector and no attributes to read."""
    by_name = {view.name: view for view in views}
    yield ("", "selector", "base", "limit", "attrib", "")
    for name in SEGMENTS:
        parts = {part: by_name[f"{name}.{part}"] for part in ("selector", "base", "limit", "attrib")}
        bare = ("selector", "attrib") if name in ("gdtr", "idtr") else ()
        cells = ["" if part in bare and not view.value else f"{view.value:#x}" for part, view in parts.items()]
        notes = [describe_segment(parts["attrib"].value)] if not bare else []
        notes += [f"! {part} {view.oddity}" for part, view in parts.items() if view.oddity]
        yield (name, *cells, "  ".join(notes))


def _rule_json(rule: Rule) -> dict[str, object]:
    return {"rule": rule.id, "section": rule.section, "fatal": rule.fatal, "text": rule.text, "remedy": rule.remedy}


def _violation_json(violation: Violation) -> dict[str, object]:
    return {**_rule_json(violation.rule), "values": violation.values}


def _vmcb(context: Context, arguments: Arguments) -> VmcbView:
    spa, owner, contents = find_vmcb(context, arguments)
    values = VMCB.decode(contents)
    broken = tuple(violations(contents, context.processor, context.memory))
    blamed = {name: violation.rule.text for violation in broken for name in violation.values}
    views = []
    for field in VMCB:
        value = values[field.name]
        if field.name in _MEANINGS:
            meaning = _MEANINGS[field.name](value, values)
        else:
            meaning = field.bits.describe(value & field.bits.defined) if field.bits else ""
        oddity = blamed.get(field.name) or _oddity(field, value, values)
        views.append(FieldView(field.name, field.group, value, meaning, oddity))
    return VmcbView(spa, owner, tuple(views), broken)


@dataclass(frozen=True, slots=True)
class Intercepts:
    owner: str
    names: tuple[str, ...]

    def text(self) -> str:
        if not self.names:
            return f"{self.owner} intercepts nothing"
        return "\n".join([f"{self.owner} intercepts:", *_wrapped(self.names)])

    def json(self) -> object:
        return jsonable(self)


def _wrapped(names: tuple[str, ...], width: int = 100) -> Iterator[str]:
    line = " "
    for name in names:
        if len(line) + len(name) >= width:
            yield line
            line = " "
        line += f" {name}"
    yield line


def _intercepts(context: Context, arguments: Arguments) -> Intercepts:
    _, owner, contents = find_vmcb(context, arguments)
    return Intercepts(owner, tuple(list_intercepts(contents)))


@dataclass(frozen=True, slots=True)
class Why:
    """Whether VMRUN takes a VMCB, and if not all the reasons."""

    spa: int
    owner: str
    exitcode: int
    violations: tuple[Violation, ...]

    @property
    def exit_status(self) -> int:
        """1 if VMRUN refuses it."""
        return int(any(violation.rule.fatal for violation in self.violations))

    def text(self) -> str:
        head = f"VMCB at {self.spa:#x}, {self.owner}"
        if not self.violations:
            return f"{head}: VMRUN accepts it. Its last exit: {exit_name(self.exitcode)}"
        return "\n".join([f"{head}:", *(f"  {violation.text}" for violation in self.violations)])

    def json(self) -> object:
        found = [_violation_json(violation) for violation in self.violations]
        return {"spa": self.spa, "owner": self.owner, "exitcode": self.exitcode, "violations": found}


def _why(context: Context, arguments: Arguments) -> Why:
    spa, owner, contents = find_vmcb(context, arguments)
    found = tuple(violations(contents, context.processor, context.memory))
    return Why(spa, owner, VMCB.read(contents, "exitcode"), found)


@dataclass(frozen=True, slots=True)
class Rules:
    rules: tuple[Rule, ...]

    def text(self) -> str:
        rows = [("rule", "APM2", "VMRUN refuses a VMCB if")]
        rows += [(rule.id, rule.section, rule.text + " (not refused)" * (not rule.fatal)) for rule in self.rules]
        return "\n".join(columns(rows))

    def json(self) -> object:
        return [_rule_json(rule) for rule in self.rules]


def _rules(context: Context, arguments: Arguments) -> Rules:
    return Rules(RULES)


COMMANDS = (
    Command(
        "vmcb", _vmcb, "Decode every field of a VMCB, with flags by name and oddities marked by !.", (WHICH, INNER),
        "PA is a system-physical address; a number that is a guest's names the guest. With `inner`, the VMCB that the\n"
        "hypervisor within another guest made for it: what the processor runs is made of that one and its own.",
        ("vmcb 2", "vmcb 0x800000"),
    ),
    Command(
        "intercepts", _intercepts, "List what a guest's VMCB intercepts.", (WHICH,),
        examples=("intercepts 2", "intercepts 5 --json"),
    ),
    Command("rules", _rules, "List the consistency rules of VMRUN.", examples=("rules", "rules --json")),
    Command(
        "vmrun why", _why, "Say why VMRUN refuses a VMCB: every rule it breaks, the value, and the remedy.", (WHICH,),
        "The rules are applied to the VMCB as it is in memory now.", ("vmrun why 2", "vmrun why 0x1000"),
    ),
)  # fmt: skip
