"""What commands ask of a machine, a dump or a remote stub, and what they give back."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from introspect.exitlog import ExitRecord
from introspect.expression import Names, Scope
from introspect.memtypes import Caching
from introspect.paging import Nested, PagingState
from introspect.rules import Processor
from introspect.sources import Memory
from introspect.symbols import Symbols

__all__ = [
    "HOST_NUMBER", "Cancelled", "CommandError", "Context", "ExitRecord", "GuestView", "HostView", "Inferior", "Result",
    "Threaded", "exit_status", "threads_of",
]  # fmt: skip

HOST_NUMBER = 1
"""The hypervisor's number, as gdb numbers inferiors: guests have others."""


class CommandError(Exception):
    """A command that cannot be carried out: the offending value, the rule it breaks, and what to do instead."""

    def __init__(self, value: str, rule: str, remedy: str) -> None:
        super().__init__(f"{value}: {rule}; {remedy}")
        self.value, self.rule, self.remedy = value, rule, remedy


class Cancelled(Exception):
    """Whoever asked for it does not want to wait any longer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inferior:
    """Who has an address space: the hypervisor or a guest."""

    number: int
    name: str
    paging: PagingState
    nested: Nested | None = None
    caching: Caching | None = None
    """What decides its memory types, if that is known."""

    def locate_iova(self, memory: Memory, address: int) -> int | None:
        """System-physical address of an I/O address; None if it leads nowhere. Only devices have such."""
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class HostView(Inferior):
    """The hypervisor, on the processor that is meant."""

    number: int = HOST_NUMBER
    name: str = "the host"
    image: tuple[tuple[int, int], ...] = ()
    """Where its image lies in system-physical memory, (start, end) of each part, if that is known."""
    saves: tuple[int, ...] = ()
    """VM_HSAVE_PA of each processor, 0 if it has none, if that is known."""

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestView(Inferior):
    """One guest as the commands see it. `vmcbs`: system-physical addresses, one for each virtual processor."""

    vmcbs: tuple[int, ...]
    asid: int
    ncr3: int | None
    """None without nested paging."""
    parent: int | None = None
    """The guest whose hypervisor runs it; None under the hypervisor of the machine."""
    inner: int | None = None
    """System-physical address of the VMCB that the hypervisor in `parent` made for it, if that is known."""
    state: str = ""
    """In words, where it is: "on CPU 0", "in host"; empty where that is not known, as in a dump."""

    def __str__(self) -> str:
        return f"guest {self.number} ({self.name})"


class Context(Protocol):
    """What a machine, a dump or a remote stub offers to the commands."""

    @property
    def memory(self) -> Memory:
        """System-physical memory."""

    @property
    def processor(self) -> Processor: ...

    @property
    def host(self) -> HostView: ...

    @property
    def guests(self) -> Sequence[GuestView]: ...

    @property
    def selected(self) -> GuestView | None:
        """The guest that a command means if none is named; None while the host is selected."""

    def exits(self, guest: int | None, count: int) -> Sequence[ExitRecord]:
        """The last `count` exits of one guest, or of all, oldest first."""

    def registers(self, number: int) -> Mapping[str, int]:
        """Those of an inferior that are known, by the names of the VMCB's fields: rax, rip, rflags, cr0, efer, cs.selector,
        gdtr.base ...; rcx to r15, dr0 to dr3 and xcr0 besides."""

    def symbols(self, number: int) -> Symbols | None: ...

    def names(self, number: int) -> Names:
        """What expressions about an inferior may name."""

    def scope(self, number: int) -> Scope:
        """Where they are evaluated."""

    def progress(self, part: float, what: str) -> None:
        """Called now and then by what may take long: the part that is done, 0 to 1.  Raises `Cancelled`."""


@runtime_checkable
class Threaded(Protocol):
    """A context that knows the registers of each processor of an inferior."""

    def threads(self, number: int, /) -> Sequence[Mapping[str, int]]: ...


def threads_of(context: Context, number: int) -> Sequence[Mapping[str, int]]:
    """Registers of the processors of an inferior, by the names that `Context.registers` has; of those that are known."""
    return context.threads(number) if isinstance(context, Threaded) else [context.registers(number)]


class Result(Protocol):
    """What a command found out."""

    def text(self) -> str:
        """Aligned plain text without a final newline."""

    def json(self) -> object:
        """The same as JSON-able values; numbers stay numbers."""


def exit_status(result: Result) -> int:
    """What a program that asked for the result tells its caller: 0, but for results with findings, which say so themselves."""
    status: int = getattr(result, "exit_status", 0)
    return status
