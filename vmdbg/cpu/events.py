"""Raising events: intercepts, delivery, and what faults on the way become (APM2 8.2.9, 15.12)."""

from __future__ import annotations

from vmdbg.svm import world

from .core import Cpu
from .delivery import deliver
from .faults import CONTRIBUTORY, DF, PF, CpuFault, Event, Kind, NestedPageFault
from .tasks import TaskSwitchExit

DELIVERY = 32
"""Ticks that entering a handler takes: time goes on in a guest that does nothing but fault, and differs on both sides."""
BREAKPOINT = 0xCC
INTO = 0xCE


def raise_event(cpu: Cpu, event: Event, *, injected: bool = False, opcode: int = 0) -> None:
    """Deliver an event, or leave the guest if its hypervisor intercepts it or the delivery faults and that is.

    `injected`: through EVENTINJ, which intercepts do not see (APM2 15.20).  `opcode`: of INT3 or INTO, whose intercepts
    are those of exceptions 3 and 4.
    """
    s = cpu.state
    origin: Event | None = None
    if not injected and opcode in (BREAKPOINT, INTO):
        vector = event.vector
        if cpu.guest is not None and cpu.guest.intercepts(0x40 + vector):
            _take_back(cpu, event)
            world.vmexit(cpu, 0x40 + vector, nrip=s.rip + event.length)
            return
    while True:
        if event.kind == Kind.EXCEPTION and not injected and cpu.guest is not None:
            if cpu.guest.intercepts(0x40 + event.vector):
                world.exception_exit(cpu, event, origin)
                return
        injected = False
        rip = s.rip
        try:
            deliver(cpu, event)
            cpu.engine.clock.now += DELIVERY
            return
        except CpuFault as fault:
            s.rip = rip
            _take_back(cpu, event)
            second = fault.event()
            if second.vector == PF and cpu.guest is not None and cpu.guest.intercepts(0x4E):
                world.exception_exit(cpu, second, event)
                return
            if event.kind == Kind.EXCEPTION:
                if event.vector == DF:
                    shut_down(cpu)
                    return
                if _doubles(event, second):
                    if cpu.guest is not None and cpu.guest.intercepts(0x40 + second.vector):
                        world.exception_exit(cpu, second, event)
                        return
                    origin, event = None, Event(DF, Kind.EXCEPTION, 0)
                    continue
            origin, event = event, second
        except NestedPageFault as fault:
            s.rip = rip
            _take_back(cpu, event)
            world.nested_fault_exit(cpu, fault.fault, event)
            return
        except TaskSwitchExit as switch:
            s.rip = rip
            _take_back(cpu, event)
            world.task_switch_exit(cpu, switch, event)
            return


def _take_back(cpu: Cpu, event: Event) -> None:
    """A software interrupt that was not delivered has not happened: RIP is at the instruction again."""
    if event.kind == Kind.SOFTWARE and event.length:
        cpu.state.rip -= event.length
        cpu.engine.clock.now -= event.length


def _doubles(first: Event, second: Event) -> bool:
    """Whether two exceptions make a double fault (APM2 table 8-4)."""
    if first.vector == PF:
        return second.vector == PF or second.vector in CONTRIBUTORY
    return first.vector in CONTRIBUTORY and second.vector in CONTRIBUTORY


def shut_down(cpu: Cpu) -> None:
    """A fault in delivering a double fault (APM2 8.2.9)."""
    if cpu.guest is not None and cpu.guest.intercepts(0x7F):
        world.vmexit(cpu, 0x7F)
    else:
        cpu.shutdown = True


