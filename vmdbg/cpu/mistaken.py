"""Instructions and accesses that the engine takes for exceptions they are not, told by their bytes."""

from __future__ import annotations

from introspect.decode import STRING_IO
from introspect.exits import ExitCode
from introspect.registers import CR4
from vmdbg.engine.state import SS

from .bits import RFLAGS_VM
from .control import CR0_TS, CR4_PCE
from .core import Cpu

_PREFIXES = b"\x26\x2e\x36\x3e\x64\x65\x66\x67\xf2\xf3"
"""All but LOCK, which makes an undefined instruction of those that `_undefined` looks for."""
_PREFIXES_64 = _PREFIXES + bytes(range(0x40, 0x50))
_PLAIN = b"\x26\x2e\x36\x3e\x64\x65\x67"
_PLAIN_64 = _PLAIN + bytes(range(0x40, 0x50))

_MONITOR = {b"\xc8": ExitCode.MONITOR, b"\xc9": ExitCode.MWAIT}
"""Of these the engine looks at ECX, for which they are #GP, before HWCR, for which they are undefined."""
_UNDEFINED = {**_MONITOR, b"\xfd": ExitCode.RDPRU}
"""Instructions of opcode 0F 01 that the engine takes for undefined ones, the first two outside CPL 0, by their third byte."""

_WITHOUT_SVME = {b"\xdc": ExitCode.STGI, b"\xde": ExitCode.SKINIT}
"""To the engine, of which SKINIT is not claimed, these are undefined while EFER.SVME is 0 (APM2 15.4)."""


def taken_for(cpu: Cpu, code: int) -> int:
    """The exit code of what the engine took for #UD or #GP, whose exit code `code` is; that itself if it is one."""
    return (_undefined(cpu) if code == ExitCode.EXCP_UD else _refused(cpu)) or code


def _undefined(cpu: Cpu) -> int:
    """INT1, INS, OUTS, RDPRU, a user's MONITOR or MWAIT, XSAVE with CR0.TS, STGI and SKINIT; 0 if it is undefined."""
    code = cpu.code().lstrip(_PREFIXES_64 if cpu.bits == 64 else _PREFIXES)
    if code[:1] == b"\xf1":
        return ExitCode.ICEBP
    if code and code[0] in STRING_IO:
        return ExitCode.IOIO
    if code[:2] == b"\x0f\x01" and code[2:3] in _UNDEFINED:
        return _UNDEFINED[code[2:3]]
    if code[:2] == b"\x0f\x01" and code[2:3] in _WITHOUT_SVME and cpu.protected and "SKINIT" in cpu.cpuid_config.features:
        return _WITHOUT_SVME[code[2:3]]
    return ExitCode.EXCP_NM if _at_xsave_with_ts(cpu) else 0


def _refused(cpu: Cpu) -> int:
    """What is no #GP, or may be another exception: some in virtual-8086 mode, RDPMC, MONITOR, MWAIT, XSETBV; else 0."""
    s = cpu.state
    if s.rflags & RFLAGS_VM:
        found = _before_virtual_privilege(cpu)
        if found:
            return found
    if s.cpl and s.cr(4) & CR4_PCE and cpu.code()[:2] == b"\x0f\x33":
        return ExitCode.RDPMC  # the engine has the sense of CR4.PCE the wrong way round
    code = cpu.code().lstrip(_PREFIXES_64 if cpu.bits == 64 else _PREFIXES)
    if code[:2] == b"\x0f\x01" and code[2:3] in _MONITOR:
        return _MONITOR[code[2:3]]
    return ExitCode.XSETBV if _plain_code(cpu)[:3] == b"\x0f\x01\xd1" else 0  # the engine refuses them all


def _before_virtual_privilege(cpu: Cpu) -> int:
    """In virtual-8086 mode the engine looks at privilege too early for some instructions."""
    guest, insn = cpu.guest, cpu.instruction()
    if insn.opcode == 0xCD and guest is not None and guest.intercepts(ExitCode.SWINT):
        return ExitCode.SWINT
    if insn.opcode == 0x0F01 and insn.modrm in range(0xD8, 0xE0):  # those of SVM are undefined outside protected mode
        return ExitCode.EXCP_UD
    return 0


def _at_xsave_with_ts(cpu: Cpu) -> bool:
    """XSAVE, XSAVEOPT and XRSTOR, which are undefined to the engine with CR0.TS (see repair.py)."""
    s, code = cpu.state, _plain_code(cpu)
    memory = code[:2] == b"\x0f\xae" and len(code) > 2 and code[2] < 0xC0 and code[2] >> 3 & 7 in (4, 5, 6)
    return memory and bool(s.cr(0) & CR0_TS and s.cr(4) & CR4.OSXSAVE)


def _plain_code(cpu: Cpu) -> bytes:
    """The code at RIP behind prefixes for segment, address size and REX."""
    return cpu.code().lstrip(_PLAIN_64 if cpu.bits == 64 else _PLAIN)


def at_far_transfer_stack(cpu: Cpu, address: int) -> bool:
    """Whether a fault at `address` is the stack access of the far CALL, far RET or IRET at RIP."""
    state = cpu.state
    insn = cpu.instruction()
    far_call = insn.opcode == 0x9A or (insn.opcode == 0xFF and insn.modrm >> 3 & 7 == 3)
    if not far_call and insn.opcode not in (0xCA, 0xCB, 0xCF):
        return False
    mask = 0xFFFFFFFFFFFFFFFF if cpu.bits == 64 else 0xFFFFFFFF if state.attrib(SS) & 0x400 else 0xFFFF
    sp = (state.reg(4) & mask) + (0 if cpu.bits == 64 else state.base(SS))
    return sp - 16 <= address < sp if far_call else sp <= address < sp + 40 + insn.immediate
