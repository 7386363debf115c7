"""A step of one thread, as its user means it: the thread's next instruction, not what interrupts it.

The machine never holds interrupts back for a step: guest time goes on as in an undebugged run.  So a step may be
interrupted before its instruction, the thread may be off its CPU, and a guest's instruction may end in a #VMEXIT whose
handler decides what becomes of it.  `Stepping` follows the thread through all of that:

- an interrupt's handler runs at full speed until it returns to the instruction that it interrupted (unless the user wants
  to step into it);
- an instruction whose #VMEXIT comes back to the same place (a nested page fault, say) is still to be executed;
- one that the hypervisor carried out, or answered with an exception, is done.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from gdbstub.target import Action, StepFlag, ThreadId
from vmdbg.cpu.faults import Kind

ALL_FLAGS = StepFlag.ENABLE | StepFlag.NOIRQ | StepFlag.NOTIMER


@dataclass(slots=True)
class Manner:
    """How the user wants to step, and what he wants to see stop."""

    flags: StepFlag = ALL_FLAGS
    """NOIRQ: over the handlers of interrupts, else into them.  NOTIMER changes nothing: time stands still with the machine
    in any case, and what a step takes is the time of its instruction."""
    follow_host: bool = False
    """A step over an instruction that leaves the guest ends in the hypervisor, not at the guest's next instruction."""
    chosen: frozenset[int] | None = None
    """The inferiors that stop; None for all that the client resumed."""

    @property
    def into_handlers(self) -> bool:
        return not self.flags & StepFlag.NOIRQ


class Place(NamedTuple):
    """Where a thread is: two visits of an instruction with the same stack pointer are taken for the same."""

    pc: int
    sp: int


@dataclass(slots=True)
class Stepping:
    """A step under way."""

    thread: ThreadId
    action: Action
    start: Place
    """Where the thread is while nothing has been executed since."""
    executed: bool = False
    """At least one instruction is done: the step ends where pc is outside the action's range."""
    back: Place | None = None
    """Where the handler of an interrupt will return to, while it runs."""

    def ends_at(self, pc: int) -> bool:
        return self.executed and not self.action.start <= pc < self.action.end

    def entered(self, here: Place, injected: Kind | None, *, into_handlers: bool = False) -> None:
        """The thread is a vCPU, and VMRUN enters it at `here`, with an event to deliver at once."""
        if self.back is not None:
            return
        if here != self.start:
            self.executed = True
        if injected in (Kind.INTR, Kind.NMI) and not into_handlers:
            self.back = here
        elif injected is not None:
            self.executed = True
