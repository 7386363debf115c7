"""`msr`: model-specific registers by number or name."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from introspect.commands.context import CommandError, Context
from introspect.commands.inferior_state import OWNER, InferiorState, find_inferior
from introspect.commands.parameters import Candidate, Misfit, Parameter, find_guest, parse_number
from introspect.commands.registry import Arguments, Command
from introspect.commands.render import columns, members
from introspect.exits import ExitCode
from introspect.intercepts import intercepted, words_of
from introspect.msrs import MSRS, find, msr_name, near
from introspect.permissions import msrpm_intercepts
from introspect.registers import memory_types
from introspect.vmcb import VMCB

__all__ = ["COMMANDS", "HasMsrs", "MsrNumber"]


@runtime_checkable
class HasMsrs(Protocol):
    """A context that knows all MSRs of an inferior, as a machine does; a dump has those that a VMCB keeps."""

    def msrs(self, number: int) -> Mapping[int, int]: ...


@dataclass(frozen=True)
class MsrNumber:
    """An MSR: its number or name."""

    noun: str = "the number or name of an MSR"

    def take(self, context: Context, words: list[str]) -> int:
        word, known = words[0], find(words[0])
        value = parse_number(word) if known is None else known.number
        if value is None:
            remedy = f"did you mean {', '.join(near(word))}?" if near(word) else "give its number"
            raise Misfit("no MSR has this name", remedy, meant=word != "host" and find_guest(context, word) is None)
        if not 0 <= value <= 0xFFFFFFFF:
            raise Misfit("the number of an MSR has 32 bits")
        words.pop(0)
        return value

    def complete(self, context: Context, prefix: str) -> Iterable[Candidate]:
        upper = not prefix.islower()
        return (Candidate(msr.name if upper else msr.name.lower(), f"{msr.number:#x}") for msr in MSRS.values())


@dataclass(frozen=True, slots=True)
class MsrView:
    """`exits`: which accesses its hypervisor intercepts: r, w, rw or nothing."""

    number: int
    name: str
    value: int
    meaning: str
    exits: str


@dataclass(frozen=True, slots=True)
class Msrs:
    who: str
    msrs: tuple[MsrView, ...]
    source: str
    """Where the values are from, and what they leave out."""

    def text(self) -> str:
        rows = [
            (f"{one.number:#010x}", one.name, f"{one.value:#x}", one.meaning, f"! exit on {one.exits}" if one.exits else "")
            for one in self.msrs
        ]
        return "\n".join([f"MSRs of {self.who}", *columns(rows, "  "), *([self.source] if self.source else [])])

    def json(self) -> object:
        return members(self)


_NUMBER = Parameter("N|NAME", MsrNumber(), optional=True, help="this one only; else all that are known and not 0")


def _values(subject: InferiorState) -> tuple[Mapping[int, int], str]:
    context, registers = subject.context, subject.registers
    if isinstance(context, HasMsrs):
        return context.msrs(subject.owner.number), ""
    found = {number: registers[msr.field] for number, msr in MSRS.items() if msr.field in registers}
    return found, "only what a VMCB or the registers of a dump hold is known from this source"


def _meaning(subject: InferiorState, number: int, value: int) -> str:
    msr = MSRS.get(number)
    if msr is None:
        return ""
    if msr.name == "PAT":
        return " ".join(kind or "reserved" for kind in memory_types(value))
    if msr.kind is not None:
        return msr.kind.describe(value)
    return subject.symbol(value) if msr.name in ("LSTAR", "CSTAR", "SYSENTER_EIP") else ""


def _exits(subject: InferiorState, vmcb: bytes, number: int) -> str:
    if not vmcb or not intercepted(words_of(vmcb), ExitCode.MSR):
        return ""
    base = VMCB.read(vmcb, "msrpm_base_pa")
    memory = subject.context.memory
    return "".join(letter for letter, write in (("r", False), ("w", True)) if msrpm_intercepts(memory, base, number, write))


def _msr(context: Context, arguments: Arguments) -> Msrs:
    subject, wanted = find_inferior(context, arguments), arguments.get(_NUMBER)
    values, source = _values(subject)
    if wanted is not None and wanted not in values:
        name = f"{wanted:#x}{f' ({msr_name(wanted)})' if msr_name(wanted) else ''}"
        rule = source or "the processor has no such MSR, or it cannot be read"
        raise CommandError(name, rule, "`msr` lists what is known")
    vmcb = subject.vmcb
    shown = values if wanted is None else {wanted: values[wanted]}
    views = tuple(
        MsrView(number, msr_name(number), value, _meaning(subject, number, value), _exits(subject, vmcb, number))
        for number, value in sorted(shown.items()) if value or wanted is not None
    )  # fmt: skip
    return Msrs(subject.title, views, source)


COMMANDS = (
    Command(
        "msr", _msr, "Read model-specific registers by number or name, without side effects.", (_NUMBER, OWNER),
        "As the inferior's own RDMSR would find them if its hypervisor let it; ! marks accesses that its MSR permission map\n"
        "intercepts. A guest that is not on a processor has what its VMCB keeps, and what world switches leave alone.",
        ("msr efer 2", "msr --guest host"),
    ),
)  # fmt: skip
