"""What the commands of introspect see of the live machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from gdbstub.target import ThreadId
from introspect.commands import ExitRecord, GuestView, HostView
from introspect.commands.devices import CachedEntry, CachedPage
from introspect.commands.inferior_state import MapRange
from introspect.dev import Barrier
from introspect.exits import ExitCode
from introspect.interception import OPTIONAL
from introspect.iommu.state import Iommu
from introspect.leaks import Leak
from introspect.msrs import MSRS
from introspect.paging import NestedTranslation, PagingState, nested_translate
from introspect.processor_state import ProcessorState
from introspect.registers import CR4
from introspect.rules import Processor as RuleProcessor
from introspect.sources import Memory
from introspect.symbols import Symbols
from introspect.vmcb import VMCB
from vmdbg import io_views
from vmdbg.contexts import GENERAL, Context, LiveContext, SavedContext
from vmdbg.cpu.processor import Processor
from vmdbg.history import HOST, KnownGuest
from vmdbg.leakwatch import LeakWatch
from vmdbg.machine import Machine
from vmdbg.platform.clock import TICKS_PER_SECOND
from vmdbg.platform.cpuid import Dynamic, cpuid
from vmdbg.platform.msrs import COUNTERS, EFER, TSC, TSC_RATIO
from vmdbg.platform_commands import physical_map
from vmdbg.processor_view import hidden_registers, processor_state
from vmdbg.registers import SYSTEM
from vmdbg.scopes import MachineNames, ThreadScope

if TYPE_CHECKING:
    from vmdbg.boot.image import BootImage
    from vmdbg.debugger import Debugger

_NAMES = {
    "rflags": "eflags", "kernel_gs_base": "k_gs_base", "fs.base": "fs_base", "gs.base": "gs_base",
    "gif": "gif", "vmcb_pa": "vmcb_pa",
    **{f"{name}.selector": name for name in ("es", "cs", "ss", "ds", "fs", "gs")},
    **{register.field or register.name: register.name for register in SYSTEM.values()},
}  # fmt: skip
"""gdb's names of registers, by those of the VMCB's fields."""
_MASK = (1 << 64) - 1
_REMEMBERED = 16
"""Threads whose registers are kept at a resume at most."""

_LOADERS = ("the boot area", "the multiboot information", "the initrd", "module ")
"""What the names of those parts of an image begin with that are not the hypervisor's own: it reads them once, or gives them to
guests."""
_paging = lru_cache(64)(PagingState)
"""Of the hypervisor: it is asked for with each command, and hardly ever changes."""


def _rip(context: Context) -> int:
    """gdb's is linear."""
    if isinstance(context, SavedContext):
        return VMCB.read(context.view, "rip")
    assert isinstance(context, LiveContext)
    return context.cpu.state.rip


def known_processor(machine: Machine, cr0: int, cr4: int, efer: int) -> RuleProcessor:
    """A machine's processor, whose hypervisor has these registers."""
    cpu, cpuid = machine.cpus[0], machine.cpuid
    return RuleProcessor(
        cpuid.physical_bits, cpuid.svm_features, cr0, cr4, efer, cr4_valid=cpu.cr4_valid,
        efer_valid=cpu.msrs.table[EFER].writable, absent=OPTIONAL - cpuid.features, counters=COUNTERS,
    )  # fmt: skip


class MachineContext:
    """The machine of a `Debugger`.  Implements `introspect.commands.Context`."""

    def __init__(self, debugger: Debugger) -> None:
        self.debugger = debugger
        self.thread = ThreadId(1, 1)
        """The one that a command means if none is named."""
        self._before: dict[ThreadId, Mapping[str, int]] = {}
        """Registers at the last resume, of the threads that somebody has asked about."""
        self._asked: set[ThreadId] = set()
        self._image: tuple[BootImage, tuple[tuple[int, int], ...]] | None = None

    @property
    def now(self) -> int:
        """Guest time in ticks."""
        return self.debugger.machine.clock.now

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
    def barrier(self) -> Barrier:
        """Implements `introspect.commands.devices.Guarded`."""
        machine = self.debugger.machine
        dev, block = machine.late_launch.dev, machine.late_launch.protection.base
        return Barrier(machine.ram, machine.ram.end, None if dev is None else dev.registers, block)

    @property
    def iommus(self) -> Sequence[Iommu]:
        """Implements `introspect.commands.devices.Devices`."""
        return io_views.iommus(self.debugger.machine)

    @property
    def device_names(self) -> Mapping[int, str]:
        """Likewise."""
        return io_views.device_names(self.debugger.machine)

    def iotlb(self) -> Sequence[CachedPage]:
        """Implements `introspect.commands.devices.IoCaches`."""
        return io_views.iotlb(self.debugger.machine)

    def cached_entries(self) -> Sequence[CachedEntry]:
        """Likewise."""
        return io_views.cached_entries(self.debugger.machine)

    @property
    def _host_context(self) -> Context:
        index = self.thread.tid - 1 if self.thread.pid == 1 else 0
        return self.debugger.context(ThreadId(1, min(index, len(self.debugger.machine.cpus) - 1) + 1))

    @staticmethod
    def _modes(context: Context) -> tuple[int, int, int, int]:
        """CR0, CR3, CR4 and EFER."""
        return context.read("cr0") or 0, context.read("cr3") or 0, context.read("cr4") or 0, context.read("efer") or 0

    @property
    def processor(self) -> RuleProcessor:
        cr0, _, cr4, efer = self._modes(self._host_context)
        return known_processor(self.debugger.machine, cr0, cr4, efer)

    def _image_of(self, image: BootImage) -> tuple[tuple[int, int], ...]:
        """The ranges of the hypervisor's own image."""
        if self._image is None or self._image[0] is not image:
            ranges = [(part.address, part.end) for part in image.segments if not part.name.startswith(_LOADERS)]
            self._image = image, tuple(ranges)
        return self._image[1]

    @property
    def host(self) -> HostView:
        machine, context = self.debugger.machine, self._host_context
        paging = _paging(*self._modes(context), maxphyaddr=machine.config.physical_bits)
        saves = [cpu.state.field("vm_hsave") & ~0xFFF for cpu in machine.cpus]
        return HostView(paging=paging, caching=context.caching(), image=self._image_of(machine.image), saves=tuple(saves))

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

    def registers_before(self, number: int) -> Mapping[str, int] | None:
        """Those that the thread had when something was resumed last; None until `registers` has been asked for once."""
        thread, running = self.thread_of(number), self.debugger.running
        if running.on_resume != self._remember:  # for the first time, or on a machine that has taken another's place
            running.on_resume, self._before, self._asked = self._remember, {}, set()
        self._asked.add(thread)
        return self._before.get(thread)

    def _remember(self) -> None:
        alive = [thread for thread in self._asked if self.debugger.who.alive(thread.pid)]
        self._asked = set(alive[-_REMEMBERED:])
        self._before = {thread: self._registers(thread) for thread in self._asked}

    def physical_map(self) -> Sequence[MapRange]:
        return physical_map(self.debugger.machine)

    def msrs(self, number: int) -> Mapping[int, int]:
        """All that RDMSR would read, with what a VMCB keeps of a guest that is not on a processor."""
        thread = self.thread_of(number)
        context = self.debugger.context(thread)
        assert isinstance(context, LiveContext | SavedContext)
        cpu = context.cpu
        found = {n: cpu.msrs.read(n, cpu) for n, msr in cpu.msrs.table.items() if "r" in msr.access}
        if isinstance(context, LiveContext):
            return found
        names = {**_NAMES, "efer": "efer"}
        kept = {msr.number: self.debugger.registers.read(thread, names[msr.field]) for msr in MSRS.values() if msr.field in names}
        found |= {n: value for n, value in kept.items() if value is not None and n in found}
        found[TSC] = self._tsc(context)
        return found

    @staticmethod
    def _tsc(context: SavedContext) -> int:
        """The time stamp counter as a thread that is not on a processor would read it."""
        cpu = context.cpu
        value = cpu.engine.clock.now + cpu.tsc_offset & _MASK
        if context.vcpu is not None:
            value = (value * cpu.msrs.values[TSC_RATIO] >> 32) + VMCB.read(context.view, "tsc_offset")
        return value & _MASK

    def cpuid(self, number: int, leaf: int, subleaf: int) -> tuple[int, int, int, int]:
        """What the processor would return, whatever its hypervisor intercepts."""
        context = self.debugger.context(self.thread_of(number))
        assert isinstance(context, LiveContext | SavedContext)
        cpu = context.cpu
        dynamic = Dynamic(bool((context.read("cr4") or 0) & CR4.OSXSAVE), cpu.lapic.enabled)
        found = cpuid(self.debugger.machine.cpuid, cpu.index, leaf, subleaf, dynamic)
        return found.eax, found.ebx, found.ecx, found.edx

    def _cpu_of(self, vmcb: int | None) -> Processor:
        """The CPU that the guest of a VMCB is on or was on last; the hypervisor's that is meant."""
        cpus = self.debugger.machine.cpus
        if vmcb is None:
            index = self.thread.tid - 1 if self.thread.pid == HOST else 0
            return cpus[min(index, len(cpus) - 1)]
        for cpu in cpus:
            if cpu.guest is not None and cpu.guest.vmcb == vmcb:
                return cpu
        return next((cpu for cpu in cpus if self.debugger.history.last_vmcb(cpu.index) == vmcb), cpus[0])

    def processor_state(self, vmcb: int | None) -> ProcessorState:
        """Implements `introspect.commands.live.Live`."""
        machine = self.debugger.machine
        return processor_state(self._cpu_of(vmcb), machine.pic, machine.chipset.ioapic)

    def hidden_registers(self, vmcb: int) -> Mapping[str, int]:
        """Likewise."""
        cpu = self._cpu_of(vmcb)
        return hidden_registers(cpu, in_guest=cpu.guest is not None and cpu.guest.vmcb == vmcb)

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
