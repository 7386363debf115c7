"""`iopm` and `msrpm`: which ports and MSRs a guest's permission maps intercept."""

from dataclasses import dataclass

from introspect.commands.context import Context
from introspect.commands.registry import Arguments, Command
from introspect.commands.render import columns, jsonable
from introspect.commands.which import WHICH, find_vmcb
from introspect.exits import ExitCode
from introspect.intercepts import intercepted, words_of
from introspect.permissions import MsrRange, iopm_ranges, msrpm_ranges
from introspect.vmcb import VMCB

__all__ = ["COMMANDS"]


@dataclass(frozen=True, slots=True)
class Ports:
    """Intercepted ports as (first, last). `active`: whether the VMCB consults the map at all."""

    owner: str
    base: int
    active: bool
    ranges: tuple[tuple[int, int], ...]

    def text(self) -> str:
        rows = [(f"{first:#x}" if first == last else f"{first:#x}-{last:#x}",) for first, last in self.ranges]
        return "\n".join([_head("IOPM", "IOIO", self.owner, self.base, self.active), *columns(rows, "  ")])

    def json(self) -> object:
        return jsonable(self)


@dataclass(frozen=True, slots=True)
class Msrs:
    """Intercepted MSRs. `active`: whether the VMCB consults the map at all."""

    owner: str
    base: int
    active: bool
    ranges: tuple[MsrRange, ...]

    def text(self) -> str:
        rows = []
        for found in self.ranges:
            span = f"{found.first:#x}" if found.first == found.last else f"{found.first:#x}-{found.last:#x}"
            rows.append((span, " ".join(filter(None, ("read" * found.read, "write" * found.write)))))
        rows.append(("all others", "passed through; MSRs that the map does not cover always exit"))
        return "\n".join([_head("MSRPM", "MSR", self.owner, self.base, self.active), *columns(rows, "  ")])

    def json(self) -> object:
        return jsonable(self)


def _head(kind: str, intercept: str, owner: str, base: int, active: bool) -> str:
    note = "" if active else f" (not consulted: the {intercept} intercept is clear)"
    return f"{kind} of {owner} at {base:#x}{note}, intercepts:"


def _iopm(context: Context, arguments: Arguments) -> Ports:
    _, owner, vmcb = find_vmcb(context, arguments)
    base = VMCB.read(vmcb, "iopm_base_pa") & ~0xFFF
    active = intercepted(words_of(vmcb), ExitCode.IOIO)
    return Ports(owner, base, active, tuple(iopm_ranges(context.memory, base)))


def _msrpm(context: Context, arguments: Arguments) -> Msrs:
    _, owner, vmcb = find_vmcb(context, arguments)
    base = VMCB.read(vmcb, "msrpm_base_pa") & ~0xFFF
    active = intercepted(words_of(vmcb), ExitCode.MSR)
    return Msrs(owner, base, active, tuple(msrpm_ranges(context.memory, base)))


COMMANDS = (
    Command(
        "iopm", _iopm, "List the ports that a guest's I/O permission map intercepts.", (WHICH,),
        examples=("iopm 2", "iopm 3 --json"),
    ),
    Command(
        "msrpm", _msrpm, "List the MSRs that a guest's MSR permission map intercepts.", (WHICH,),
        examples=("msrpm 2", "msrpm 3 --json"),
    ),
)  # fmt: skip
