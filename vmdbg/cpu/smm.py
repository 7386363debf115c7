"""System-management mode: what an SMI saves and RSM restores (APM2 chapter 10), and SMM_CTL (15.30.3)."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from introspect.exits import SMI_INFO, port_info, smi_info
from introspect.smm import SMM_IO, SMM_SAVE, SMM_SAVE_OFFSET
from introspect.vmcb import VMCB
from vmdbg.engine.physical import Npt, Shadow
from vmdbg.engine.state import CS, DS, ES, FS, GDTR, GS, IDTR, LDTR, SS, TR
from vmdbg.platform.msrs import EFER as MSR_EFER
from vmdbg.platform.msrs import SMM_BASE
from vmdbg.svm import world

from .bits import CR0_PE, CR0_PG, DR7_RESET, RFLAGS_TF, RFLAGS_VM
from .core import Cpu

if TYPE_CHECKING:
    from introspect.decode import Instruction
    from vmdbg.svm.guest import Guest

ENTRY = 0x8000
"""Of the handler from SMBASE."""
REVISION = 0x30064
"""AMD64's area, with I/O restart and a base that can be moved (APM2 10.2.4)."""
CR0_EM, CR0_TS, CR0_NW, CR0_CD = 1 << 2, 1 << 3, 1 << 29, 1 << 30
EFER_LME, EFER_LMA = 1 << 8, 1 << 10
DISMISS, ENTER, EXIT = 1 << 0, 1 << 1, 1 << 3
"""Bits of SMM_CTL; SMI_CYCLE and RSM_CYCLE are for a bus that is not there."""

_GENERAL = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", *(f"r{number}" for number in range(8, 16)))
_SEGMENTS = {"es": ES, "cs": CS, "ss": SS, "ds": DS, "fs": FS, "gs": GS, "ldtr": LDTR, "tr": TR}
_TABLES = {"gdtr": GDTR, "idtr": IDTR}


class Interrupted(NamedTuple):
    """What SMM interrupted and software does not see."""

    guest: Guest | None
    npt: Npt
    nmi_blocked: bool


class PortAccess(NamedTuple):
    """An I/O instruction that has retired, or an iteration of one, and the registers it began with."""

    time: int
    """At which it retired."""
    insn: Instruction
    port: int
    size: int
    rip: int
    rcx: int
    rsi: int
    rdi: int

    @property
    def info(self) -> int:
        """As SMM_IO."""
        return port_info(self.insn, self.port, self.size) & SMM_IO.defined | SMM_IO.VALID


def _port_access(cpu: Cpu) -> PortAccess | None:
    """The I/O instruction right before, if it was one."""
    last = cpu.port_access
    return last if last is not None and last.time == cpu.engine.clock.now else None


def exit_info(cpu: Cpu) -> tuple[int, int]:
    """EXITINFO1 and 2 of an SMI that is intercepted: an external one, and the I/O instruction it followed (APM2 15.13.3).

    No breakpoint at the port is told of: its #DB has come first.
    """
    access = _port_access(cpu)
    if access is None:
        return SMI_INFO.SMISRC, 0
    stepped = SMI_INFO.TF if cpu.state.rflags & RFLAGS_TF else 0
    return smi_info(port_info(access.insn, access.port, access.size)) | stepped, access.rip


def enter(cpu: Cpu) -> None:
    """Take an SMI: the state goes to the save area, the handler begins in real mode with flat segments (APM2 10.3.1)."""
    s, guest = cpu.state, cpu.guest
    base = cpu.msrs.values[SMM_BASE]
    cr0 = cpu.cr0
    values = {
        "efer": s.efer, "cr4": s.cr(4), "cr3": s.cr(3), "cr0": cr0, "dr7": cpu.dr[7], "dr6": cpu.dr[6],
        "rflags": s.rflags, "rip": s.rip, "smbase": base, "revision": REVISION,
        "auto_halt_restart": int(cpu.halted and cpu.awaited is None),
    }  # fmt: skip
    for number, name in enumerate(_GENERAL):
        values[name] = s.reg(number)
    for name, number in _SEGMENTS.items():
        attrib = s.attrib(number)
        values |= {
            f"{name}.selector": s.selector(number), f"{name}.attrib": attrib & 0xFF | (attrib & 0xF00) << 4,
            f"{name}.limit": s.limit(number), f"{name}.base": s.base(number),
        }  # fmt: skip
    for name, number in _TABLES.items():
        values |= {f"{name}.limit": s.limit(number) & 0xFFFF, f"{name}.base": s.base(number)}
    access = _port_access(cpu)
    if access is not None:
        values |= {
            "io": access.info, "io_rip": access.rip, "io_rcx": access.rcx, "io_rsi": access.rsi, "io_rdi": access.rdi,
        }  # fmt: skip
    if guest is not None:
        host = world.hsave(cpu)
        values |= {
            "svm_state": 2 | guest.np << 2, "vmcb": guest.vmcb, "v_intr": guest.v_intr & ~0xFF | guest.v_tpr,
            "n_cr3": guest.n_cr3, "g_pat": s.field("pat"),
            **{f"host_{name}": VMCB.read(host, name) for name in ("efer", "cr4", "cr0")},
        }  # fmt: skip
    area = base + SMM_SAVE_OFFSET & 0xFFFFFFFF
    if cpu.ram.contains(area, SMM_SAVE.size):
        cpu.ram.write(area, bytes(SMM_SAVE.encode(values)))
    cpu.smm = Interrupted(guest, cpu.npt, s.nmi_blocked)
    if guest is not None and guest.np:
        s.set_field("pat", guest.host_pat)
    s.nmi_blocked = True
    cpu.halted = False
    _run(cpu, None)
    cpu.npt = cpu.engine.physical.host
    for number in (ES, SS, DS, FS, GS):
        s.set_segment(number, 0, 0, 0xFFFFFFFF, 0x893)
    s.set_segment(CS, base >> 4 & 0xFFFF, base, 0xFFFFFFFF, 0x893)
    s.set_cr(0, cr0 & ~(CR0_PE | CR0_EM | CR0_TS | CR0_PG))
    s.set_cr(4, 0)
    s.efer = 0
    s.rflags, s.rip = 2, ENTRY
    cpu.dr[7] = DR7_RESET
    _changed(cpu, 0)


def leave(cpu: Cpu) -> bool:
    """RSM: go back to what the save area says.  False if that is no state a processor can be in (APM2 10.3.8)."""
    s, interrupted = cpu.state, cpu.smm
    assert interrupted is not None
    area = cpu.msrs.values[SMM_BASE] + SMM_SAVE_OFFSET & 0xFFFFFFFF
    if not cpu.ram.contains(area, SMM_SAVE.size):
        return False
    saved = SMM_SAVE.decode(cpu.ram.read(area, SMM_SAVE.size))
    cr0, cr4, efer = saved["cr0"], saved["cr4"], saved["efer"]
    long = bool(efer & EFER_LME and cr0 & CR0_PG)
    if (
        (cr0 | saved["dr6"] | saved["dr7"]) >> 32 or (cr0 & CR0_PG and not cr0 & CR0_PE) or (cr0 & CR0_NW and not cr0 & CR0_CD)
        or cr4 & ~cpu.cr4_valid or efer & ~(cpu.msrs.table[MSR_EFER].writable | EFER_LMA)
        or bool(efer & EFER_LMA) != long or (long and not cr4 & 1 << 5)
    ):  # fmt: skip
        return False
    cpu.smm = None
    cpu.msrs.values[SMM_BASE] = saved["smbase"]
    if saved["io_restart"] == 0xFF:
        saved |= {name.removeprefix("io_"): saved[name] for name in ("io_rip", "io_rcx", "io_rsi", "io_rdi")}
    for number, name in enumerate(_GENERAL):
        s.set_reg(number, saved[name])
    for name, number in _SEGMENTS.items():
        attrib = saved[f"{name}.attrib"]
        s.set_segment(
            number, saved[f"{name}.selector"], saved[f"{name}.base"], saved[f"{name}.limit"],
            attrib & 0xFF | attrib >> 4 & 0xF00,
        )  # fmt: skip
    for name, number in _TABLES.items():
        s.set_table(number, saved[f"{name}.base"], saved[f"{name}.limit"])
    s.set_cr(0, cr0)
    s.set_cr(3, saved["cr3"])
    s.set_cr(4, cr4)
    s.efer = efer
    s.rflags, s.rip = saved["rflags"], saved["rip"]
    cpu.dr[6], cpu.dr[7] = saved["dr6"], saved["dr7"]
    s.nmi_blocked = interrupted.nmi_blocked
    cpu.halted, cpu.awaited = bool(saved["auto_halt_restart"]), None
    guest = interrupted.guest
    if guest is not None and guest.np:
        guest.host_pat = s.field("pat")
        s.set_field("pat", saved["g_pat"])
    _run(cpu, guest)
    npt = interrupted.npt
    # Looked up anew: its table may have been given up meanwhile.
    nested = npt.nested if isinstance(npt, Shadow) else None
    physical = cpu.engine.physical
    cpu.npt = physical.host if nested is None else physical.shadow(
        nested.ncr3, nested.host_cr4, nested.host_efer, nested.apic, nested.gmet
    )
    cpl = 0 if not cr0 & CR0_PE else 3 if saved["rflags"] & RFLAGS_VM else s.attrib(SS) >> 5 & 3
    _changed(cpu, cpl)
    return True


def control(cpu: Cpu, value: int) -> None:
    """WRMSR of SMM_CTL: a hypervisor that runs the SMM handler in a guest masks SMIs and NMIs as SMM does."""
    if value & DISMISS:
        cpu.smi_pending = False
    if value & ENTER and cpu.smm is None:
        cpu.smm = Interrupted(None, cpu.engine.physical.host, cpu.state.nmi_blocked)
        cpu.state.nmi_blocked = True
    if value & EXIT and cpu.smm is not None:
        cpu.state.nmi_blocked = cpu.smm.nmi_blocked
        cpu.smm = None


def _run(cpu: Cpu, guest: Guest | None) -> None:
    """From a guest to the handler, or back to one: no world switch that a hypervisor sees."""
    before, cpu.guest = cpu.guest, guest
    if before is guest:
        return
    cpu.ne_is_ours = False
    cpu.observer.switched(cpu, before, guest)
    if cpu.switcher is not None:
        cpu.switcher.left() if guest is None else cpu.switcher.resumed()


def _changed(cpu: Cpu, cpl: int) -> None:
    """The engine's view of the new mode."""
    s = cpu.state
    s.shadow = False
    s.refresh(cpl)
    cpu.hold_pdptes()
    cpu.debug.update()
    world.set_intercepts(s, cpu.guest)
    cpu.guard_ferr()
    cpu.guard_tasks()
    cpu.forget_all_translations()
