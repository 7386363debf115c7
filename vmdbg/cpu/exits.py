"""What a stop of the engine before an instruction, or at an exception, leads to: an exit, or the instruction executed by us."""

from __future__ import annotations

from functools import partial

from introspect.decode import Instruction
from introspect.exits import PF_ERROR, ExitCode
from introspect.paging import NestedFault
from introspect.registers import CR4
from vmdbg.engine.engine import EXCEPTION, VMEXIT, Stop
from vmdbg.engine.state import HF_SMAP, RCX, RDX
from vmdbg.svm import world

from . import ports, transfers
from .bits import DR6_BS
from .core import Cpu
from .events import raise_event
from .faults import DB, GP, MF, PF, UD, CpuFault, Event, Kind
from .instructions import EMULATE
from .interception import intercepted
from .mistaken import at_far_transfer_stack, taken_for
from .steps import step

_SWINT, _IOIO = int(ExitCode.SWINT), int(ExitCode.IOIO)
_UD, _GP, _END = EXCEPTION + UD, EXCEPTION + GP, EXCEPTION + 32
_BY_ENGINE = frozenset((ExitCode.IRET, ExitCode.TR_WRITE))
"""IRET that an NMI waits for, which the engine then masks no more, or with breakpoints enabled: the RF that it loads is for one
instruction, which the engine forgets.  LTR in a guest whose task switches are intercepted: the new TSS is looked after."""


def act(cpu: Cpu, stop: Stop) -> Stop | None:
    """Act on a stop with an exit code.  If the engine has executed the instruction after all: how it stopped then."""
    if stop.npf is not None:
        if stop.npf.gpa >> cpu.physical_bits:
            raise world.reserved_bit_fault(cpu)
        world.nested_fault_exit(cpu, classify(cpu, stop), None)
        return None
    code = stop.code - VMEXIT
    if code in (_UD, _GP):
        code = taken_for(cpu, code)
    if EXCEPTION <= code < _END:
        return _exception(cpu, code - EXCEPTION)
    if cpu.catches is not None and cpu.catches.instruction(cpu, code):
        cpu.postponed = partial(_instruction, cpu, code)
        return None
    return _instruction(cpu, code)


def _instruction(cpu: Cpu, code: int) -> Stop | None:
    guest = cpu.guest
    if code == _SWINT:
        vector, size, opcode = transfers.software_interrupt(cpu)
        if opcode == 0xCD and guest is not None and guest.intercepts(ExitCode.SWINT):
            world.vmexit(cpu, ExitCode.SWINT, vector, nrip=cpu.state.rip + size)
        else:
            transfers.interrupt(cpu, vector, size, opcode)
        return None
    if code == _IOIO:
        _string_io(cpu)
        return None
    if guest is not None and intercepted(cpu, guest, code):
        return None
    handler, following = EMULATE.get(code), None
    if handler is not None:
        handler(cpu)
    elif code in _BY_ENGINE:
        following = _by_engine(cpu, code)
    else:
        raise AssertionError(f"the engine stopped for exit code {code:#x}, which nobody asked for")
    if cpu.guest is not None and cpu.guest.intercepts_task_switch:
        cpu.guard_tasks()
    return following


def _by_engine(cpu: Cpu, code: int) -> Stop:
    """Have the engine execute the instruction at RIP, before which it stopped because of `code`."""
    if code == ExitCode.IRET:
        cpu.debug.moved = True
    world.let_through(cpu.state, code)
    stop = step(cpu)
    world.set_intercepts(cpu.state, cpu.guest)
    return stop


def _exception(cpu: Cpu, vector: int) -> Stop | None:
    state = cpu.state
    if vector == MF and cpu.ne_is_ours:
        world.vmexit(cpu, ExitCode.FERR_FREEZE)
        return None
    if vector == DB:
        cpu.due |= DR6_BS
        return None
    if vector == PF:
        error, address = state.error_code, cpu.engine.fault_address()
        if state.cpl == 3 and not error & PF_ERROR.U and at_far_transfer_stack(cpu, address):
            # The engine makes the stack accesses of far transfers with supervisor rights, which SMAP then refuses.
            smap = error == PF_ERROR.P | error & PF_ERROR.W and state.cr(4) & CR4.SMAP
            if smap and cpu.permits(address, write=bool(error & PF_ERROR.W), user=True):
                return _without_smap(cpu)
            error |= PF_ERROR.U
        event = Event(PF, Kind.EXCEPTION, error, address)
    else:
        event = CpuFault(vector, state.error_code if vector in (8, 10, 11, 12, GP, 17) else None).event()
    raise_event(cpu, event)
    return None


def _without_smap(cpu: Cpu) -> Stop:
    """Execute the instruction at RIP as if SMAP were off."""
    state = cpu.state
    state.hflags &= ~HF_SMAP
    cpu.flush()
    stop = step(cpu)
    state.refresh()
    cpu.flush()
    return stop


def port_access(cpu: Cpu) -> None:
    """IN or OUT, or where the engine has them INS or OUTS (see repair.py)."""
    rt = cpu.engine.rt
    _io(cpu, cpu.instruction(), rt.io_port & 0xFFFF, rt.io_size)


def _string_io(cpu: Cpu) -> None:
    insn, s = cpu.instruction(), cpu.state
    if insn.rep and not s.reg(RCX) & (1 << insn.address) - 1:
        cpu.advance(insn.length)
    else:
        _io(cpu, insn, s.reg(RDX) & 0xFFFF, min(insn.operand, 32) // 8 if insn.opcode & 1 else 1)


def _io(cpu: Cpu, insn: Instruction, port: int, size: int) -> None:
    """The order is that of APM2 15.10.2: permission of the port, intercept, and only then what the access may raise."""
    ports.permitted(cpu, port, size)
    seen, cpu.port_seen = cpu.port_seen, False
    if cpu.catches is not None and not seen and cpu.catches.port(cpu, insn, port, size):
        cpu.postponed = partial(_permitted_io, cpu, insn, port, size)
    else:
        _permitted_io(cpu, insn, port, size)


def _permitted_io(cpu: Cpu, insn: Instruction, port: int, size: int) -> None:
    if world.io_intercepted(cpu, port, size):
        world.io_exit(cpu, insn, port, size)
    else:
        ports.io(cpu, insn, port, size)


def classify(cpu: Cpu, stop: Stop) -> NestedFault:
    """Bit 32 or 33 of EXITINFO1: was it the access itself, or the walk of the guest's page tables?

    The engine does not tell, but its walk of guest tables always asks to write (APM2 15.25.6), so only writes are in
    doubt.  They are settled by walking again for the addresses the instruction accesses.
    """
    fault = stop.npf
    assert fault is not None
    if not stop.write or cpu.paging.format is None:
        return fault
    return world.classify_write_fault(cpu, fault)
