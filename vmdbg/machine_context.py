"""What the commands of introspect see of the live machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from gdbstub.target import ThreadId
from introspect.commands import ExitRecord, GuestView, HostView
from introspect.exits import ExitCode
from introspect.leaks import Leak
from introspect.paging import NestedTranslation, PagingState, nested_translate
from introspect.rules import Processor as RuleProcessor
from introspect.sources import Memory
from introspect.symbols import Symbols
from introspect.vmcb import VMCB
from vmdbg.contexts import GENERAL, Context, LiveContext, SavedContext
from vmdbg.history import HOST, KnownGuest
from vmdbg.leakwatch import LeakWatch
from vmdbg.platform.clock import TICKS_PER_SECOND
from vmdbg.registers import SYSTEM
from vmdbg.scopes import MachineNames, ThreadScope
from vmdbg.svm import world

if TYPE_CHECKING:
    from vmdbg.debugger import Debugger

_NAMES = {
    "rflags": "eflags", "kernel_gs_base": "k_gs_base", "fs.base": "fs_base", "gs.base": "gs_base",
    **{f"{name}.selector": name for name in ("es", "cs", "ss", "ds", "fs", "gs")},
    **{register.field or register.name: register.name for register in SYSTEM.values()},
}  # fmt: skip
"""gdb's names of registers, by those of the VMCB's fields."""

_LOADERS = ("the boot area", "the multiboot information", "the initrd")
"""Parts of an image that its kernel only reads, once."""


def _rip(context: Context) -> int:
    """gdb's is linear."""
    if isinstance(context, SavedContext):
        return VMCB.read(context.view, "rip")
    assert isinstance(context, LiveContext)
    return context.cpu.state.rip


class MachineContext:
    """The machine of a `Debugger`.  Implements `introspect.commands.Context`."""

    def __init__(self, debugger: Debugger) -> None:
        self.debugger = debugger
        self.thread = ThreadId(1, 1)
        """The one that a command means if none is named."""
        self._seen: dict[int, tuple[int, Mapping[str, int], Mapping[str, int]]] = {}
        """Registers of inferiors, when somebody looked last: at what time, what they were, and at an earlier time."""

    @property
    def now(self) -> int:
        return self.debugger.machine.clock.now

    def before(self, number: int) -> Mapping[str, int]:
        now, (time, last, earlier) = self.now, self._seen.get(number, (-1, {}, {}))
        if time != now:
            earlier = last
            self._seen[number] = now, self.registers(number), earlier
        return earlier

    @property
    def ticks_per_second(self) -> int:
        """Of the times in `exits`."""
        return TICKS_PER_SECOND

    def leaks(self) -> tuple[Leak, ...] | None:
        """What `leak record` has seen; None while it is off."""
        witness = self.debugger.history.witness
        return witness.log.leaks if isinstance(witness, LeakWatch) else None

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
    def host(self) -> HostView:
        paging = PagingState(*self._host, maxphyaddr=self.debugger.machine.config.physical_bits)
        image = tuple(
            (segment.address, segment.end) for segment in self.debugger.machine.image.segments if segment.name not in _LOADERS
        )
        saves = tuple(cpu.state.field("vm_hsave") & ~0xFFF for cpu in self.debugger.machine.cpus)
        return HostView(paging=paging, caching=self._host_context.caching(), image=image, saves=saves)

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

    def thread_of(self, number: int) -> ThreadId:
        """The selected thread if it is one of this inferior, else that one's first.  TargetError if there is none."""
        if self.thread.pid == number:
            return self.thread
        return self.debugger.who.first_thread(number)

    def registers(self, number: int) -> Mapping[str, int]:
        return self._registers(self.thread_of(number))

    def threads(self, number: int) -> Sequence[Mapping[str, int]]:
        return [self._registers(ThreadId(number, thread.tid)) for thread in self.debugger.threads(number)]

    def _registers(self, thread: ThreadId) -> Mapping[str, int]:
        registers = self.debugger.registers
        context = self.debugger.context(thread)
        found = {name: context.read(name) for name in (*GENERAL, "cr0", "cr2", "cr3", "cr4", "cr8", "efer")}
        found |= {name: registers.read(thread, gdb_name) for name, gdb_name in _NAMES.items()}
        found["rip"] = _rip(context)
        found["cpl"] = context.paging().cpl
        return {name: value for name, value in found.items() if value is not None}

    def symbols(self, number: int) -> Symbols | None:
        executables = self.debugger.executables
        path = executables.of(number)
        return None if path is None else Symbols.load(path, executables.offsets.get(number, 0))

    def names(self, number: int) -> MachineNames:
        return MachineNames(self.debugger.executables, pid=number)

    def scope(self, number: int) -> ThreadScope:
        return ThreadScope(self.debugger.registers, self.thread_of(number), {})

    def progress(self, part: float, what: str) -> None:
        """Under a stub nobody is told, and ^C waits."""

    def _view(self, guest: KnownGuest) -> GuestView:
        first = next(iter(guest.vcpus.values()))
        context = self.debugger.context(ThreadId(guest.number, first.thread))
        parent = self.debugger.history.parent(guest)
        cpus = [str(vcpu.running_on) for vcpu in guest.vcpus.values() if vcpu.running_on is not None]
        return GuestView(
            number=guest.number, name=guest.name, vmcbs=tuple(guest.vcpus), asid=first.asid, ncr3=first.root or None,
            paging=context.paging(), nested=context.nested(), parent=None if parent == HOST else parent,
            inner=self._inner(guest), caching=context.caching(), state=f"on CPU {', '.join(cpus)}" if cpus else "in host",
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
