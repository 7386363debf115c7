"""A world of bytes for commands: what they ask of a machine, without one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from introspect.commands import ExitRecord, GuestView, HostView
from introspect.iommu.state import Iommu
from introspect.paging import PagingState
from introspect.rules import Processor
from introspect.scope import ContextNames, ContextScope
from introspect.sources import Memory
from introspect.symbols import Symbols

HOST = HostView(number=0, paging=PagingState(1, 0, 0, 0))


@dataclass
class World:
    """Implements `introspect.commands.Context`. Guests may have any number but 0, which is the host's here."""

    memory: Memory
    guests: Sequence[GuestView] = ()
    selected: GuestView | None = None
    processor: Processor = Processor()  # noqa: RUF009 - frozen
    host: HostView = HOST
    ring: Sequence[ExitRecord] = ()
    known_registers: Mapping[int, Mapping[str, int]] = field(default_factory=dict)
    known_symbols: Mapping[int, Symbols] = field(default_factory=dict)
    iommus: Sequence[Iommu] = ()
    device_names: Mapping[int, str] = field(default_factory=dict)

    def exits(self, guest: int | None, count: int) -> Sequence[ExitRecord]:
        return [record for record in self.ring if guest in (None, record.guest)][-count:]

    def registers(self, number: int) -> Mapping[str, int]:
        return self.known_registers.get(number, {})

    def symbols(self, number: int) -> Symbols | None:
        return self.known_symbols.get(number)

    def names(self, number: int) -> ContextNames:
        return ContextNames(self, number)

    def scope(self, number: int) -> ContextScope:
        return ContextScope(self, number)

    def progress(self, part: float, what: str) -> None:
        pass
