"""What power-on and INIT leave in a processor (APM2 14.1.3, tables 14-1 and 14-2)."""

from __future__ import annotations

from vmdbg.engine.state import CS, DS, ES, FS, GDTR, GS, IDTR, LDTR, MXCSR_DEFAULT, RDX, SS, TR
from vmdbg.platform.msrs import VM_CR, VM_CR_LOCK, VM_CR_SVMDIS
from vmdbg.svm import world

from .bits import DR6_RESET, DR7_RESET, XCR0_X87
from .control import CR0_CD, CR0_ET, CR0_NW
from .core import Cpu

_CACHES = CR0_CD | CR0_NW
CR0_RESET = _CACHES | CR0_ET


def power_on(cpu: Cpu) -> None:
    """Power-on (APM2 14.1.3); the boot code sets what differs."""
    cpu.nmi_pending = cpu.smi_pending = cpu.init_pending = False
    cpu.sipi_vector = None
    cpu.state.set_cr(0, CR0_RESET)
    init(cpu)
    cpu.state.xcr0, cpu.state.mxcsr = XCR0_X87, MXCSR_DEFAULT
    cpu.msrs.reset(cpu)
    cpu.lapic.reset()
    cpu.gif = True
    cpu.smm, cpu.smi_pending = None, False


def init(cpu: Cpu) -> None:
    """The registers as INIT leaves them (APM2 14.1.3); the FPU, cache control and MSRs stay, but for VM_CR.SVMDIS."""
    s = cpu.state
    if not cpu.msrs.values[VM_CR] & VM_CR_LOCK:
        cpu.msrs.values[VM_CR] &= ~VM_CR_SVMDIS  # APM2 15.30.1
    cpu.guest = None
    if cpu.switcher is not None:
        cpu.switcher.left()
    cpu.npt = cpu.engine.physical.host
    for number in range(16):
        s.set_reg(number, 0)
    s.set_reg(RDX, 0x00830F10)
    s.set_cr(0, CR0_RESET & ~_CACHES | s.cr(0) & _CACHES)
    for number in (2, 3, 4):
        s.set_cr(number, 0)
    s.efer = 0
    s.rflags = 2
    for segment in (ES, SS, DS, FS, GS):
        s.set_segment(segment, 0, 0, 0xFFFF, 0x92)
    s.set_segment(CS, 0xF000, 0xFFFF0000, 0xFFFF, 0x9A)
    s.set_segment(LDTR, 0, 0, 0xFFFF, 0x82)
    s.set_segment(TR, 0, 0, 0xFFFF, 0x83)
    s.set_table(GDTR, 0, 0xFFFF)
    s.set_table(IDTR, 0, 0xFFFF)
    s.rip = 0xFFF0
    cpu.dr[:] = [0, 0, 0, 0, 0, 0, DR6_RESET, DR7_RESET]
    cpu.debug.update()
    cpu.due = cpu.debug.held = 0
    s.nmi_blocked = False
    s.shadow = False
    cpu.halted = cpu.shutdown = False
    cpu.monitored = cpu.postponed = None
    s.refresh(0)
    cpu.hold_pdptes()
    cpu.guard_tasks()
    cpu.guard_ferr()
    world.set_intercepts(s, None)
    if cpu.tlb is not None:
        cpu.tlb.forget_all()
    cpu.flush()
