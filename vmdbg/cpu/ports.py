"""IN, OUT, INS and OUTS: the permission of a port, and the access."""

from __future__ import annotations

from introspect.decode import STRING_IO, Instruction
from vmdbg.engine.state import ES, RAX, RCX, RDI, RSI, TR
from vmdbg.platform.clock import TICKS_PER_SECOND

from .bits import CR0_PE, RFLAGS_DF, RFLAGS_IOPL, RFLAGS_VM
from .core import Cpu
from .faults import GP, CpuFault
from .smm import PortAccess

PORT_TICKS = TICKS_PER_SECOND // 1_000_000
"""Guest time that an access to a port takes besides the instruction: a microsecond, as on the ISA bus.  Software that
waits for a device by reading a port counts on it, and would wait long if it were the two bytes of the instruction."""


def permitted(cpu: Cpu, port: int, size: int) -> None:
    """IOPL, and beyond it the TSS's permission map (APM2 12.2.5).  Raises #GP(0)."""
    s = cpu.state
    if not s.cr(0) & CR0_PE:
        return
    flags = s.rflags
    if s.cpl <= (flags & RFLAGS_IOPL) >> 12 and not flags & RFLAGS_VM:
        return
    if not s.attrib(TR) & 8 or s.limit(TR) < 103:
        raise CpuFault(GP, 0)
    base = cpu.read(s.base(TR) + 102, 2, implicit=True)
    if base + port // 8 + 1 > s.limit(TR):
        raise CpuFault(GP, 0)
    word = cpu.read(s.base(TR) + base + port // 8, 2, implicit=True)
    if word >> (port & 7) & ((1 << size) - 1):
        raise CpuFault(GP, 0)


def io(cpu: Cpu, insn: Instruction, port: int, size: int) -> None:
    """Execute IN, OUT, INS or OUTS; one iteration of a repeated one."""
    s = cpu.state
    low = insn.opcode & 0xFF
    before = s.rip, s.reg(RCX), s.reg(RSI), s.reg(RDI)
    if low in STRING_IO:
        _string_io(cpu, insn, port, size)
    else:
        _register_io(cpu, insn, port, size)
    cpu.port_access = PortAccess(cpu.engine.clock.now, insn, port, size, *before)


def _register_io(cpu: Cpu, insn: Instruction, port: int, size: int) -> None:
    s = cpu.state
    cpu.engine.clock.now += PORT_TICKS
    cpu.debug.port(port, size)
    if insn.opcode & 2:
        _write(cpu, port, size, s.reg(RAX) & ((1 << 8 * size) - 1))
    else:
        value = _read(cpu, port, size)
        s.set_reg(RAX, value if size == 4 else s.reg(RAX) & ~((1 << 8 * size) - 1) | value)
    cpu.advance(insn.length)


def _read(cpu: Cpu, port: int, size: int) -> int:
    value = cpu.bus.read_port(port, size)
    if cpu.recorder is not None:
        cpu.recorder.port(cpu, port, size, False, value)
    return value


def _write(cpu: Cpu, port: int, size: int, value: int) -> None:
    cpu.bus.write_port(port, size, value)
    if cpu.recorder is not None:
        cpu.recorder.port(cpu, port, size, True, value)


def _string_io(cpu: Cpu, insn: Instruction, port: int, size: int) -> None:
    s = cpu.state
    out = bool(insn.opcode & 2)
    pointer = RSI if out else RDI
    mask = (1 << insn.address) - 1
    offset = s.reg(pointer) & mask
    segment = (insn.segment if insn.segment is not None else 3) if out else ES
    address = cpu.segment_address(segment, offset, size)
    pieces = cpu.pieces(address, size, write=not out, user=s.cpl == 3)
    cpu.stop_if_watched(pieces, write=not out)
    data = cpu.load(pieces) if out else b""
    cpu.engine.clock.now += PORT_TICKS
    cpu.debug.port(port, size)
    cpu.due |= cpu.debug.data_bits(address, size, reads=out, writes=not out)
    if out:
        _write(cpu, port, size, int.from_bytes(data, "little"))
    else:
        cpu.commit([(pieces, _read(cpu, port, size).to_bytes(size, "little"))])
    step = -size if s.rflags & RFLAGS_DF else size
    _set_masked(cpu, pointer, offset + step, insn.address)
    if not insn.rep:
        cpu.advance(insn.length)
        return
    _set_masked(cpu, RCX, s.reg(RCX) - 1, insn.address)
    # RIP stays: the engine runs the instruction once more with a count of zero, as it does for every REP.
    cpu.advance(0)
    cpu.engine.retire(insn.length)


def _set_masked(cpu: Cpu, register: int, value: int, bits: int) -> None:
    s = cpu.state
    mask = (1 << bits) - 1
    keep = s.reg(register) & ~mask if bits == 16 else 0
    s.set_reg(register, keep | value & mask)
