"""Threads that a debugger has stand still while others run (non-stop mode), and what that means for the CPUs they share."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import TYPE_CHECKING

from gdbstub.target import ThreadId
from vmdbg.cpu.core import Hold
from vmdbg.history import HOST
from vmdbg.inferiors import Inferiors
from vmdbg.machine import Machine

if TYPE_CHECKING:
    from vmdbg.cpu.core import Cpu
    from vmdbg.cpu.processor import Processor


class Holds:
    """In a held guest the CPU waits, as if the guest's next instruction took very long: time goes on, and what makes the
    guest leave happens as ever, so that its hypervisor gets the CPU back.  In a held hypervisor nothing happens at all.

    A step of a guest runs what it needs: a hypervisor that is held runs for it until it is done.  Clients rely on that, for
    to step a thread off a breakpoint they first stop all the others.
    """

    def __init__(self, machine: Machine, inferiors: Inferiors, stepping: Callable[[], Collection[ThreadId]]) -> None:
        """`stepping` gives the threads that step."""
        self.machine = machine
        self.inferiors = inferiors
        self.active = False
        """Threads stop one by one."""
        self._stepping = stepping
        self._threads: set[ThreadId] = set()
        self._noted: dict[int, str] = {}

    def __contains__(self, thread: ThreadId) -> bool:
        return thread in self._threads

    def __bool__(self) -> bool:
        """Whether there is any."""
        return bool(self._threads)

    def add(self, threads: Iterable[ThreadId]) -> None:
        self.active = True
        self._threads.update(threads)

    def remove(self, threads: Iterable[ThreadId]) -> None:
        self._threads.difference_update(threads)

    def forget(self, pid: int) -> None:
        """The client has let go of an inferior, or it is gone."""
        self._threads = {thread for thread in self._threads if thread.pid != pid}

    def end(self) -> None:
        """All threads stop together again."""
        if self.active:
            self.active = False
            self._threads.clear()
            self.tell_cpus()

    def tell_cpus(self) -> None:
        for cpu in self.machine.cpus:
            cpu.hold = self.of(cpu)

    def note(self) -> None:
        """Something is about to be executed, or time to pass.  Who stands still then depends on when the client says so, as input
        does; what it says while all stands still makes no difference."""
        if self.active or self._noted:
            holds = {cpu.index: cpu.hold.name for cpu in self.machine.cpus if cpu.hold != Hold.NO}
            if holds != self._noted:
                self._noted = holds
                self.machine.outside("debugger", f"hold {holds}".encode())

    def of(self, cpu: Cpu) -> Hold:
        """What it means for a CPU now."""
        if not self.stops(self.inferiors.thread_on(cpu)):
            return Hold.NO
        # Amid an instruction or event, where a catchpoint stops, nothing comes between.
        stands = cpu.guest is None or cpu.postponed is not None or self.stops(ThreadId(HOST, cpu.index + 1))
        return Hold.STANDS if stands else Hold.WAITS

    def stops(self, thread: ThreadId) -> bool:
        """Whether a thread stands still."""
        return thread in self._threads and thread.pid not in self._needed()

    def _needed(self) -> set[int]:
        """The hypervisors of guests that step."""
        stepping = {thread.pid for thread in self._stepping() if self.inferiors.alive(thread.pid)}
        return {above for pid in stepping for above in self.inferiors.above(pid)}

    def move(self) -> bool:
        """Whether any CPU executes, or waits for what lets it."""
        return not all(map(self._stands, self.machine.cpus))

    def _stands(self, cpu: Processor) -> bool:
        return cpu.shutdown or (cpu.wait_for_sipi and not cpu.runnable) or self.of(cpu) == Hold.STANDS
