"""Raising events: intercepts, delivery, and what faults on the way become (APM2 8.2.9, 15.12)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

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
    cpu.debug.moved = True
    if injected or event.kind != Kind.EXCEPTION:
        _deliver(cpu, event, 0 if injected else event.length)
    else:
        _unless_caught(cpu, event, partial(_raise, cpu, event, intercepted))


def _unless_caught(cpu: Cpu, event: Event, action: Callable[[], None]) -> None:
    """What an exception leads to, now or when whoever waits for it has seen it."""
    if cpu.catches is not None and cpu.catches.exception(cpu, event):
        cpu.postponed = action
    else:
        action()


def _raise(cpu: Cpu, event: Event, intercepted: bool) -> None:
    s, ticks = cpu.state, event.length
    if intercepted and _intercepted(cpu, event.vector):
        following = s.rip + cpu.instruction().length if event.vector == BR else s.rip
        _take_back(cpu, event, ticks)
        world.exception_exit(cpu, event, None, nrip=following if event.software or event.vector == BR else 0)
    else:
        _deliver(cpu, event, ticks)


def _deliver(cpu: Cpu, event: Event, ticks: int = 0) -> None:
    s = cpu.state
    rip = s.rip
    try:
        deliver(cpu, event)
        cpu.engine.clock.now += DELIVERY
        cpu.event_taken(event, rip - event.length)
    except CpuFault as fault:
        if not fault.committed:
            s.rip = rip
            _take_back(cpu, event, ticks)
        second = fault.event()
        _unless_caught(cpu, second, partial(_faulted, cpu, event, second))
    except NestedPageFault as fault:
        s.rip = rip
        _take_back(cpu, event, ticks)
        world.nested_fault_exit(cpu, fault.fault, event)
    except TaskSwitchExit as switch:
        s.rip = rip
        _take_back(cpu, event, ticks)
        world.task_switch_exit(cpu, switch, event)


def _faulted(cpu: Cpu, event: Event, second: Event) -> None:
    """The delivery of an event has raised an exception."""
    if _intercepted(cpu, second.vector):  # before it makes a double fault of both
        world.exception_exit(cpu, second, event)
    elif event.kind == Kind.EXCEPTION and event.vector == DF:
        shut_down(cpu)
    elif event.kind == Kind.EXCEPTION and _doubles(event, second):
        double = Event(DF, Kind.EXCEPTION, 0)
        _unless_caught(cpu, double, partial(_double_fault, cpu, double, event))
    else:
        _deliver(cpu, second)


def _double_fault(cpu: Cpu, double: Event, first: Event) -> None:
    """EXITINTINFO of an intercepted #DF is what was being delivered (APM2 15.7.3)."""
    if _intercepted(cpu, DF):
        world.exception_exit(cpu, double, first)
    else:
        _deliver(cpu, double)


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
    if cpu.catches is not None and cpu.catches.triple_fault(cpu):
        cpu.postponed = partial(_shut_down, cpu)
    else:
        _shut_down(cpu)


def _shut_down(cpu: Cpu) -> None:
    if cpu.guest is not None and cpu.guest.intercepts(0x7F):
        world.vmexit(cpu, 0x7F)
    else:
        cpu.shutdown = True
