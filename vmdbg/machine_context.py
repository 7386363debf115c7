"""What the commands of introspect see of the live machine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from gdbstub.target import ThreadId
from introspect.commands import ExitRecord, GuestView
from introspect.exits import ExitCode
from introspect.memtypes import Caching
from introspect.paging import NestedTranslation, PagingState, nested_translate
from introspect.rules import Processor as RuleProcessor
from introspect.sources import Memory
from vmdbg.contexts import Context
from vmdbg.history import HOST, KnownGuest
from vmdbg.svm import world

if TYPE_CHECKING:
    from vmdbg.debugger import Debugger


class MachineContext:
    """The machine of a `Debugger`.  Implements `introspect.commands.Context`."""

    def __init__(self, debugger: Debugger) -> None:
        self.debugger = debugger
        self.thread = ThreadId(1, 1)
        """The one that a command means if none is named."""

    @property
    def memory(self) -> Memory:
        return self.debugger.machine.ram

    @property
    def _host_context(self) -> Context:
        index = self.thread.tid - 1 if self.thread.pid == 1 else 0
        return self.debugger.context(ThreadId(1, min(index, len(self.debugger.machine.cpus) - 1) + 1))

    @property
    def _host(self) -> tuple[int, int, int, int]:
        """CR0, CR3, CR4 and EFER of the hypervisor, also while a guest runs on its CPU."""
        cr0, cr3, cr4, efer = (self._host_context.read(name) or 0 for name in ("cr0", "cr3", "cr4", "efer"))
        return cr0, cr3, cr4, efer

    @property
    def processor(self) -> RuleProcessor:
        cr0, _, cr4, efer = self._host
        return RuleProcessor(self.debugger.machine.config.physical_bits, world.FEATURES, cr0, cr4, efer)

    @property
    def host_paging(self) -> PagingState:
        return PagingState(*self._host, maxphyaddr=self.debugger.machine.config.physical_bits)

    @property
    def host_caching(self) -> Caching:
        return self._host_context.caching()

    @property
    def guests(self) -> Sequence[GuestView]:
        return [self._view(guest) for guest in self.debugger.history.guests.values() if not guest.gone]

    @property
    def selected(self) -> GuestView | None:
        guest = self.debugger.history.guests.get(self.thread.pid)
        return self._view(guest) if guest is not None and not guest.gone else None

    def exits(self, guest: int | None, count: int) -> Sequence[ExitRecord]:
        known = self.debugger.history.guests
        chosen = [known[guest]] if guest in known else list(known.values()) if guest is None else []
        records = [record for one in chosen for record in one.exits]
        records.sort(key=lambda record: record.number)
        return records[-count:]

    def _view(self, guest: KnownGuest) -> GuestView:
        first = next(iter(guest.vcpus.values()))
        context = self.debugger.context(ThreadId(guest.number, first.thread))
        parent = self.debugger.history.parent(guest)
        return GuestView(
            guest.number, guest.name, tuple(guest.vcpus), first.asid, first.root or None, context.paging(),
            context.nested(), None if parent == HOST else parent, self._inner(guest), context.caching(),
        )  # fmt: skip

    def _inner(self, guest: KnownGuest) -> int | None:
        """The VMCB that the hypervisor within another guest made for this one: what was in rAX when that one left by VMRUN,
        if it has not run since and this one has."""
        history = self.debugger.history
        parent = history.guests.get(history.parent(guest))
        if parent is None:
            return None
        last = parent.last_exit()
        vcpu = parent.vcpus.get(last.vmcb)
        if last.code != ExitCode.VMRUN or vcpu is None or vcpu.running_on is not None:
            return None
        runs = any(own.running_on is not None for own in guest.vcpus.values())
        if not runs and guest.last_exit().number < last.number:
            return None
        context = self.debugger.context(ThreadId(parent.number, vcpu.thread))
        nested, rax = context.nested(), context.read("rax")
        if nested is None or rax is None:
            return None
        found = nested_translate(self.memory, nested, rax, False, False, set_ad=False)
        return int(found.spa) if isinstance(found, NestedTranslation) else None
