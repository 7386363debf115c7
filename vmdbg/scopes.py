"""Names and memory of the machine for expressions: registers and VMCB fields of threads, facts of an event, symbols."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from gdbstub.target import TargetError, ThreadId
from introspect.expression import HOST as HOST_OWNER
from introspect.expression import Space
from introspect.pci import RequesterId
from introspect.symbols import Symbols
from introspect.vmcb import NAMES, VMCB
from vmdbg.contexts import locate_gpa, read_memory
from vmdbg.executables import Executables
from vmdbg.history import HOST
from vmdbg.inferiors import Inferiors
from vmdbg.registers import Registers, description

PAGE = 4096
_VMCB = "vmcb."
_SHORT = {"pc": "rip", "sp": "rsp"}
"""gdb's names for these, whatever the mode."""
COMMON = frozenset(("guest", "cpu", "time", "cpl"))
"""Facts of every thread: its inferior's number (1 is the hypervisor), its CPU, guest time, its privilege level."""
_REGISTERS = frozenset(
    register.name for architecture in ("i386:x86-64", "i386") for register in description(architecture).registers
)


class MachineNames:
    """What expressions may name: facts of one kind of event, registers, VMCB fields, symbols."""

    def __init__(self, executables: Executables, facts: Iterable[str] = (), pid: int = HOST) -> None:
        """`pid`: the inferior whose symbols need no owner."""
        self.executables = executables
        self.facts = COMMON.union(facts)
        self.pid = pid

    def variable(self, name: str) -> bool:
        if name.startswith(_VMCB):
            return name[len(_VMCB) :] in NAMES
        return name in self.facts or name in _REGISTERS or name in _SHORT

    def constant(self, name: str, owner: str | None) -> int | None:
        symbols = self._symbols(owner)
        return None if symbols is None else symbols.address(name)

    def constants(self, owner: str | None) -> Iterable[str]:
        symbols = self._symbols(owner)
        return () if symbols is None else symbols.guesses

    def _symbols(self, owner: str | None) -> Symbols | None:
        if owner is not None and owner != HOST_OWNER and not owner.isdecimal():
            return None
        pid = self.pid if owner is None else HOST if owner == HOST_OWNER else int(owner)
        path = self.executables.of(pid)
        return None if path is None else Symbols.load(path, self.executables.offsets.get(pid, 0))

    def known(self) -> Iterable[str]:
        return [*self.facts, *_REGISTERS, *_SHORT, *(_VMCB + name for name in NAMES)]


class ThreadScope:
    """A thread as it is now, with the facts of what just happens to it."""

    def __init__(self, registers: Registers, thread: ThreadId, facts: Mapping[str, int | None]) -> None:
        """A fact `vmcb_pa` is the VMCB whose fields are meant, else it is the thread's own."""
        self.registers, self.thread, self.facts = registers, thread, facts

    @property
    def _who(self) -> Inferiors:
        return self.registers.who

    def value(self, name: str) -> int | None:
        if name in self.facts:
            return self.facts[name]
        try:
            if name in COMMON:
                return self._common(name)
            if name.startswith(_VMCB):
                return self._field(NAMES[name[len(_VMCB) :]].name)
            return self.registers.read(self.thread, _SHORT.get(name, name))
        except TargetError:
            return None

    def _common(self, name: str) -> int | None:
        if name == "guest":
            return self.thread.pid
        if name == "time":
            return self._who.machine.clock.now
        context = self._who.context(self.thread)
        if name == "cpl":
            return context.paging().cpl
        if self.thread.pid == HOST:
            return self.thread.tid - 1
        return self._who.vcpu(self.thread).running_on

    def _field(self, name: str) -> int | None:
        vmcb, ram = self.facts.get("vmcb_pa"), self._who.machine.ram
        if vmcb is None:
            return self.registers.field(self.thread, name)
        return VMCB.read(ram.view[vmcb : vmcb + PAGE], name) if ram.contains(vmcb, PAGE) else None

    def read(self, space: Space, address: int, size: int) -> bytes:
        machine = self._who.machine
        try:
            context = self._who.context(self.thread)
        except TargetError:
            return b""
        if space == Space.GVA:
            return read_memory(machine.ram, context, address, size)
        data = bytearray()
        while len(data) < size and space in (Space.GPA, Space.SPA):
            at = address + len(data)
            spa = at if space == Space.SPA else locate_gpa(machine.ram, context, at)
            length = min(size - len(data), PAGE - at % PAGE)
            if spa is None or not machine.ram.contains(spa, length):
                break
            data += machine.ram.view[spa : spa + length]
        return bytes(data)

    def of(self, owner: str) -> ThreadScope | None:
        """The hypervisor's CPU that the thread is on, or a guest's vCPU there, or else the first; a device."""
        device = RequesterId.parse(owner)
        if device is not None:
            from vmdbg.io_views import DeviceScope  # which is made of this

            return DeviceScope(self.registers, device)
        if owner != HOST_OWNER and not owner.isdecimal():
            return None
        pid = HOST if owner == HOST_OWNER else int(owner)
        if not self._who.alive(pid):
            return None
        cpu = self.value("cpu")
        threads = self._who.threads(pid)
        here = next((t for t in threads if cpu is not None and t.core == cpu), threads[0])
        return ThreadScope(self.registers, ThreadId(pid, here.tid), {})
