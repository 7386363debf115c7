"""A step of one thread, as its user means it: the thread's next instruction, not what interrupts it.

The machine never holds interrupts back for a step: guest time goes on as in an undebugged run.  So a step may be
interrupted before its instruction, the thread may be off its CPU, and a guest's instruction may end in a #VMEXIT whose
handler decides what becomes of it.  `Stepping` follows the thread through all of that:

- an interrupt's handler runs at full speed until it returns to the instruction that it interrupted;
- an instruction whose #VMEXIT comes back to the same place (a nested page fault, say) is still to be executed;
- one that the hypervisor carried out, or answered with an exception, is done.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from gdbstub.target import Action, ThreadId
from vmdbg.cpu.faults import Kind


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

    def entered(self, here: Place, injected: Kind | None) -> None:
        """The thread is a vCPU, and VMRUN enters it at `here`, with an event to deliver at once."""
        if self.back is not None:
            return
        if here != self.start:
            self.executed = True
        if injected in (Kind.INTR, Kind.NMI):
            self.back = here
        elif injected is not None:
            self.executed = True
