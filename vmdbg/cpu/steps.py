"""Instructions one at a time, and the single steps and breakpoints of the debugged software itself (APM2 13.1)."""

from __future__ import annotations

from introspect.decode import Undecodable, decode, has_branched
from vmdbg.engine.engine import EXCEPTION, VMEXIT, Stop
from vmdbg.engine.runtime import Reason
from vmdbg.platform.msrs import DEBUGCTL, DEBUGCTL_BTF

from .bits import DR6_BS, RFLAGS_RF
from .core import Cpu
from .events import raise_event
from .faults import DB, Event, Kind


def retired(stop: Stop) -> bool:
    """Whether a stepped instruction is done."""
    return stop.reason in (0, Reason.STEPPED) or (stop.reason == Reason.EXIT and stop.code == VMEXIT + EXCEPTION + DB)


def step(cpu: Cpu) -> Stop:
    """A step of the engine.  RFLAGS.RF is clear behind the instruction, not before, and not amid a repeated one.

    Where DebugCtl asks for it, see whether the instruction is a branch that is taken.
    """
    state, looks = cpu.state, cpu.looks_for_branches
    if looks:
        cpu.branched = False
        code, bits = cpu.fetch(), cpu.bits
    resumes, rip = state.rflags & RFLAGS_RF, state.rip
    state.rflags &= ~RFLAGS_RF
    stop = cpu.executor.step(state, cpu.npt)
    if looks and retired(stop):
        try:
            if has_branched(decode(code, bits), rip, state.rip, bits):
                cpu.branch(rip, state.rip)
        except Undecodable:
            pass
    if resumes and state.rip == rip and (not retired(stop) or cpu.engine.rt.rep):
        state.rflags |= RFLAGS_RF
    return stop


def trap(cpu: Cpu) -> None:
    """Raise the #DB that is due behind an instruction, if one is."""
    if cpu.due and cpu.postponed is None:
        bits, cpu.due = cpu.due, 0
        if bits & DR6_BS and cpu.msrs.values[DEBUGCTL] & DEBUGCTL_BTF and not cpu.branched:
            bits &= ~DR6_BS  # it traps behind branches only (APM2 13.1.4)
            if not bits:
                return
        cpu.debug.report(bits)
        raise_event(cpu, Event(DB, Kind.EXCEPTION, trap=True))


def run_debugged(cpu: Cpu, deadline: int, window: bool, held: bool, breakpoints: bool, one: bool) -> Stop | None:
    """Run the engine, or step it, with debug registers enabled; `one`: an instruction and no more.  None to look again."""
    state, engine, debug = cpu.state, cpu.engine, cpu.debug
    debug.prepare()
    at_hook = state.linear_rip in engine.armed
    if at_hook and breakpoints and not one:
        return Stop(Reason.BREAK)  # the debugger's come first: it steps if it has none here
    bits = debug.instruction()
    if bits:
        debug.report(bits)
        raise_event(cpu, Event(DB, Kind.EXCEPTION))
        return Stop(Reason.STEPPED)
    if debug.held:
        stop = step(cpu)
        cpu.due |= debug.held
        debug.held = 0
        return stop
    if one or held or at_hook or cpu.looks_for_branches or state.rflags & RFLAGS_RF:
        return step(cpu)
    stop = cpu.executor.run(state, cpu.npt, deadline, window=window, breakpoints=breakpoints or bool(debug.instructions))
    return None if stop.reason == Reason.BREAK and not breakpoints else stop
