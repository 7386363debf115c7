"""Raising events: intercepts, delivery, and what faults on the way become (APM2 8.2.9, 15.12)."""

from __future__ import annotations

from vmdbg.svm import world

from .core import Cpu
from .delivery import deliver
from .faults import BR, CONTRIBUTORY, DF, PF, CpuFault, Event, Kind, NestedPageFault
from .tasks import TaskSwitchExit

DELIVERY = 32
"""Ticks that entering a handler takes: time goes on in a guest that does nothing but fault, and differs on both sides."""


def raise_event(cpu: Cpu, event: Event, *, injected: bool = False, intercepted: bool = True) -> None:
    """Deliver an event, or leave the guest if its hypervisor intercepts it or what faults on the way.

    `injected`: through EVENTINJ, which intercepts do not see (APM2 15.20) and whose instruction has taken no time.
    `intercepted`: whether exception intercepts see it.
    """
    s = cpu.state
    cpu.debug.moved = True
    ticks = 0 if injected else event.length
    if event.kind == Kind.EXCEPTION and intercepted and not injected and _intercepted(cpu, event.vector):
        following = s.rip + cpu.instruction().length if event.vector == BR else s.rip
        _take_back(cpu, event, ticks)
        world.exception_exit(cpu, event, None, nrip=following if event.software or event.vector == BR else 0)
        return
    while True:
        rip = s.rip
        try:
            deliver(cpu, event)
            cpu.engine.clock.now += DELIVERY
            return
        except CpuFault as fault:
            if not fault.committed:
                s.rip = rip
                _take_back(cpu, event, ticks)
            second = fault.event()
            if _intercepted(cpu, second.vector):  # before it makes a double fault of both
                world.exception_exit(cpu, second, event)
                return
            if event.kind == Kind.EXCEPTION and event.vector == DF:
                shut_down(cpu)
                return
            if event.kind == Kind.EXCEPTION and _doubles(event, second):
                second = Event(DF, Kind.EXCEPTION, 0)
                if _intercepted(cpu, DF):
                    world.exception_exit(cpu, second, None)
                    return
            event = second
        except NestedPageFault as fault:
            s.rip = rip
            _take_back(cpu, event, ticks)
            world.nested_fault_exit(cpu, fault.fault, event)
            return
        except TaskSwitchExit as switch:
            s.rip = rip
            _take_back(cpu, event, ticks)
            world.task_switch_exit(cpu, switch, event)
            return


def _intercepted(cpu: Cpu, vector: int) -> bool:
    return cpu.guest is not None and cpu.guest.intercepts(0x40 + vector)


def _take_back(cpu: Cpu, event: Event, ticks: int) -> None:
    """A software interrupt that was not delivered has not happened: RIP is at the instruction again."""
    if event.software:
        cpu.state.rip -= event.length
        cpu.engine.clock.now -= ticks


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


