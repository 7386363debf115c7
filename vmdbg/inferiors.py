"""Who is there to be debugged: the hypervisor and its guests as inferiors, CPUs and vCPUs as threads."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING

from gdbstub.target import Inferior, TargetError, Thread, ThreadId
from vmdbg.contexts import Context, LiveContext, SavedContext
from vmdbg.cpu.processor import Processor
from vmdbg.history import HOST, KnownGuest, Vcpu
from vmdbg.machine import Machine

if TYPE_CHECKING:
    from vmdbg.cpu.core import Cpu

PAGE = 4096


def _title(guest: KnownGuest, vcpu: Vcpu, parent: int) -> str:
    under = f" under guest {parent}" if parent != HOST else ""
    return f"{guest.name}{under} asid={vcpu.asid} vmcb={vcpu.vmcb:#x}"


class Inferiors:
    """Those of one machine.  The hypervisor is number `HOST`, a guest's number is its pid for its life."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.history = machine.history
        self._cpus: list[Thread] = []
        self._states: list[str] = []
        """Of the CPUs, when the list was made."""

    def living(self) -> Sequence[Inferior]:
        cpus = ", ".join(self._cpu_state(cpu) for cpu in self.machine.cpus)
        return [Inferior(HOST, "hypervisor", cpus)] + [
            Inferior(number, guest.name, self._guest_state(guest))
            for number, guest in self.history.guests.items() if not guest.gone
        ]  # fmt: skip

    def _guest_state(self, guest: KnownGuest) -> str:
        """In words, where it is and whose guest."""
        cpus = [str(vcpu.running_on) for vcpu in guest.vcpus.values() if vcpu.running_on is not None]
        where = f"on CPU {', '.join(cpus)}" if cpus else "in host"
        parent = self.history.parent(guest)
        whose = f", under guest {parent}" if parent != HOST else ""
        return f"{where}, {guest.ring.count} exits{whose}"

    def alive(self, pid: int) -> bool:
        return pid == HOST or (pid in self.history.guests and not self.history.guests[pid].gone)

    def above(self, pid: int) -> Iterator[int]:
        """The hypervisors of an inferior: its own, that one's, and so on."""
        while pid != HOST:
            pid = self.history.parent(self.history.guests[pid])
            yield pid

    def threads(self, pid: int) -> Sequence[Thread]:
        if pid == HOST:
            states = [self._cpu_state(cpu) for cpu in self.machine.cpus]
            if states != self._states:
                self._states = states
                self._cpus = [Thread(index + 1, f"CPU {index}", index, state) for index, state in enumerate(states)]
            return self._cpus
        guest = self.guest(pid)
        parent = self.history.parent(guest)
        return [
            Thread(
                vcpu.thread, _title(guest, vcpu, parent), vcpu.running_on,
                "in host" if vcpu.running_on is None else f"running on CPU {vcpu.running_on}",
            )
            for vcpu in guest.vcpus.values()
        ]  # fmt: skip

    def thread_ids(self, pid: int) -> Collection[ThreadId]:
        """Those of `threads`, for who needs no more."""
        if pid == HOST:
            return [ThreadId(HOST, cpu.index + 1) for cpu in self.machine.cpus]
        return [ThreadId(pid, vcpu.thread) for vcpu in self.guest(pid).vcpus.values()]

    def _cpu_state(self, cpu: Processor) -> str:
        if cpu.guest is not None:
            return f"in guest {self.history.by_vmcb[cpu.guest.vmcb][0].number}"
        if cpu.wait_for_sipi:
            return "waiting for SIPI"
        return "halted" if cpu.halted else "running"

    def guest(self, pid: int) -> KnownGuest:
        """TargetError if there is none, or no longer."""
        guest = self.history.guests.get(pid)
        if guest is None or guest.gone:
            raise TargetError(f"there is no guest {pid}; `monitor guests` lists them")
        return guest

    def vcpu(self, thread: ThreadId) -> Vcpu:
        """A guest's thread.  TargetError if there is none."""
        for vcpu in self.guest(thread.pid).vcpus.values():
            if vcpu.thread == thread.tid:
                return vcpu
        raise TargetError(f"guest {thread.pid} has no vCPU {thread.tid}; `info threads` lists them")

    def context(self, thread: ThreadId) -> Context:
        """Where the thread's registers and memory are now."""
        cpus = self.machine.cpus
        if thread.pid != HOST:
            vcpu = self.vcpu(thread)
            if vcpu.running_on is not None:
                return LiveContext(cpus[vcpu.running_on])
            view = self.machine.ram.view[vcpu.vmcb : vcpu.vmcb + PAGE]
            return SavedContext(self.machine.cpu, view, vcpu, self.history.change)
        if not 1 <= thread.tid <= len(cpus):
            raise TargetError(f"there is no CPU {thread.tid - 1}; `info threads` lists them")
        cpu = cpus[thread.tid - 1]
        return LiveContext(cpu) if cpu.guest is None else SavedContext(cpu, cpu.host_save_area(), None)

    def vmcb(self, thread: ThreadId) -> int | None:
        """Address of a guest thread's VMCB; for a CPU of the hypervisor, of the one it ran last or runs."""
        if thread.pid != HOST:
            return self.vcpu(thread).vmcb
        cpu = self.machine.cpus[thread.tid - 1]
        return cpu.guest.vmcb if cpu.guest is not None else self.history.last_vmcb(cpu.index)

    def thread_on(self, cpu: Cpu) -> ThreadId:
        """The thread that a CPU executes now."""
        if cpu.guest is None:
            return ThreadId(HOST, cpu.index + 1)
        guest, vcpu = self.history.by_vmcb[cpu.guest.vmcb]
        return ThreadId(guest.number, vcpu.thread)

    def first_thread(self, pid: int) -> ThreadId:
        if pid == HOST:
            return ThreadId(HOST, 1)
        return ThreadId(pid, self.threads(pid)[0].tid)

    def first_context(self, pid: int) -> Context | None:
        """Of the first thread; None if the inferior is gone."""
        return self.context(self.first_thread(pid)) if self.alive(pid) else None

    def name(self, thread: ThreadId) -> str:
        """A thread in words."""
        return f"CPU {thread.tid - 1} of the hypervisor" if thread.pid == HOST else self.guest(thread.pid).name
