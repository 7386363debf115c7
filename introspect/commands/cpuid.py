"""`cpuid`: what the processor says of itself, in words."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from introspect.commands.context import CommandError, Context
from introspect.commands.inferior_state import OWNER, find_inferior
from introspect.commands.parameters import Number, Parameter
from introspect.commands.registry import Arguments, Command
from introspect.commands.render import columns, members
from introspect.cpuid import LEAVES, OUTPUTS, features, meanings, subleaves
from introspect.exits import ExitCode
from introspect.intercepts import intercepted, words_of

__all__ = ["COMMANDS", "HasCpuid"]


@runtime_checkable
class HasCpuid(Protocol):
    """A context that knows what CPUID returns to an inferior, as a machine does."""

    def cpuid(self, number: int, leaf: int, subleaf: int) -> tuple[int, int, int, int]: ...


@dataclass(frozen=True, slots=True)
class LeafView:
    leaf: int
    subleaf: int
    eax: int
    ebx: int
    ecx: int
    edx: int
    name: str
    meaning: str
    features: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Cpuid:
    who: str
    leaves: tuple[LeafView, ...]
    intercepted: bool
    """Whether its hypervisor decides what the inferior is told."""

    def text(self) -> str:
        lines = [f"CPUID of {self.who}"]
        for one in self.leaves:
            several = f".{one.subleaf}" if subleaves(one.leaf) > 1 or one.subleaf else ""
            registers = "  ".join(f"{name} {getattr(one, name):#010x}" for name in OUTPUTS)
            lines += columns([(f"{one.leaf:#010x}{several}", registers, one.name)], "  ")
            lines += [f"      {text}" for text in (one.meaning, *_wrapped(one.features)) if text]
        if self.intercepted:
            lines.append("! its hypervisor intercepts CPUID: this is the processor's answer, what the guest is told it decides")
        return "\n".join(lines)

    def json(self) -> object:
        return members(self)


def _wrapped(names: tuple[str, ...], width: int = 110) -> list[str]:
    lines = [""]
    for name in names:
        if len(lines[-1]) + len(name) > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {name}".strip()
    return lines


_LEAF = Parameter("LEAF", Number(0, 0xFFFFFFFF), optional=True, help="EAX; without it all leaves that are not 0")
_SUBLEAF = Parameter("SUBLEAF", Number(0, 0xFFFFFFFF), optional=True, help="ECX; without it all that are worth asking for")


def _cpuid(context: Context, arguments: Arguments) -> Cpuid:
    subject, leaf, subleaf = find_inferior(context, arguments), arguments.get(_LEAF), arguments.get(_SUBLEAF)
    if not isinstance(context, HasCpuid):
        raise CommandError("cpuid", "memory does not tell what the processor was", "ask a live machine")
    number = subject.owner.number
    asked = [leaf] if leaf is not None else sorted(LEAVES)
    views = []
    for one in asked:
        for sub in range(subleaves(one)) if subleaf is None else [subleaf]:
            registers = context.cpuid(number, one, sub)
            if any(registers) or leaf is not None:
                found = [features(one, sub, output, value)[0] for output, value in zip(OUTPUTS, registers, strict=True)]
                names = tuple(name for part in found for name in part)
                views.append(LeafView(one, sub, *registers, LEAVES.get(one, ""), meanings(one, sub, registers), names))
    vmcb = subject.vmcb
    return Cpuid(subject.title, tuple(views), bool(vmcb) and intercepted(words_of(vmcb), ExitCode.CPUID))


COMMANDS = (
    Command(
        "cpuid", _cpuid, "Show what CPUID returns, features by name.", (_LEAF, _SUBLEAF, OWNER),
        "Says whether the guest's hypervisor intercepts it. Numbers in front are LEAF and SUBLEAF: name a guest with --guest.",
        ("cpuid 0x8000000a --guest 2", "cpuid 1 0 host"),
    ),
)  # fmt: skip
