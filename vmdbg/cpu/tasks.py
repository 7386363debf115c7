"""Hardware task switches (APM2 12.3), for task gates met by an interrupt or exception."""

from __future__ import annotations

from enum import IntEnum

from vmdbg.engine.state import CS, DS, ES, FS, GS, LDTR, RSP, SS, TR

from .bits import CR0_PG, CR0_TS, DR6_BT, RFLAGS_NT, RFLAGS_RF, RFLAGS_VM
from .core import Cpu
from .descriptors import CONFORMING, PRESENT, Descriptor, fetch, load, null_selector, require
from .faults import GP, NP, CpuFault, Event
from .faults import SS as STACK_FAULT
from .faults import TS as INVALID_TSS

AVAILABLE_16, BUSY_16, AVAILABLE_32, BUSY_32 = 1, 3, 9, 11
BUSY = 2


class Source(IntEnum):
    """What asks for the switch."""

    JUMP = 0
    CALL = 1
    IRET = 2
    GATE = 3


GATE = Source.GATE

# The 32-bit TSS (APM2 figure 12-4): offsets of EIP, EFLAGS and the eight registers, then of the selectors.
_REGISTERS_32 = 0x20
_SELECTORS_32 = {ES: 0x48, CS: 0x4C, SS: 0x50, DS: 0x54, FS: 0x58, GS: 0x5C}
_LDT_32, _CR3_32, _TRAP_32 = 0x60, 0x1C, 0x64
_REGISTERS_16 = 0x0E
_SELECTORS_16 = {ES: 0x22, CS: 0x24, SS: 0x26, DS: 0x28}
_LDT_16 = 0x2A


class TaskSwitchExit(Exception):
    """The guest's hypervisor intercepts task switches; nothing has changed yet."""

    def __init__(self, selector: int, source: Source, event: Event | None) -> None:
        super().__init__(selector, source)
        self.selector = selector
        self.source = source
        self.event = event


def switch(cpu: Cpu, selector: int, source: Source, event: Event | None) -> None:
    """Leave the present task for the one whose TSS `selector` names.

    Faults raised before the new task is committed belong to the old one, later ones to the new (APM2 12.3.4).
    """
    s = cpu.state
    external = event.external if event else 0
    fault = INVALID_TSS if source == Source.IRET else GP
    require(not selector & 4 and not null_selector(selector), fault, selector & 0xFFFC | external)
    tss = fetch(cpu, selector, fault, external)
    wanted = (BUSY_16, BUSY_32) if source == Source.IRET else (AVAILABLE_16, AVAILABLE_32)
    require(not tss.is_segment and tss.type in wanted, fault, selector & 0xFFFC | external)
    require(tss.present, NP, selector & 0xFFFC | external)
    wide = bool(tss.type & 8)
    require(tss.limit >= (0x67 if wide else 0x2B), INVALID_TSS, selector & 0xFFFC | external)
    if cpu.guest is not None and cpu.guest.intercepts_task_switch:
        raise TaskSwitchExit(selector, source, event)
    old_wide = bool(s.attrib(TR) & 8)
    new = _read(cpu, tss.base, wide)
    saved = _plan_save(cpu, old_wide, source, event)
    old_selector = s.selector(TR)
    if source in (Source.JUMP, Source.IRET):
        old = fetch(cpu, old_selector, GP, external)
        saved.append(cpu.plan(old.address + 5, 1, old.raw >> 40 & 0xFF & ~BUSY, implicit=True))
    if source != Source.IRET:
        saved.append(cpu.plan(tss.address + 5, 1, tss.raw >> 40 & 0xFF | BUSY, implicit=True))
    if source in (Source.CALL, Source.GATE):
        saved.append(cpu.plan(tss.base, 2, old_selector, implicit=True))
    trap = wide and cpu.read(tss.base + _TRAP_32, 2, implicit=True) & 1
    cpu.commit(saved)
    try:
        _enter(cpu, tss, new, wide, source)
        if event is not None and event.error is not None:
            _push_error(cpu, event.error, wide)
        if trap:
            cpu.due |= DR6_BT
    except CpuFault as fault:
        fault.committed = True
        raise


def _plan_save(
    cpu: Cpu, wide: bool, source: Source, event: Event | None
) -> list[tuple[list[tuple[int, int]], bytes]]:  # fmt: skip
    s = cpu.state
    base, size = s.base(TR), 4 if wide else 2
    flags = s.rflags & ~RFLAGS_NT if source == Source.IRET else s.rflags
    if event is not None and event.restarts:
        flags |= RFLAGS_RF
    values = [s.rip, flags, *(s.reg(number) for number in range(8))]
    at = base + (_REGISTERS_32 if wide else _REGISTERS_16)
    plans = [cpu.plan(at + size * index, size, value, implicit=True) for index, value in enumerate(values)]
    for register, offset in (_SELECTORS_32 if wide else _SELECTORS_16).items():
        plans.append(cpu.plan(base + offset, 2, s.selector(register), implicit=True))
    return plans


def _read(cpu: Cpu, base: int, wide: bool) -> dict[str, int]:
    size, at = (4, base + _REGISTERS_32) if wide else (2, base + _REGISTERS_16)
    values = {name: cpu.read(at + size * index, size, implicit=True) for index, name in enumerate(
        ("eip", "eflags", "r0", "r1", "r2", "r3", "r4", "r5", "r6", "r7"))}  # fmt: skip
    for register, offset in (_SELECTORS_32 if wide else _SELECTORS_16).items():
        values[f"s{register}"] = cpu.read(base + offset, 2, implicit=True)
    values["ldt"] = cpu.read(base + (_LDT_32 if wide else _LDT_16), 2, implicit=True)
    if wide:
        values["cr3"] = cpu.read(base + _CR3_32, 4, implicit=True)
    return values


def _enter(cpu: Cpu, tss: Descriptor, new: dict[str, int], wide: bool, source: Source) -> None:
    s = cpu.state
    s.set_segment(TR, tss.selector, tss.base, tss.limit, tss.attrib | BUSY)
    s.set_cr(0, s.cr(0) | CR0_TS)
    cpu.debug.task_switch()
    if wide and s.cr(0) & CR0_PG:
        s.set_cr(3, new["cr3"])
        cpu.hold_pdptes()
        cpu.forget_translations(keep_global=True)
    flags = new["eflags"] | (RFLAGS_NT if source in (Source.CALL, Source.GATE) else 0) | 2
    s.rflags = flags if wide else flags & 0xFFFF
    for number in range(8):
        s.set_reg(number, new[f"r{number}"] | (0 if wide else s.reg(number) & 0xFFFF0000))
    s.rip = new["eip"]
    virtual = bool(s.rflags & RFLAGS_VM)
    cpl = 3 if virtual else new[f"s{CS}"] & 3
    selectors = _SELECTORS_32 if wide else _SELECTORS_16
    for register in (ES, CS, SS, DS, FS, GS):
        value = new.get(f"s{register}", 0) if register in selectors else 0
        if virtual:
            s.set_segment(register, value, value << 4, 0xFFFF, 0xF3)
        else:
            s.set_segment(register, value, 0, 0, 0)
    s.set_segment(LDTR, new["ldt"], 0, 0, 0)
    s.refresh(cpl)
    if not null_selector(new["ldt"]):
        error = new["ldt"] & 0xFFFC
        require(not new["ldt"] & 4, INVALID_TSS, error)
        ldt = fetch(cpu, new["ldt"], INVALID_TSS, 0)
        require(not ldt.is_segment and ldt.type == 2 and ldt.present, INVALID_TSS, error)
        s.set_segment(LDTR, new["ldt"], ldt.base, ldt.limit, ldt.attrib)
    if virtual:
        return
    _load_code(cpu, new[f"s{CS}"], cpl)
    _load_stack(cpu, new[f"s{SS}"], cpl)
    for register in (ES, DS, FS, GS):
        if register in selectors:
            _load_data(cpu, register, new[f"s{register}"], cpl)
    s.refresh(cpl)
    require(s.rip <= s.limit(CS), GP, 0)


def _load_code(cpu: Cpu, selector: int, cpl: int) -> None:
    error = selector & 0xFFFC
    require(not null_selector(selector), INVALID_TSS, error)
    code = fetch(cpu, selector, INVALID_TSS, 0)
    fits = code.dpl <= cpl if code.type & CONFORMING else code.dpl == cpl
    require(code.is_code and fits, INVALID_TSS, error)
    require(code.present, NP, error)
    load(cpu, CS, code, cpl)


def _load_stack(cpu: Cpu, selector: int, cpl: int) -> None:
    error = selector & 0xFFFC
    require(not null_selector(selector), INVALID_TSS, error)
    stack = fetch(cpu, selector, INVALID_TSS, 0)
    writable = stack.is_segment and not stack.is_code and bool(stack.type & 2)
    require(writable and stack.dpl == cpl and selector & 3 == cpl, INVALID_TSS, error)
    require(stack.present, STACK_FAULT, error)
    load(cpu, SS, stack, cpl)


def _load_data(cpu: Cpu, register: int, selector: int, cpl: int) -> None:
    if null_selector(selector):
        return
    error = selector & 0xFFFC
    data = fetch(cpu, selector, INVALID_TSS, 0)
    readable = data.is_segment and (not data.is_code or bool(data.type & 2))
    conforming = data.is_code and bool(data.type & CONFORMING)
    require(readable and (conforming or data.dpl >= max(cpl, selector & 3)), INVALID_TSS, error)
    require(bool(data.attrib & PRESENT), NP, error)
    load(cpu, register, data, selector & 3)


def _push_error(cpu: Cpu, error: int, wide: bool) -> None:
    s = cpu.state
    size = 4 if wide else 2
    mask = 0xFFFFFFFF if s.attrib(SS) & 0x400 else 0xFFFF
    sp = (s.reg(RSP) - size) & mask
    cpu.write(cpu.segment_address(SS, sp, size), size, error, user=s.cpl == 3)
    s.set_reg(RSP, (s.reg(RSP) & ~mask) | sp)


__all__ = ["GATE", "Source", "TaskSwitchExit", "switch"]
