"""Whose state a command is about: registers, mode, symbols and memory of the hypervisor or a guest."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol, runtime_checkable

from introspect.commands.context import HOST_NUMBER, CommandError, Context, GuestView, HostView
from introspect.commands.devices import DeviceView
from introspect.commands.parameters import Located, Owner, Parameter
from introspect.commands.registry import Arguments
from introspect.execution import Mode, execution_mode, linear_pc, linear_sp
from introspect.expression import Space
from introspect.scope import locate_space, read_space
from introspect.sources import Unreadable
from introspect.symbols import Symbols
from introspect.vmcb import VMCB_SIZE

__all__ = ["OWNER", "InferiorState", "MapRange", "Mapped", "Remembers", "find_inferior", "unreadable"]

OWNER = Parameter("GUEST|host", Owner(), optional=True, option="--guest", help="whose; else who is selected")


class MapRange(NamedTuple):
    """System-physical addresses, or ports, first..last and what is there."""

    first: int
    last: int
    kind: str
    """RAM, ROM, MMIO, APIC, port."""
    owner: str


@runtime_checkable
class Mapped(Protocol):
    """A context that knows what physical addresses and ports lead to, as a machine does and a dump does not."""

    def physical_map(self) -> Sequence[MapRange]: ...


@runtime_checkable
class Remembers(Protocol):
    """A context that knows the registers that an inferior had when it was resumed last."""

    def registers_before(self, number: int) -> Mapping[str, int] | None: ...


@dataclass(frozen=True)
class InferiorState:
    """One inferior of a context at this moment."""

    context: Context
    owner: GuestView | HostView

    @property
    def title(self) -> str:
        return str(self.owner)

    @cached_property
    def registers(self) -> Mapping[str, int]:
        """Those that are known; the four that decide translations always."""
        paging = self.owner.paging
        base = {"cr0": paging.cr0, "cr3": paging.cr3, "cr4": paging.cr4, "efer": paging.efer, "cpl": paging.cpl}
        return {**base, **self.context.registers(self.owner.number)}

    @cached_property
    def mode(self) -> Mode:
        return execution_mode(self.registers)

    @cached_property
    def vmcb_pa(self) -> int | None:
        """System-physical address of a guest's VMCB, the one of its thread that is meant; None for the hypervisor."""
        if not isinstance(self.owner, GuestView):
            return None
        return self.context.registers(self.owner.number).get("vmcb_pa", next(iter(self.owner.vmcbs), None))

    @cached_property
    def vmcb(self) -> bytes:
        """Its contents; empty where there is none."""
        spa = self.vmcb_pa
        try:
            return self.context.memory.read(spa, VMCB_SIZE) if spa is not None else b""
        except Unreadable:
            return b""

    @cached_property
    def symbols(self) -> Symbols | None:
        return self.context.symbols(self.owner.number)

    def symbol(self, address: int) -> str:
        """ "tick+0x10", or empty."""
        return self.symbols.name(address) if self.symbols is not None else ""

    def named(self, address: int) -> str:
        """ "0x401010 <tick+0x10>"."""
        name = self.symbol(address)
        return f"{address:#x} <{name}>" if name else f"{address:#x}"

    @property
    def prefix(self) -> str:
        """How addresses of it are written: "host:" or "2:"."""
        return "host:" if self.owner.number == HOST_NUMBER or isinstance(self.owner, HostView) else f"{self.owner.number}:"

    @property
    def pc(self) -> int:
        """Linear.  CommandError if it is not known."""
        return self._known(linear_pc(self.registers), "rip")

    @property
    def sp(self) -> int:
        """Linear.  CommandError if it is not known."""
        return self._known(linear_sp(self.registers), "rsp")

    def _known(self, value: int | None, name: str) -> int:
        if value is None:
            rule = f"{name} of {self.title} is not known from this source"
            raise CommandError(name, rule, "give an address, or open the source with registers")
        return value

    def read(self, space: Space, address: int, size: int) -> bytes:
        """As much as can be read, without side effects."""
        return read_space(self.context.memory, self.owner, space, address, size)

    def linear(self, address: int, size: int) -> bytes:
        return self.read(Space.GVA, address, size)

    def require(self, *names: str) -> list[int]:
        """Registers by name.  CommandError for the first that is not known."""
        return [self._known(self.registers.get(name), name) for name in names]


def find_inferior(context: Context, arguments: Arguments, parameter: Parameter[GuestView | HostView] = OWNER) -> InferiorState:
    """The inferior that a command means by `parameter`, else who is selected."""
    return InferiorState(context, arguments.owner_or_selected(parameter))


def unreadable(context: Context, where: Located) -> str:
    """Why there is nothing to read at an address, or what is there instead of memory."""
    spa = locate_space(context.memory, where.owner, where.space, where.offset)
    if where.space == Space.IOVA:
        if not isinstance(where.owner, DeviceView):
            return "an I/O address is some device's: write 00:03.0:iova:0x1000"
        if spa is None:
            return f"the IOMMU does not let the device there; `iommu walk {where.owner.device} {where.offset:#x}` shows why"
    if spa is None:
        return "not mapped; `walk` shows why" if where.space == Space.GVA else "no nested page table maps it; `npt` lists what is"
    ranges = context.physical_map() if isinstance(context, Mapped) else ()
    there = next((one for one in ranges if one.first <= spa <= one.last), None)
    at = "" if where.space == Space.SPA else f" at spa {spa:#x}"
    if there is not None and there.kind not in ("RAM", "ROM"):
        return f"{there.kind} of {there.owner}{at}: devices are not read, it would change them"
    try:
        context.memory.read(spa, 1)
    except Unreadable:
        return f"no memory{at}"
    return ""
