"""Control transfers that we make in the engine's place: software interrupts, task switches, system calls."""

from __future__ import annotations

from vmdbg.engine.state import CS, RCX, RSP, SS, TR

from .bits import CR0_PE, DR6_BS, RFLAGS_IF, RFLAGS_NT, RFLAGS_RF, RFLAGS_TF, RFLAGS_VM
from .control import EFER_SCE
from .core import Cpu
from .delivery import TASK_GATE
from .descriptors import fetch
from .events import raise_event
from .faults import DB, GP, UD, CpuFault, Event, Kind, NestedPageFault
from .operands import length, operand_address
from .tasks import AVAILABLE_16, AVAILABLE_32, Source, TaskSwitchExit, switch

MASK32 = 0xFFFFFFFF
CODE64, CODE32, DATA32 = 0xA9B, 0xC9B, 0xC93


def software_interrupt(cpu: Cpu) -> tuple[int, int, int]:
    """(vector, length, opcode) of the INT n, INT3 or INTO at RIP."""
    insn = cpu.instruction()
    vector = {0xCC: 3, 0xCE: 4}.get(insn.opcode, insn.immediate)
    return vector, insn.length, insn.opcode


def interrupt(cpu: Cpu, vector: int, size: int, opcode: int) -> None:
    s = cpu.state
    s.rip = s.rip + size if s.is_code64 else (s.rip + size) & MASK32
    cpu.engine.retire(size)
    # INT3 and INTO are exceptions, to intercepts and to EXITINTINFO.
    raise_event(cpu, Event(vector, Kind.SOFTWARE if opcode == 0xCD else Kind.EXCEPTION, length=size, trap=True))


def icebp(cpu: Cpu) -> None:
    s = cpu.state
    size = length(cpu)
    s.rip += size
    cpu.engine.retire(size)
    raise_event(cpu, Event(DB, Kind.EXCEPTION, length=size, trap=True), intercepted=False)  # APM2 15.12.2


def task_switch(cpu: Cpu) -> TaskSwitchExit | None:
    """The task switch that the far JMP, far CALL or IRET at RIP is about to make; None if it makes none."""
    s = cpu.state
    insn = cpu.instruction()
    if insn.opcode == 0xCF:
        if not s.rflags & RFLAGS_NT:
            return None
        return TaskSwitchExit(cpu.read(s.base(TR), 2, implicit=True), Source.IRET, None)
    indirect = insn.opcode == 0xFF and insn.memory and insn.modrm >> 3 & 7 in (3, 5)
    if insn.opcode in (0x9A, 0xEA):
        selector = insn.immediate >> insn.operand
    elif indirect:
        size = insn.operand // 8
        selector = cpu.read(operand_address(cpu, insn, size + 2) + size, 2, user=s.cpl == 3)
    else:
        return None
    target = fetch(cpu, selector, GP, 0)
    if target.is_segment or target.type not in (AVAILABLE_16, AVAILABLE_32, TASK_GATE):
        return None
    if target.type == TASK_GATE:
        selector = target.raw >> 16 & 0xFFFF
    jump = insn.opcode == 0xEA or (indirect and insn.modrm >> 3 & 7 == 5)
    return TaskSwitchExit(selector, Source.JUMP if jump else Source.CALL, None)


def switch_tasks(cpu: Cpu, selector: int, source: Source) -> None:
    """The task switch of the far JMP, far CALL or IRET at RIP, whose rights the engine has checked."""
    s = cpu.state
    rip, size = s.rip, length(cpu)
    s.skip(size)
    try:
        switch(cpu, selector, source, None)
    except (CpuFault, NestedPageFault) as fault:
        if isinstance(fault, NestedPageFault) or not fault.committed:
            s.rip = rip
        raise
    cpu.engine.retire(size)


# SYSCALL and SYSENTER: the engine has counted the instruction and RIP is behind it.


def syscall(cpu: Cpu) -> None:
    """APM3 SYSCALL."""
    s = cpu.state
    if not s.efer & EFER_SCE or not s.cr(0) & CR0_PE:
        _take_back(cpu)
        raise CpuFault(UD)
    source = s.rip - 2
    star = s.field("star")
    selector = star >> 32 & 0xFFFC
    if s.is_long:
        flags = s.rflags
        s.set_reg(RCX, s.rip)
        s.set_reg(11, flags & ~RFLAGS_RF)
        s.rip = s.field("lstar") if s.is_code64 else s.field("cstar")
        s.rflags = flags & ~s.field("sfmask") & ~RFLAGS_RF
        code = CODE64
    else:
        s.set_reg(RCX, s.rip & MASK32)
        s.rip = star & MASK32
        s.rflags &= ~(RFLAGS_VM | RFLAGS_IF | RFLAGS_RF)
        code = CODE32
    s.set_segment(CS, selector, 0, MASK32, code)
    s.set_segment(SS, selector + 8, 0, MASK32, DATA32)
    s.refresh(0)
    cpu.branch(source, s.rip)
    if s.rflags & RFLAGS_TF:
        cpu.due |= DR6_BS


def sysenter(cpu: Cpu) -> None:
    """APM3 SYSENTER: legacy mode only on AMD processors."""
    s = cpu.state
    selector = s.field("sysenter_cs") & 0xFFFC
    if s.is_long or not s.cr(0) & CR0_PE:
        _take_back(cpu)
        raise CpuFault(UD if s.is_long else GP, None if s.is_long else 0)
    if not selector:
        _take_back(cpu)
        raise CpuFault(GP, 0)
    source = s.rip - 2
    s.set_segment(CS, selector, 0, MASK32, CODE32)
    s.set_segment(SS, selector + 8, 0, MASK32, DATA32)
    s.set_reg(RSP, s.field("sysenter_esp") & MASK32)
    s.rip = s.field("sysenter_eip") & MASK32
    s.rflags &= ~(RFLAGS_VM | RFLAGS_IF | RFLAGS_RF)
    s.refresh(0)
    cpu.branch(source, s.rip)
    if s.rflags & RFLAGS_TF:
        cpu.due |= DR6_BS


def _take_back(cpu: Cpu) -> None:
    cpu.state.rip -= 2
    cpu.engine.clock.now -= 2
