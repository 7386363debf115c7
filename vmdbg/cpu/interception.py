"""Whether a guest's hypervisor intercepts the instruction at RIP (APM2 15.7 to 15.13), and the exit if it does."""

from __future__ import annotations

from introspect.exits import ExitCode
from vmdbg.svm import world
from vmdbg.svm.guest import Guest

from .control import cr0_value
from .core import Cpu
from .instructions import CHECK, is_rdtscp
from .operands import length, moved, operand_linear

_PARTICULAR = frozenset(
    (*range(0x40), ExitCode.MSR, ExitCode.RDTSC, ExitCode.INVLPG, ExitCode.WBINVD, ExitCode.PAUSE, ExitCode.MWAIT)
)
"""Exits that more than one intercept bit decides, or with an EXITINFO1."""


def intercepted(cpu: Cpu, guest: Guest, code: int) -> bool:
    """Leave the guest if its hypervisor intercepts the instruction at RIP; True if it does.

    Raises `CpuFault` for exceptions that come before the intercept.
    """
    check = CHECK.get(code)
    if check is not None:
        check(cpu)
    info1 = 0
    if code not in _PARTICULAR:
        if not guest.intercepts(code):
            return False
    elif code == ExitCode.MSR:
        insn = cpu.instruction()
        write = insn.opcode == 0x0F30
        if not world.msr_intercepted(cpu, cpu.state.reg(1) & 0xFFFFFFFF, write):
            return False
        info1 = int(write)
    elif code == 0x10:
        found = _cr0_write(cpu, guest)
        if found is None:
            return False
        code, info1 = found
    elif code < 0x40:
        code, info1, wanted = _register_access(cpu, guest, code)
        if not wanted:
            return False
    elif code == ExitCode.RDTSC and is_rdtscp(cpu):
        code = ExitCode.RDTSCP
        if not guest.intercepts(code):
            return False
    elif code == ExitCode.WBINVD and cpu.instruction().opcode == 0x0F08:
        code = ExitCode.INVD
        if not guest.intercepts(code):
            return False
    elif code == ExitCode.MWAIT:
        # The conditional intercept is looked at first: its exit tells an MWAIT that would have waited (APM2 table 15-7).
        waits = cpu.monitored is not None and not cpu.stored_to(cpu.monitored)
        if waits and guest.intercepts(ExitCode.MWAIT_COND):
            code = ExitCode.MWAIT_COND
        elif not guest.intercepts(code):
            return False
    elif not guest.intercepts(code):
        return False
    elif code == ExitCode.PAUSE:
        if not guest.pause(cpu.engine.clock.now):
            return False
    elif code == ExitCode.INVLPG:
        info1 = operand_linear(cpu, cpu.instruction())
    world.vmexit(cpu, code, info1, nrip=cpu.state.rip + length(cpu))
    return True


def _register_access(cpu: Cpu, guest: Guest, code: int) -> tuple[int, int, bool]:
    """MOV of CR and DR: exit code, EXITINFO1 with the general register, and whether it is intercepted."""
    insn = cpu.instruction()
    if code < 0x20:
        move = insn.opcode in (0x0F20, 0x0F22)
        return code, (1 << 63 | insn.rm) if move else 0, guest.intercepts(code)
    code = (code & ~0xF) | insn.reg
    return code, insn.rm, guest.intercepts(code)


def _cr0_write(cpu: Cpu, guest: Guest) -> tuple[int, int] | None:
    """Exit code and EXITINFO1 of MOV to CR0, LMSW and CLTS, if one of two intercepts wants them (APM2 15.8.1, table 15-7).

    The selective one sees changes of bits other than TS and MP, and any LMSW.
    """
    insn = cpu.instruction()
    move = insn.opcode == 0x0F22
    info1 = 1 << 63 | insn.rm if move else 0
    if guest.intercepts(ExitCode.CR0_WRITE):
        return ExitCode.CR0_WRITE, info1
    if not guest.intercepts(ExitCode.CR0_SEL_WRITE) or insn.opcode == 0x0F06:
        return None
    if move and not (cpu.cr0 ^ cr0_value(moved(cpu, insn))) & ~0xA:
        return None
    return ExitCode.CR0_SEL_WRITE, info1
