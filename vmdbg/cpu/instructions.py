"""System instructions that the engine stops before, executed by us (APM3 chapter 4).

Each function executes the instruction at RIP for a CPU and leaves RIP behind it, or raises `CpuFault`.  Whether a
hypervisor intercepts it has been decided before (vmdbg/svm).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from introspect.registers import EFER
from introspect.vmcb import V_INTR
from vmdbg.engine.state import DS, RAX, RBX, RCX, RDX
from vmdbg.platform.cpuid import MAX_RDPRU, MONITOR_LINE, Dynamic, cpuid
from vmdbg.platform.faults import MsrFault
from vmdbg.platform.msrs import COUNTERS, HWCR, HWCR_MON_MWAIT_DIS, HWCR_MON_MWAIT_USER_EN, MEMORY_TYPE_MSRS
from vmdbg.svm import world
from vmdbg.svm.skinit import launch

from . import smm
from .bits import CR4_OSXSAVE, XCR0_SSE, XCR0_X87
from .control import CHECK_CR, CR4_PCE, CR4_TSD, check_cr_write, check_dr, cr_access, dr_access
from .core import Cpu, Line
from .events import raise_event, shut_down
from .faults import GP, UD, CpuFault
from .operands import length, operand_linear
from .transfers import icebp

MASK32 = 0xFFFFFFFF


# Time, identity, model-specific registers


def is_rdtscp(cpu: Cpu) -> bool:
    """The engine reports both as RDTSC."""
    return cpu.engine.code()[:2] != b"\x0f\x31" and cpu.instruction().opcode == 0x0F01


def rdtsc(cpu: Cpu) -> None:
    s = cpu.state
    value = cpu.tsc
    size = length(cpu)
    s.set_reg(RAX, value & MASK32)
    s.set_reg(RDX, value >> 32)
    if is_rdtscp(cpu):
        s.set_reg(RCX, s.field("tsc_aux") & MASK32)
    cpu.advance(size)


def check_rdpmc(cpu: Cpu) -> None:
    """The privilege, at which the engine has not looked, and the counter's number."""
    s = cpu.state
    if (s.cpl and not s.cr(4) & CR4_PCE) or s.reg(RCX) & MASK32 >= COUNTERS:
        raise CpuFault(GP, 0)


def rdpmc(cpu: Cpu) -> None:
    """Four counters that never count (no event is modelled)."""
    check_rdpmc(cpu)
    s = cpu.state
    value = cpu.msrs.read(0xC0010004 + (s.reg(RCX) & MASK32), cpu)
    s.set_reg(RAX, value & MASK32)
    s.set_reg(RDX, value >> 32 & 0xFFFF)
    cpu.advance(length(cpu))


def check_rdpru(cpu: Cpu) -> None:
    """Time is not for everybody (APM3 RDPRU)."""
    s = cpu.state
    if s.cpl and s.cr(4) & CR4_TSD:
        raise CpuFault(GP, 0)


def rdpru(cpu: Cpu) -> None:
    """MPERF or APERF; registers that it does not have read as zero."""
    check_rdpru(cpu)
    s = cpu.state
    size = length(cpu)
    number = s.reg(RCX) & MASK32
    value = cpu.performance(("mperf", "aperf")[number]) if number <= MAX_RDPRU else 0
    s.set_reg(RAX, value & MASK32)
    s.set_reg(RDX, value >> 32)
    cpu.advance(size)


def check_xsetbv(cpu: Cpu) -> None:
    """Only this comes before the intercept, not the privilege."""
    if not cpu.state.cr(4) & CR4_OSXSAVE:
        raise CpuFault(UD)


def xsetbv(cpu: Cpu) -> None:
    """XCR0, with x87 always and SSE or not (APM3 XSETBV).  VMRUN and #VMEXIT leave it alone."""
    check_xsetbv(cpu)
    s = cpu.state
    value = s.reg(RDX) << 32 & 0xFFFFFFFF00000000 | s.reg(RAX) & MASK32
    if s.cpl or s.reg(RCX) & MASK32 or value not in (XCR0_X87, XCR0_X87 | XCR0_SSE):
        raise CpuFault(GP, 0)
    s.xcr0 = value
    cpu.advance(length(cpu))


def cpuid_instruction(cpu: Cpu) -> None:
    s = cpu.state
    dynamic = Dynamic(osxsave=bool(s.cr(4) & CR4_OSXSAVE), apic=cpu.lapic.enabled)
    found = cpuid(cpu.cpuid_config, cpu.index, s.reg(RAX) & MASK32, s.reg(RCX) & MASK32, dynamic)
    s.set_reg(RAX, found.eax)
    s.set_reg(RBX, found.ebx)
    s.set_reg(RCX, found.ecx)
    s.set_reg(RDX, found.edx)
    cpu.advance(length(cpu))


def msr(cpu: Cpu) -> None:
    """RDMSR and WRMSR."""
    s = cpu.state
    insn = cpu.instruction()
    number = s.reg(RCX) & MASK32
    try:
        if insn.opcode == 0x0F30:
            value = s.reg(RDX) << 32 & 0xFFFFFFFF00000000 | s.reg(RAX) & MASK32
            cpu.msrs.write(number, value, cpu)
            if number in MEMORY_TYPE_MSRS:
                cpu.forget_all_translations()
        else:
            value = cpu.msrs.read(number, cpu)
            s.set_reg(RAX, value & MASK32)
            s.set_reg(RDX, value >> 32)
    except MsrFault as fault:
        cpu.last_fault = str(fault)
        raise CpuFault(GP, 0) from None
    cpu.advance(insn.length)


def hlt(cpu: Cpu) -> None:
    cpu.advance(length(cpu))
    cpu.halted, cpu.awaited = True, None


def check_monitor(cpu: Cpu) -> None:
    """What MONITOR and MWAIT refuse before they are intercepted: privilege, and extensions, of which there are none."""
    s, hwcr = cpu.state, cpu.msrs.values[HWCR]
    if hwcr & HWCR_MON_MWAIT_DIS or (s.cpl and not hwcr & HWCR_MON_MWAIT_USER_EN):
        raise CpuFault(UD)
    if s.reg(RCX) & MASK32:
        raise CpuFault(GP, 0)


def monitor(cpu: Cpu) -> None:
    """Arm the line at DS:rAX; what is not memory is not monitored."""
    check_monitor(cpu)
    s, insn = cpu.state, cpu.instruction()
    segment = DS if insn.segment is None else insn.segment
    address = cpu.segment_address(segment, s.reg(RAX) & (1 << insn.address) - 1, 1)
    spa = cpu.translate(address, user=s.cpl == 3) & -MONITOR_LINE
    cpu.monitored = Line(spa, cpu.ram.read(spa, MONITOR_LINE)) if cpu.ram.contains(spa, MONITOR_LINE) else None
    cpu.advance(insn.length)


def mwait(cpu: Cpu) -> None:
    """Wait as HLT does, or for a store to the line; not at all where none is armed or there was one (APM3 MWAIT)."""
    check_monitor(cpu)
    line, cpu.monitored = cpu.monitored, None
    cpu.advance(length(cpu))
    if line is not None and not cpu.stored_to(line):
        cpu.halted, cpu.awaited = True, line


def nothing(cpu: Cpu) -> None:
    """INVD, WBINVD, PAUSE: there is no cache to write back."""
    cpu.advance(length(cpu))


def invlpg(cpu: Cpu) -> None:
    """The engine forgets more than the page, which is allowed (APM2 5.5.2)."""
    insn = cpu.instruction()
    cpu.forget_page(operand_linear(cpu, insn), cpu.asid)
    cpu.advance(insn.length)


def invlpga(cpu: Cpu) -> None:
    """The page at rAX, of the ASID in ECX (APM2 15.16.2)."""
    insn = cpu.instruction()
    cpu.forget_page(cpu.state.reg(RAX) & (1 << insn.address) - 1, cpu.state.reg(RCX) & MASK32)
    cpu.advance(insn.length)


def check_stgi_skinit(cpu: Cpu) -> None:
    """The engine has looked at neither the mode nor the privilege.  One of two is enough (APM2 15.4)."""
    enabled = cpu.state.efer & EFER.SVME or "SKINIT" in cpu.cpuid_config.features
    if not cpu.protected or not enabled:
        raise CpuFault(UD)
    if cpu.state.cpl:
        raise CpuFault(GP, 0)


def skinit(cpu: Cpu) -> None:
    check_stgi_skinit(cpu)
    launch(cpu, length(cpu))


def undefined(cpu: Cpu) -> None:
    raise CpuFault(UD)


# SVM and SMM


def vmrun(cpu: Cpu) -> None:
    event = world.vmrun(cpu, length(cpu))
    if event is not None:
        raise_event(cpu, event, injected=True)


def vmload(cpu: Cpu) -> None:
    world.vmload(cpu, length(cpu))


def vmsave(cpu: Cpu) -> None:
    world.vmsave(cpu, length(cpu))


def rsm(cpu: Cpu) -> None:
    """RSM (APM2 10.3.8).  A guest of the SMM handler has none of its own."""
    if cpu.smm is None or cpu.guest is not None:
        raise CpuFault(UD)
    cpu.engine.retire(length(cpu))
    if not smm.leave(cpu):
        shut_down(cpu)


def stgi(cpu: Cpu) -> None:
    check_stgi_skinit(cpu)
    cpu.advance(length(cpu))
    _set_gif(cpu, True)
    world.set_intercepts(cpu.state, cpu.guest)


def clgi(cpu: Cpu) -> None:
    cpu.advance(length(cpu))
    _set_gif(cpu, False)


def _set_gif(cpu: Cpu, value: bool) -> None:
    """STGI and CLGI: of a guest with a virtual GIF, that (APM2 15.33.2)."""
    guest = cpu.guest
    if guest is None or not guest.v_gif_enabled:
        cpu.gif = value
    elif value:
        guest.v_intr |= V_INTR.v_gif
    else:
        guest.v_intr &= ~V_INTR.v_gif


CHECK: dict[int, Callable[[Cpu], object]] = {
    **{0x10 + number: partial(check_cr_write, number=number) for number in CHECK_CR},
    **dict.fromkeys(range(0x20, 0x40), check_dr),
    0x6F: check_rdpmc,
    **{0x80 + number: partial(world.operand, what=what) for number, what in ((0, "VMRUN"), (2, "VMLOAD"), (3, "VMSAVE"))},
    0x84: check_stgi_skinit,
    0x86: check_stgi_skinit,
    0x8A: check_monitor,
    0x8B: check_monitor,
    0x8D: check_xsetbv,
    0x8E: check_rdpru,
}
"""Exit code to the exceptions that come before the intercept, as far as the engine has not raised them (APM2 table 15-7)."""

EMULATE: dict[int, Callable[[Cpu], None]] = {
    **{number: partial(cr_access, number=number, write=False) for number in range(16)},
    **{0x10 + number: partial(cr_access, number=number, write=True) for number in range(16)},
    **dict.fromkeys(range(0x20, 0x30), partial(dr_access, write=False)),
    **dict.fromkeys(range(0x30, 0x40), partial(dr_access, write=True)),
    0x6E: rdtsc,
    0x6F: rdpmc,
    0x72: cpuid_instruction,
    0x73: rsm,
    0x76: nothing,
    0x77: nothing,
    0x78: hlt,
    0x79: invlpg,
    0x7A: invlpga,
    0x7C: msr,
    0x80: vmrun,
    0x81: undefined,  # VMMCALL that nobody intercepts
    0x82: vmload,
    0x83: vmsave,
    0x84: stgi,
    0x85: clgi,
    0x86: skinit,
    0x87: rdtsc,
    0x88: icebp,
    0x89: nothing,
    0x8A: monitor,
    0x8B: mwait,
    0x8D: xsetbv,
    0x8E: rdpru,
}
"""Exit code to what the instruction does when no hypervisor intercepts it."""
